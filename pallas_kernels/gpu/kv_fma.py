"""Decode attention over cached keys and values on NVIDIA GPUs without tensor cores, in Pallas Mosaic GPU.

For what `gpu_kv_decode.py` cannot do: float32, which tensor cores multiply only in shorter formats, and GPUs without
wgmma. A page of keys is a matrix `[S*N, H]` of (token, head) rows, contiguous in memory. A CUDA block walks over tiles
of 32 such rows, loaded straight into registers, at a stride of whole tokens, so that each of the 32 rows meets the same
head again and again, and keeps a softmax of its own: no shared memory, no waiting, and no sums but those over the
columns of a row. XLA merges the rows of a head by log-sum-exp.

Shape letters as in `reference.py`; T tokens in one stride, J tiles of 32 rows in a stride (T*N = 32*J).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.pallas_kernels.gpu import kv_fma_int8
from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.reference import NEVER, Partial

_BLOCKS_WANTED = 4 * 132  # four CUDA blocks on each SM of an H200
_SHORTEST_SPLIT = 64  # tokens


def kv_decode_attention(
    q: jax.Array,
    pool: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    length: jax.Array,
    *,
    scales: jax.Array | None = None,
    split_tokens: int | None = None,
    strides_at_once: int = 2,
    interpret: object = None,
) -> Partial:
    """One query per row over the row's cached keys and values; as `reference.kv_decode_attention`. Pure.

    Args:
        q: `[R, N, H]`, already scaled.
        pool: `[L*P, S, D]`, float32, bfloat16 or float16; products and sums are float32. int8 with `scales` goes to
            `kv_fma_int8.py`.
        key_blocks, value_blocks: int32 `[R, W]`.
        length: int32 `[R]`.
        split_tokens: context that one CUDA block reads; None chooses enough blocks to fill a GPU.
        strides_at_once: whose loads are in flight together. Ampere and Ada want 1: jax 0.12 has kernels assembled for
            linking, and then the sums over lanes are calls there, across which half of the registers must be saved.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Returns:
        float32 out `[R, N, H]` and lse `[R, N]`.

    Raises:
        NotImplementedError: a block size or head shape that the kernel does not handle.
    """
    if scales is not None:
        return kv_fma_int8.kv_decode_attention(
            q, pool, key_blocks, value_blocks, length, scales=scales, split_tokens=split_tokens,
            tiles_at_once=strides_at_once, interpret=interpret,
        )  # fmt: skip
    R, N, H = q.shape
    _, S, D = pool.shape
    W = key_blocks.shape[1]
    if N * H != D:
        raise ValueError(f"queries are {N * H} wide, the pool's vectors {D}")
    T = gpu_pages.TILE_ROWS // math.gcd(N, gpu_pages.TILE_ROWS)
    if S % T or H % 16:
        raise NotImplementedError(
            f"block_size={S} must be a multiple of {T} for {N} heads, and head_dim={H} of 16; "
            "set --block-size, or --attention-backend xla"
        )
    J = T * N // gpu_pages.TILE_ROWS
    longest = split_tokens or max(-(-W * S * R * J // _BLOCKS_WANTED), _SHORTEST_SPLIT)
    split, splits = gpu_pages.splits_of(longest, W, S)
    kernel = plgpu.kernel(
        functools.partial(_body, split=split, stride_tokens=T, heads=N, block_size=S, strides_at_once=strides_at_once),
        out_type=[
            jax.ShapeDtypeStruct((R, splits, J, gpu_pages.TILE_ROWS, H), jnp.float32),
            jax.ShapeDtypeStruct((R, splits, J, gpu_pages.TILE_ROWS), jnp.float32),
        ],
        grid=(R, splits, J),
        grid_names=("row", "split", "tile"),
        compiler_params=gpu_pages.compiler(pool.dtype),
        interpret=interpret,
    )
    queries = jnp.tile(q.astype(jnp.float32), (1, T, 1)).reshape(R, J, gpu_pages.TILE_ROWS, H)
    out, lse = kernel(queries, pool.reshape(-1, S * N, H), key_blocks, value_blocks, length)
    out, lse = out.reshape(R, splits * T, N, H), lse.reshape(R, splits * T, N)
    return gpu_pages.merge_splits(out, lse, length, split, parts=T)


def _body(  # type: ignore[no-untyped-def]
    q, pool, key_blocks, value_blocks, length, out, lse, *, split, stride_tokens, heads, block_size, strides_at_once
):
    """One CUDA block. q `[R, J, 32, H]`, pool `[L*P, S*N, H]`, out `[R, splits, J, 32, H]`, all in GMEM."""
    row, part, tile = lax.axis_index("row"), lax.axis_index("split"), lax.axis_index("tile")
    shape = out.shape[3:]
    layout = gpu_pages.rows_layout()
    per_row = layout.reduce(1)
    todo = jnp.minimum(length[row] - part * split, split)
    stride_rows = stride_tokens * heads
    strides = pl.cdiv(todo, stride_tokens)
    first_page = part * (split // block_size)
    strides_in_page = block_size // stride_tokens

    def wide(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), layout)

    def load(blocks: Any, stride: jax.Array) -> jax.Array:
        block = blocks[row, first_page + lax.div(stride, strides_in_page)]
        start = lax.rem(stride, strides_in_page) * stride_rows + tile * gpu_pages.TILE_ROWS
        loaded = plgpu.load(pool.at[block, pl.ds(start, gpu_pages.TILE_ROWS), :], layout=layout, optimized=False)
        return loaded.astype(jnp.float32)

    @pl.when(todo > 0)
    def _() -> None:
        queries = plgpu.load(q.at[row, tile], layout=layout, optimized=False)
        at = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=per_row)
        at_wide = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

        def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            now = [number * strides_at_once + i for i in range(strides_at_once)]  # strides
            # past the end the last valid rows are read again
            keys, values = ([load(b, jnp.minimum(t, strides - 1)) for t in now] for b in (key_blocks, value_blocks))
            valid = [
                todo * heads - t * stride_rows - tile * gpu_pages.TILE_ROWS for t in now
            ]  # rows, from the first on
            scores = [plgpu.layout_cast((k * queries).sum(axis=1), per_row) for k in keys]
            scores = [jnp.where(at < n, s, NEVER) for n, s in zip(valid, scores, strict=True)]
            new_top = functools.reduce(jnp.maximum, scores, top)
            keep = jnp.exp(top - new_top)
            total, acc = total * keep, acc * wide(keep)
            for n, s, v in zip(valid, scores, values, strict=True):
                weight = jnp.where(at < n, jnp.exp(s - new_top), 0.0)
                total += weight
                acc += wide(weight) * jnp.where(at_wide < n, v, 0.0)  # a zero weight does not silence a NaN
            return new_top, total, acc

        start = (
            plgpu.layout_cast(jnp.full(shape[:1], NEVER, jnp.float32), per_row),
            plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), per_row),
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout),
        )
        top, total, acc = lax.fori_loop(0, pl.cdiv(strides, strides_at_once), step, start)
        some = total > 0.0
        total = jnp.where(some, total, 1.0)
        out.at[row, part, tile][...] = acc / wide(total)
        lse.at[row, part, tile][...] = jnp.where(some, top + jnp.log(total), NEVER)
