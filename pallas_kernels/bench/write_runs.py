"""Writing a step's keys and values into the cache on the local accelerator, by the kernel and by XLA's scatter.

A decode step, one token of every row, and a prefill chunk of one row that starts inside a block. The pool has several
layers, written one after the other, as a model does. What was written is compared with the scatter first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.pallas_kernels import dispatch, reference
from apt_jax.pallas_kernels.bench.timing import Times, reason, time_calls
from apt_jax.scheduling.costs.hardware import MODELS

_LAYERS = 4
_ITERATIONS = 20

Writer = Callable[..., Callable[..., jax.Array]]


@dataclass(frozen=True)
class WriteResult:
    """One implementation on one shape; `error` says why there is no time."""

    model: str
    tokens: int
    rows: int
    implementation: str
    error: str | None = None
    times: Times | None = None

    @property
    def bytes(self) -> int:
        """Read and written at least: keys and values in bfloat16, once each."""
        return 2 * 2 * 2 * self.tokens * MODELS[self.model].hidden_size

    def line(self) -> str:
        """For the table."""
        head = f"{self.model:<9} {self.tokens:>6} {self.rows:>4} {self.implementation:<7}"
        times = self.times
        if times is None:
            return f"{head} not measured: {self.error}"
        return f"{head} {times.median_s * 1e6:>10.1f} {times.spread:>7.1%} {self.bytes / times.median_s / 1e9:>8.0f}"


HEADER = f"{'model':<9} {'tokens':>6} {'rows':>4} {'by':<7} {'us':>10} {'spread':>7} {'GB/s':>8}"


def implementations(device: jax.Device) -> dict[str, Writer]:
    """All that could run on `device`."""
    kernel = dispatch.kernels_for(device).cache_writer if device.platform in ("gpu", "tpu") else None
    return {"xla": reference.cache_writer} | ({"kernel": kernel} if kernel else {})


def run_writes(
    models: Iterable[str], batches: Iterable[int], chunks: Iterable[int], block_size: int, device: jax.Device,
    report: Callable[[WriteResult], None],
) -> list[WriteResult]:  # fmt: skip
    """Check and time every implementation for decode steps and chunks; one that fails is a result too."""
    results = []
    shapes = [(rows, rows) for rows in batches] + [(tokens, 1) for tokens in chunks]
    for model in models:
        for tokens, rows in shapes:
            for name, writer in implementations(device).items():
                result = WriteResult(model, tokens, rows, name)
                try:
                    result = _run(result, writer, block_size)
                except Exception as error:  # one that cannot run must not take the others along
                    result = replace(result, error=reason(error))
                results.append(result)
                report(result)
    return results


def _run(base: WriteResult, writer: Writer, block_size: int) -> WriteResult:
    rng = np.random.default_rng(0)
    size = base.tokens // base.rows
    pages = -(-size // block_size) + 1
    position = np.tile(np.arange(size), base.rows) + rng.integers(1, block_size, base.rows).repeat(size)
    row = np.arange(base.rows).repeat(size)
    blocks = rng.permutation(2 * base.rows * pages).reshape(2, base.rows, pages)
    places = [jnp.asarray(x, jnp.int32) for x in (*blocks[:, row, position // block_size], position % block_size)]
    D = MODELS[base.model].hidden_size
    keys, values, pool = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(base.tokens, D)] * 2 + [(_LAYERS * blocks.size, block_size, D)])
    )
    once = jax.jit(partial(_write, blocks.size, 1), static_argnums=0)
    found, expected = (once(by, pool, places, keys, values) for by in (writer, reference.cache_writer))
    if not jnp.array_equal(found, expected):
        raise ArithmeticError("the pool differs from what the scatter makes of it")
    program = jax.jit(partial(_write, blocks.size, _ITERATIONS), static_argnums=0, donate_argnums=1)

    def call() -> jax.Array:
        nonlocal pool
        pool = program(writer, pool, places, keys, values)
        return pool

    return replace(base, times=time_calls(call, calls=1).of_one(_ITERATIONS))


def _write(
    blocks: int, iterations: int, writer: Writer, pool: jax.Array, places: list[jax.Array], keys: jax.Array,
    values: jax.Array,
) -> jax.Array:  # fmt: skip
    """Write to one layer after the other; `blocks` of one layer."""
    write = writer(*places)
    return jax.lax.fori_loop(0, iterations, lambda i, pool: write(pool, i % _LAYERS * blocks, keys, values), pool)
