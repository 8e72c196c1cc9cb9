"""What a model's step takes on a TPU or GPU that is not here.

python -m experiments.aot mamba2-130m --device v5e:2x2 --batch-size 16    # memory, whether it fits, operations
python -m experiments.aot mamba2-130m --device h100 --what decode
python -m experiments.aot --report RESULTS.md                             # models x devices, as a table
"""

import importlib

from experiments.aot.quiet import quiet


def main() -> int:
    """Sets the environment before JAX is imported, and hands on."""
    quiet()
    return importlib.import_module("experiments.aot.command").main()


if __name__ == "__main__":
    quiet()
    from experiments.loop import flags

    flags.run(main)
