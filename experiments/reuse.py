"""A trained model into another: larger or smaller, merged, with an adapter folded in, in fewer bits.

python -m experiments.reuse grow MODEL out --d-model 256 --n-layers 8                   # at first of the same output
python -m experiments.reuse coalesce MODEL out --d-model 64 --n-layers 2                # and the way back
python -m experiments.reuse merge BASE out --tuned TUNE TUNE --method dare --rate 0.9   # several tunes in one
python -m experiments.reuse adapt MODEL out --adapter ADAPTER                           # peft's, or our own
python -m experiments.reuse prune MODEL out --n-layers 8 --data.path my.txt              # what is needed least goes
python -m experiments.reuse latency MODEL latency.json                                  # what prune --speedup goes by
python -m experiments.reuse factorize MODEL out --n-blocks 8 --data.path my.txt         # products of smaller maps
python -m experiments.reuse quantize MODEL out --bits 4 --group-size 64                 # codes and scales
python -m experiments.reuse task MODEL out --task 1                                     # one of several tasks
python -m experiments.reuse VERB --help                                                 # flags of each

Models are folders of runs, in our own or a published layout, or names on the Hugging Face hub. What is written is read
by every command that takes a model; tokenizer, labels and model card go with it.
"""

from experiments.loop import flags

# Verb -> the module whose `main` it is.
COMMANDS = {
    "grow": "experiments.reusing.grow",
    "coalesce": "experiments.reusing.coalesce",
    "merge": "experiments.reusing.merge",
    "adapt": "experiments.reusing.adapt",
    "prune": "experiments.reusing.prune",
    "latency": "experiments.reusing.latency",
    "factorize": "experiments.reusing.factorize",
    "quantize": "experiments.reusing.quantize",
    "task": "experiments.reusing.task",
}


def main() -> int:
    """Hands the command line on to one of the verbs."""
    return flags.hand_on_or_explain(COMMANDS, __doc__)


if __name__ == "__main__":
    flags.run(main)
