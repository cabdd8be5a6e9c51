"""Limits of this process on its host: processors by affinity and quota, memory by its control groups.

A container sees the host's cores and memory; its limits are those of the Linux control groups that it is in. A group
lies in others, and each may have a limit of its own, so the tightest one counts.

Source: Linux `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`, `scheduler/sched-bwc.rst`.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_NO_LIMIT = 2**60  # a v1 group without a limit says the largest multiple of a page that 63 bits hold


def usable_processors(root: Path = _ROOT) -> int:
    """Processors that this process can keep busy: by affinity, and by quotas, of which parts count as a whole one.

    Args:
        root: where `proc` and the mounted control groups are; another in tests.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for quota in map(_quota, _groups("cpu", root)) if quota is not None]
    return max(math.ceil(min([allowed, *quotas])), 1)


def unused_memory_bytes(root: Path = _ROOT) -> int | None:
    """Bytes that this process' control groups still allow, files in the page cache not counted; None: no limit."""
    left = [found for found in map(_memory_left, _groups("memory", root)) if found is not None]
    return max(min(left), 0) if left else None


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the group that this process is in under `controller`, and of those around it, innermost first."""
    own = _own_paths(root)
    for mount, top, controllers in _mounts(root):
        path = own.get(controller if controllers else "")
        if path is None or (controllers and controller not in controllers):
            continue
        # in a container without a name space of its own, the path is the host's and the mount begins inside it
        inside = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
        folder = root / mount.relative_to("/")
        parts = [part for part in inside.parts if part != ".."]
        for count in range(len(parts), -1, -1):
            yield folder.joinpath(*parts[:count])


def _own_paths(root: Path) -> dict[str, PurePosixPath]:
    """Path of this process' group by controller; "" is that of version 2."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            found[controller] = PurePosixPath("/", path.lstrip("/"))
    return found


def _mounts(root: Path) -> Iterator[tuple[PurePosixPath, PurePosixPath, set[str]]]:
    """Mounted hierarchies: where, from which group on, and the controllers of version 1 (none: it is version 2)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controllers = set(kind[-1].split(",")) if kind[0] == "cgroup" else set()
        yield PurePosixPath(fields[4]), PurePosixPath(fields[3]), controllers


def _quota(group: Path) -> float | None:
    """Processors that a group may use; None: no limit."""
    if maximum := _lines(group / "cpu.max"):
        quota, _, period = maximum[0].partition(" ")
    else:
        quota = next(iter(_lines(group / "cpu.cfs_quota_us")), "")
        period = next(iter(_lines(group / "cpu.cfs_period_us")), "")
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _memory_left(group: Path) -> int | None:
    limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    known = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    if not known:
        return None
    used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
    stat = dict(line.split() for line in _lines(group / "memory.stat") if len(line.split()) == 2)
    files = [stat.get(f"total_{name}", stat.get(name, "0")) for name in ("inactive_file", "active_file")]
    return min(known) - max(used - sum(map(int, files)), 0)


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    """Lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
