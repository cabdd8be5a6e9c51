"""The kernels interpreted on a CPU, in shapes that hypothesis draws: a program for each, too slow for `make test`."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from apt_jax.pallas_kernels.tpu import hidden_prefix as tpu_hidden_prefix
from apt_jax.pallas_kernels.tpu import kv_prefix as tpu_kv_prefix
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from tests.aot.tpu_compiler import MISSING
from tests.kernels import test_kernels_gpu as gpu
from tests.kernels import test_kernels_tpu as tpu
from tests.kernels import test_kernels_tpu_prefix as tpu_prefix
from tests.support.kernel_cases import make_case

if MISSING:  # they need no compiler, but a minute and a half: `make test-aot` runs them
    pytest.skip(MISSING, allow_module_level=True)

pytestmark = pytest.mark.timeout(1500)
FEW = settings(max_examples=6, deadline=None, derandomize=True)
DTYPES = st.sampled_from([jnp.bfloat16, jnp.float32])


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Several chunks and tiles for contexts of a hundred tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_paging, "MAX_CHUNK_TOKENS", tpu.CHUNK)
        patch.setattr(tpu_kv_prefix, "TILE", tpu_prefix.TILE)
        patch.setattr(tpu_hidden_prefix, "tile_queries", lambda width: tpu_prefix.TILE)
        yield


@st.composite
def one_long_among_short(draw: st.DrawFn, block_size: int, longest: int) -> list[int]:
    """Rows at the edges of blocks, and somewhere among them one that is many times longer."""
    edges = st.sampled_from([0, 1, block_size - 1, block_size, block_size + 1])
    lengths = draw(st.lists(edges, min_size=5, max_size=5))
    lengths.insert(draw(st.integers(0, 5)), draw(st.integers(longest // 2, longest)))
    return lengths


def draw_case(data: st.DataObject, shapes: list[tuple[int, int]], block_sizes: list[int], longest: int):
    heads, head_dim = data.draw(st.sampled_from(shapes), "heads, head_dim")
    block_size, dtype = data.draw(st.sampled_from(block_sizes), "block_size"), data.draw(DTYPES, "dtype")
    lengths = data.draw(one_long_among_short(block_size, longest), "lengths")
    seed = data.draw(st.integers(0, 2**31), "seed")
    return make_case(lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=dtype, seed=seed)


@FEW
@given(data=st.data())
def test_gpu_keys_and_values(data):
    """float32 goes to the kernel without tensor cores; as many splits as chunks, or one."""
    case = draw_case(data, [(4, 64), (8, 64), (4, 80), (4, 128)], [8, 16, 64, 128], longest=300)
    gpu.check_kv(case, gpu.kv_kernel(data.draw(st.sampled_from([64, 512]), "split")))


@FEW
@given(data=st.data())
def test_gpu_keys_and_values_without_tensor_cores(data):
    """One stride at once as on Ampere and Ada, or two."""
    case = draw_case(data, [(12, 64), (4, 80), (8, 128)], [8, 16, 32], longest=150)
    gpu.check_kv(case, gpu.fma_kernel(data.draw(st.sampled_from([None, 32]), "split"), data.draw(st.integers(1, 2))))


@FEW
@given(data=st.data())
def test_gpu_hidden_vectors(data):
    gpu.check_hidden(draw_case(data, [(1, 64), (5, 64), (4, 80), (3, 128), (9, 64)], [8, 16, 64, 128], longest=300))


@FEW
@given(data=st.data())
@pytest.mark.parametrize("check", [tpu.check_kv, tpu.check_hidden], ids=["kv", "hidden"])
def test_tpu_decode(check, data):
    shapes = [(1, 64), (3, 8), (12, 64), (9, 80), (5, 128)]
    check(draw_case(data, shapes, [8, 16, 32, 128], longest=300), cores=data.draw(st.integers(1, 2), "cores"))


@FEW
@given(data=st.data())
@tpu_prefix.WAYS
def test_tpu_prefix(way, data):
    heads, head_dim = data.draw(st.sampled_from([(2, 64), (8, 80), (3, 128), (5, 16)]), "heads, head_dim")
    block_size, dtype = data.draw(st.sampled_from([8, 16, 32]), "block_size"), data.draw(DTYPES, "dtype")
    lengths = data.draw(one_long_among_short(block_size, 96), "lengths")
    counts = data.draw(st.lists(st.integers(0, 9), min_size=5, max_size=5), "counts")
    counts.insert(data.draw(st.integers(0, 5)), 30)
    gaps = data.draw(st.lists(st.integers(0, 1), min_size=6, max_size=6), "gaps")
    shape = {"heads": heads, "head_dim": head_dim, "dtype": dtype, "block_size": block_size, "slots": 96}
    tpu_prefix.check(way, lengths, counts, gaps, **shape)


def test_hidden_prefix_has_no_races_and_no_read_before_a_write():
    """`test_kernels_tpu_prefix.py` does the same for keys and values."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")
    tpu_prefix.check("hidden", [0, 70, 17], [3, 15, 4], [0, 0, 2], heads=2, head_dim=8, slots=24, interpret=params)
    assert not interpret_pallas_call.races.races_found
