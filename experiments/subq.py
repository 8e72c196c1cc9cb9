"""Every command of the experiments by one name: where the package is installed, `subq COMMAND` is the same.

subq causal_lm tiny                                 # train: causal language models, any text
subq bert pretrain|finetune|predict|retrieve|embed  # encoders
subq vit digits                                     # image classifiers
subq vlm tiny                                       # language models that read pictures
subq clip tiny                                      # images and texts in one space
subq synthetic | needles | distill ...              # what a mixer remembers, finds, learns from attention
subq sample RUN --prompt "def "                     # go on with a text
subq score RUN text.txt                             # how likely a model finds a text
subq convert RUN out                                # take a model out of its run
subq export RUN out                                 # as programs for JAX without this library, on any platform
subq reuse grow|merge|adapt|quantize ...            # make one model of others
subq runs                                           # the runs there are; subq runs compare RUN RUN
subq data list                                      # real data that ordinary packages carry
subq bench                                          # time the operations (from a checkout)
subq aot PRESET --device v5e:2x2                    # does a step fit a TPU or GPU that is not here
subq COMMAND --help                                 # presets and flags of each; `subq --version`
"""

import sys

import zoo
from experiments.loop import flags

# Command -> the module whose `main` it is. A name may be written with dashes, too.
COMMANDS = {
    "causal_lm": "experiments.causal_lm",
    "bert": "experiments.bert",
    "vit": "experiments.vit",
    "vlm": "experiments.vlm",
    "clip": "experiments.clip",
    "synthetic": "experiments.synthetic",
    "needles": "experiments.needles",
    "distill": "experiments.distill",
    "sample": "experiments.sample",
    "score": "experiments.score",
    "convert": "experiments.convert",
    "export": "experiments.export",
    "reuse": "experiments.reuse",
    "runs": "experiments.runs",
    "data": "experiments.data.fetch",
    "bench": "experiments.bench.__main__",
    "aot": "experiments.aot.__main__",
}


def main() -> int:
    """Hands the command line on to the command that it names."""
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    if sys.argv[1] == "--version":
        print(f"subquadratic-zoo {zoo.__version__}")
        return 0
    sys.argv[1] = sys.argv[1].replace("-", "_")
    return flags.hand_on(COMMANDS)


def cli() -> None:
    """What the installed command runs."""
    flags.run(main)


if __name__ == "__main__":
    cli()
