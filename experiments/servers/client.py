"""`apt-jax bench serve` in a separate process, so that the client does not share an interpreter with the server."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def bench_serve(url: str, flags: Sequence[str]) -> dict[str, Any]:
    """Figures of one run at one rate against the server at `url`.

    Raises:
        CalledProcessError: the client failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        command = [
            sys.executable,
            "-m",
            "apt_jax.serve.cli",
            "bench",
            "serve",
            "--base-url",
            url,
            "--output",
            str(output),
        ]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return figures
