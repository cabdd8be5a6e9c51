"""Limits of control groups, read from folders like those of Linux."""

import os

import pytest

from apt_jax.host_limits import unused_memory_bytes, usable_processors

MIB = 2**20
V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_CPU = "31 25 0:27 {} /sys/fs/cgroup/cpu,cpuacct rw shared:7 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 25 0:28 {} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
OTHER = "22 27 0:21 / /proc rw,relatime - proc proc rw"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host of 64 processors: its mounts, the lines of `/proc/self/cgroup`, and the groups' files by path."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)

    def make(mounts, own, files):
        for name, lines in (("mountinfo", [OTHER, *mounts]), ("cgroup", own)):
            path = tmp_path / "proc/self" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


def test_without_control_groups_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert usable_processors(tmp_path) == 3
    assert unused_memory_bytes(tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "processors"),
    [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64), ("9900000 100000", 64)],
)
def test_a_quota_of_version_2(host, quota, processors):
    assert usable_processors(host([V2], ["0::/"], {"cpu.max": quota})) == processors


def test_the_tightest_quota_around_a_nested_group_counts(host):
    own = ["0::/kubepods/pod1/container"]
    files = {"kubepods/pod1/container/cpu.max": "max 100000", "kubepods/pod1/cpu.max": "300000 100000"}
    assert usable_processors(host([V2], own, files)) == 3
    assert usable_processors(host([V2], own, {"kubepods/cpu.max": "200000 100000"})) == 2
    assert usable_processors(host([V2], own, {"kubepods/pod1/container/cpu.max": "100000 100000"})) == 1
    assert usable_processors(host([V2], own, {"another/cpu.max": "1000 100000"})) == 1


@pytest.mark.parametrize("root", ["/", "/docker/abc"], ids=["own name space", "the host's paths"])
def test_a_quota_of_version_1(host, root):
    own = ["4:cpu,cpuacct:/docker/abc", "0::/"]
    group = "cpu,cpuacct/docker/abc/" if root == "/" else "cpu,cpuacct/"
    files = {f"{group}cpu.cfs_quota_us": "400000", f"{group}cpu.cfs_period_us": "100000"}
    assert usable_processors(host([V1_CPU.format(root)], own, files)) == 4
    assert usable_processors(host([V1_CPU.format(root)], own, {f"{group}cpu.cfs_quota_us": "-1"})) == 64


def test_a_path_outside_what_is_mounted_takes_the_mounted_group(host):
    assert usable_processors(host([V2], ["0::/../other"], {"cpu.max": "200000 100000"})) == 2


def test_memory_of_version_2_is_what_the_limit_leaves_without_cached_files(host):
    files = {
        "a/b/memory.max": 1000 * MIB,
        "a/b/memory.current": 700 * MIB,
        "a/b/memory.stat": f"anon {500 * MIB}\nactive_file {50 * MIB}\ninactive_file {150 * MIB}",
        "a/memory.max": "max",
    }
    assert unused_memory_bytes(host([V2], ["0::/a/b"], files)) == 500 * MIB
    around = {"a/memory.max": 800 * MIB, "a/memory.current": 750 * MIB}
    assert unused_memory_bytes(host([V2], ["0::/a/b"], around)) == 50 * MIB
    assert unused_memory_bytes(host([V2], ["0::/a/b"], {"a/b/memory.high": 510 * MIB})) == 10 * MIB
    assert unused_memory_bytes(host([V2], ["0::/a/b"], {"a/memory.current": 900 * MIB})) == 0


def test_memory_of_version_1(host):
    own = ["9:memory:/docker/abc", "0::/"]
    files = {
        "memory/docker/abc/memory.limit_in_bytes": 512 * MIB,
        "memory/docker/abc/memory.usage_in_bytes": 300 * MIB,
        "memory/docker/abc/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}\ntotal_active_file 0",
        "memory/memory.limit_in_bytes": 9223372036854771712,
    }
    root = host([V1_MEMORY.format("/"), V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")], own, files)
    assert unused_memory_bytes(root) == 312 * MIB
    assert usable_processors(root) == 64
    no_limit = {"memory/docker/abc/memory.limit_in_bytes": 9223372036854771712}
    assert unused_memory_bytes(host([V1_MEMORY.format("/")], own, no_limit)) is None
