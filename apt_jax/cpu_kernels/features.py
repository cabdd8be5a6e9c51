"""What the host's processor can do."""

import platform
from functools import cache
from pathlib import Path


@cache
def cpu_features() -> str:
    """Instruction sets of the host's CPU, where the system tells: a program for a newer one must not be loaded."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
