"""Published Llamas and hybrids: the publishers' numbers and continuations, their files in and out."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import zoo
from tests.numerics import jitted
from tests.places import PUBLISHED
from zoo.published.weight_files import open_weights

NAMES = (
    "llama_tied",
    "llama_untied",
    "mistral",
    "qwen2",
    "qwen3",
    "jamba",
    "bamba",
    "falcon_h1",
    "granite",
    "nemotron_h",
    "zamba2",
)
NAMES += ("bamba_no_attention", "nemotron_h_no_mamba")  # without one of their kinds
OFFICIAL = ("mamba2attn", "mamba2attn_mlp")  # of state-spaces/mamba
# What transformers writes and nothing here depends on.
NOT_WRITTEN = {"initializer_range", "pretraining_tp", "transformers_version", "use_cache", "max_position_embeddings"}
NOT_WRITTEN |= {"attention_dropout", "num_logits_to_keep", "z_loss_coefficient", "mamba_chunk_size", "chunk_size"}
NOT_WRITTEN |= {"output_router_logits", "router_aux_loss_coef", "use_associative_scan", "use_mamba_kernels"}
NOT_WRITTEN |= {
    "use_mem_eff_path",
    "use_mambapy",
    "time_step_floor",
    "time_step_max",
    "hidden_dropout",
    "mamba_ssm_cache_dtype",
}
NOT_WRITTEN |= {"moe_shared_expert_overlap", "mtp_layers_block_type", "rescale_prenorm_residual", "residual_in_fp32"}
NOT_WRITTEN |= {"attention_head_dim", "attention_hidden_size", "kv_channels", "hybrid_layer_ids", "num_query_groups"}
NOT_WRITTEN |= {"n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "n_group"}
NOT_WRITTEN |= {"routed_scaling_factor", "topk_group", "n_shared_experts", "moe_shared_expert_intermediate_size"}
NOT_WRITTEN |= {"moe_latent_size"}  # of no mixture
NOT_WRITTEN |= {"sliding_window", "expand", "mamba_proj_bias", "attention_bias", "num_nextn_predict_layers"}
# What there are several words for.
RESPELLED = {"layer_types", "layers_block_type", "position_embedding_type", "time_step_limit", "rope_parameters"}
RESPELLED |= {
    "time_step_min",
    "fused_add_norm",
    "attn_cfg",
    "ssm_cfg",
    "d_intermediate",
    "mamba_expand",
    "expert_layer_period",
    "attn_layer_period",
}


def arrays(folder):
    return {key: tensor.read() for key, tensor in open_weights(folder).items()}


def config_file(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES + OFFICIAL)
def test_gives_the_publishers_numbers(name):
    """The second row is padded on the left, where there is padding there."""
    model = zoo.from_pretrained(PUBLISHED / name)
    expected = np.load(PUBLISHED / name / "expected.npz")
    ids, mask = expected["ids"], expected["mask"]
    assert mask[1, 0] == (name in OFFICIAL)
    call, params = jitted(model)
    np.testing.assert_allclose(call(params, ids, mask)[mask], expected["logits"][mask], rtol=0, atol=1e-4)
    # In pieces, from a cache.
    state = model.init_state(2, ids.shape[1])
    extend, params = jitted(model, "extend")
    for start, end in ((0, 11), (11, 12), (12, 23), (23, 24)):
        logits, state = extend(params, ids[:, start:end], state, mask=mask[:, start:end])
        seen = mask[:, start:end]
        np.testing.assert_allclose(logits[seen], expected["logits"][:, start:end][seen], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES + OFFICIAL)
def test_goes_on_as_the_publishers_does(name):
    expected = np.load(PUBLISHED / name / "expected.npz")
    prompts = [ids[mask].tolist() for ids, mask in zip(expected["ids"], expected["mask"], strict=True)]
    rows = zoo.generate(zoo.from_pretrained(PUBLISHED / name), prompts, 10)
    assert np.array_equal(rows[:, -10:], expected["greedy"])


@pytest.mark.parametrize("name", NAMES + OFFICIAL)
def test_goes_out_as_it_came_in(name, tmp_path):
    pytest.importorskip("safetensors")
    model = zoo.from_pretrained(PUBLISHED / name)
    if name in OFFICIAL:
        zoo.save_pretrained(model, tmp_path / "out", "official")
    else:
        zoo.save_pretrained(model, tmp_path / "out", "transformers", extra={"max_position_embeddings": 64})
    ours, theirs = arrays(tmp_path / "out"), arrays(PUBLISHED / name)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    said, wrote = config_file(PUBLISHED / name), config_file(tmp_path / "out")
    alike = said.keys() & wrote.keys() - {"bos_token_id", "pad_token_id", "max_position_embeddings"} - RESPELLED
    assert {key: wrote[key] for key in alike} == {key: said[key] for key in alike}
    assert said.keys() - wrote.keys() <= NOT_WRITTEN | RESPELLED
    back = zoo.from_pretrained(tmp_path / "out")
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))
