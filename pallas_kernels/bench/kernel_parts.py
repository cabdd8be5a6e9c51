"""`apt-jax bench kernels --all`: all measurements on an accelerator, unattended, with a summary.

Each part is a process of its own with a time limit: one that hangs or is killed, as a kernel that no device has run yet
may be, leaves its table so far and the other parts.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTS = {"attention": [], "chunks": ["--chunks"], "writes": ["--writes"], "end-to-end": ["--end-to-end"]}
LIMIT_S = 1500
_MAIN = ("attention", "end-to-end")  # without which the command failed
_KV_SHARE, _HIDDEN_TO_KV = 0.8, 0.6  # aims
_AGAINST_KV = (("hidden", "pallas"), ("hidden", "xla"), ("kv", "xla"), ("kv", "jax"))


def run_parts(flags: list[str], folder: Path, *, limit_s: float = LIMIT_S) -> int:
    """Run all of `PARTS` one after the other; prints and keeps their tables, and sums up; 0 if the main ones worked.

    Args:
        flags: of `apt-jax bench kernels`, for each part.
        folder: gets `PART.txt` and `PART.json` of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name, own in PARTS.items():
        output = folder / f"{name}.json"
        output.unlink(missing_ok=True)
        print(f"--- {name}", flush=True)
        command = [sys.executable, "-m", "apt_jax.serve.cli", "bench", "kernels", *flags, *own, "-o", str(output)]
        codes[name] = _run_part(command, folder / f"{name}.txt", limit_s)
    print("--- in short")
    found = {name: json.loads(path.read_text()) for name in PARTS if (path := folder / f"{name}.json").exists()}
    for line in (*summary(found), *(f"{name} ended with {code}" for name, code in codes.items() if code)):
        print(line)
    return int(any(codes[name] for name in _MAIN))


def _run_part(command: list[str], text: Path, limit_s: float) -> int:
    """Run `command`, which is killed after `limit_s`; its output goes to the terminal and to `text`."""
    with (
        text.open("w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
            kept.flush()
        timer.cancel()
    if process.returncode < 0:
        print(f"killed by signal {-process.returncode}; a part may take {limit_s:.0f} s")
    return process.returncode


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    """The parts' results compared with the aims, one line each. Pure."""
    lines = []
    kernels = found.get("attention", {}).get("kernels", [])
    times = {
        tuple(r[key] for key in ("model", "batch", "context_tokens", "way", "implementation")): r["times"]["median_s"]
        for r in kernels
        if r["times"]
    }
    for model in dict.fromkeys(r["model"] for r in kernels):
        of_model = [r for r in kernels if r["model"] == model]
        by_kernel = [r for r in of_model if r["times"] and (r["way"], r["implementation"]) == ("kv", "pallas")]
        shares = [r["copy_share"] for r in by_kernel if r["batch"] >= 32]
        lines += _range(f"{model}: KV by the kernel, share of a copy at batch >= 32 (aim {_KV_SHARE})", shares)
        for way, name in _AGAINST_KV:
            ratios = [
                seconds / times[m, b, c, "kv", "pallas"]
                for (m, b, c, w, n), seconds in times.items()
                if (m, w, n) == (model, way, name) and (m, b, c, "kv", "pallas") in times
            ]
            aim = f" (aim {_HIDDEN_TO_KV})" if way == "hidden" and name != "xla" else ""
            lines += _range(f"{model}: time of {way} by {name}, against KV by the kernel{aim}", ratios)
    names = ("model", "tokens", "rows", "cached", "kind", "implementation")
    chunks = {
        tuple(r[name] for name in names): r["times"]["median_s"]
        for r in found.get("chunks", {}).get("chunks", [])
        if r["times"]
    }
    for model in dict.fromkeys(key[0] for key in chunks):
        for what, *which in (
            ("among itself", False, "kv"),
            ("over a cached prefix", True, "kv"),
            ("over cached hidden vectors", True, "hidden"),
        ):
            ratios = _against_xla({k: s for k, s in chunks.items() if [k[0], k[3] > 0, k[4]] == [model, *which]})
            lines += _range(f"{model}: a chunk {what}, time of the kernel against XLA", ratios)
    writes = {
        (r["model"], r["tokens"], r["rows"], r["implementation"]): r["times"]["median_s"]
        for r in found.get("writes", {}).get("writes", [])
        if r["times"]
    }
    for model in dict.fromkeys(key[0] for key in writes):
        ratios = _against_xla({k: s for k, s in writes.items() if k[0] == model})
        lines += _range(f"{model}: writing to the cache, time of the kernel against XLA", ratios)
    steps = found.get("end-to-end", {}).get("end_to_end", {})
    for kind in ("kv", "hidden"):
        shares = [r["floor_s"] / r["times"]["median_s"] for r in steps.get("steps", [])
                  if r["times"] and r["kind"] == kind]  # fmt: skip
        lines += _range(f"{steps.get('model')}: floor of a {kind} decode step against its time", shares)
    rho_ns = [seconds * 1e9 for seconds in steps.get("rho_s", {}).values()]
    return lines + _range(f"{steps.get('model')}: rho, ns per hidden token and step", rho_ns)


def _against_xla(seconds: dict[tuple[Any, ...], float]) -> list[float]:
    """The kernel's time against XLA's for each shape, by shape and implementation."""
    return [
        s / seconds[*shape, "xla"]
        for (*shape, implementation), s in seconds.items()
        if implementation == "kernel" and (*shape, "xla") in seconds
    ]


def _range(what: str, numbers: Iterable[float]) -> list[str]:
    numbers = list(numbers)
    return [f"{what}: {min(numbers):.2f} to {max(numbers):.2f}"] if numbers else []
