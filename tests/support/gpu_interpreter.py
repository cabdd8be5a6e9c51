"""GPU kernels interpreted on a CPU, in a process whose XLA has many more threads than there are cores.

JAX's interpreter runs every warpgroup as a program of its own, which waits for the others in a callback. A callback may
hold a thread of XLA's pool, which has one for each core: on two cores a run of the tests stood still, both held by
callbacks that waited for what was to run next. XLA takes the number from NPROC when it starts.
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

from apt_jax.pallas_kernels.reference import Partial
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache

# a slot that is overwritten before it was read, or read before it was written, is a race
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
_THREADS = 64  # more than warpgroups of any kernel here


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


def _start(compiled_programs: str | None) -> None:
    os.environ["NPROC"] = str(_THREADS)
    use_compile_cache(compiled_programs)


@functools.cache
def _compiled(kernel: Callable[..., Partial], options: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(kernel, **dict(options), interpret=INTERPRET))


def _run(
    kernel: Callable[..., Partial], options: tuple[tuple[str, Any], ...], arrays: list[np.ndarray]
) -> tuple[Partial, bool]:
    found = jax.tree.map(np.asarray, _compiled(kernel, options)(*arrays))
    return found, bool(gpu_callbacks.get_races().races_found)
