"""What may stand in a config: dicts where they fit, and nothing that would be passed over in silence."""

import dataclasses
import json

import pytest
from flax import nnx

import m2
import ssm
import zoo
from zoo.stack.option_values import from_dict, with_values


@pytest.mark.usefixtures("unchecked")
def test_a_dict_is_the_options_that_it_describes():
    config = zoo.BackboneConfig(
        mamba={"d_state": 4}, m2={"l_max": 8, "filter": {"order": 3}}, mamba2={"dt_limit": [0, 1]}
    )
    assert config.mamba == ssm.MambaConfig(d_state=4)
    assert config.m2 == m2.M2Config(l_max=8, filter=m2.HyenaFilterConfig(order=3))
    assert config.mamba2.dt_limit == (0, 1)
    hash(config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mamba": ssm.Mamba2Config()}, r"mamba=Mamba2Config\(.*\), expected MambaConfig or a dict of its fields"),
        ({"mamba": None}, "mamba=None, expected MambaConfig"),
        ({"mamba": {"d_stat": 4}}, "mamba: unknown field 'd_stat', did you mean 'd_state'"),
        ({"mamba": {"d_state": "4"}}, "mamba: d_state='4', expected at least 1"),
        ({"attn": {"rope_base": "x"}}, "attn.rope_base='x', expected a number"),
        (
            lambda: {"m2": m2.M2Config(filter=ssm.MambaConfig())},
            r"m2.filter=Mamba.*, expected HyenaFilterC",
        ),
        ({"d_model": "64"}, "d_model='64', expected an integer"),
        ({"d_model": 64.0}, "d_model=64.0, expected an integer"),
        ({"dropout": True}, "dropout=True, expected a number"),
        ({"remat": 1}, "remat=1, expected True or False"),
        ({"remat_keeps": "dots"}, "remat_keeps='dots', expected 'nothing' or 'matmuls'"),
        ({"pattern": 3}, "pattern=3, expected a text"),
        ({"norm_eps": "x"}, "norm_eps='x', expected a number"),
    ],
)
def test_options_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        zoo.BackboneConfig(**(fields() if callable(fields) else fields))


def test_a_config_comes_back_from_json():
    for name, config in zoo.presets.items():
        assert from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config, name


def test_a_presets_options_change_one_by_one():
    preset = zoo.presets["mamba2-130m"]
    changed = with_values(preset, {"n_layers": 2, "mamba2": {"d_state": 16}})
    assert changed.mamba2 == dataclasses.replace(preset.mamba2, d_state=16)
    assert changed == dataclasses.replace(preset, n_layers=2, mamba2=changed.mamba2)
    model = zoo.create("mamba-130m", rngs=nnx.Rngs(0), d_model=16, n_layers=1, vocab_size=7, mamba={"d_state": 4})
    assert model.backbone.layers[0].mixer.A_log.shape == (32, 4)
    with pytest.raises(ValueError, match="unknown config field 'd_stat'"):
        zoo.create("mamba-130m", rngs=nnx.Rngs(0), mamba={"d_stat": 4})
