"""How long a stream waits for hostile requests within the limit on bodies, and how much memory they take.

    python -m tests.soak.stalls URL PID [PART_OF_A_NAME ...]

`make soak` has it as the part `stalls`, which fails where the wait is too long or the memory too much. The server needs
a chat template.
"""

import sys
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from apt_jax.request import DEFAULT_STALL_S
from tests.soak.server import Server
from tests.support.bystander import bystander, forget_peak, memory_bytes, peak_bytes
from tests.support.hostile_requests import ANSWERED, MB, READ, send

BASELINE_S = 1.0
ALLOWED_S = 0.1  # or ten times what the stream waits for without them
# Where the engine is full the policy may let the stream wait as long as its SLO does; what the server's own work adds
# is bounded with an engine that costs nothing (`tests/serve/test_hostile_requests.py`).
ALLOWED_FULL_S = DEFAULT_STALL_S
TIMES_SIZE, SLACK_BYTES = 10, 48 * MB  # of body and answer; what allocators keep of the other parts' load


@dataclass(frozen=True)
class Seen:
    """What one request did to the stream and to the server."""

    name: str
    status: int
    expected_status: int
    gap_s: float
    baseline_s: float  # of the stream before
    fills_batches: bool
    body_bytes: int
    answer_bytes: int
    memory_bytes: int  # at the peak, more than before

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        allowed_bytes = TIMES_SIZE * (self.body_bytes + self.answer_bytes) + SLACK_BYTES
        allowed_s = ALLOWED_FULL_S if self.fills_batches else max(ALLOWED_S, 10 * self.baseline_s)
        found = {
            f"{self.name}: status {self.status}, not {self.expected_status}": self.status != self.expected_status,
            f"{self.name}: a gap of {self.gap_s:.3f} s": self.gap_s > allowed_s,
            f"{self.name}: {self.memory_bytes / MB:.0f} MB": self.memory_bytes > allowed_bytes,
        }
        return [fault for fault, is_there in found.items() if is_there]


def measure(url: str, process: int, names: list[str]) -> list[Seen]:
    """Send each request beside a stream, and print what it did."""
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
                status, answer_bytes = send(address.hostname, address.port, wire, timeout_s=300)
            except ConnectionResetError:
                status, answer_bytes = 0, 0
            gap_s = stream.worst_gap_s(began, time.monotonic())
            taken = max(peak_bytes(process) - before, 0)
            row = Seen(
                *(hostile.name, status, hostile.status, gap_s, baseline_s, hostile.fills_batches),
                *(len(wire), answer_bytes, taken),
            )
            rows.append(row)
            print(
                f"    {row.name:40} {status} gap {1000 * gap_s:6.0f} ms (before {1000 * baseline_s:4.0f} ms)"
                f" memory {taken / MB:5.0f} MB for {len(wire) / MB:4.1f} MB, answered with {answer_bytes / MB:4.1f} MB",
                flush=True,
            )
    return rows


def stalls(server: Server, scale: float) -> str:
    """Requests that would be long work for a careless server, each beside a stream."""
    rows = measure(server.url, server.pid, [])
    faults = [fault for row in rows for fault in row.faults]
    assert not faults, f"{len(faults)} of {len(rows)}: {'; '.join(faults)}"
    worst, full = (
        max((row for row in rows if row.fills_batches == kind), key=lambda row: row.gap_s) for kind in (False, True)
    )
    most = max(rows, key=lambda row: row.memory_bytes)
    return (
        f"{len(rows)} requests, the worst gap {1000 * worst.gap_s:.0f} ms ({worst.name}), "
        f"of those that fill the engine {1000 * full.gap_s:.0f} ms ({full.name}), "
        f"the most memory {most.memory_bytes / MB:.0f} MB ({most.name})"
    )


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
