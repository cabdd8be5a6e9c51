"""Recordings of what host and devices do."""

import time
from pathlib import Path


def record(base: Path, seconds: float) -> Path:
    """Record for `seconds`; returns the folder, for TensorBoard or xprof."""
    import jax

    folder = base / time.strftime("%Y%m%d-%H%M%S")
    with jax.profiler.trace(str(folder)):
        time.sleep(seconds)
    return folder
