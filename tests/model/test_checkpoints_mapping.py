"""The Hugging Face correspondence: complete, one to one, and true to torch's layouts, for every variant."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.mappings.opt import OPT_MAPPING
from apt_jax.models.opt import OPT
from tests.support.checkpoint_folders import TINY, VARIANTS, random_model


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_slots_cover_every_parameter_exactly_once(config):
    model = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
    filled = {}
    for slot in OPT_MAPPING.slots(config).values():
        filled.setdefault(slot.path, []).append(slot)
    parameters = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert filled.keys() == parameters.keys()
    for path, found in filled.items():
        layers = [slot.layer for slot in found]
        stacked = path[0] == "layers"
        assert layers == (list(range(config.num_hidden_layers)) if stacked else [None])
        assert {slot.shape for slot in found} == {parameters[path][1:] if stacked else parameters[path]}
        assert all(np.prod(slot.shape) == np.prod(slot.torch_shape) for slot in found)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_export_has_torch_names_shapes_and_layout(config):
    model = random_model(config, seed=0)
    exported = export_huggingface(config, model)
    assert {name: array.shape for name, array in exported.items()} == OPT_MAPPING.hf_shapes(config)
    x = np.random.default_rng(0).normal(size=(5, config.hidden_size)).astype(np.float32)
    layer = nnx.merge(*_one_layer(model, 2))
    query = layer.self_attn.q_proj(jnp.asarray(x)).reshape(5, -1)
    np.testing.assert_allclose(query, _torch_linear(exported, "q_proj", x), atol=1e-4)
    merged = layer.self_attn.out_proj(jnp.asarray(x).reshape(5, config.num_attention_heads, -1))
    np.testing.assert_allclose(merged, _torch_linear(exported, "out_proj", x), atol=1e-4)


def _torch_linear(exported, name, x):
    """What torch's `nn.Linear` computes with the exported tensors."""
    prefix = f"model.decoder.layers.2.self_attn.{name}"
    return x @ exported[f"{prefix}.weight"].T + exported.get(f"{prefix}.bias", np.float32(0))


def _one_layer(model, index):
    graphdef, state = nnx.split(model.layers)
    return graphdef, nnx.map_state(lambda _, leaf: leaf[index], state)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_export_is_undone_by_from_torch_and_from_flax(config):
    model = random_model(config, seed=1)
    exported = export_huggingface(config, nnx.state(model))
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    for name, slot in OPT_MAPPING.slots(config).items():
        held = np.asarray(flat[slot.path][...])
        held = held if slot.layer is None else held[slot.layer]
        np.testing.assert_array_equal(slot.from_torch(exported[name]), held)
        np.testing.assert_array_equal(slot.from_flax(held.reshape(slot.flax_shape)), held)


def test_names_of_a_known_layer():
    shapes = OPT_MAPPING.hf_shapes(VARIANTS["untied"])
    assert shapes["model.decoder.embed_tokens.weight"] == (64, 24)
    assert shapes["model.decoder.embed_positions.weight"] == (18, 32)
    assert shapes["model.decoder.project_in.weight"] == (32, 24)
    assert shapes["model.decoder.project_out.weight"] == (24, 32)
    assert shapes["model.decoder.layers.0.fc1.weight"] == (48, 32)
    assert shapes["model.decoder.layers.2.fc2.bias"] == (32,)
    assert shapes["lm_head.weight"] == (64, 24)


def test_spellings_in_the_wild():
    canonical_name, flax_name = OPT_MAPPING.canonical_name, OPT_MAPPING.flax_name
    assert canonical_name("decoder.layers.0.fc1.weight") == "model.decoder.layers.0.fc1.weight"
    assert canonical_name("model.decoder.layers.0.fc1.weight") == "model.decoder.layers.0.fc1.weight"
    assert canonical_name("lm_head.weight") == "lm_head.weight"
    assert canonical_name("decoder.version") is None
    assert flax_name(("model", "decoder", "layers", "0", "fc1", "kernel")) == "model.decoder.layers.0.fc1.weight"
    assert flax_name(("params", "decoder", "embed_tokens", "embedding")) == "model.decoder.embed_tokens.weight"
    assert flax_name(("decoder", "final_layer_norm", "scale")) == "model.decoder.final_layer_norm.weight"
    assert flax_name(("decoder", "final_layer_norm", "bias")) == "model.decoder.final_layer_norm.bias"


def test_export_refuses_parameters_that_do_not_fit():
    model = random_model(TINY, seed=0)
    with pytest.raises(ValueError, match=r"no parameter lm_head\.kernel"):
        export_huggingface(dataclasses.replace(TINY, tie_word_embeddings=False), model)
    with pytest.raises(ValueError, match=r"does not: .*layers\.fc1\.bias"):
        export_huggingface(dataclasses.replace(TINY, enable_bias=False), model)
    with pytest.raises(ValueError, match="has shape"):
        export_huggingface(dataclasses.replace(TINY, vocab_size=65), model)
