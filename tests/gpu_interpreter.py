"""GPU kernels interpreted on a CPU, in a process whose XLA has many more threads than there are cores.

JAX's interpreter runs every warpgroup as a program of its own, which waits for the others in a callback. A callback may
hold a thread of XLA's pool, which has one for each core: on two cores, once in some twenty runs of the tests, all were
held by who waited for what was to run next, and nothing went on. XLA takes the number from NPROC when it starts.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.reference import Partial

# a slot that is overwritten before it was read, or read before it was written, is a race
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
_THREADS = 64  # more than warpgroups of the largest cluster


def interpreted(kernel: Callable[..., Partial], **options: Any) -> Callable[..., Partial]:
    """The kernel, a function of a module, as one of arrays; it fails where the interpreter finds a race."""

    def run(*args: Any) -> Partial:
        arrays = [np.asarray(arg) for arg in args]
        found, races = _process().submit(_run, kernel, tuple(options.items()), arrays).result()
        assert not races
        return found

    return run


@functools.cache
def _process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _start, (jax.config.jax_compilation_cache_dir,))


def _start(cache: str | None) -> None:
    os.environ["NPROC"] = str(_THREADS)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@functools.cache
def _compiled(kernel: Callable[..., Partial], options: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(kernel, **dict(options), interpret=INTERPRET))


def _run(
    kernel: Callable[..., Partial], options: tuple[tuple[str, Any], ...], arrays: list[np.ndarray]
) -> tuple[Partial, bool]:
    found = jax.tree.map(np.asarray, _compiled(kernel, options)(*arrays))
    return found, bool(gpu_callbacks.get_races().races_found)
