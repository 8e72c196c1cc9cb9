"""What the stages of a distillation train."""

from flax import nnx

from experiments.causal.stages import STAGES, stage_model
from tests.experiments.causal.test_pair import make_pair


def test_each_stage_trains_its_own_parts_of_the_converted_layers():
    pair = make_pair()

    def trained(stage):
        state = nnx.state(stage_model(pair, STAGES[stage]), nnx.Param)
        names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
        assert all(name.startswith("student.backbone.layers.1.mixer.") for name in names)
        return {name.split(".")[5] for name in names}

    new = {"A_log", "dt_bias", "dt_proj", "conv1d", "gate_proj", "norm"}
    maps = {"q_proj", "k_proj", "v_proj"}
    assert trained("layers") == new
    assert trained("qkv") == new | maps
    assert trained("hidden") == trained("logits") == new | maps | {"o_proj"}
