"""Decode attention on the local accelerator: each implementation checked against the reference, then timed.

One layer's attention is run many times in a program, each time over other blocks of the pool, so that no run finds the
previous one's blocks in an on-chip cache, as in a model. Implementations:

* pallas: the kernels that the engine takes on this device.
* xla: gathers every page of the table, then plain products: the form without a kernel.
* jax: JAX's paged attention for this platform, where it runs; its pool is laid out by head.

Over an int8 pool the kernels alone are measured, and the bytes that must be moved include the scales.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.attention.pool import scale_row
from apt_jax.cache import CacheDtype, CacheKind
from apt_jax.pallas_kernels import dispatch, reference
from apt_jax.pallas_kernels.bench.kernel_counts import Shape, count
from apt_jax.pallas_kernels.bench.timing import Times, reason, repeated, time_calls
from apt_jax.pallas_kernels.reference import NEVER, Partial
from apt_jax.scheduling.costs.hardware import MODELS

TOLERANCE = 2e-2  # of bfloat16, relative to the largest value
_POOL_BYTES = 2 * 2**30  # beyond every chip's caches; more where one layer needs more
_CHECKED_ROWS = 2
_TARGET_S = 0.02  # of one timed program
_CODE = 1 / 40  # what a step of an int8 code stands for, at most


class Implementation(NamedTuple):
    """A function of queries, pool and tables for one kind of cache."""

    name: str
    way: str  # of kernel_counts
    run: Callable[..., Any]
    by_head: bool = False  # keys and values in pools of their own, `[N, P, S, H]`, with one table


@dataclass(frozen=True)
class Result:
    """One implementation on one shape; `error` says why there is no time."""

    model: str
    batch: int
    context_tokens: int
    way: str
    implementation: str
    error: str | None = None
    relative_difference: float | None = None
    times: Times | None = None
    bytes_per_s: float | None = None
    copy_share: float | None = None
    cache_dtype: CacheDtype = "auto"
    """auto: bfloat16."""

    def line(self) -> str:
        """For the table."""
        head = f"{self.model:<9} {self.batch:>5} {self.context_tokens:>7} {self.way:<7} {self.implementation:<7}"
        if self.times is None or self.bytes_per_s is None or self.copy_share is None:
            return f"{head} not measured: {self.error}"
        return (
            f"{head} {self.times.median_s * 1e6:>10.1f} {self.times.spread:>7.1%} {self.bytes_per_s / 1e9:>8.0f} "
            f"{self.copy_share:>6.1%} {self.relative_difference:>9.1e}"
        )


HEADER = (
    f"{'model':<9} {'batch':>5} {'context':>7} {'way':<7} {'by':<7} {'us':>10} {'spread':>7} {'GB/s':>8} {'share':>6} "
    f"{'error':>9}"
)


class Inputs(NamedTuple):
    """Arguments for one shape: as many layers as fill `_POOL_BYTES`, blocks in random order."""

    queries: jax.Array  # [R, N, H] or [R, N, D]
    pool: jax.Array  # [layers * blocks, S, D]
    key_blocks: jax.Array  # int32 [R, W]; of keys or hidden vectors
    value_blocks: jax.Array  # int32 [R, W]
    length: jax.Array  # int32 [R]
    layers: int
    blocks: int  # of one layer
    scales: jax.Array | None = None  # float32 [layers * blocks, 1, scale_row], of an int8 pool


def implementations(device: jax.Device) -> list[Implementation]:
    """All that could run on `device`; importing or running one may fail, and then only when it is called."""
    found = [Implementation("xla", "kv", _xla_kv), Implementation("xla", "hidden", _xla_hidden)]
    if device.platform in ("gpu", "tpu"):
        theirs = _jax_gpu if device.platform == "gpu" else _jax_tpu
        found = [*kernels_of(device), *found, Implementation("jax", "kv", theirs, by_head=True)]
    return found


def kernels_of(device: jax.Device) -> list[Implementation]:
    """The Pallas kernels of both kinds; on a CPU they are interpreted."""

    def kv(
        q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array, **scales: Any
    ) -> Partial:
        kernels = dispatch.kernels_for(device)
        assert kernels.kv_decode is not None
        return kernels.kv_decode(q, pool, key_blocks, value_blocks, length, **scales)

    def hidden(
        q: jax.Array, pool: jax.Array, blocks: jax.Array, _: jax.Array, length: jax.Array, **scales: Any
    ) -> Partial:
        kernels = dispatch.kernels_for(device)
        if kernels.hidden_decode is None:
            raise NotImplementedError(f"the {kernels.name!r} kernels leave hidden rows to XLA")
        return kernels.hidden_decode(q, pool, blocks, length, **scales)

    return [Implementation("pallas", "kv", kv), Implementation("pallas", "hidden", hidden)]


def run_all(
    shapes: Iterable[Shape],
    device: jax.Device,
    block_size: int,
    copy_bytes_per_s: float,
    report: Callable[[Result], None],
) -> list[Result]:
    """Check and time every implementation on every shape; one that fails is a result too."""
    results = []
    for shape in shapes:
        for implementation in implementations(device):
            results.append(run_one(shape, implementation, block_size, copy_bytes_per_s))
            report(results[-1])
    return results


def run_one(
    shape: Shape, which: Implementation, block_size: int, copy_bytes_per_s: float, cache_dtype: CacheDtype = "auto"
) -> Result:
    """Check and time one implementation; a failure is a result too."""
    base = Result(
        shape.model, shape.batch, shape.context_tokens, which.way, which.name, cache_dtype=cache_dtype
    )  # fmt: skip
    try:
        return _run(base, shape, which, block_size, copy_bytes_per_s)
    except Exception as error:  # one that cannot run must not take the others along
        return replace(base, error=reason(error))


def _run(base: Result, shape: Shape, which: Implementation, block_size: int, copy_bytes_per_s: float) -> Result:
    inputs = make_inputs(shape, which.way, block_size, cache_dtype=base.cache_dtype)
    expected = _expected(inputs, which.way)
    blocks = inputs.blocks
    arrays: tuple[jax.Array, ...]
    arrays = inputs.queries, inputs.pool, inputs.key_blocks, inputs.value_blocks, inputs.length
    if which.by_head:
        blocks, arrays = _by_head(inputs, shape.num_heads)

    def attend(scales: jax.Array | None, *arguments: jax.Array) -> Any:
        return which.run(*arguments, **({} if scales is None else {"scales": scales}))

    arguments = inputs.scales, *arrays
    run = jax.jit(attend)
    found = run(*arguments)
    out = found.out if isinstance(found, Partial) else found
    difference = float(jnp.abs(out[:_CHECKED_ROWS] - expected.out).max() / jnp.abs(expected.out).max())
    if not difference <= TOLERANCE:
        raise ArithmeticError(f"differs from the reference by {difference:.1e}, more than {TOLERANCE:.0e}")

    def step(i: jax.Array, arguments: Any) -> Any:
        *others, key_blocks, value_blocks, length = arguments
        shift = (i % inputs.layers) * blocks
        return attend(*others, key_blocks + shift, value_blocks + shift, length)

    once = time_calls(lambda: run(*arguments), calls=1, repeats=1).median_s
    iterations = max(inputs.layers, min(int(_TARGET_S / once), 200))
    program = repeated(step, iterations)
    times = time_calls(lambda: program(*arguments), calls=1).of_one(iterations)
    bytes_per_s = count(shape, which.way, is_coded=inputs.scales is not None).bytes / times.median_s
    return replace(
        base, relative_difference=difference, times=times, bytes_per_s=bytes_per_s,
        copy_share=bytes_per_s / copy_bytes_per_s,
    )  # fmt: skip


def make_inputs(
    shape: Shape, way: str, block_size: int, seed: int = 0, *, cache_dtype: CacheDtype = "auto"
) -> Inputs:  # fmt: skip
    """Random bfloat16 queries and pool (or int8 and scales) on the default device; every row has `context_tokens`."""
    config = MODELS[shape.model]
    R, N, D = shape.batch, shape.num_heads, shape.hidden_size
    pages = -(-shape.context_tokens // block_size)
    blocks = R * pages * CacheKind.named(way).blocks_per_page
    dtype = jnp.dtype(jnp.bfloat16 if cache_dtype == "auto" else jnp.int8)
    layers = max(1, round(_POOL_BYTES / (blocks * block_size * D * dtype.itemsize)))
    if jax.default_backend() == "cpu":
        layers = 1
    order = np.random.default_rng(seed).permutation(blocks).astype(np.int32).reshape(-1, R, pages)
    keys = jax.random.split(jax.random.key(seed), 3)
    wide = D if way == "hidden" else config.head_dim
    return Inputs(
        jax.random.normal(keys[0], (R, N, wide), jnp.bfloat16) * wide**-0.5,
        jax.jit(_vectors, static_argnums=(1, 2))(keys[1], (layers * blocks, block_size, D), dtype),
        jnp.asarray(order[0]),
        jnp.asarray(order[-1]),
        jnp.full((R,), shape.context_tokens, jnp.int32),
        layers,
        blocks,
        None if cache_dtype == "auto" else _scales(keys[2], layers * blocks, scale_row(block_size, N)),
    )


def _vectors(key: jax.Array, shape: tuple[int, int, int], dtype: np.dtype) -> jax.Array:
    """Random numbers for a pool; a part is drawn and repeated, since drawing takes several times their memory."""
    drawn = min(shape[0], 1021)  # a prime, so that no table's stride repeats with it
    part = jax.random.normal(key, (drawn, *shape[1:]), jnp.bfloat16)
    if dtype == jnp.int8:
        part = jnp.clip(jnp.round(part / _CODE), -127, 127).astype(dtype)
    return jnp.tile(part, (-(-shape[0] // drawn), 1, 1))[: shape[0]]


def _scales(key: jax.Array, blocks: int, numbers: int) -> jax.Array:
    """Scales for the codes of a pool, which make them numbers of a spread of about 1."""
    return jax.random.uniform(key, (blocks, 1, numbers), minval=0.5 * _CODE, maxval=_CODE)


def _expected(inputs: Inputs, way: str) -> Partial:
    """The reference on the first rows."""
    queries, key_blocks, value_blocks, length = (
        array[:_CHECKED_ROWS] for array in (inputs.queries, inputs.key_blocks, inputs.value_blocks, inputs.length)
    )
    options = {} if inputs.scales is None else {"scales": inputs.scales}
    if way == "kv":
        return jax.jit(reference.kv_decode_attention)(queries, inputs.pool, key_blocks, value_blocks, length, **options)
    return jax.jit(reference.hidden_decode_attention)(queries, inputs.pool, key_blocks, length, **options)


def _by_head(inputs: Inputs, num_heads: int) -> tuple[int, tuple[jax.Array, ...]]:
    """Blocks of a layer, and arguments with pools `[N, layers*blocks, S, H]` of keys and of values and one table."""
    _, S, D = inputs.pool.shape
    R, W = inputs.key_blocks.shape
    order = np.random.default_rng(1).permutation(R * W)

    def pool_of(table: jax.Array) -> jax.Array:
        rows = table.reshape(-1)[np.argsort(order)]
        rows = (rows + inputs.blocks * jnp.arange(inputs.layers)[:, None]).reshape(-1)
        return inputs.pool[rows].reshape(-1, S, num_heads, D // num_heads).transpose(2, 0, 1, 3)

    keys, values = (jax.jit(pool_of)(table) for table in (inputs.key_blocks, inputs.value_blocks))
    table = jnp.asarray(order.reshape(R, W).astype(np.int32))
    return R * W, (inputs.queries, keys, values, table, table, inputs.length)


def _xla_kv(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array
) -> Partial:
    R, N, H = q.shape
    keys, values = (pool[blocks].reshape(R, -1, N, H) for blocks in (key_blocks, value_blocks))
    return _softmax_products(q, keys, values, length, "RNH,RCNH->RNC", "RNC,RCNH->RNH")


def _xla_hidden(q: jax.Array, pool: jax.Array, blocks: jax.Array, _: jax.Array, length: jax.Array) -> Partial:
    vectors = pool[blocks].reshape(q.shape[0], -1, q.shape[2])
    return _softmax_products(q, vectors, vectors, length, "RND,RCD->RNC", "RNC,RCD->RND")


def _softmax_products(
    q: jax.Array, x: jax.Array, y: jax.Array, length: jax.Array, into_scores: str, into_out: str
) -> Partial:
    scores = jnp.einsum(into_scores, q, x, preferred_element_type=jnp.float32)
    valid = jnp.arange(x.shape[1]) < length[:, None]
    scores = jnp.where(valid[:, None], scores, NEVER)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(x.dtype)
    return Partial(jnp.einsum(into_out, weights, y, preferred_element_type=jnp.float32), lse)


def _jax_gpu(
    q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, _: jax.Array, length: jax.Array
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    return paged_attention(q, keys, values, table, length)


def _jax_tpu(
    q: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, _: jax.Array, length: jax.Array
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    return paged_attention(q, keys, values, length, table, pages_per_compute_block=min(8, table.shape[1]))
