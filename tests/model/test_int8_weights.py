"""Models with int8 weights: products, layouts, checkpoints, and engines whose tokens depend on the request only."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.checkpoints.convert import convert, verify
from apt_jax.checkpoints.errors import CheckpointError
from apt_jax.checkpoints.export import export_huggingface
from apt_jax.checkpoints.formats.weight_files import MANIFEST
from apt_jax.checkpoints.load import load_model
from apt_jax.checkpoints.source import DEMO_FOLDER
from apt_jax.engine.calibration import base_model
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import serving_layout
from apt_jax.execution.weights.int8 import PARTS, VOCABULARY, Int8Choice
from apt_jax.execution.weights.layout import StackedLayout
from apt_jax.models.interface import causal_attention
from apt_jax.models.kernels import Int8Kernel, Int8Table, Kernel, LazySlice, RowScaledKernel
from apt_jax.models.quantization import quantise_stack, quantise_table
from apt_jax.request import SamplingParams
from apt_jax.serve.runtime.build import build_engine
from tests.model.test_tensor_parallel import SUPPORT, in_new_process
from tests.support.checkpoint_folders import TINY, VARIANTS, random_model, write_config, write_safetensors
from tests.support.engines import run
from tests.support.sharded_engines import greedy_tokens, sharded_engine

pytestmark = pytest.mark.timeout(900)

NAMES = ("int8", "int8-dynamic")


def rows(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def kernel():
    """`[D, N, H]` = 12, 2, 5, with a row that is a hundred times smaller."""
    wide = np.array(rows(3, 12, 2, 5, seed=2))
    wide[:, 4] /= 100
    return quantise_stack(wide, 1)


def layer_of(kernel, layer, dynamic=False):
    return RowScaledKernel(Int8Kernel(kernel.values[layer], kernel.scale[layer], dynamic), kernel.factor[layer])


def test_a_product_is_that_with_the_array(kernel):
    one, x = layer_of(kernel, 1), rows(7, 12)
    array = kernel.factor[1][:, None, None] * kernel.values[1] * kernel.scale[1]
    np.testing.assert_allclose(one.array, array, rtol=1e-6)
    np.testing.assert_allclose(one.matmul(x), np.einsum("td,dnh->tnh", x, array), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.by_head(), array.swapaxes(0, 1), rtol=1e-6)
    over_heads = RowScaledKernel(Int8Kernel(kernel.values[0][0, :, :, None].repeat(3, 2), rows(3)), rows(2, 5))
    expected = np.einsum("tnh,nhd->td", rows(7, 2, 5), over_heads.array)
    np.testing.assert_allclose(over_heads.matmul(rows(7, 2, 5), 2), expected, rtol=1e-4, atol=1e-4)


def test_a_dynamic_product_is_of_integers(kernel):
    one, x = layer_of(kernel, 1, dynamic=True), np.array(rows(7, 12))
    x[2], x[5, 0] = 0, np.nan
    scaled = x * kernel.factor[1]
    step = np.abs(scaled).max(1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore"):
        codes = np.rint(scaled / np.where(step > 0, step, 1))
    expected = np.einsum("td,dnh->tnh", codes, kernel.values[1].astype(float)) * step[..., None] * kernel.scale[1]
    found = np.asarray(one.matmul(jnp.asarray(x)))
    np.testing.assert_allclose(found[[0, 1, 3, 4, 6]], expected[[0, 1, 3, 4, 6]], rtol=1e-5, atol=1e-6)
    assert not found[2].any() and np.isnan(found[5]).all()
    alone = one.matmul(jnp.asarray(x[3:4]))
    assert (found[3] == alone[0]).all(), "a row's product depends on the others"


def test_a_lazy_slice_is_the_layers_kernel(kernel):
    def product(values, scale, factor, layer, x):
        lazy = RowScaledKernel(Int8Kernel(LazySlice(values, layer), scale[layer]), factor[layer]).after(x)
        assert lazy.is_sliced_lazily and lazy.shape == (12, 2, 5)
        return lazy.matmul(x), lazy.by_head()

    found = jax.jit(product)(*map(jnp.asarray, kernel), 2, rows(7, 12))
    whole = layer_of(kernel, 2)
    np.testing.assert_allclose(found[0], whole.matmul(rows(7, 12)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], whole.by_head(), rtol=1e-6)


def test_a_table_is_looked_up_and_multiplied():
    values, scale = quantise_table(np.array(rows(9, 6)))
    table = Int8Table(jnp.asarray(values), jnp.asarray(scale))
    array = values * scale[:, None]
    np.testing.assert_allclose(table.columns(jnp.array([[3, 0]])), array[[3, 0]][None], rtol=1e-6)
    np.testing.assert_allclose(table.matmul(rows(4, 6)), rows(4, 6) @ array.T, rtol=1e-4, atol=1e-5)
    assert table.shape == table.array.shape == (6, 9)


@pytest.fixture(scope="module", params=["plain", "post_norm", "untied"])
def folder(request, tmp_path_factory):
    """A model of each kind, on disk."""
    config, found = VARIANTS[request.param], tmp_path_factory.mktemp(request.param)
    write_config(found, config)
    write_safetensors(found, export_huggingface(config, random_model(config, seed=5)))
    return found


def load(folder, quantization=None, layered=None, **options):
    layout = layered and partial(serving_layout, backend=layered, block_size=16)
    return load_model(str(folder), dtype="float32", quantization=quantization, layout=layout, **options)


def logits_of(loaded):
    """Logits `[T, V]` of a sequence, without a cache."""
    ids, weights = jnp.arange(9) % TINY.vocab_size, loaded.weights
    model = weights.model(weights.outer.arrays)
    x = model.embed(ids, jnp.arange(9))[None]
    if weights.layers is None:
        x = model(ids[None], jnp.arange(9)[None], causal_attention, None)[0]
    else:
        for number, layer in enumerate(weights.layers):
            x, _ = layer.module(layer.arrays)(x, causal_attention, None, jnp.int32(number))
        x = model.finish(x)
    return np.asarray(model.logits(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_logits_near_those_of_wide_weights(folder, name):
    wide = logits_of(load(folder))
    stacked = load(folder, name)
    found = logits_of(stacked)
    error = np.abs(found - wide).mean() / wide.std()
    assert 1e-4 < error < 0.1, error
    for backend in ("xla", "native"):
        layered = load(folder, name, backend)
        assert layered.weights.layers is not None and layered.weights.quantization == name
        np.testing.assert_allclose(logits_of(layered), found, atol=2e-3 * wide.std())
    assert stacked.weights.nbytes == stacked.weight_bytes < load(folder).weight_bytes / 2


def arrays_of(loaded):
    return [np.asarray(array) for array in loaded.weights.outer.arrays]


def test_a_converted_checkpoint_is_what_is_made_at_load(folder, tmp_path, caplog):
    convert(str(folder), tmp_path / "wide")
    done = convert(str(folder), tmp_path / "int8", quantization="int8")
    verify(tmp_path / "int8")
    made, stored = load(folder, "int8"), load(tmp_path / "int8")
    assert "holds int8 weights: they are served as such" in caplog.text or not caplog.text
    assert done.quantization == stored.weights.quantization == "int8" and done.weight_bytes == stored.weight_bytes
    for other in (stored, load(tmp_path / "wide", "int8"), load(tmp_path / "int8", "int8")):
        assert other.fingerprint == made.fingerprint == load(folder).fingerprint + "+int8"
        for a, b in zip(arrays_of(made), arrays_of(other), strict=True):
            assert a.dtype == b.dtype and (a == b).all()
    dynamic = load(tmp_path / "int8", "int8-dynamic")
    assert dynamic.fingerprint == load(folder, "int8-dynamic").fingerprint != made.fingerprint
    again = convert(str(tmp_path / "int8"), tmp_path / "again", dtype="bfloat16")
    assert again.quantization == "int8" and load(tmp_path / "again").fingerprint == made.fingerprint


def test_what_contradicts_the_stored_weights_is_refused(tmp_path):
    convert(str(DEMO_FOLDER), tmp_path / "int8", quantization="int8")
    for action in (
        partial(load, tmp_path / "int8"),
        lambda q: convert(str(tmp_path / "int8"), tmp_path / "n", quantization=q),
    ):
        with pytest.raises(
            CheckpointError, match=r"'none', but the weights in .* were converted with --quantization int8; leave"
        ):
            action("none")
    with pytest.raises(
        CheckpointError, match=r"a way to multiply int8 weights.*convert with --quantization int8 and serve"
    ):
        convert(str(DEMO_FOLDER), tmp_path / "n", quantization="int8-dynamic")
    fields = json.loads((tmp_path / "int8" / MANIFEST).read_text())
    assert fields["version"] == 3 and fields["int8_parts"] == list(PARTS)


def test_dummy_weights_are_the_wide_ones_quantised(folder):
    wide = load(folder, load_format="dummy", seed=3)
    found = load(folder, "int8", load_format="dummy", seed=3)
    assert found.fingerprint == wide.fingerprint + "+int8"
    states = (nnx.to_flat_state(nnx.state(each.model)) for each in (wide, found))
    for (path, exact), (_, made) in zip(*states, strict=True):
        exact, made = np.asarray(exact.get_value()), made.get_value()
        if not isinstance(made, Kernel):
            assert path[0] != "layers" or path[-1] in ("bias", "scale")
            assert (np.asarray(made) == exact).all()
            continue
        if path[0] == "layers":
            array = jax.vmap(lambda kernel: kernel.array)(made)
        else:
            array = made.array.T if isinstance(made, Int8Table) else made.array
        assert np.abs(array - exact).max() < np.abs(exact).max() / 250


@pytest.mark.parametrize("part", [*PARTS, "none of them"])
def test_each_part_can_be_chosen(part):
    model = random_model(TINY, seed=0)
    choice = Int8Choice.of(model, "int8", (part,) if part in PARTS else ())
    assert Int8Choice.of(model, "none") is None
    weights = StackedLayout(jax.devices()[0], int8=choice).lay_out(model)
    narrow = sum(array.dtype == np.int8 for array in weights.outer.arrays)
    assert narrow == len(choice.paths) == (part in PARTS)
    if part == VOCABULARY:
        assert isinstance(weights.model(weights.outer.arrays).embed_tokens.embedding.get_value(), Int8Table)


@pytest.fixture(scope="module")
def engines():
    """By name: float32, one program for each layer or of stacked weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apt_jax.attention.xla.CHUNK_TOKENS", 16)  # several chunks per context
        patch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
        yield lambda **options: sharded_engine(1, "hybrid", **options)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_depend_on_nothing_but_the_request(engines, name, monkeypatch):
    """Chunks, batch mates, preemption, kind of cache and conversion, form of a step; greedy, float32."""
    found = greedy_tokens(engines(quantization=name), "hybrid")
    by_prompt = {i.partition("-")[0]: tokens for i, tokens in found.items()}
    assert all(tokens == by_prompt[i.partition("-")[0]] for i, tokens in found.items())
    if name == "int8-dynamic":
        return
    monkeypatch.setattr(
        "apt_jax.execution.weights.choice.LayerLayout.of",
        lambda model, device, kernels, int8: StackedLayout(device, kernels=kernels, int8=int8),
    )
    stacked = engines(quantization=name, max_num_batched_tokens=24, attention_backend="xla")
    assert stacked.runner.weights.layers is None
    assert greedy_tokens(stacked, "hybrid") == found


def test_the_same_tokens_on_two_devices():
    assert "2 devices, hybrid, int8 weights: same tokens" in in_new_process(
        str(SUPPORT / "sharded_engines.py"), "2:hybrid:weights"
    )


def test_an_int8_cache_on_two_devices():
    """Nothing called this check."""
    assert "2 devices, hybrid, int8: same tokens" in in_new_process(
        str(SUPPORT / "sharded_engines.py"), "2:hybrid:int8"
    )


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_a_float16_model_of_int8_weights_and_cache_is_that_of_xla(tmp_path, mode):
    """The C++ call took its residual stream for bfloat16, and the text was nonsense."""
    found = []
    for backend in ("auto", "xla"):
        options = {"num_blocks": 40, "max_model_len": 64, "max_num_seqs": 1, "max_num_batched_tokens": 16}
        config = EngineConfig(
            dtype="float16", quantization="int8", cache_dtype="int8", cache_mode=mode, attention_backend=backend,
            scheduling_policy="fcfs", compilation_cache_dir=str(tmp_path), **options,
        )  # fmt: skip
        engine = build_engine(None, engine_config=config)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        (request,) = run(engine, [engine.tokenizer.encode("def read_file(path):")], params)
        found.append(request.output_token_ids)
    assert found[0] == found[1]


def test_an_engine_says_what_its_weights_are(tmp_path):
    options = {"num_blocks": 80, "max_model_len": 64, "dtype": "bfloat16", "compilation_cache_dir": str(tmp_path)}
    int8, dynamic = (build_engine(None, engine_config=EngineConfig(quantization=name, **options)) for name in NAMES)
    assert [each.config.quantization for each in (int8, dynamic)] == [*NAMES]
    assert int8.figures().weights == {"dtype": "bfloat16", "quantization": "int8"}
    assert int8.fingerprint != dynamic.fingerprint and int8.setup.calibration_file != dynamic.setup.calibration_file
    assert "MiB  int8\n" in int8.setup.memory.table()
    assert base_model(dynamic.runner).quantization == "int8-dynamic"
    # positions are all that the cost model counts and the layers do not read; packed vocabulary is padded to 32 rows
    assert base_model(int8.runner).weight_bytes == pytest.approx(int8.setup.memory.weight_bytes, rel=0.01)
