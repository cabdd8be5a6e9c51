"""Decode attention by the kernels, 16 bits and int8, as a share of the speed of a copy."""

from dataclasses import asdict
from functools import partial
from typing import Any

from apt_jax.cache import CacheDtype
from apt_jax.pallas_kernels.bench.kernel_counts import Shape
from apt_jax.pallas_kernels.bench.kernel_runs import Implementation, implementations, kernels_of, run_one
from apt_jax.pallas_kernels.bench.timing import copy_bytes_per_s
from experiments.device_check.session import Session

LIMIT_S = 45.0


class NotMeasured(RuntimeError):
    """An implementation failed, and said why."""


def copy(session: Session) -> float | None:
    """The speed of a copy, measured once in the whole check."""
    if session.copy_bytes_per_s is None:
        session.check("copy", lambda: {"copy_bytes_per_s": copy_bytes_per_s(session.device)})
    return session.copy_bytes_per_s


def run(session: Session) -> None:
    """The copy, then both kinds over both caches for each shape; at last XLA in the first shape."""
    speed = copy(session)
    if speed is None:
        return
    sizes = session.sizes
    caches: tuple[tuple[CacheDtype, int], ...] = (("auto", sizes.block_size), ("int8", sizes.int8_block_size))
    for shape in sizes.decodes:
        for cache, block_size in caches:
            for which in kernels_of(session.device):
                _check(session, shape, which, block_size, speed, cache)
    for which in implementations(session.device):
        if which.name == "xla":
            _check(session, sizes.decodes[0], which, sizes.block_size, speed, "auto", needs_s=20.0)


def _check(
    session: Session, shape: Shape, which: Implementation, block_size: int, speed: float, cache: CacheDtype,
    needs_s: float = 0.0,
) -> None:  # fmt: skip
    numbers = "bfloat16" if cache == "auto" else cache
    name = f"{which.way} {numbers} {which.name} {shape.model} {shape.batch}x{shape.context_tokens}"
    needs_s = needs_s if session.sizes.patience == 1 else 0.0
    session.check(name, partial(_measure, shape, which, block_size, speed, cache), limit_s=LIMIT_S, needs_s=needs_s)


def _measure(
    shape: Shape, which: Implementation, block_size: int, speed: float, cache: CacheDtype
) -> dict[str, Any]:  # fmt: skip
    found = run_one(shape, which, block_size, speed, cache)
    if found.error is not None:
        raise NotMeasured(found.error)
    return {**asdict(found), "block_size": block_size}
