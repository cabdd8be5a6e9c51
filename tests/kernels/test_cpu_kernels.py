"""The C++ kernels against their references, and what happens where they cannot be had."""

import logging
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_jax.attention.selection import select_kernels
from apt_jax.cpu_kernels import calls, features, library, packed, packed_int8
from apt_jax.execution.weights.layer_layout import LayerLayout
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.pallas_kernels import dispatch

try:
    LIBRARY = library.register()
except library.Unavailable as error:
    pytest.skip(f"the C++ kernels cannot be had here: {error}", allow_module_level=True)

COMPILED = {
    (kernels.name, name): jax.jit(getattr(kernels, name))
    for kernels in (calls.KERNELS, dispatch.REFERENCES)
    for name in ("kv_decode", "hidden_decode")
}
TINY = ModelConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32, vocab_size=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(3, 64, 16), (3, 80, 8), (5, 128, 128)])
def test_attention_is_that_of_the_references(heads, head_dim, block_size, dtype):
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    assert dispatch.self_check(calls.KERNELS, **shape) is None
    assert dispatch.self_check(calls.KERNELS, **shape, is_coded=True) is None
    assert dispatch.check_chunk(calls.KERNELS, heads=heads, head_dim=head_dim, dtype=dtype) is None


def test_no_request_sees_what_is_not_finite_in_another():
    row = np.repeat(np.arange(4, dtype=np.int32), [40, 3, 70, 7])
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((len(row), 2, 20), np.float32) for _ in range(3))
    expected = calls.chunk(*map(jnp.asarray, (q, k, v, row)))
    for array in (q, k, v):
        array[(row == 1) | (row == 3)] = np.nan
    found = calls.chunk(*map(jnp.asarray, (q, k, v, row)))
    others = (row == 0) | (row == 2)
    np.testing.assert_array_equal(found.out[others], expected.out[others])
    assert np.isnan(found.out[~others]).all()


@pytest.mark.parametrize("name", ["kv_decode", "hidden_decode"])
def test_a_rows_attention_does_not_depend_on_the_other_rows(name):
    """To the last digit, over contexts that are attended to in several parts."""
    rng = np.random.default_rng(0)
    R, N, H, S, W = 32, 2, 16, 16, 48
    pool = jnp.asarray(rng.standard_normal((2 * W, S, N * H), np.float32))
    tables = jnp.asarray(rng.integers(0, 2 * W, (2, R, W)), jnp.int32)
    length = jnp.asarray([700, 128, 129, 5, 256, 300, 64, 513] * 4, jnp.int32)
    q = jnp.asarray(rng.standard_normal((R, N, H if name == "kv_decode" else N * H), np.float32))
    tables = tables[: 2 if name == "kv_decode" else 1]
    kernel = getattr(calls, name)
    every = kernel(q, pool, *tables, length)
    for rows in (1, 2, 8, 31):
        found = kernel(q[:rows], pool, *(table[:rows] for table in tables), length[:rows])
        np.testing.assert_array_equal(found.out, every.out[:rows], err_msg=f"{rows=}")
        np.testing.assert_array_equal(found.lse, every.lse[:rows])


@settings(max_examples=10)
@given(st.data())
def test_attention_to_any_lengths_in_any_blocks(data):
    rows, heads, head_dim = data.draw(st.sampled_from([(1, 3, 20), (7, 2, 33)]))
    pages, size = 12, 8  # the shapes are few, since the references compile for each
    length = np.array(data.draw(st.lists(st.integers(0, pages * size), min_size=rows, max_size=rows)), np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    D = heads * head_dim
    blocks = rng.permutation(2 * rows * pages).reshape(2, rows, pages).astype(np.int32)
    pool = rng.standard_normal((2 * rows * pages, size, D), np.float32)
    for table in blocks:
        for row, tokens in zip(table, length, strict=True):
            position = np.arange(pages * size).reshape(pages, size, 1)
            pool[row] = np.where(position < tokens, pool[row], np.nan)
    q = rng.standard_normal((rows, heads, head_dim), np.float32) * head_dim**-0.5
    wide = rng.standard_normal((rows, heads, D), np.float32) * D**-0.5
    for name, args in (("kv_decode", (q, pool, *blocks, length)), ("hidden_decode", (wide, pool, blocks[0], length))):
        found, expected = (COMPILED[k, name](*map(jnp.asarray, args)) for k in ("cpu", "reference"))
        np.testing.assert_allclose(found.out, expected.out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


KINDS = [  # of rows and of the kernel
    pytest.param(jnp.float32, jnp.float32, id="float32"),
    pytest.param(jnp.bfloat16, jnp.bfloat16, id="bfloat16"),
    pytest.param(jnp.float32, jnp.bfloat16, id="float32 with bfloat16"),
]


@pytest.mark.parametrize(("of_rows", "of_kernel"), KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 96), (3072, 50), (48, 7), (1, 1), (2, 1), (33, 13), (800, 6)])
@pytest.mark.parametrize("rows", [1, 3, 15, 16, 37, 300])
def test_products_are_those_of_numpy(rows, inputs, outputs, of_rows, of_kernel):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, inputs), np.float32), of_rows)
    kernel = np.asarray(jnp.asarray(rng.standard_normal((inputs, outputs), np.float32) * inputs**-0.5, of_kernel))
    if inputs % 2 and of_kernel == jnp.bfloat16:
        assert not packed.can_pack(inputs, of_kernel)
        return
    stored = packed.pack(kernel)
    assert stored.nbytes == kernel.itemsize * inputs * -(-outputs // packed.PACKED_OUTPUTS) * packed.PACKED_OUTPUTS
    found = calls.matmul(x, jnp.asarray(stored), outputs)
    expected = np.asarray(x, np.float64) @ kernel.astype(np.float64)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    own = packed.PackedKernel(jnp.asarray(stored), (inputs, outputs))
    by_inputs = np.asarray(own.by_head())
    np.testing.assert_array_equal(np.concatenate(by_inputs, axis=1)[:, :outputs], kernel)
    np.testing.assert_array_equal(own.array, kernel)
    np.testing.assert_array_equal(own.columns(jnp.arange(outputs)), kernel.T)


@pytest.mark.parametrize(("of_rows", "of_kernel"), KINDS)
def test_a_rows_products_do_not_depend_on_the_other_rows(of_rows, of_kernel):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((300, 1600), np.float32), of_rows)
    stored = packed.pack(np.asarray(jnp.asarray(rng.standard_normal((1600, 100), np.float32), of_kernel)))
    every = np.asarray(calls.matmul(x, stored, 100))
    for rows in (1, 5, 16, 33):
        np.testing.assert_array_equal(calls.matmul(x[:rows], stored, 100), every[:rows])


@pytest.fixture
def with_and_without_amx():
    """Calls a function with AMX and without."""
    if not library.use_amx(True):
        pytest.skip("this processor has no AMX, or the system does not permit it")

    def both(function):
        results = []
        for wanted in (True, False):
            library.use_amx(wanted)
            results.append(np.asarray(function()))
        return results

    yield both
    library.use_amx(True)


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 96), (3072, 50), (64, 7), (1600, 33)])
@pytest.mark.parametrize("rows", [1, 3, 15, 16, 29, 300])
def test_amx_gives_the_products_of_vectors(rows, inputs, outputs, with_and_without_amx):
    """Of bfloat16 but for the order of sums, of int8 to the last digit."""
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, inputs), np.float32), jnp.bfloat16)
    stored = packed.pack(np.asarray(jnp.asarray(rng.standard_normal((inputs, outputs), np.float32), jnp.bfloat16)))
    found, expected = with_and_without_amx(lambda: calls.matmul(x, jnp.asarray(stored), outputs))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * inputs**0.5)
    assert inputs * rows < 1000 or (found != expected).any(), "another order, so it was really used"
    own, _ = int8_kernel(rng, inputs, outputs)
    found, expected = with_and_without_amx(lambda: own.matmul(x, dtype=jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found, expected = with_and_without_amx(lambda: replace(own, dynamic=True).matmul(x, dtype=jnp.float32))
    np.testing.assert_array_equal(found, expected)


def int8_kernel(rng, inputs, outputs, **options):
    """An int8 kernel, and the same as a plain array of float64."""
    codes = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    scale = np.zeros(-(-outputs // packed.PACKED_OUTPUTS) * packed.PACKED_OUTPUTS, np.float32)
    scale[:outputs] = rng.uniform(0.5, 1, outputs) / 127 * inputs**-0.5
    stored = packed_int8.pack_int8(codes)
    assert stored.nbytes == -(-inputs // 4) * 4 * len(scale) and (stored == 0).sum() >= stored.size - codes.size
    own = packed_int8.PackedInt8Kernel(
        *map(jnp.asarray, (stored, scale)), options.pop("shape", (inputs, outputs)), **options
    )
    return own, codes * scale[:outputs].astype(np.float64)


def as_quantised(x):
    """What rows `[R, inputs]` are as int8 with a scale each, float64."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.round(x / np.where(scale > 0, scale, 1)) * scale


@pytest.mark.parametrize("of_rows", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        *((rows, 33, 13) for rows in range(1, 16)), (1, 3072, 50), (33, 3072, 50), (300, 3072, 50), (1, 768, 96),
        (20, 768, 96), (3, 48, 7), (37, 48, 7), (1, 1, 1), (33, 1, 1), (5, 2, 33), (300, 801, 6),
    ],
)  # fmt: skip
def test_products_with_int8_kernels_are_those_of_numpy(rows, inputs, outputs, of_rows):
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.standard_normal((rows, inputs), np.float32), of_rows)
    own, kernel = int8_kernel(rng, inputs, outputs)
    found = own.matmul(x, dtype=jnp.float32)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ kernel, rtol=1e-5, atol=1e-5)
    found = replace(own, dynamic=True).matmul(x, dtype=jnp.float32)
    code = float(jnp.abs(x).max()) / 127 * np.abs(kernel).max()
    # a number halfway between two codes may become either: in a row of bfloat16 there are some
    np.testing.assert_allclose(found, as_quantised(x) @ kernel, rtol=1e-5, atol=1e-5 + 8 * code * (inputs > 2))
    assert own.matmul(x).dtype == of_rows
    if rows < 6:
        np.testing.assert_allclose(own.array, kernel, rtol=1e-6)
        np.testing.assert_allclose(own.columns(jnp.arange(outputs)), kernel.T, rtol=1e-6)


@pytest.mark.parametrize(("shape", "axes"), [((96, 3, 32), 1), ((3, 32, 50), 2), ((2, 3, 64), 2), ((34, 1, 64), 1)])
def test_an_int8_kernel_of_heads_is_multiplied_over_its_inputs(shape, axes):
    rng = np.random.default_rng(0)
    inputs = int(np.prod(shape[:axes]))
    own, kernel = int8_kernel(rng, inputs, int(np.prod(shape)) // inputs, shape=shape)
    x = jnp.asarray(rng.standard_normal((5, *shape[:axes]), np.float32))
    expected = np.tensordot(np.asarray(x, np.float64), kernel.reshape(shape), axes)
    np.testing.assert_allclose(own.matmul(x, axes), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own.array, kernel.reshape(shape), rtol=1e-6)
    if axes == 1:
        by_inputs = np.concatenate(np.asarray(own.by_head()), axis=1)
        np.testing.assert_allclose(by_inputs, kernel, rtol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("of_rows", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inputs", [3300, 1600])
def test_a_rows_products_with_int8_kernels_do_not_depend_on_the_other_rows(inputs, of_rows, dynamic):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((300, inputs), np.float32), of_rows)
    own, _ = int8_kernel(rng, inputs, 100, dynamic=dynamic)
    every = np.asarray(own.matmul(x))
    for rows in (1, 5, 16, 33):
        np.testing.assert_array_equal(own.matmul(x[:rows]), every[:rows])
    np.testing.assert_array_equal(own.matmul(x.at[7].set(jnp.nan))[8:], every[8:])


@pytest.mark.parametrize(("rows", "inputs"), [(6, 70), (40, 128)])
def test_dynamic_rows_that_are_zero_or_not_finite(rows, inputs):
    own = int8_kernel(np.random.default_rng(0), inputs, 40, dynamic=True)[0]
    x = jnp.ones((rows, inputs)).at[0].set(0).at[1, inputs - 1].set(jnp.nan).at[2, 3].set(jnp.inf)
    found = own.matmul(x.at[3].set(-1e-38).at[4].set(3e38))
    assert (found[0] == 0).all() and np.isnan(found[1:3]).all() and np.isfinite(found[3]).all()
    np.testing.assert_allclose(found[5], np.asarray(own.array).sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_of_any_number_of_rows_with_the_models_own_table(dtype):
    model = OPT(TINY, dtype=dtype, rngs=nnx.Rngs(0))
    weights = LayerLayout.of(model, jax.devices("cpu")[0], calls.KERNELS).lay_out(model)
    own = weights.model(weights.outer.arrays)
    ids = jnp.arange(TINY.vocab_size)
    np.testing.assert_allclose(
        own.embed(ids, ids), model.embed(ids, ids), rtol=1e-2 if dtype == jnp.bfloat16 else 0, atol=1e-6
    )
    for rows in (1, 32, 33, 200):
        hidden = jax.random.normal(jax.random.key(rows), (rows, TINY.word_embed_proj_dim), dtype)
        found, expected = own.logits(hidden), model.logits(hidden)
        np.testing.assert_allclose(found, expected, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-3)


def test_what_is_not_finite_stays_so():
    x = jnp.asarray([[jnp.nan, 1.0], [jnp.inf, 1.0], [1.0, 1.0]])
    found = calls.matmul(x, packed.pack(np.ones((2, 3), np.float32)), 3)
    assert np.isnan(found[0]).all() and np.isinf(found[1]).all() and np.isfinite(found[2]).all()
    pool = jnp.ones((1, 8, 4)).at[0, 2].set(jnp.nan)
    one = jnp.zeros((1, 1), jnp.int32)
    assert np.isnan(calls.kv_decode(jnp.ones((1, 1, 4)), pool, one, one, jnp.array([4])).out).all()


def select(backend):
    options = {"block_size": 16, "dtype": jnp.dtype("float32"), "device": jax.devices("cpu")[0]}
    return select_kernels(backend, TINY, **options, cpp_kernels=True)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.register.cache_clear()
    yield monkeypatch
    library.register.cache_clear()


def test_without_a_compiler_xla_attends(fresh, tmp_path, caplog):
    fresh.setenv("PATH", str(tmp_path))
    fresh.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert select("auto") is None
    assert "no C++ compiler is on PATH" in caplog.text
    with pytest.raises(ValueError, match=r"attention_backend='native' cannot be used here .*no C\+\+ compiler"):
        select("native")


def test_without_a_compiler_what_was_compiled_for_this_processor_is_used(fresh, tmp_path):
    folder = tmp_path / LIBRARY.parent.relative_to(LIBRARY.parents[2])
    folder.mkdir(parents=True)
    shutil.copy(LIBRARY, folder)
    fresh.setenv("PATH", str(tmp_path))
    fresh.delenv("CXX", raising=False)
    assert library.built() == folder / LIBRARY.name
    fresh.setattr(library, "cpu_features", lambda: "another processor")
    with pytest.raises(library.Unavailable, match=r"no C\+\+ compiler"):
        library.built()


def test_a_compiler_that_fails_is_named_with_its_error(fresh, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    with pytest.raises(ValueError, match=r"c\+\+ failed: x.cc:1: error: no such thing"):
        select("native")


@pytest.mark.parametrize("processor", ["x86-64", "haswell", "skylake-avx512", "cooperlake", "sapphirerapids"])
def test_the_sources_compile_for_processors_that_have_less(processor):
    """SSE alone, AVX2, AVX-512 without bfloat16, with it, and AMX: only one of these is the host."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs g++ for x86-64")
    folder = Path(library.__file__).parent
    for source in ("handlers.cc", "layers_bfloat16_int8.cc", "amx.cc"):
        command = [compiler, *library._FLAGS, "-O0", f"-march={processor}", f"-isystem{jax.ffi.include_dir()}"]
        done = subprocess.run(
            [*command, "-fsyntax-only", str(folder / source)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_library_is_jaxlib_s_and_the_processor_s(fresh, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    first = library.built()
    assert library.built() == first
    fresh.setattr("jaxlib.__version__", "another")
    second = library.built()
    fresh.setattr(library, "cpu_features", lambda: "Apple M9")
    third = library.built()
    assert len({first, second, third}) == 3
    assert {path.name for path in first.parent.iterdir()} == {"lock", first.name, second.name, third.name}


def test_what_failed_or_killed_compilations_leave_is_removed(fresh, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    folder = tmp_path / LIBRARY.parent.relative_to(LIBRARY.parents[2])
    (folder / "build-killed").mkdir(parents=True)
    (folder / "build-killed/layers.o").touch()
    with pytest.raises(library.Unavailable, match=r"c\+\+ failed"):
        library.built()
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_mac_is_known_by_its_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(features.platform, "processor", lambda: "arm")
    program = tmp_path / "sysctl"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    names = []
    for brand in ("Apple M1", "Apple M2 Pro"):
        program.write_text(f'#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo "{brand}"\n')
        program.chmod(0o755)
        names.append(features.cpu_features.__wrapped__())
    assert names == ["Apple M1", "Apple M2 Pro"]
    program.write_text("#!/bin/sh\nexit 1\n")
    assert features.cpu_features.__wrapped__() == "arm"


def test_kernels_that_compute_something_else_are_not_used(monkeypatch, caplog, tmp_path):
    def wrong(*args):
        found = dispatch.REFERENCES.kv_decode(*args)
        return found._replace(lse=found.lse + 1)

    monkeypatch.setattr("apt_jax.attention.selection.CPU_KERNELS", calls.KERNELS._replace(kv_decode=wrong))
    monkeypatch.setattr(library, "register", lambda: tmp_path / "kernels.so")
    assert select("auto") is None
    assert "kv_decode differs from its reference" in caplog.text


def test_a_check_that_was_passed_is_not_repeated(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "register", lambda: tmp_path / "kernels.so")
    assert select("native") is calls.KERNELS
    monkeypatch.setattr(dispatch, "self_check", lambda *args, **kwargs: "it ran again")
    assert select("native") is calls.KERNELS
