"""What a bi-encoder finds in the end, beside BM25: measured, in files, and as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.data.special_tokens import SpecialTokens
from experiments.loop import flags
from experiments.loop.json_files import write_json
from experiments.retrieval.pairs import Prepared
from experiments.retrieval.ranking import Run, mean_over, measure, save_run
from experiments.retrieval.searches import searches
from experiments.retrieval.start import BiEncoderConfig

RESULTS = "results.json"


def evaluate(
    model: Any,
    prepared: Sequence[Prepared],
    special: SpecialTokens,
    config: BiEncoderConfig,
    folder: Path,
    *,
    max_doc_len: int,
) -> dict[str, Any]:
    """The last evaluation, written to results.json and run.trec: on the test split, or on dev where there is none.

    Returns:
      {"split", "queries", "documents", "model": measures, "bm25": measures, "tasks": the same for each}.
    """
    split = next((s for s in ("test", "dev") if any(one.collection.qrels.get(s) for one in prepared)), None)
    if split is None:
        raise flags.UsageError("there are neither test nor dev queries to evaluate on")
    tasks: dict[str, dict[str, Any]] = {}
    whole: Run = {}
    for one in searches(prepared, split):
        run = one.run(model, special, config, max_doc_len=max_doc_len)
        whole |= run
        tasks[one.prepared.collection.name] = {
            "queries": len(one.qrels),
            "documents": len(one.documents),
            "model": measure(one.qrels, run),
            "bm25": measure(one.qrels, one.bm25()),
        }
    results = {
        "split": split,
        "queries": sum(task["queries"] for task in tasks.values()),
        "documents": sum(task["documents"] for task in tasks.values()),
        "model": mean_over([task["model"] for task in tasks.values()]),
        "bm25": mean_over([task["bm25"] for task in tasks.values()]),
        "tasks": tasks,
    }
    save_run(whole, folder / "run.trec")
    write_json(results, folder / RESULTS)
    return results


def table(results: Mapping[str, Any]) -> list[str]:
    """The results, for people: a line for the model, one for BM25, and two for each task where there are several."""
    names = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@1": "R@1", "recall@10": "R@10", "recall@100": "R@100"}
    tasks = results["tasks"] if len(results["tasks"]) > 1 else {}
    width = max(map(len, [*tasks, "mean"]))
    lines = [" " * (width + 8) + "".join(f"{label:>9}" for label in names.values())]
    for task, values in {**tasks, "mean" if tasks else results["split"]: results}.items():
        for who in ("model", "bm25"):
            numbers = "".join(f"{values[who][name]:>9.3f}" for name in names)
            lines.append(f"{task if who == 'model' else '':{width}}  {who:<6}{numbers}")
    return lines
