"""What the host's processor can do."""

import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def cpu_features() -> str:
    """Instruction sets of the host's CPU, or on a Mac its name: a program for a newer one must not be loaded."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _brand() or platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _brand() -> str:
    """A Mac's processor, as "Apple M2 Pro", where Python only says "arm"; empty elsewhere."""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
