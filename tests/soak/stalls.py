"""How long a stream waits for hostile requests within the limit on bodies, and how much memory they take.

    python -m tests.soak.stalls URL PID [PART_OF_A_NAME ...]

`make soak` has it as the part `stalls`, which fails where the wait is too long.
"""

import sys
import time
from urllib.parse import urlsplit

from tests.soak.server import Server
from tests.support.bystander import bystander, forget_peak, memory_bytes, peak_bytes
from tests.support.hostile_requests import ANSWERED, MB, READ, send

BASELINE_S = 1.0
ALLOWED_S = 0.1  # or ten times what the stream waits for without them


def measure(url: str, process: int, names: list[str]) -> list[tuple[str, int, float, float, float]]:
    """For each request its name, status, worst gap of the stream in seconds with and before it, and MB taken."""
    address, rows = urlsplit(url), []
    assert address.hostname is not None and address.port is not None
    with bystander(url) as stream:
        for hostile in (*READ, *ANSWERED):
            if names and not any(name in hostile.name for name in names):
                continue
            wire, began = hostile.wire(), time.monotonic()
            time.sleep(BASELINE_S)
            baseline_s = stream.worst_gap_s(began, time.monotonic())
            forget_peak(process)
            before, began = memory_bytes(process), time.monotonic()
            try:
                status = send(address.hostname, address.port, wire, timeout_s=300)
            except ConnectionResetError:
                status = 0
            gap_s = stream.worst_gap_s(began, time.monotonic())
            rows.append((hostile.name, status, gap_s, baseline_s, (peak_bytes(process) - before) / MB))
            print(
                f"    {hostile.name:40} {status} gap {1000 * gap_s:6.0f} ms (before {1000 * baseline_s:4.0f} ms)"
                f" memory {rows[-1][4]:5.0f} MB for {len(wire) / MB:4.1f} MB",
                flush=True,
            )
    return rows


def stalls(server: Server, scale: float) -> str:
    """Requests that would be long work for a careless server, each beside a stream."""
    rows = measure(server.url, server.pid, [])
    late = [row for row in rows if row[2] > max(ALLOWED_S, 10 * row[3])]
    assert not late, f"the stream waited too long for {late}"
    worst = max(rows, key=lambda row: row[2])
    return f"{len(rows)} requests, the worst gap {1000 * worst[2]:.0f} ms ({worst[0]})"


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
