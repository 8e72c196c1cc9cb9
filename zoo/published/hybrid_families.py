"""The published hybrids by their `model_type`."""

from zoo.published.hybrid_bamba import BAMBA
from zoo.published.hybrid_falcon_h1 import FALCON_H1
from zoo.published.hybrid_family import Family
from zoo.published.hybrid_granite import GRANITE
from zoo.published.hybrid_jamba import JAMBA
from zoo.published.hybrid_nemotron_h import NEMOTRON_H
from zoo.published.hybrid_zamba2 import ZAMBA2

FAMILIES: dict[str, Family] = {
    "jamba": JAMBA,
    "bamba": BAMBA,
    "falcon_h1": FALCON_H1,
    "granitemoehybrid": GRANITE,
    "nemotron_h": NEMOTRON_H,
    "zamba2": ZAMBA2,
}
"""By `model_type`. Of those whose words a model has, the first that can describe it is written."""
