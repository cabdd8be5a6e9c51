"""What the TPU kernels share: distributing rows over cores, and reading a row's pages chunk by chunk from HBM.

An int8 pool is its numbers and an array of scales (`codes.py`), which are copied together, page by page.

A kernel runs on a grid (cores, steps). A step serves one row: its pages are copied from the pool in HBM to one of two
VMEM buffers, a chunk of tokens at a time, while the other buffer is computed on; during a step's last chunk the first
chunk of the core's next step is already being copied, so a core waits only for its very first read.

Shape letters as in `reference.py`; C is the tokens of a chunk.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

SCOPED_VMEM_BYTES = 16 * 2**20  # what a kernel gets without asking, on v5e and v5p
BUFFER_BYTES = 6 * 2**20  # VMEM for page buffers
MAX_CHUNK_TOKENS = 256
TABLE_BYTES = 2**19  # of SMEM, half of what every chip has, for the block tables of the rows of one call
LANES = 128
INT8_ROWS = 32  # of a tile in memory

type Ref = Any


class RowOrder(NamedTuple):
    """Which row each step of each core serves; rows without tokens come last and are never visited."""

    order: jax.Array  # int32 [R]: rows, longest first, then those of length 0
    num_rows: jax.Array  # int32 [1]: rows with tokens
    length: jax.Array  # int32 [R]


class Source(NamedTuple):
    """One of the things read for a row (keys, values or hidden vectors)."""

    blocks: Ref  # SMEM int32 [R, W]
    buffers: tuple[Ref, ...]  # VMEM [2, C/S, S, D] and, of an int8 pool, float32 [2, C/S, 1, X]; or fewer columns
    arrived: Ref  # DMA semaphores [2]


class Steps(NamedTuple):
    """What this core does in its steps `0 .. num_steps`; the grid may have more, which do nothing."""

    num_steps: jax.Array
    row: Callable[[jax.Array], jax.Array]  # of a step
    first_column: Callable[[int, jax.Array], jax.Array | int] = lambda array, step: 0
    """Of array 0 or 1 of the pool in a step, where buffers hold a part of its columns."""


def chunk_tokens(width: int, block_size: int, itemsize: int, num_sources: int) -> int:
    """Tokens of a chunk, whole blocks: at most `MAX_CHUNK_TOKENS` and what `BUFFER_BYTES` hold, but at least one."""
    tokens = max(MAX_CHUNK_TOKENS, block_size)
    while tokens > block_size and 2 * num_sources * tokens * width * itemsize > BUFFER_BYTES:
        tokens //= 2
    return tokens


def row_groups(num_rows: int, pages: int, num_tables: int) -> list[slice]:
    """Rows for each call of a kernel: all of them, or groups of about the same size whose block tables fit in SMEM.

    Args:
        num_tables: `[rows, pages]` each; a row of one fills whole lines of `LANES` numbers.
    """
    most = max(TABLE_BYTES // (num_tables * -(-pages // LANES) * LANES * 4), 1)
    groups = -(-num_rows // most)
    return [slice(i * num_rows // groups, (i + 1) * num_rows // groups) for i in range(groups)]


def check_shapes(query: jax.Array, pool: jax.Array, columns: int, interpret: object, is_coded: bool = False) -> None:
    """Refuse what does not compile for a TPU; the interpreter takes any width.

    Args:
        columns: of the pool that one product takes.
        is_coded: the pool is int8, with scales.

    Raises:
        NotImplementedError: a dtype, block size or width that a kernel does not handle.
    """
    cure = "use --attention-backend xla"
    for array in () if is_coded else (query, pool):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotImplementedError(f"dtype {array.dtype} is neither bfloat16 nor float32; {cure}")
    S = pool.shape[1]
    if is_coded and S not in (16, 32, 64) and S % LANES:
        raise NotImplementedError(f"block_size={S} of an int8 cache is not 16, 32, 64 or a multiple of {LANES}; {cure}")
    if interpret:
        return
    if is_coded and S % INT8_ROWS:
        raise NotImplementedError(
            f"block_size={S} is no multiple of {INT8_ROWS}, the rows of a tile of int8; set --block-size {INT8_ROWS}"
        )
    if S < 8:
        raise NotImplementedError(f"block_size={S} < 8, the rows of a register tile; {cure}")
    if pool.shape[2] % LANES or columns % LANES:
        raise NotImplementedError(f"hidden_size={pool.shape[2]} or {columns=} is no multiple of {LANES}; {cure}")


def order_rows(length: jax.Array) -> RowOrder:
    """Sort rows by length: cores, which serve every `cores`-th row, get equal work. Pure; the same for every layer."""
    order = jnp.argsort(-length).astype(jnp.int32)
    return RowOrder(order, jnp.sum(length > 0, dtype=jnp.int32)[None], length.astype(jnp.int32))


def grid(row_order: RowOrder, cores: int) -> tuple[int, jax.Array]:
    """`(cores, steps)`: enough steps for the rows that have tokens, at least one."""
    return cores, jnp.maximum(lax.div(row_order.num_rows[0] + cores - 1, cores), 1)


def row_spec(block_shape: tuple[int, ...], cores: int) -> pl.BlockSpec:
    """Block `[1, ...]` of the array `[R, ...]` for the row of each step.

    The last step of a core may have no row. It keeps the block of the step before, so that nothing is copied and
    nothing of another core is overwritten; a core without any row takes that of a row without tokens.
    """

    def index(core: jax.Array, step: jax.Array, order: Ref, count: Ref, *_: Ref) -> tuple[jax.Array | int, ...]:
        place = step * cores + core  # in `order`
        idle = place >= jnp.maximum(count[0], cores)
        return order[jnp.where(idle, place - cores, place)], *(0 for _ in block_shape)

    return pl.BlockSpec((None, *block_shape), index)


def scratch(num_sources: int, chunk: int, block_size: int, width: int, dtype: DTypeLike, lanes: int = 0) -> list[Any]:
    """Scratch shapes: buffers and semaphores of each source, then the number of the buffer that is next.

    Args:
        lanes: scales of a block that are read, of an int8 pool.
    """
    pages, shapes = chunk // block_size, list[Any]()
    for _ in range(num_sources):
        numbers = pltpu.VMEM((2, pages, block_size, width), dtype)
        shapes.append((numbers, pltpu.VMEM((2, pages, 1, lanes), jnp.float32)) if lanes else (numbers,))
        shapes.append(pltpu.SemaphoreType.DMA((2,)))
    return [*shapes, pltpu.SMEM((1,), jnp.int32)]


def pool_specs(pool: tuple[jax.Array, ...]) -> tuple[pl.BlockSpec, ...]:
    """The pool's arrays stay in HBM."""
    return tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in pool)


def compiler_params(
    scratch_shapes: Sequence[Any], block_bytes: int, spare_bytes: int = 2 * 2**20
) -> pltpu.CompilerParams:
    """Rows go to the cores; more VMEM is asked for where buffers and blocks (twice: the next row's) need it.

    Args:
        spare_bytes: for what the compiler needs in addition; more than the usual is asked for in any case.
    """
    shapes = jax.tree.leaves(list(scratch_shapes))
    buffers = (shape for shape in shapes if getattr(shape, "memory_space", None) == pltpu.VMEM)
    needed = sum(math.prod(b.shape) * jnp.dtype(b.dtype).itemsize for b in buffers) + 2 * block_bytes
    fits = needed < 0.8 * SCOPED_VMEM_BYTES and spare_bytes <= 2 * 2**20
    limit = None if fits else int(1.25 * needed) + spare_bytes
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)


def for_each_row(
    row_order: RowOrder,
    pool: tuple[Ref, ...],
    sources: Sequence[Source],
    next_buffer: Ref,
    serve: Callable[..., None],
    *,
    cores: int,
) -> None:
    """In a kernel with one step per row: `run_step` for the rows that `row_order` gives this core."""
    core = pl.program_id(0)
    steps = Steps(
        num_steps=lax.div(row_order.num_rows[0] - core + cores - 1, cores),
        row=lambda step: row_order.order[step * cores + core],
    )
    run_step(steps, row_order.length, pool, sources, next_buffer, serve)


def run_step(
    steps: Steps, length: Ref, pool: tuple[Ref, ...], sources: Sequence[Source], next_buffer: Ref,
    serve: Callable[..., None],
) -> None:  # fmt: skip
    """In a kernel: run `serve(walk)` for this step's row, if it has one; the row has tokens.

    `walk(body, carry)` calls `body(buffer_index, num_valid, carry)` for each chunk once it has arrived and returns the
    last carry. The buffers' tokens from `num_valid` on are 0 by then, whatever the pool holds, unless it is int8: then
    their numbers are finite and their scales anything.
    """
    step = pl.program_id(1)
    pages, S, _ = sources[0].buffers[0].shape[1:]
    C = pages * S

    def copy(
        step: jax.Array,
        chunk: jax.Array | int,
        buffer: jax.Array | int,
        act: Callable[[Any], None],
        unroll: bool = False,
    ) -> None:
        row = steps.row(step)
        needed = jnp.minimum(lax.div(length[row] + S - 1, S) - chunk * pages, pages)

        def one_page(page: jax.Array | int, _: None) -> None:
            for source in sources:
                block = source.blocks[row, chunk * pages + page]
                for number, (array, to) in enumerate(zip(pool, source.buffers, strict=True)):
                    width = to.shape[-1]
                    whole = width == array.shape[-1]
                    columns = slice(None) if whole else pl.ds(steps.first_column(number, step), width)
                    own = array.at[block, :, columns]
                    act(pltpu.make_async_copy(own, to.at[buffer, page], source.arrived.at[buffer]))

        if not unroll:
            lax.fori_loop(0, needed, one_page, None)
            return

        @pl.when(needed == pages)
        def _() -> None:
            for page in range(pages):
                one_page(page, None)

        @pl.when(needed < pages)
        def _() -> None:
            lax.fori_loop(0, needed, one_page, None)

    def start(step: jax.Array, chunk: jax.Array | int, buffer: jax.Array | int, unroll: bool = False) -> None:
        copy(step, chunk, buffer, lambda dma: dma.start(), unroll)

    def walk(body: Callable[..., Any], carry: Any) -> Any:
        tokens = length[steps.row(step)]
        chunks = lax.div(tokens + C - 1, C)
        first_buffer = next_buffer[0]

        def one_chunk(chunk: jax.Array, carry: Any) -> Any:
            buffer = lax.rem(first_buffer + chunk, 2)

            @pl.when(chunk + 1 < chunks)
            def _() -> None:
                start(step, chunk + 1, 1 - buffer, unroll=True)

            @pl.when((chunk + 1 == chunks) & (step + 1 < steps.num_steps))
            def _() -> None:
                start(step + 1, 0, 1 - buffer)

            copy(step, chunk, buffer, lambda dma: dma.wait())
            num_valid = jnp.minimum(tokens - chunk * C, C)

            if len(pool) == 1:

                @pl.when(num_valid < C)
                def _clear() -> None:
                    for source in sources:
                        _clear_tail(source.buffers[0], buffer, num_valid)

            return body(buffer, num_valid, carry)

        carry = lax.fori_loop(0, chunks, one_chunk, carry)
        next_buffer[0] = lax.rem(first_buffer + chunks, 2)
        return carry

    @pl.when(step < steps.num_steps)
    def _serve() -> None:
        @pl.when(step == 0)
        def _begin() -> None:
            next_buffer[0] = 0
            start(step, 0, 0)

        serve(walk)


def _clear_tail(buffer: Ref, index: jax.Array, num_valid: jax.Array) -> None:
    """Zero the tokens from `num_valid` on: a weight of 0 times NaN would be NaN."""
    pages, S, D = buffer.shape[1:]

    def one_page(page: jax.Array, _: None) -> None:
        token = page * S + lax.broadcasted_iota(jnp.int32, (S, D), 0)
        # selected in float32: a bfloat16 select on an iota mask does not compile
        kept = jnp.where(token < num_valid, buffer[index, page].astype(jnp.float32), 0)
        buffer[index, page] = kept.astype(buffer.dtype)

    lax.fori_loop(lax.div(num_valid, S), pages, one_page, None)


def online_softmax(
    scores: jax.Array, num_valid: jax.Array, top: jax.Array, total: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of the running softmax over scores `[M, C]`.

    Args:
        num_valid: positions from here on do not count; at least 1.
        top, total: running maximum and sum, `[M, 1]`; or `[M, LANES]`, which saves bringing one lane's number to all
            others, and pays with many rows: there every lane has the maximum, and the sum over its own columns.

    Returns:
        Weights `[M, C]`, the factor for what was summed so far, and the new top and total, in the shape of `top`.
    """
    position = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(position < num_valid, scores, -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - over_columns(new_top, scores.shape[1]))
    keep = jnp.exp(top - new_top)
    found = _sums_by_lane(weights) if top.shape[1] == LANES else jnp.sum(weights, axis=1, keepdims=True)
    return weights, keep, new_top, total * keep + found


def over_columns(x: jax.Array, columns: int) -> jax.Array:
    """A number per row for every column, from `[M, 1]`, or from `[M, LANES]` with the same number in all lanes."""
    if x.shape[1] == 1:
        return x
    return jnp.concatenate([x] * -(-columns // LANES), axis=1)[:, :columns]


def _sums_by_lane(x: jax.Array) -> jax.Array:
    """`[M, C] -> [M, LANES]`: the columns of each lane added up."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES)))
    parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)
