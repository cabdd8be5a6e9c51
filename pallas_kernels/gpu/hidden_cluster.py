"""Decode attention over cached hidden vectors on NVIDIA Hopper GPUs in one pass, by clusters of CUDA blocks.

What one SM cannot hold, an absorbed query and its result, a cluster of K SMs can: each block keeps its share of the
columns, of the query in shared memory and of the result in registers, and reads only these of the hidden vectors, once.
Scores need all columns, so in every chunk of 64 tokens

1. each block multiplies its columns, and sends the partial scores of every group of 8 heads to the group's owner,
   another block of the cluster, through distributed shared memory (`st.async`, counted by a barrier over there);
2. the owner adds up what it got and sends the sums to all blocks;
3. each block computes the same softmax, group by group, and adds weights times vectors to its columns of the result.

Blocks wait for each other only through these data: a block that has the sums knows that all partial scores were read,
and one that has all partial scores knows that the sums before them were. So buffers are single, and nothing else
synchronises.

Pallas' interpreter has no `st.async`. Interpreted, the same numbers go through global memory in the same order, with
cluster barriers in place of the counting ones (`_Mail`).

Shape letters as in `reference.py`; C tokens in a chunk, M heads padded to a multiple of 8, G = M/8 groups of heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from apt_jax.pallas_kernels.gpu import pages as gpu_pages
from apt_jax.pallas_kernels.gpu.pages import CHUNK_TOKENS, PADDED_HEADS, TILE_COLUMNS, TILES
from apt_jax.pallas_kernels.reference import NEVER, Partial

_WGMMA = plgpu.Layout.WGMMA
_WORKERS = 2  # warpgroups that compute; each takes half the columns of a tile
_TILE = _WORKERS * TILE_COLUMNS  # columns of a slot of the ring
_ACCUMULATORS = 104  # registers of a thread for its part of the result
_SMEM_BYTES = 222 << 10  # of 227 KiB that a block may have
_LARGEST_CLUSTER = 8  # what every Hopper GPU can place; a larger one aborts the process where it cannot
_GROUP_TILES: tuple[Any, ...] = (plgpu.TilingTransform((8, PADDED_HEADS)), plgpu.SwizzleTransform(32))  # type: ignore[abstract]
_BLOCKS_AT_ONCE = 128  # one an SM, of 132; clusters of 8 leave some over


def cluster_size(heads: int, width: int) -> int:
    """K: CUDA blocks that share a row of `heads` absorbed queries `width` wide: the fewest that hold it.

    Raises:
        NotImplementedError: no cluster can hold it, or its columns do not divide.
    """
    M = heads + -heads % PADDED_HEADS
    for size in (1, 2, 4, _LARGEST_CLUSTER):
        tiles = width // (size * _TILE)
        fits = tiles * M // _WORKERS <= _ACCUMULATORS and _slots(M, tiles * _TILE, size) > tiles
        if width % (size * _TILE) == 0 and size >= M // PADDED_HEADS and fits:
            return size
    raise NotImplementedError(
        f"no cluster of at most {_LARGEST_CLUSTER} CUDA blocks holds {heads} absorbed queries of {width} columns"
    )


def hidden_decode_attention(
    q_wide: jax.Array, pool: jax.Array, blocks: jax.Array, length: jax.Array, *, interpret: object = None
) -> Partial:
    """One absorbed query per row and head over hidden vectors; as `reference.hidden_decode_attention`. Pure.

    Args:
        q_wide: `[R, N, D]`, already scaled; cast to the pool's dtype.
        pool: `[L*P, S, D]`, bfloat16 or float16.
        blocks: int32 `[R, W]`.
        length: int32 `[R]`.
        interpret: None on a GPU, `plgpu.InterpretGPUParams()` elsewhere.

    Returns:
        float32 out `[R, N, D]` and lse `[R, N]`.

    Raises:
        NotImplementedError: a dtype, block size or shape that the kernel does not handle.
    """
    R, N, D = q_wide.shape
    S, W = pool.shape[1], blocks.shape[1]
    gpu_pages.check_pool(pool, D)
    if pool.dtype == jnp.float32:
        raise NotImplementedError(f"{pool.dtype=} is multiplied in two passes only, by gpu_hidden_decode")
    K = cluster_size(N, D)
    q_wide = jnp.pad(q_wide.astype(pool.dtype), ((0, 0), (0, -N % PADDED_HEADS), (0, 0)))
    M = q_wide.shape[1]
    wanted = max(_BLOCKS_AT_ONCE // (R * K), 1)
    split = gpu_pages.split_tokens(W, S, max(-(-W * S // wanted), 4 * CHUNK_TOKENS))
    table, splits = gpu_pages.pad_table(blocks, split // S)
    out_type = [jax.ShapeDtypeStruct((R, splits, M, D), jnp.float32), jax.ShapeDtypeStruct((R, splits, M), jnp.float32)]
    if interpret is not None:
        out_type += [jax.ShapeDtypeStruct((R, splits, K, *shape), jnp.float32) for shape in _mail_shapes(M, K)]
    kernel = plgpu.kernel(
        functools.partial(_body, split=split, block_size=S, interpreted=interpret is not None),
        out_type=out_type,
        grid=(R, splits),
        grid_names=("row", "split"),
        cluster=(K,),
        cluster_names=("slice",),
        num_threads=_WORKERS + 1,
        thread_name="wg",
        scratch_types=_scratch(M, D // K, K, gpu_pages.copied_pages(split // S), S, pool.dtype, interpret is not None),
        compiler_params=gpu_pages.COMPILER,
        interpret=interpret,
    )
    out, lse = kernel(q_wide, pool, table, length)[:2]
    if splits > 1:
        return gpu_pages.merge_splits(out[:, :, :N], lse[:, :, :N], length, split)
    some = (length > 0)[:, None]
    return Partial(jnp.where(some[..., None], out[:, 0, :N], 0), jnp.where(some, lse[:, 0, :N], NEVER))


def _mail_shapes(heads: int, cluster: int) -> list[tuple[int, ...]]:
    """Partial scores for a group from every warpgroup of the cluster; sums for every group."""
    return [
        (cluster * _WORKERS, CHUNK_TOKENS, PADDED_HEADS),
        (heads // PADDED_HEADS, CHUNK_TOKENS, PADDED_HEADS),
    ]


def _slots(heads: int, columns: int, cluster: int) -> int:
    """Tiles that fit into the rest of shared memory; at least a chunk's, and more keep loads in flight."""
    scores = sum(shape[0] for shape in _mail_shapes(heads, cluster)) * CHUNK_TOKENS * PADDED_HEADS
    fixed_bytes = 2 * heads * (columns + _WORKERS * CHUNK_TOKENS) + 4 * scores
    return min((_SMEM_BYTES - fixed_bytes) // (2 * CHUNK_TOKENS * _TILE), 2 * columns // _TILE + 2)


def _scratch(
    heads: int, columns: int, cluster: int, pages: int, block_size: int, dtype: jnp.dtype, interpreted: bool
) -> dict[str, Any]:
    mail = _mail_shapes(heads, cluster)
    slots = _slots(heads, columns, cluster)
    scratch: dict[str, Any] = {
        "pages": plgpu.SMEM((pages,), jnp.int32),
        "q_s": plgpu.SMEM((heads, columns), dtype, transforms=TILES),
        "ring": plgpu.SMEM((slots, CHUNK_TOKENS, _TILE), dtype, transforms=TILES),
        "weights_s": plgpu.SMEM((_WORKERS, heads, CHUNK_TOKENS), dtype, transforms=TILES),
        "top_s": plgpu.SMEM((_WORKERS, heads), jnp.float32),
        "total_s": plgpu.SMEM((_WORKERS, heads), jnp.float32),
        "keep_s": plgpu.SMEM((_WORKERS, heads), jnp.float32),
        "q_ready": plgpu.Barrier(),
        "table_ready": plgpu.Barrier(),
        "full": plgpu.Barrier(num_arrivals=gpu_pages.copies_per_chunk(block_size), num_barriers=slots),
        "empty": plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=slots),
    }
    if interpreted:
        barrier = plgpu.ClusterBarrier(collective_axes=("slice",), num_arrivals=_WORKERS)
        return scratch | {"partial_in": barrier, "sums_in": barrier}
    return scratch | {
        "partial_s": plgpu.SMEM(mail[0], jnp.float32, transforms=_GROUP_TILES),
        "sums_s": plgpu.SMEM(mail[1], jnp.float32, transforms=_GROUP_TILES),
        "partial_in": plgpu.Barrier(num_arrivals=mail[0][0]),
        "sums_in": plgpu.Barrier(num_arrivals=mail[1][0]),
    }


def _body(  # type: ignore[no-untyped-def]
    q_wide, pool, table, length, out, lse, *mail, pages, q_s, ring, weights_s, top_s, total_s, keep_s, q_ready,
    table_ready, full, empty, partial_in, sums_in, split, block_size, interpreted, partial_s=None, sums_s=None,
):  # fmt: skip
    """One CUDA block. q_wide `[R, M, D]`, out `[R, splits, M, D]`, lse `[R, splits, M]`, all in GMEM."""
    row, part = lax.axis_index("row"), lax.axis_index("split")
    block, worker = lax.axis_index("slice"), lax.axis_index("wg")
    M, columns = q_s.shape
    tiles, slots = columns // _TILE, ring.shape[0]
    todo = jnp.minimum(length[row] - part * split, split)
    chunks = jnp.maximum(pl.cdiv(todo, CHUNK_TOKENS), 0)
    block_column = block * columns
    if interpreted:
        partial_m, sums_m = (m.at[row, part] for m in mail)
        post = _Mail(partial_m, sums_m, partial_in, sums_in, interpreted=True)
    else:
        post = _Mail(partial_s, sums_s, partial_in, sums_in, interpreted=False)

    @pl.when((todo > 0) & (worker == _WORKERS))
    def _memory() -> None:
        plgpu.set_max_registers(56, action="decrease")
        first_page = part * (split // block_size)
        plgpu.copy_gmem_to_smem(table.at[row, pl.ds(first_page, pages.shape[0])], pages, table_ready)
        plgpu.copy_gmem_to_smem(q_wide.at[row, :, pl.ds(block_column, columns)], q_s, q_ready)
        plgpu.barrier_wait(table_ready)

        @pl.loop(0, chunks * tiles)
        def _(load: jax.Array) -> None:
            slot = lax.rem(load, slots)

            @pl.when(load >= slots)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            at = pl.ds(block_column + lax.rem(load, tiles) * _TILE, _TILE)
            gpu_pages.load_chunk(pool, pages, ring.at[slot], full.at[slot], lax.div(load, tiles), todo, block_size, at)

        gpu_pages.drain(empty, chunks * tiles)

    @pl.when((todo > 0) & (worker < _WORKERS))
    def _compute() -> None:
        plgpu.set_max_registers(224, action="increase")  # jax 0.12 lets it be ignored; there 168 suffice
        plgpu.barrier_wait(q_ready)

        def step(chunk: jax.Array, acc: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            first_column = worker * TILE_COLUMNS

            def multiply(scores: Any) -> jax.Array:
                @pl.loop(0, tiles)  # unrolled, it would keep the addresses of all of q_s in registers
                def _(tile: jax.Array) -> None:
                    slot = lax.rem(chunk * tiles + tile, slots)
                    plgpu.barrier_wait(full.at[slot])
                    vectors = ring.at[slot, :, pl.ds(first_column, TILE_COLUMNS)]
                    plgpu.wgmma(scores, vectors, q_s.at[:, pl.ds(tile * _TILE + first_column, TILE_COLUMNS)].T)
                    plgpu.wgmma_wait(0)

                return scores[...]

            partial = pl.run_scoped(multiply, plgpu.ACC((CHUNK_TOKENS, M), jnp.float32))
            post.exchange(plgpu.layout_cast(partial, _WGMMA), block, worker)
            left = todo - chunk * CHUNK_TOKENS

            @pl.loop(0, M // PADDED_HEADS)  # not all heads at once, since registers are short
            def _(group: jax.Array) -> None:
                heads = pl.ds(pl.multiple_of(group * PADDED_HEADS, PADDED_HEADS), PADDED_HEADS)
                scores = post.sums(group, block)
                scores = jnp.where(gpu_pages.valid_rows(left, scores.shape), scores, NEVER)
                top = plgpu.load(top_s.at[worker, heads], layout=_WGMMA.reduce(0))
                new_top = jnp.maximum(top, gpu_pages.column(scores.max(axis=0)))
                weights = jnp.exp(scores - gpu_pages.over_rows(new_top, scores.shape))
                keep = jnp.exp(top - new_top)
                total = plgpu.load(total_s.at[worker, heads], layout=_WGMMA.reduce(0))
                total_s.at[worker, heads][...] = total * keep + gpu_pages.column(weights.sum(axis=0))
                top_s.at[worker, heads][...] = new_top
                keep_s.at[worker, heads][...] = keep
                weights_s.at[worker, heads].T[...] = plgpu.layout_cast(weights.astype(weights_s.dtype), _WGMMA)

            plgpu.commit_smem()
            keep = plgpu.load(keep_s.at[worker], layout=_WGMMA.reduce(0))

            @pl.loop(0, tiles)
            def _(tile: jax.Array) -> None:
                slot = lax.rem(chunk * tiles + tile, slots)
                gpu_pages.clear_tail(ring.at[slot, :, pl.ds(first_column, TILE_COLUMNS)], left)

            found = []
            for tile, before in enumerate(acc):
                slot = lax.rem(chunk * tiles + tile, slots)
                vectors = ring.at[slot, :, pl.ds(first_column, TILE_COLUMNS)]
                kept = before * gpu_pages.over_rows(keep, before.shape)
                found.append(gpu_pages.add_product(kept, (vectors.T, weights_s.at[worker].T), interpreted=interpreted))
                plgpu.barrier_arrive(empty.at[slot])
            return tuple(found)

        # kept in shared memory, since registers are short
        top_s.at[worker][...] = gpu_pages.column(jnp.full((M,), NEVER, jnp.float32))
        total_s.at[worker][...] = gpu_pages.column(jnp.zeros((M,), jnp.float32))
        nothing = plgpu.layout_cast(jnp.zeros((TILE_COLUMNS, M), jnp.float32), _WGMMA)
        acc = lax.fori_loop(0, chunks, step, (nothing,) * tiles)
        total = plgpu.load(total_s.at[worker], layout=_WGMMA.reduce(0))
        for tile, context in enumerate(acc):
            at = pl.ds(block_column + tile * _TILE + worker * TILE_COLUMNS, TILE_COLUMNS)
            context = context / gpu_pages.over_rows(total, context.shape)
            out.at[row, part, :, at].T[...] = plgpu.layout_cast(context, plgpu.Layout.WGMMA_TRANSPOSED)

        @pl.when((block == 0) & (worker == 0))
        def _() -> None:
            top = plgpu.load(top_s.at[worker], layout=_WGMMA.reduce(0))
            gpu_pages.store(lse.at[row, part], top + jnp.log(total))


class _Mail:
    """Scores of a chunk between the blocks of a cluster.

    On a GPU `partial [2K, C, 8]` and `sums [G, C, 8]` are in each block's shared memory, and the barriers count what
    has arrived there. Interpreted, they are in global memory, `[K, 2K, C, 8]` and `[K, G, C, 8]` by receiving block,
    and the barriers, of the whole cluster, say that everyone has sent.
    """

    def __init__(self, partial: Any, sums: Any, partial_in: Any, sums_in: Any, *, interpreted: bool) -> None:
        self.partial_box, self.sums_box, self.partial_in, self.sums_in = partial, sums, partial_in, sums_in
        self.interpreted = interpreted
        self.senders, self.groups = partial.shape[-3], sums.shape[-3]

    def exchange(self, partial: jax.Array, block: jax.Array, worker: jax.Array) -> None:
        """Add up scores of all columns from this warpgroup's `[C, M]`. Every warpgroup that computes calls it."""
        sender = block * _WORKERS + worker
        for group in range(self.groups):
            heads = slice(group * PADDED_HEADS, (group + 1) * PADDED_HEADS)
            self._send(partial[:, heads], self.partial_box, sender, self.partial_in, jnp.int32(group))
        if self.interpreted:
            plgpu.barrier_arrive(self.partial_in)
            plgpu.barrier_wait(self.partial_in)

        @pl.when((block < self.groups) & (worker == 0))
        def _add() -> None:
            if not self.interpreted:
                plgpu.barrier_wait(self.partial_in)
            total = self._read(self.partial_box, 0, block)
            for other in range(1, self.senders):
                total += self._read(self.partial_box, other, block)

            @pl.loop(0, self.senders // _WORKERS)
            def _(receiver: jax.Array) -> None:
                self._send(total, self.sums_box, block, self.sums_in, receiver)

        if self.interpreted:
            plgpu.barrier_arrive(self.sums_in)
        plgpu.barrier_wait(self.sums_in)

    def sums(self, group: jax.Array, block: jax.Array) -> jax.Array:
        """Scores `[C, 8]` of one group of heads over all columns."""
        return self._read(self.sums_box, group, block)

    def _send(self, value: jax.Array, box: Any, slot: jax.Array, barrier: Any, to: jax.Array) -> None:
        if self.interpreted:
            box.at[to, slot][...] = value
        else:
            plgpu.async_store_smem(value, box.at[slot], barrier, cluster_idx=to, cluster_dim="slice")

    def _read(self, box: Any, slot: jax.Array | int, block: jax.Array) -> jax.Array:
        at = box.at[block, slot] if self.interpreted else box.at[slot]
        return plgpu.load(at, layout=_WGMMA)
