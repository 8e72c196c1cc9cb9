"""GLUE: its tasks, columns and metrics on the hub, and how MosaicBERT and M2-BERT were tuned on them.

    python -m experiments.bert finetune cola --init FOLDER              # MosaicBERT's recipe
    python -m experiments.bert finetune cola-m2-80m --init FOLDER       # M2-BERT-80M's

RTE, MRPC and STS-B were started from the model tuned on MNLI: --init is then that run's folder. Published numbers are
the last evaluation of the "validation" rows, since the test labels are kept secret; 3 to 5 seeds on the small tasks.
Two things differ here: rows are shuffled anew each epoch, where M2's were read in order, and STS-B's labels are trained
on with mean 0 and variance 1.

Sources: MosaicBERT, arXiv:2312.17482, appendix (the same values in its mosaic_bert/yamls); HazyResearch/m2,
bert/yamls/finetune-glue/*.yaml. WNLI is left out, as it is there.
"""

from typing import NamedTuple

from experiments.data.labelled import LabelledConfig
from zoo.layers.pooling import Pool


class GlueTask(NamedTuple):
    """A task as the hub has it."""

    columns: tuple[str, str | None]
    """The text, and the second one."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What papers report, the first one first."""
    validation: str = "validation"
    others: tuple[str, ...] = ("test",)
    """More splits: for MNLI, other genres (the second number that is reported); "test", whose labels are secret."""


TASKS: dict[str, GlueTask] = {
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        validation="validation_matched",
        others=("validation_mismatched", "test_matched", "test_mismatched"),
    ),
    "rte": GlueTask(("sentence1", "sentence2")),
    "qqp": GlueTask(("question1", "question2"), ("f1", "accuracy")),
    "qnli": GlueTask(("question", "sentence")),
    "sst2": GlueTask(("sentence", None)),
    # Its test labels are -1.0, which nothing says is no number.
    "stsb": GlueTask(("sentence1", "sentence2"), ("spearman", "pearson"), others=()),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("f1", "accuracy")),
    "cola": GlueTask(("sentence", None), ("matthews",)),
}


class Recipe(NamedTuple):
    """How a model was tuned on a task; betas 0.9 and 0.98, eps 1e-6, warm-up over 6 % of the steps, linear to 0."""

    learning_rate: float
    decay: float
    """Share of the parameters that a step at the peak takes away; `weight_decay` is AdamW's, times the rate."""
    epochs: int
    batch_size: int
    max_len: int = 128
    pool: Pool = "first"
    adamw: bool = False
    """Whether `decay` is AdamW's already."""

    @property
    def weight_decay(self) -> float:
        return self.decay if self.adamw else self.decay / self.learning_rate


_BATCH = {"mnli": 48, "rte": 16, "qqp": 16, "qnli": 16, "sst2": 16, "stsb": 32, "mrpc": 32, "cola": 32}
_EPOCHS = {"mnli": 3, "rte": 3, "qqp": 5, "qnli": 10, "sst2": 3, "stsb": 10, "mrpc": 10, "cola": 10}
# The released jobs switch to pooling by the mean for QNLI, and leave it on for those that come after.
_MEAN = ("qnli", "sst2", "stsb", "mrpc", "cola")


def _mosaicbert(**rates: tuple[float, float]) -> dict[str, Recipe]:
    return {task: Recipe(*rates[task], _EPOCHS[task], _BATCH[task], max_len=256) for task in TASKS}


def _m2(adamw: tuple[str, ...] = (), epochs: dict[str, int] | None = None, **rates: tuple[float, float]):
    return {
        task: Recipe(
            *rates[task],
            epochs=(_EPOCHS | (epochs or {}))[task],
            batch_size=_BATCH[task],
            pool="mean" if task in _MEAN else "first",
            adamw=task in adamw,
        )
        for task in TASKS
    }


RECIPES: dict[str, dict[str, Recipe]] = {
    "mosaicbert": _mosaicbert(
        mnli=(5e-5, 5e-6),
        rte=(1e-5, 1e-5),
        qqp=(3e-5, 3e-6),
        qnli=(1e-5, 1e-6),
        sst2=(3e-5, 3e-6),
        stsb=(3e-5, 3e-6),
        mrpc=(8e-5, 8e-6),
        cola=(5e-5, 5e-6),
    ),
    "m2-80m": _m2(
        adamw=("rte", "qqp", "stsb", "mrpc"),
        epochs={"rte": 6, "qqp": 10},
        mnli=(5e-5, 5e-6),
        rte=(5e-5, 0.01),
        qqp=(3e-5, 0.01),
        qnli=(5e-5, 1e-6),
        sst2=(3e-5, 3e-6),
        stsb=(7e-5, 0.01),
        mrpc=(5e-5, 0.01),
        cola=(5e-5, 5e-6),
    ),
    "m2-110m": _m2(
        adamw=("cola",),
        mnli=(5e-5, 5e-6),
        rte=(1e-5, 1e-6),
        qqp=(3e-5, 3e-6),
        qnli=(5e-5, 1e-6),
        sst2=(3e-5, 3e-6),
        stsb=(8e-5, 3e-6),
        mrpc=(8e-5, 8e-5),
        cola=(8e-5, 5e-6),
    ),
    "m2-260m": _m2(
        epochs={"stsb": 10},
        mnli=(5e-5, 5e-6),
        rte=(1e-5, 1e-6),
        qqp=(3e-5, 3e-6),
        qnli=(5e-5, 1e-6),
        sst2=(3e-5, 3e-6),
        stsb=(7e-5, 3e-6),
        mrpc=(8e-5, 8e-6),
        cola=(5e-5, 5e-6),
    ),
    "m2-341m": _m2(
        adamw=("rte",),
        epochs={"rte": 2, "stsb": 8},
        mnli=(5e-5, 5e-6),
        rte=(5e-5, 1e-6),
        qqp=(3e-5, 3e-6),
        qnli=(5e-5, 1e-6),
        sst2=(3e-5, 3e-6),
        stsb=(8e-5, 3e-6),
        mrpc=(8e-5, 8e-6),
        cola=(5e-5, 1e-6),
    ),
}


def data(task: str) -> LabelledConfig:
    """A task on the hub."""
    text, second = TASKS[task].columns
    return LabelledConfig(
        hub=f"nyu-mll/glue:{task}",
        text_column=text,
        second_column=second,
        label_column="label",
        validation_split=TASKS[task].validation,
        test_splits=TASKS[task].others,
    )
