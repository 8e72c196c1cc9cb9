"""Encoders with any mixer: pre-trained, tuned, searched with.

python -m experiments.bert pretrain tiny                                   # a masked language model, two minutes
python -m experiments.bert finetune tiny --init runs/bert/tiny             # classes, numbers, tags, answers
python -m experiments.bert retrieve tiny --init runs/bert/tiny             # queries and documents as vectors
python -m experiments.bert embed runs/bert/tiny texts.txt vectors.npy      # a file of texts as vectors
python -m experiments.bert COMMAND --help                                  # presets and flags of each
"""

import importlib
import sys

from experiments import flags
from zoo.names import unknown_name

# Command -> the module whose `main` it is.
COMMANDS = {
    "pretrain": "experiments.masked_lm",
    "finetune": "experiments.finetune",
    "retrieve": "experiments.retrieve",
    "embed": "experiments.embed",
}


def main() -> int:
    """Hands the command line on to one of the commands."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        raise flags.UsageError(unknown_name("command", command, COMMANDS))
    del sys.argv[1]
    return importlib.import_module(COMMANDS[command]).main()


if __name__ == "__main__":
    flags.run(main)
