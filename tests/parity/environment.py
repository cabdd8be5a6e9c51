"""Finds or makes a Python that has torch and transformers, apart from the one that has jax.

torch's CPU build is not there for every Python that jax wants, and `make test` shall not need it.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

BASES = ("3.11", "3.12", "3.13")  # in the order in which they are tried
TORCH = "torch==2.13.0+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OTHERS = ("transformers>=5.0", "safetensors>=0.6", "numpy>=2.0")


def torch_python(folder: Path) -> Path:
    """Path of the Python in the virtual environment `folder`, which is made on the first call.

    Raises:
        SystemExit: there is no Python to make it with, or torch cannot be installed; says what to do.
    """
    python = folder / "bin" / "python"
    if _has_torch(python):
        return python
    base = next(_bases(), None)
    if base is None:
        raise SystemExit(
            f"make parity needs Python {', '.join(BASES[:-1])} or {BASES[-1]} with venv, and found none on PATH or "
            "under pyenv; install one, or give --torch-python a Python that has torch and transformers"
        )
    print(f"making {folder} with {base}; torch takes a minute or two", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = [TORCH, *OTHERS]
    if subprocess.run([*pip, *wanted], stderr=subprocess.DEVNULL).returncode:  # PyPI itself has no +cpu builds
        subprocess.run([*pip, "--extra-index-url", CPU_INDEX, *wanted], check=False)
    if not _has_torch(python):
        raise SystemExit(f"{TORCH} could not be installed in {folder}; give --torch-python a Python that has it")
    return python


def _has_torch(python: Path) -> bool:
    return python.is_file() and _runs(str(python), "import safetensors, torch, transformers")


def _bases() -> Iterator[str]:
    """Pythons that run and can make virtual environments, from PATH and from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in BASES:
        folders = [Path(folder) for folder in os.get_exec_path()]
        found = [folder / f"python{version}" for folder in folders]
        found += [folder / "bin" / "python" for folder in sorted(pyenv.glob(f"{version}.*"))]
        for path in found:
            if path.is_file() and _runs(str(path), "import ensurepip, venv"):
                yield str(path)


def _runs(python: str, code: str) -> bool:
    try:
        return subprocess.run([python, "-c", code], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
