"""CPUs that a process may use: affinity, and the quota of control groups of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protopnet.machine import usable_cpus, usable_memory

ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on 16 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def test_nothing_but_affinity_where_there_are_no_groups(tmp_path: Path, many: None) -> None:
    assert usable_cpus(tmp_path) == 16


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_affinity_is_kept_to() -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program += "from protopnet.machine import usable_cpus; print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "1\n"
    assert 1 <= usable_cpus() <= (ALL or 1)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 16), ("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 16)],
)
def test_version_2(tmp_path: Path, many: None, quota: str, cpus: int) -> None:
    write(tmp_path, **{"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota})
    assert usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 16), ("300000", 3), ("20000", 1)])
def test_version_1(tmp_path: Path, many: None, quota: str, cpus: int) -> None:
    folder = "sys/fs/cgroup/cpu/docker/1f"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    groups = "9:pids:/\n4:cpu,cpuacct:/docker/1f\n2:cpuset:/\n0::/"
    write(tmp_path, **files, **{"proc/self/cgroup": groups})
    assert usable_cpus(tmp_path) == cpus


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path, many: None) -> None:
    files = {
        "proc/self/cgroup": "0::/user.slice/job.scope",
        "sys/fs/cgroup/user.slice/job.scope/cpu.max": "800000 100000",
        "sys/fs/cgroup/user.slice/cpu.max": "600000 100000",
    }
    assert usable_cpus(write(tmp_path, **files)) == 6


def test_a_container_that_sees_its_group_as_the_top(tmp_path: Path, many: None) -> None:
    files = {"proc/self/cgroup": "0::/kubepods/pod7/c1", "sys/fs/cgroup/cpu.max": "400000 100000"}
    assert usable_cpus(write(tmp_path, **files)) == 4


def test_memory_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    there_is = usable_memory(tmp_path)
    assert there_is > 1e8
    files = {"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/job/memory.max": "60000000"}
    assert usable_memory(write(tmp_path, **{"proc/self/cgroup": "0::/job"}, **files)) == 60_000_000
    older = {
        "proc/self/cgroup": "7:cpu:/\n5:memory:/slurm",
        "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "50000000",
    }
    assert usable_memory(write(tmp_path, **older)) == 50_000_000
    unlimited = {"sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "9223372036854771712"}
    assert usable_memory(write(tmp_path, **unlimited)) == there_is
