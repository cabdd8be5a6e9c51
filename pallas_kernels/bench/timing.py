"""Timing programs on an accelerator: medians of repeated runs, and the bandwidth of a plain copy to compare with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

REPEATS = 7


@dataclass(frozen=True)
class Times:
    """Seconds of one iteration, over repeated runs."""

    median_s: float
    fastest_s: float
    slowest_s: float

    @property
    def spread(self) -> float:
        """From fastest to slowest, as a share of the median."""
        return (self.slowest_s - self.fastest_s) / self.median_s

    def of_one(self, iterations: int) -> "Times":
        """Times of one iteration, where these are of all."""
        return Times(self.median_s / iterations, self.fastest_s / iterations, self.slowest_s / iterations)


def reason(error: Exception) -> str:
    """The reason why there is no time, for a line of a table."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


def time_calls(call: Callable[[], Any], *, calls: int, repeats: int = REPEATS) -> Times:
    """Time `call`, which starts work and returns arrays; `calls` are started before the last is awaited.

    The first runs, which compile and warm up, are not counted.
    """
    for _ in range(2):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls - 1):
            call()
        jax.block_until_ready(call())
        seconds.append((time.perf_counter() - started) / calls)
    return Times(statistics.median(seconds), min(seconds), max(seconds))


def copy_bytes_per_s(device: jax.Device, *, num_bytes: int = 2**30) -> float:
    """Bytes read and written per second where `num_bytes` of device memory (fewer on a CPU) are read and written back.

    In place, since a CPU would first have to map memory for the result, which takes several times as long.
    """
    if device.platform == "cpu":
        num_bytes = min(num_bytes, 2**26)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.device_put(jnp.zeros(num_bytes // 4, jnp.int32), device)

    def once() -> jax.Array:
        nonlocal array
        array = copy(array)
        return array

    return 2 * array.nbytes / time_calls(once, calls=4).median_s


def repeated(step: Callable[[jax.Array, Any], Any], iterations: int) -> Callable[..., jax.Array]:
    """A program that runs `step(i, arguments)` `iterations` times on the device, one after the other.

    The last of the arguments, integers, depends on the step before (by an addition that is always zero), so that no
    step can be left out, moved out of the loop or overlapped with another.
    """

    def program(*arguments: Any) -> jax.Array:
        def body(i: jax.Array, carry: jax.Array) -> jax.Array:
            *others, last = arguments
            out = jax.lax.optimization_barrier(step(i, (*others, last + carry)))
            first = jax.tree.leaves(out)[0]
            return jnp.where(first[(0,) * first.ndim] == 1e33, 1, 0)

        return jax.lax.fori_loop(0, iterations, body, jnp.zeros((), jnp.int32))

    return jax.jit(program)
