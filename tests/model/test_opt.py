"""Our OPT against transformers' `OPTForCausalLM`, and its shapes at the real sizes without any weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.model_config import ACTIVATIONS, ModelConfig
from apt_jax.models.activations import ACTIVATION_FUNCTIONS
from apt_jax.models.interface import causal_attention
from apt_jax.models.opt import OPT
from tests.golden import ACTIVATIONS_FILE, DATA, golden_names, load_golden, write_checkpoint
from tests.golden.compare import compare, greedy, load_golden_model, whole_sequences
from tests.golden.configs import FIXED, GREEDY_TOKENS
from tests.support.checkpoint_folders import TINY, random_model


@pytest.mark.parametrize("name", golden_names())
def test_logits_and_greedy_tokens_equal_transformers(name, tmp_path):
    golden = load_golden(name)
    difference = compare(load_golden_model(golden, tmp_path), golden)
    assert difference.logits <= 1e-4
    assert difference.greedy_tokens == golden.greedy_tokens


def test_goldens_are_complete_clear_and_small():
    goldens = [load_golden(name) for name in golden_names()]
    assert [golden.name for golden in goldens] == sorted(FIXED)
    for golden in goldens:
        assert golden.config.items() >= FIXED[golden.name].items()
        assert all(len(tokens) == GREEDY_TOKENS == 64 for tokens in golden.greedy_tokens)
        assert golden.margin >= 5e-3
        assert min(len(set(tokens)) for tokens in golden.greedy_tokens) >= 20
        assert max(map(len, golden.sequences)) == golden.config["max_position_embeddings"]
        assert golden.logits.shape == (sum(map(len, golden.logits_at)), golden.config["vocab_size"])
    configs = [ModelConfig.from_hf(golden.config) for golden in goldens]
    for flag in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings",
                 "remove_final_layer_norm"):  # fmt: skip
        assert {getattr(config, flag) for config in configs} == {True, False}
    assert {config.head_dim for config in configs} >= {16, 80}
    assert any(config.word_embed_proj_dim < config.hidden_size for config in configs)
    assert any(config.word_embed_proj_dim > config.hidden_size for config in configs)
    assert any(config.num_attention_heads % 2 for config in configs)
    assert sum(path.stat().st_size for path in DATA.parent.rglob("*") if path.is_file()) < 1_000_000


def test_greedy_tokens_do_not_depend_on_the_draft(tmp_path):
    golden = load_golden("pre_norm")
    forward = whole_sequences(load_golden_model(golden, tmp_path), max(map(len, golden.sequences)))
    drafts = [tokens[:40] + [0] * 24 for tokens in golden.greedy_tokens]
    assert greedy(forward, golden.prompts, drafts) == golden.greedy_tokens


def test_comparison_notices_one_wrong_parameter(tmp_path):
    """A shift of 0.001 in half of any one parameter is far outside the tolerance, so the equality above counts."""
    golden = load_golden("post_norm_projected")
    graphdef, state = nnx.split(load_golden_model(golden, tmp_path))
    for path, leaf in nnx.to_flat_state(state):
        if path[-2:] == ("k_proj", "bias"):
            continue  # the same for all earlier tokens, so the softmax cancels it
        original = leaf[...]
        leaf[...] = original + 1e-3 * (jnp.arange(original.shape[-1]) % 2)
        forward = whole_sequences(nnx.merge(graphdef, state), 128)
        rows = forward(golden.sequences)
        ours = np.concatenate([rows[i, at] for i, at in enumerate(golden.logits_at)])
        assert np.abs(ours - golden.logits).max() > 3e-4, path
        leaf[...] = original


def test_changed_weights_are_not_blamed_on_the_model(tmp_path):
    golden = dataclasses.replace(load_golden("pre_norm"), weights_seed=12345)
    with pytest.raises(ValueError, match="weights of pre_norm changed"):
        write_checkpoint(golden, tmp_path)


def test_activation_functions_equal_transformers():
    values = json.loads(ACTIVATIONS_FILE.read_text(encoding="utf-8"))
    x = np.asarray(values.pop("x"), np.float32)
    assert values.keys() == ACTIVATION_FUNCTIONS.keys() == set(ACTIVATIONS)
    for name, expected in values.items():
        np.testing.assert_allclose(ACTIVATION_FUNCTIONS[name](x), expected, atol=1e-6, err_msg=name)


# hidden_size, layers, heads, word_embed_proj_dim, parameters as transformers counts them (ffn_dim is 4 x hidden_size)
REAL_SIZES = {
    "opt-125m": (768, 12, 12, 768, 125_239_296),
    "opt-350m": (1024, 24, 16, 512, 331_196_416),
    "opt-1.3b": (2048, 24, 32, 2048, 1_315_758_080),
    "opt-2.7b": (2560, 32, 32, 2560, 2_651_596_800),
    "opt-6.7b": (4096, 32, 32, 4096, 6_658_473_984),
    "opt-13b": (5120, 40, 40, 5120, 12_853_473_280),
    "opt-30b": (7168, 48, 56, 7168, 29_974_540_288),
    "opt-66b": (9216, 64, 72, 9216, 65_719_701_504),
}


def real_config(name):
    hidden, layers, heads, width, _ = REAL_SIZES[name]
    return ModelConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, word_embed_proj_dim=width,
        ffn_dim=4 * hidden, do_layer_norm_before=name != "opt-350m",
    )  # fmt: skip


@pytest.mark.parametrize("name", REAL_SIZES)
def test_real_sizes_have_the_published_parameters(name):
    config = real_config(name)
    model = nnx.eval_shape(lambda: OPT(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    D, F, E, L = config.hidden_size, config.ffn_dim, config.word_embed_proj_dim, config.num_hidden_layers
    layer = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 2 * (2 * D)
    outside = config.vocab_size * E + (config.max_position_embeddings + 2) * D
    outside += 2 * D * E if E != D else 0
    outside += 2 * D if config.has_final_layer_norm else 0
    count = sum(leaf.size for leaf in leaves)
    assert count == L * layer + outside
    assert count == REAL_SIZES[name][-1]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["opt-350m", "opt-2.7b", "opt-66b"])
def test_real_sizes_run_in_the_abstract(name, dtype):
    config = real_config(name)

    def run(ids):
        model = OPT(config, dtype=dtype, rngs=nnx.Rngs(0))
        hidden, _ = model(ids, ids, causal_attention, None)
        return hidden, model.logits(hidden)

    hidden, logits = jax.eval_shape(run, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert (hidden.shape, hidden.dtype) == ((2, 5, config.word_embed_proj_dim), dtype)
    assert (logits.shape, logits.dtype) == ((2, 5, config.vocab_size), jnp.float32)


def test_the_program_does_not_grow_with_the_layers():
    """The layers run under one `lax.scan`: 32 layers compile to as many operations as 2."""

    def operations(layers):
        config = dataclasses.replace(real_config("opt-125m"), num_hidden_layers=layers)
        graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))

        def run(state, ids):
            model = nnx.merge(graphdef, state)
            return model.logits(model(ids, ids, causal_attention, None)[0])

        return jax.jit(run).lower(state, jax.ShapeDtypeStruct((1, 8), jnp.int32)).as_text().count("\n")

    assert operations(32) == operations(2)


def test_cache_and_layer_numbers_pass_through_the_layers():
    """The attention function gets layer 0, 1, ... with its own projections, and the cache of the layer before."""
    model = random_model(TINY, seed=0)

    def attend(projections, h, cache, layer):
        order, weights = cache
        cache = order * 10 + layer, weights.at[layer].set(projections.k_proj.kernel[0, 0, 0])
        return causal_attention(projections, h, None, layer)[0], cache

    ids = jnp.arange(6, dtype=jnp.int32)[None]
    start = jnp.int32(0), jnp.zeros(TINY.num_hidden_layers)
    _, (order, weights) = jax.jit(lambda model: model(ids, ids, attend, start))(model)
    assert order == 12  # 0, then 1, then 2
    np.testing.assert_array_equal(weights, model.layers.self_attn.k_proj.kernel[:, 0, 0, 0])
