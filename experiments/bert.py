"""Encoders with any mixer: pre-trained, tuned, searched with.

python -m experiments.bert pretrain tiny                                   # a masked language model, two minutes
python -m experiments.bert finetune tiny --init runs/bert/tiny             # classes, numbers, tags, answers
python -m experiments.bert predict runs/finetune/tiny texts.csv out.csv    # what it says of other texts
python -m experiments.bert retrieve tiny --init runs/bert/tiny             # queries and documents as vectors
python -m experiments.bert embed runs/bert/tiny texts.txt vectors.npy      # a file of texts as vectors
python -m experiments.bert COMMAND --help                                  # presets and flags of each
"""

from experiments.loop import flags

# Command -> the module whose `main` it is.
COMMANDS = {
    "pretrain": "experiments.encoders.masked_lm",
    "finetune": "experiments.encoders.finetune",
    "predict": "experiments.encoders.predict",
    "retrieve": "experiments.retrieval.retrieve",
    "embed": "experiments.retrieval.embed",
}


def main() -> int:
    """Hands the command line on to one of the commands."""
    return flags.hand_on_or_explain(COMMANDS, __doc__)


if __name__ == "__main__":
    flags.run(main)
