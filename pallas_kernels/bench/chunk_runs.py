"""A prefill chunk's attention on the local accelerator, by the kernels and by XLA.

Among its own tokens: chunks of one row, and of eight rows packed one after the other. Over as many cached tokens, of
both kinds: one row; hidden vectors as a step reads them, absorbed or projected, with the layer's projections. Checked
against the reference before they are timed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.attention.int8 import Channels
from apt_jax.attention.kinds import KindMix
from apt_jax.attention.paged import causal_tiles
from apt_jax.attention.pool import Pool
from apt_jax.attention.prefix import merge_prefix
from apt_jax.attention.xla import CHUNK_TOKENS, attend_by_head, read_chunk, read_keys_values
from apt_jax.batching.arrays import Rows, Tokens
from apt_jax.cache import CacheKind
from apt_jax.models.kernels import ArrayKernel
from apt_jax.models.linear import KeyValueProjections
from apt_jax.pallas_kernels import dispatch, reference
from apt_jax.pallas_kernels.bench.kernel_runs import TOLERANCE
from apt_jax.pallas_kernels.bench.timing import Times, reason, repeated, time_calls
from apt_jax.pallas_kernels.reference import NEVER, Partial
from apt_jax.scheduling.costs.hardware import MODELS

ROWS = (1, 8)
_ITERATIONS = 20
_BLOCK_SIZE = 16

Chunk = Callable[..., Partial]


@dataclass(frozen=True)
class ChunkResult:
    """One implementation on one shape; `error` says why there is no time."""

    model: str
    tokens: int
    rows: int
    implementation: str
    cached: int = 0
    """Tokens before the chunk that are attended to; with 0, the chunk's own are."""
    error: str | None = None
    relative_difference: float | None = None
    times: Times | None = None
    kind: str = "kv"
    """Of the cached tokens."""

    @property
    def flops(self) -> float:
        """Of both products for all pairs of a token and one that it sees; projecting hidden vectors is not counted."""
        own = sum(n * (n + 1) / 2 for n in row_tokens(self.tokens, self.rows))
        return 4 * MODELS[self.model].hidden_size * (self.tokens * self.cached or own)

    def line(self) -> str:
        """For the table."""
        over = f"{self.cached:>6} {self.kind:<6}"
        head = f"{self.model:<9} {self.tokens:>6} {self.rows:>4} {over} {self.implementation:<7}"
        times = self.times
        if times is None:
            return f"{head} not measured: {self.error}"
        return (
            f"{head} {times.median_s * 1e6:>10.1f} {times.spread:>7.1%} {self.flops / times.median_s / 1e12:>9.2f} "
            f"{self.relative_difference:>9.1e}"
        )


_SHAPE_HEADER = f"{'model':<9} {'tokens':>6} {'rows':>4} {'cached':>6} {'kind':<6} {'by':<7}"
HEADER = f"{_SHAPE_HEADER} {'us':>10} {'spread':>7} {'TFLOP/s':>9} {'error':>9}"


def row_tokens(tokens: int, rows: int) -> list[int]:
    """Tokens of each row, as equal as can be."""
    return [tokens // rows + (r < tokens % rows) for r in range(rows)]


def implementations(
    device: jax.Device, *, over_prefix: bool, kind: str = "kv", interpreted: bool = False
) -> dict[str, Chunk]:
    """All that could run on `device`; one that cannot fails when it is called.

    Arguments as of `reference.kv_prefix_attention` for one row, of `_xla_over_hidden`, or of
    `reference.chunk_attention`.

    Args:
        interpreted: the kernels on a CPU too.
    """
    kernels = dispatch.kernels_for(device) if interpreted or device.platform in ("gpu", "tpu") else None
    if over_prefix and kind == "hidden":
        by_kernels = {"kernel": partial(_over_hidden, kernels)} if kernels and kernels.hidden_prefix else {}
        return {"xla": _xla_over_hidden} | by_kernels
    kernel = kernels and (kernels.kv_prefix if over_prefix else kernels.chunk)
    return {"xla": _xla_over_prefix if over_prefix else _xla_among_itself} | ({"kernel": kernel} if kernel else {})


def _xla_among_itself(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
    return causal_tiles(q, k, v, Tokens(row, row, row, jnp.arange(q.shape[0])))


def _xla_over_prefix(
    q: jax.Array, pool: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array, length: jax.Array, *_: jax.Array
) -> Partial:
    blocks = key_blocks[0], value_blocks[0]
    return attend_by_head(q, length[0], lambda chunk, valid: read_keys_values(q, Pool(pool), *blocks, chunk, valid))


def _projections(key: jax.Array, value: jax.Array) -> KeyValueProjections:
    return KeyValueProjections(ArrayKernel(key), ArrayKernel(value), None, None, splits_inputs=False)


def _xla_over_hidden(
    q: jax.Array, pool: jax.Array, blocks: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array, *_: jax.Array
) -> Partial:
    """One row's queries `[T, N, H]` over its hidden vectors, projected by kernels `[D, N, H]`."""

    def keys_values(chunk: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _projections(key, value).keys_values(read_chunk(Pool(pool), blocks[0], chunk, valid, dtype=q.dtype))

    return attend_by_head(q, length[0], keys_values)


def _over_hidden(
    kernels: dispatch.Kernels, q: jax.Array, pool: jax.Array, blocks: jax.Array, key: jax.Array, value: jax.Array,
    length: jax.Array, first: jax.Array, count: jax.Array,
) -> Partial:  # fmt: skip
    """As `_xla_over_hidden` by the kernels, and the way that `merge_prefix` chooses."""
    nothing = Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], NEVER, jnp.float32))
    kind = jnp.full((1,), CacheKind.HIDDEN.index, jnp.int32)
    rows = Rows(first, length, count, count, first + count - 1, count, kind, (blocks, blocks))
    return merge_prefix(
        nothing, _projections(key, value), q, Pool(pool), Channels(), rows, length, kernels,
        KindMix((CacheKind.HIDDEN,)),
    )  # fmt: skip


def _reference_over_hidden(
    q: jax.Array, pool: jax.Array, blocks: jax.Array, key: jax.Array, value: jax.Array, length: jax.Array, *_: jax.Array
) -> Partial:
    vectors = pool[blocks[0]].reshape(-1, pool.shape[-1]).astype(jnp.float32)
    keys, values = (
        jnp.einsum("CD,DNH->CNH", vectors, kernel.astype(jnp.float32), precision="highest") for kernel in (key, value)
    )
    scores = jnp.einsum("TNH,CNH->TNC", q.astype(jnp.float32), keys, precision="highest")
    scores = jnp.where(jnp.arange(len(keys)) < length[0], scores, NEVER)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return Partial(jnp.einsum("TNC,CNH->TNH", jnp.exp(scores - lse[..., None]), values, precision="highest"), lse)


def run_chunks(
    models: Iterable[str], lengths: Iterable[int], device: jax.Device, report: Callable[[ChunkResult], None]
) -> list[ChunkResult]:
    """Check and time every implementation for chunks of each length; one that fails is a result too."""
    results = []
    for model in models:
        for tokens in lengths:
            shapes = [(rows, 0, "kv") for rows in ROWS if rows <= tokens] + [(1, tokens, "kv"), (1, tokens, "hidden")]
            for rows, cached, kind in shapes:
                for name, run in implementations(device, over_prefix=cached > 0, kind=kind).items():
                    results.append(run_one(ChunkResult(model, tokens, rows, name, cached, kind=kind), run))
                    report(results[-1])
    return results


def run_one(base: ChunkResult, run: Chunk) -> ChunkResult:
    """Check and time one implementation; a failure is a result too."""
    try:
        return _run(base, run)
    except Exception as error:  # one that cannot run must not take the others along
        return replace(base, error=reason(error))


def _run(base: ChunkResult, run: Chunk) -> ChunkResult:
    if base.kind == "hidden":
        arguments, expect = _of_hidden(base)
    else:
        arguments, expect = _over_prefix(base) if base.cached else _among_itself(base)
    expected, found = jax.jit(expect)(*arguments), jax.jit(run)(*arguments)
    difference = float(jnp.abs(found.out - expected.out).max() / jnp.abs(expected.out).max())
    difference = max(difference, float(jnp.abs(found.lse - expected.lse).max()))
    if not difference <= TOLERANCE:
        raise ArithmeticError(f"differs from the reference by {difference:.1e}, more than {TOLERANCE:.0e}")
    program = repeated(lambda i, arguments: run(*arguments), _ITERATIONS)
    times = time_calls(lambda: program(*arguments), calls=1).of_one(_ITERATIONS)
    return replace(base, relative_difference=difference, times=times)


def _normal(base: ChunkResult, number: int) -> list[jax.Array]:
    """Random queries, scaled, and more of their shape `[T, N, H]`."""
    config = MODELS[base.model]
    shape = (base.tokens, config.num_attention_heads, config.head_dim)
    q, *others = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), number))
    return [q * config.head_dim**-0.5, *others]


def _among_itself(base: ChunkResult) -> tuple[tuple[jax.Array, ...], Chunk]:
    row = jnp.asarray(np.repeat(np.arange(base.rows), row_tokens(base.tokens, base.rows)), jnp.int32)
    return (*_normal(base, 3), row), reference.chunk_attention


def _over_prefix(base: ChunkResult) -> tuple[tuple[jax.Array, ...], Chunk]:
    """One row whose pages lie in any order in a pool twice as large."""
    (q,), D = _normal(base, 1), MODELS[base.model].hidden_size
    pages = -(-base.cached // CHUNK_TOKENS) * CHUNK_TOKENS // _BLOCK_SIZE  # XLA reads whole chunks
    blocks = np.random.default_rng(0).permutation(4 * pages)[: 2 * pages].reshape(2, 1, pages)
    pool = jax.random.normal(jax.random.key(1), (4 * pages, _BLOCK_SIZE, D), jnp.bfloat16)
    numbers = (jnp.array([n], jnp.int32) for n in (base.cached, 0, base.tokens))
    return (q, pool, *jnp.asarray(blocks, jnp.int32), *numbers), reference.kv_prefix_attention


def _of_hidden(base: ChunkResult) -> tuple[tuple[jax.Array, ...], Chunk]:
    """As `_over_prefix`, of hidden vectors, and the projections of a layer."""
    (q, pool, key_blocks, _, *numbers), _ = _over_prefix(base)
    D, (N, H) = pool.shape[-1], q.shape[1:]
    drawn = jax.random.normal(jax.random.key(2), (2, D, N, H), jnp.bfloat16) * D**-0.5
    return (q, pool, key_blocks, drawn[0], drawn[1], *numbers), _reference_over_hidden
