"""TPU kernels for more rows or tokens than SMEM holds the tables of: several calls, with the results of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.pallas_kernels import dispatch, reference
from apt_jax.pallas_kernels.tpu import paging as tpu_paging
from tests.kernels.test_kernels_tpu_write import check as check_write
from tests.support.kernel_cases import assert_close, make_case, prefix_arguments

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMEM_BYTES = 2**20
LENGTHS = (33, 0, 8, 1, 64)


@pytest.mark.parametrize("num_tables", [1, 2])
@pytest.mark.parametrize(("rows", "pages"), [(1024, 128), (512, 256), (1, 8), (64, 128), (4096, 100), (257, 2048)])
def test_groups_hold_all_rows_and_fit(rows, pages, num_tables):
    groups = tpu_paging.row_groups(rows, pages, num_tables)
    assert [row for group in groups for row in range(rows)[group]] == list(range(rows))
    sizes = [group.stop - group.start for group in groups]
    assert max(sizes) - min(sizes) <= 1
    lines = -(-pages // 128) * 128
    assert max(sizes) * lines * 4 * num_tables <= SMEM_BYTES // 2
    assert len(groups) == 1 or (max(sizes) + 1) * (len(groups) - 1) <= rows, "no more groups than needed"


@pytest.fixture
def two_rows_at_once(monkeypatch):
    monkeypatch.setattr(tpu_paging, "TABLE_BYTES", 2 * 2 * 128 * 4)


def compiled(name):
    return jax.jit(getattr(dispatch.tpu_kernels("tpu", cores=1, interpret=True), name), compiler_options=QUICK)


@pytest.mark.parametrize("kind", ["kv", "hidden"])
def test_decode_attention_in_groups_of_rows(two_rows_at_once, kind):
    case = make_case(LENGTHS, heads=3, head_dim=20, dtype=jnp.float32, block_size=8, seed=1)
    if kind == "kv":
        args = case.q, case.pool, case.key_or_hidden_blocks, case.value_blocks, case.length
        found, expected = compiled("kv_decode")(*args), reference.kv_decode_attention(*args)
    else:
        args = case.q_wide, case.pool, case.key_or_hidden_blocks, case.length
        found, expected = compiled("hidden_decode")(*args), reference.hidden_decode_attention(*args)
        empty = (case.length == 0)[:, None, None]
        found = found._replace(out=jnp.where(empty, 0, found.out))
    assert_close(found, expected, jnp.float32)


@pytest.mark.parametrize("way", ["kv", "hidden"])
def test_prefix_attention_in_groups_of_rows(two_rows_at_once, way):
    counts, gaps = (5, 3, 9, 0, 4), (1, 0, 2, 0, 1)
    (queries, *rest), mine = prefix_arguments(
        way, LENGTHS, counts, gaps, heads=2, head_dim=16, dtype=jnp.float32, block_size=8, slots=40, table_pages=12,
        seed=0,
    )  # fmt: skip
    found = compiled(f"{way}_prefix")(queries, *rest)
    expected = functools.partial(getattr(reference, f"{way}_prefix_attention"), queries)(*rest)
    mine = np.asarray(mine)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(got)[mine], np.asarray(wanted)[mine], rtol=2e-4, atol=2e-4)


def test_the_cache_is_written_in_parts(monkeypatch):
    monkeypatch.setattr(tpu_paging, "TABLE_BYTES", 1)
    monkeypatch.setattr("tests.kernels.test_kernels_tpu_write.write", check_write.__globals__["write"].__wrapped__)
    check_write([(3, 70, False, 2), (15, 1, False, 0), (8, 61, True, 3), (0, 9, False, 1)], slots=150)
