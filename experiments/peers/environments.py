"""A virtual environment for each peer below .venv-peers/."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from experiments.peers.catalogue import PYTHON, ROOT, UNWANTED, Peer

FOLDER = ROOT / ".venv-peers"
STAMP = ".installed"


def model_folder(given: Path | None, model: str, *, dummy: bool) -> Path:
    """Where a model's folder is written, if it is not given."""
    return (given or FOLDER / f"{model}-{'dummy' if dummy else 'random'}").resolve()


class NotInstalled(ValueError):
    """A peer cannot be installed here; one sentence."""


def python_of(peer: Peer) -> Path:
    """The peer's interpreter; its environment is created and filled if necessary.

    Raises:
        NotInstalled: why not; the whole output of pip is in a file next to the environment.
    """
    if not peer.requirements:
        return Path(PYTHON)
    folder = FOLDER / (peer.shares or peer.name)
    python = folder / "bin" / "python"
    stamp, wanted = folder / STAMP, "\n".join(peer.requirements)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    base = shutil.which(peer.python or "") or PYTHON
    print(f"installing {peer.name} into {folder.relative_to(ROOT)} (once; minutes)", file=sys.stderr)
    FOLDER.mkdir(exist_ok=True)
    log = FOLDER / f"{peer.name}.log"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    commands = (
        [base, "-m", "venv", "--clear", str(folder)],
        [*pip, "install", *peer.requirements],
        [*pip, "uninstall", "--yes", *UNWANTED],
    )
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                raise NotInstalled(f"{peer.name} is skipped: it cannot be installed here ({_last_error(log)})")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def versions_of(peer: Peer, python: Path) -> dict[str, str]:
    """Versions of the peer's distributions, and of its Python."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d: m.version(d) for d in sys.argv[1:]}\n"
        "print(json.dumps({**found, 'python': platform.python_version()}))"
    )
    done = subprocess.run([str(python), "-c", code, *peer.distributions], capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line]
    return f"{lines[-1][:160] if lines else 'see'}; see {log.relative_to(ROOT)}"
