"""A prefill chunk's attention among its own tokens on the accelerator at hand: the well-kept kernel, and XLA in tiles.

Chunks of one row, and of eight rows packed one after the other. Checked against the reference before they are timed.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from apt_jax.attention import causal_tiles
from apt_jax.batch import Tokens
from apt_jax.scheduling.hardware import MODELS
from pallas_kernels import dispatch, reference
from pallas_kernels.reference import Partial
from serve.bench.kernel_runs import TOLERANCE
from serve.bench.timing import Times, repeated, time_calls

ROWS = (1, 8)
_ITERATIONS = 20

Chunk = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Partial]


@dataclass(frozen=True)
class ChunkResult:
    """One implementation on one shape; `error` says why there is no time."""

    model: str
    tokens: int
    rows: int
    implementation: str
    error: str | None = None
    relative_difference: float | None = None
    times: Times | None = None

    @property
    def flops(self) -> float:
        """Of both products for all pairs of a token and one that it sees."""
        pairs = sum(n * (n + 1) / 2 for n in row_tokens(self.tokens, self.rows))
        return 4 * MODELS[self.model].hidden_size * pairs

    def line(self) -> str:
        """For the table."""
        head = f"{self.model:<9} {self.tokens:>6} {self.rows:>4} {self.implementation:<7}"
        if self.times is None:
            return f"{head} not measured: {self.error}"
        spread = (self.times.slowest_s - self.times.fastest_s) / self.times.median_s
        return (
            f"{head} {self.times.median_s * 1e6:>10.1f} {spread:>7.1%} {self.flops / self.times.median_s / 1e12:>9.2f} "
            f"{self.relative_difference:>9.1e}"
        )


HEADER = f"{'model':<9} {'tokens':>6} {'rows':>4} {'by':<7} {'us':>10} {'spread':>7} {'TFLOP/s':>9} {'error':>9}"


def row_tokens(tokens: int, rows: int) -> list[int]:
    """Tokens of each row, as equal as can be."""
    return [tokens // rows + (r < tokens % rows) for r in range(rows)]


def implementations(device: jax.Device) -> dict[str, Chunk]:
    """All that could run on `device`; one that cannot fails when it is called."""

    def xla(q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array) -> Partial:
        return causal_tiles(q, k, v, Tokens(row, row, row, jnp.arange(q.shape[0])))

    found: dict[str, Chunk] = {"xla": xla}
    if device.platform in ("gpu", "tpu") and (kernel := dispatch.kernels_for(device).chunk):
        found["kernel"] = kernel
    return found


def run_chunks(
    models: Iterable[str], lengths: Iterable[int], device: jax.Device, report: Callable[[ChunkResult], None]
) -> list[ChunkResult]:
    """Check and time every implementation for chunks of each length; one that fails is a result too."""
    results = []
    for model in models:
        for tokens in lengths:
            for rows in (r for r in ROWS if r <= tokens):
                for name, run in implementations(device).items():
                    result = ChunkResult(model, tokens, rows, name)
                    try:
                        result = _run(result, run)
                    except Exception as error:  # one that cannot run must not take the others along
                        text = (str(error).strip().splitlines() or [""])[0]
                        result = ChunkResult(**{**asdict(result), "error": f"{type(error).__name__}: {text}"[:200]})
                    results.append(result)
                    report(result)
    return results


def _run(base: ChunkResult, run: Chunk) -> ChunkResult:
    config, T = MODELS[base.model], base.tokens
    shape = (T, config.num_attention_heads, config.head_dim)
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    row = jnp.asarray(np.repeat(np.arange(base.rows), row_tokens(T, base.rows)), jnp.int32)
    arguments = q * config.head_dim**-0.5, k, v, row
    expected, found = jax.jit(reference.chunk_attention)(*arguments), jax.jit(run)(*arguments)
    difference = float(jnp.abs(found.out - expected.out).max() / jnp.abs(expected.out).max())
    difference = max(difference, float(jnp.abs(found.lse - expected.lse).max()))
    if not difference <= TOLERANCE:
        raise ArithmeticError(f"differs from the reference by {difference:.1e}, more than {TOLERANCE:.0e}")
    program = repeated(lambda i, arguments: run(*arguments), _ITERATIONS)
    times = time_calls(lambda: program(*arguments), calls=1)
    times = Times(*(s / _ITERATIONS for s in (times.median_s, times.fastest_s, times.slowest_s)))
    return ChunkResult(base.model, T, base.rows, base.implementation, relative_difference=difference, times=times)
