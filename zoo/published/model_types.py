"""Every model_type of a config.json that there is a model for."""

from typing import get_args

from zoo.layers.names import unknown_name
from zoo.published import bert_layout, clip_layout, hybrid_layout, llama_layout, ssm_layout
from zoo.published.tensors import Json

MODEL_TYPES: tuple[str, ...] = (
    *get_args(bert_layout.Family),
    *hybrid_layout.FAMILIES,
    *ssm_layout.MODEL_TYPES,
    *clip_layout.MODEL_TYPES,
    *llama_layout.MODEL_TYPES,
    *("deit", "llava", "m2_bert", "vim", "vit"),
)


def require_model_type(raw: Json) -> None:
    """Raises a ValueError where a config says that it is of a type there is none for here: names the nearest.

    The official configs of state-spaces/mamba and Codestral-Mamba are told by their fields, whatever they say.
    """
    official = {"d_model", "n_layer"} <= raw.keys() or {"dim"} <= raw.keys() <= ssm_layout.CODESTRAL_FIELDS
    if "model_type" in raw and raw["model_type"] not in MODEL_TYPES and not official:
        raise ValueError(unknown_name("model_type", str(raw["model_type"]), MODEL_TYPES))
