"""Decode attention over cached keys and values on NVIDIA Hopper GPUs, in Pallas Mosaic GPU.

One CUDA block handles one row, one group of heads and one split of the context (flash-decoding). A memory warpgroup
streams pages, cut to the group's columns, through a ring of shared-memory slots (K, V, K, V, ...); a compute warpgroup
follows with an online softmax. Both products run on tensor cores with the tokens, or the columns, in the 64-row
dimension of wgmma and the heads in the other one, which may be as narrow as 8: `scores [C, heads] = K q^T` with q laid
out block-diagonally over the group's columns, and `out^T [columns, heads] = V^T P`. The diagonal blocks are the result.
wgmma reads the page from shared memory once whatever the number of heads, so the zeros cost no bandwidth. An int8 page
is first decoded, into another place of shared memory.

Shape letters as in `reference.py`; G heads in a group, E = G*H columns of a group, C tokens in a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.pallas_kernels.gpu import kv_fma as gpu_kv_fma
from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.gpu.pages import CHUNK_TOKENS, PADDED_HEADS, TILES, TILES_8
from apt_jax.pallas_kernels.reference import NEVER, Partial

SPLIT_TOKENS = 512  # context of one CUDA block: small enough to balance, large enough to amortise its start
_RING_BYTES = 96 << 10  # with two blocks per SM, 192 KiB of loads in flight
_WGMMA = plgpu.Layout.WGMMA


def heads_in_group(num_heads: int, head_dim: int) -> int:
    """G: heads whose columns one CUDA block reads: a multiple of 64 columns, about 256 of them, at most 8 heads.

    Raises:
        NotImplementedError: no number of heads fits.
    """
    fits = [g for g in range(1, PADDED_HEADS + 1) if num_heads % g == 0 and g * head_dim % gpu_pages.TILE_COLUMNS == 0]
    if not fits:
        raise NotImplementedError(
            f"{num_heads=} of {head_dim=} do not group into multiples of {gpu_pages.TILE_COLUMNS} columns; "
            "use --attention-backend xla"
        )
    return min(fits, key=lambda g: abs(g * head_dim - 256))


def kv_decode_attention(
    q: jax.Array,
    pool: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    length: jax.Array,
    *,
    scales: jax.Array | None = None,
    split_tokens: int = SPLIT_TOKENS,
    interpret: object = None,
) -> Partial:
    """One query per row over the row's cached keys and values; as `reference.kv_decode_attention`. Pure.

    Args:
        q: `[R, N, H]`, already scaled; cast to the pool's dtype, unless that is int8.
        pool: `[L*P, S, D]`, bfloat16, float16 or int8 with `scales`; float32 goes to `kv_fma.py`, which multiplies it
            exactly.
        key_blocks, value_blocks: int32 `[R, W]`.
        length: int32 `[R]`.
        split_tokens: context that one CUDA block reads.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Returns:
        float32 out `[R, N, H]` and lse `[R, N]`.

    Raises:
        NotImplementedError: a dtype, block size or head shape that the kernel does not handle.
    """
    R, N, H = q.shape
    S = pool.shape[1]
    if pool.dtype == jnp.float32:
        return gpu_kv_fma.kv_decode_attention(q, pool, key_blocks, value_blocks, length, interpret=interpret)
    is_coded = scales is not None
    gpu_pages.check_pool(pool, N * H, q.dtype, is_coded)
    operand = q.dtype if is_coded else pool.dtype
    G = heads_in_group(N, H)
    split = gpu_pages.split_tokens(key_blocks.shape[1], S, split_tokens)
    (key_blocks, splits), (value_blocks, _) = (gpu_pages.pad_table(b, split // S) for b in (key_blocks, value_blocks))
    kernel = plgpu.kernel(
        functools.partial(_body, split=split, heads=G, head_dim=H, block_size=S),
        out_type=[
            jax.ShapeDtypeStruct((R, splits, N * H), jnp.float32),
            jax.ShapeDtypeStruct((R, splits, N // G, PADDED_HEADS), jnp.float32),
        ],
        grid=(R, splits, N // G),
        grid_names=("row", "split", "group"),
        num_threads=2,
        thread_name="wg",
        scratch_types=_scratch(G, H, gpu_pages.copied_pages(split // S), S, pool.dtype, operand),
        compiler_params=gpu_pages.COMPILER,
        interpret=interpret,
    )
    by_head = jnp.zeros((1, 1, CHUNK_TOKENS)) if scales is None else gpu_pages.scales_by_head(scales, N, S)
    out, lse = kernel(_block_diagonal(q.astype(operand), G), pool, by_head, key_blocks, value_blocks, length)
    return gpu_pages.merge_splits(out.reshape(R, splits, N, H), lse[..., :G].reshape(R, splits, N), length, split)


def _block_diagonal(q: jax.Array, group: int) -> jax.Array:
    """q `[R, N, H]` as `[R, N/G, 8, G*H]`: row g of a group holds its head at columns g*H, zeros elsewhere."""
    R, N, H = q.shape
    grouped = q.reshape(R, N // group, group, 1, H)
    wide = jnp.where(jnp.eye(group, dtype=jnp.bool_)[..., None], grouped, 0).reshape(R, N // group, group, group * H)
    return jnp.pad(wide, ((0, 0), (0, 0), (0, PADDED_HEADS - group), (0, 0)))


def _scratch(
    heads: int, head_dim: int, pages: int, block_size: int, dtype: jnp.dtype, operand: jnp.dtype
) -> dict[str, Any]:
    columns, is_coded = heads * head_dim, dtype == jnp.int8
    slot_bytes = CHUNK_TOKENS * columns * dtype.itemsize
    slots = max(-(-_RING_BYTES // 2 // slot_bytes), 2) if is_coded else max(-(-_RING_BYTES // slot_bytes), 2)
    for_codes: dict[str, Any] = {
        "scale_ring": plgpu.SMEM((slots, heads, CHUNK_TOKENS), jnp.float32),
        "decoded_s": plgpu.SMEM((CHUNK_TOKENS, columns), operand, transforms=TILES),
    }
    return {
        **(for_codes if is_coded else {}),
        "q_s": plgpu.SMEM((PADDED_HEADS, columns), operand, transforms=TILES),
        "key_pages": plgpu.SMEM((pages,), jnp.int32),
        "value_pages": plgpu.SMEM((pages,), jnp.int32),
        "ring": plgpu.SMEM((slots, CHUNK_TOKENS, columns), dtype, transforms=TILES_8 if is_coded else TILES),
        "weights_s": plgpu.SMEM((PADDED_HEADS, CHUNK_TOKENS), operand, transforms=TILES),
        "out_s": plgpu.SMEM((columns,), jnp.float32),
        "lse_s": plgpu.SMEM((PADDED_HEADS,), jnp.float32),
        "q_ready": plgpu.Barrier(),
        "table_ready": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_arrivals=gpu_pages.copies_per_chunk(block_size) + is_coded, num_barriers=slots),
        "empty": plgpu.Barrier(num_barriers=slots),
    }


def _body(  # type: ignore[no-untyped-def]
    q, pool, scales, key_blocks, value_blocks, length, out, lse, *, q_s, key_pages, value_pages, ring, weights_s,
    out_s, lse_s, q_ready, table_ready, full, empty, split, heads, head_dim, block_size, scale_ring=None,
    decoded_s=None,
):  # fmt: skip
    """One CUDA block. q `[R, N/G, 8, E]`, scales `[L*P, N, S]`, out `[R, splits, D]`, lse `[R, splits, N/G, 8]`."""
    row, part, group = lax.axis_index("row"), lax.axis_index("split"), lax.axis_index("group")
    columns = heads * head_dim
    slots, is_coded = ring.shape[0], ring.dtype == jnp.int8
    todo = jnp.minimum(length[row] - part * split, split)  # tokens of this block
    chunks = pl.cdiv(todo, CHUNK_TOKENS)

    @pl.when((todo > 0) & (lax.axis_index("wg") == 1))
    def _memory() -> None:
        own = pl.ds(part * (split // block_size), key_pages.shape[0])
        tables = (key_blocks.at[row, own], key_pages), (value_blocks.at[row, own], value_pages)
        at = pl.ds(group * columns, columns)
        own_scales = (scales, scale_ring, pl.ds(group * heads, heads)) if is_coded else None
        gpu_pages.stream_keys_values(pool, tables, table_ready, ring, full, empty, todo, block_size, at, own_scales)

    @pl.when((todo > 0) & (lax.axis_index("wg") == 0))
    def _compute() -> None:
        plgpu.copy_gmem_to_smem(q.at[row, group], q_s, q_ready)
        plgpu.barrier_wait(q_ready)

        def operand(slot: jax.Array, left: jax.Array) -> Any:
            """What wgmma reads of a slot: the slot itself, or decoded numbers; then the slot is free."""
            if not is_coded:
                return ring.at[slot]
            gpu_pages.store_decoded(ring.at[slot], scale_ring.at[slot], left, decoded_s, heads)
            plgpu.barrier_arrive(empty.at[slot])
            return decoded_s

        def step(chunk: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            left = todo - chunk * CHUNK_TOKENS
            slot = lax.rem(2 * chunk, slots)
            plgpu.barrier_wait(full.at[slot])
            scores = gpu_pages.product((CHUNK_TOKENS, PADDED_HEADS), (operand(slot, left), q_s.T))
            if not is_coded:
                plgpu.barrier_arrive(empty.at[slot])
            valid = gpu_pages.valid_rows(left, scores.shape)
            scores = jnp.where(valid, scores, NEVER)
            new_top = jnp.maximum(top, gpu_pages.column(scores.max(axis=0)))
            weights = jnp.exp(scores - gpu_pages.over_rows(new_top, scores.shape))
            keep = jnp.exp(top - new_top)
            total = total * keep + gpu_pages.column(weights.sum(axis=0))
            weights_s.T[...] = plgpu.layout_cast(weights.astype(weights_s.dtype), _WGMMA)
            plgpu.commit_smem()
            slot = lax.rem(2 * chunk + 1, slots)
            plgpu.barrier_wait(full.at[slot])
            if not is_coded:
                gpu_pages.clear_tail(ring.at[slot], left)
            added = gpu_pages.product((columns, PADDED_HEADS), (operand(slot, left).T, weights_s.T))
            if not is_coded:
                plgpu.barrier_arrive(empty.at[slot])
            return new_top, total, acc * gpu_pages.over_rows(keep, acc.shape) + added

        start = (
            gpu_pages.column(jnp.full((PADDED_HEADS,), NEVER, jnp.float32)),
            gpu_pages.column(jnp.zeros((PADDED_HEADS,), jnp.float32)),
            plgpu.layout_cast(jnp.zeros((columns, PADDED_HEADS), jnp.float32), _WGMMA),
        )
        top, total, acc = lax.fori_loop(0, chunks, step, start)
        out_s[...] = _diagonal(acc / gpu_pages.over_rows(total, acc.shape), head_dim)
        lse_s[...] = top + jnp.log(total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out.at[row, part, pl.ds(group * columns, columns)])
        plgpu.copy_smem_to_gmem(lse_s, lse.at[row, part, group])
        plgpu.wait_smem_to_gmem(0)


def _diagonal(acc: jax.Array, head_dim: int) -> jax.Array:
    """`[E]` from `[E, 8]`: every column of D keeps the result of its own head."""
    column = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=_WGMMA)
    head = plgpu.broadcasted_iota(jnp.int32, acc.shape, 1, layout=_WGMMA)
    own = (column >= head * head_dim) & (column < (head + 1) * head_dim)
    return plgpu.layout_cast(jnp.where(own, acc, 0.0).sum(axis=1), _WGMMA.reduce(1))
