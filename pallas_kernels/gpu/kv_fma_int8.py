"""Decode attention over int8 keys and values on NVIDIA GPUs without wgmma, in Pallas Mosaic GPU.

As `kv_fma.py`, but a tile is 32 tokens of one head, whose scales lie side by side: codes become float32 in registers, a
key's scale goes into its score and a value's into its weight. Each of the 32 rows of a tile keeps a softmax of its own;
a CUDA block merges them at its end, and XLA the splits of a row. Codes are finite, so only scales have to be masked.

Shape letters as in `reference.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.reference import NEVER, Partial

TILE_TOKENS = gpu_pages.TILE_ROWS
_BLOCKS_WANTED = 8 * 132  # eight CUDA blocks on each SM of an H200
_SHORTEST_SPLIT = 128  # tokens
_COLUMNS = 32  # Mosaic writes whole lines of 128 bytes


def kv_decode_attention(
    q: jax.Array,
    pool: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    length: jax.Array,
    *,
    scales: jax.Array,
    split_tokens: int | None = None,
    tiles_at_once: int = 2,
    interpret: object = None,
) -> Partial:
    """One query per row over the row's cached keys and values; as `reference.kv_decode_attention`. Pure.

    Args:
        q: `[R, N, H]`, already scaled.
        pool: int8 `[L*P, S, D]`.
        key_blocks, value_blocks: int32 `[R, W]`.
        length: int32 `[R]`.
        scales: float32 `[L*P, 1, X]`, X at least N*S, head by head.
        split_tokens: context that one CUDA block reads; None chooses enough blocks to fill a GPU.
        tiles_at_once: whose loads are in flight together; see `strides_at_once` in `kv_fma.py`.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Returns:
        float32 out `[R, N, H]` and lse `[R, N]`.

    Raises:
        NotImplementedError: a block size or head shape that the kernel does not handle.
    """
    R, N, H = q.shape
    blocks, S, D = pool.shape
    W = key_blocks.shape[1]
    if N * H != D:
        raise ValueError(f"queries are {N * H} wide, the pool's vectors {D}")
    if S % TILE_TOKENS or H % _COLUMNS:
        raise NotImplementedError(
            f"block_size={S} of an int8 cache must be a multiple of {TILE_TOKENS}, and head_dim={H} of {_COLUMNS}; "
            "set --block-size 32, or --attention-backend xla"
        )
    longest = split_tokens or max(-(-W * S * R * N // _BLOCKS_WANTED), _SHORTEST_SPLIT)
    split, splits = gpu_pages.splits_of(longest, W, S)
    kernel = plgpu.kernel(
        functools.partial(_body, split=split, block_size=S, tiles_at_once=tiles_at_once),
        out_type=[jax.ShapeDtypeStruct((R, splits, N, H), jnp.float32)] * 2,
        grid=(R, splits, N),
        grid_names=("row", "split", "head"),
        compiler_params=gpu_pages.compiler(q.dtype),
        interpret=interpret,
    )
    by_head = gpu_pages.scales_by_head(scales, N, S)
    out, lse = kernel(q.astype(jnp.float32), pool.reshape(blocks, S, N, H), by_head, key_blocks, value_blocks, length)
    return gpu_pages.merge_splits(out, lse[..., 0], length, split)


def _body(  # type: ignore[no-untyped-def]
    q, pool, scales, key_blocks, value_blocks, length, out, lse, *, split, block_size, tiles_at_once
):
    """One CUDA block. pool `[L*P, S, N, H]`, scales `[L*P, N, S]`, out and lse `[R, splits, N, H]`, all in GMEM."""
    row, part, head = lax.axis_index("row"), lax.axis_index("split"), lax.axis_index("head")
    shape = TILE_TOKENS, out.shape[3]
    layout = gpu_pages.rows_layout()
    per_token, per_column = layout.reduce(1), layout.reduce(0)
    todo = jnp.minimum(length[row] - part * split, split)
    tiles = pl.cdiv(todo, TILE_TOKENS)
    first_page = part * (split // block_size)
    tiles_in_page = block_size // TILE_TOKENS

    def over_columns(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), layout)

    def over_tokens(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [1]), layout)

    def load(blocks: Any, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A tile's codes as float32, and their scales."""
        block = blocks[row, first_page + lax.div(tile, tiles_in_page)]
        tokens = pl.ds(lax.rem(tile, tiles_in_page) * TILE_TOKENS, TILE_TOKENS)
        codes = plgpu.load(pool.at[block, tokens, head, :], layout=layout, optimized=False)
        own_scales = plgpu.load(scales.at[block, head, tokens], layout=per_token, optimized=False)
        return codes.astype(jnp.float32), own_scales

    @pl.when(todo > 0)
    def _() -> None:
        query = over_tokens(plgpu.load(q.at[row, head], layout=per_column, optimized=False))
        at = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=per_token)

        def step(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, acc = carry
            now = [number * tiles_at_once + i for i in range(tiles_at_once)]
            # past the end the last valid tile is read again
            keys, values = ([load(b, jnp.minimum(t, tiles - 1)) for t in now] for b in (key_blocks, value_blocks))
            valid = [todo - t * TILE_TOKENS for t in now]
            scores = [plgpu.layout_cast((codes * query).sum(axis=1), per_token) * own for codes, own in keys]
            scores = [jnp.where(at < n, s, NEVER) for n, s in zip(valid, scores, strict=True)]
            new_top = functools.reduce(jnp.maximum, scores, top)
            keep = jnp.exp(top - new_top)
            total, acc = total * keep, acc * over_columns(keep)
            for n, s, (codes, own) in zip(valid, scores, values, strict=True):
                weight = jnp.exp(s - new_top)
                total += jnp.where(at < n, weight, 0.0)
                acc += over_columns(jnp.where(at < n, weight * own, 0.0)) * codes
            return new_top, total, acc

        start = (
            plgpu.layout_cast(jnp.full(shape[:1], NEVER, jnp.float32), per_token),
            plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), per_token),
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout),
        )
        top, total, acc = lax.fori_loop(0, pl.cdiv(tiles, tiles_at_once), step, start)
        # the 32 softmaxes as one
        highest = top.max()
        weight = jnp.exp(top - highest)
        whole = (total * weight).sum()
        out.at[row, part, head][...] = plgpu.layout_cast((acc * over_columns(weight)).sum(axis=0), per_column) / whole
        lse.at[row, part, head][...] = plgpu.layout_cast(jnp.full(shape[1:], highest + jnp.log(whole)), per_column)
