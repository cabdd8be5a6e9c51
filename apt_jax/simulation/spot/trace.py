"""When spot machines come and go.

`TRACES` are the times and numbers of three files that SpotServe's authors published (github.com/Hsword/SpotServe,
elastic-switch/trace/trace_seg: trace_0203_real, trace_0304_real, trace_0506_real; Apache License 2.0): segments of what
they recorded of g4dn.12xlarge spot machines. A machine is taken here to be gone at the time of its event, and to have
had notice of it a grace period earlier.
"""

from dataclasses import dataclass

GRACE_S = 30.0  # the paper's


@dataclass(frozen=True)
class Change:
    """Machines that come, and that are gone, at a time. Numbers are given in order of coming."""

    time_s: float
    come: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Changes in order of time, the first at 0, and when it ends."""

    name: str
    changes: tuple[Change, ...]
    end_s: float

    def machine_s(self) -> float:
        """Seconds of all machines together."""
        counted = [(change.time_s, len(change.come) - len(change.gone)) for change in self.changes]
        return sum((self.end_s - time_s) * more for time_s, more in counted)

    def most(self) -> int:
        """Machines that are there at once at most."""
        count = largest = 0
        for change in self.changes:
            count += len(change.come) - len(change.gone)
            largest = max(largest, count)
        return largest


def steady(count: int, end_s: float) -> Trace:
    """Machines that nobody takes away."""
    return Trace(f"{count} on demand", (Change(0.0, tuple(range(count))),), end_s)


TRACES = (
    Trace(
        "0203",
        (
            Change(0, tuple(range(9))), Change(120, gone=(4,)), Change(180, gone=(1, 5)), Change(480, (9,)),
            Change(540, (10,)), Change(600, (11,)), Change(660, (12,)),
        ),
        720.0,
    ),
    Trace(
        "0304",
        (
            Change(0, tuple(range(7))), Change(240, (7,)), Change(360, (8, 9)), Change(600, gone=(8,)),
            Change(900, (10,)), Change(1200, gone=(3, 10)),
        ),
        1320.0,
    ),
    Trace(
        "0506",
        (
            Change(0, tuple(range(10))), Change(120, gone=(4, 8)), Change(240, gone=(0,)), Change(720, (10,)),
            Change(960, (11,)),
        ),
        1020.0,
    ),
)  # fmt: skip
