"""Everything that is timed, by one command.

python -m experiments.bench                            # operations and models beside their alternatives
python -m experiments.bench scan mamba2 --lengths 4096 # some of them; `python -m experiments.bench --help`
python -m experiments.bench peers                      # beside torch, timm, transformers, mambapy: ratios, in one run
python -m experiments.bench limits                     # the machine's ceilings, and each operation's share of its own
python -m experiments.bench vision                     # image classifiers, from 224 to 1024 pixels
python -m experiments.bench decode                     # a token with attention's cache or a state, against the context
python -m experiments.bench quantized MODEL            # perplexity, bytes and time a token in 16, 8 and 4 bits
python -m experiments.bench reused                     # what starting from a trained model is worth
python -m experiments.bench in_training                # what options of training are worth: depths, sharing, decoders
python -m experiments.bench tuned                      # ways to tune, and to put tunes together
python -m experiments.bench dropping                   # what encoders lose where positions are left behind
python -m experiments.bench modules                    # what learning module by module from a teacher is worth
python -m experiments.bench few_bits                   # what fewer bits cost small models, trained in them too
python -m experiments.bench depth                      # compile time and memory of 8, 16, 32 blocks
python -m experiments.bench length                     # memory of a step of up to a million tokens, on several devices
python -m experiments.bench recall                     # what a state recalls, and what attention does
python -m experiments.bench pictures                   # what reads drawn scenes best: connectors and language models
python -m experiments.bench image_tokens               # speed and memory against the number of tokens of an image
python -m experiments.bench coverage                   # which task works with which family, from training to use
"""

import sys

from experiments.loop import flags
from zoo.layers.names import unknown_name

BENCHES = (
    *("peers", "limits", "vision", "decode", "quantized", "reused", "in_training", "depth", "length", "recall"),
    *("dropping", "modules", "few_bits", "tuned", "pictures", "image_tokens", "coverage"),
)
COMMANDS = {name: f"experiments.bench.{name}" for name in BENCHES}


def main() -> int:
    """Hands the command line on to the bench that it names, or to that of operations."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked in COMMANDS:
        return flags.hand_on(COMMANDS)
    from experiments.bench import operations  # with all its contenders

    if asked and not asked.startswith("-") and asked not in operations.GROUPS:
        raise flags.UsageError(unknown_name("bench", asked, [*COMMANDS, *operations.GROUPS]))
    return operations.main()


if __name__ == "__main__":
    flags.run(main)
