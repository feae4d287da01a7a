"""What this process may use of the machine it runs on; a container or a scheduler may leave it less than there is."""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use at once: by its affinity, and by the quota of its control groups; at least 1.

    A quota of two and a half CPUs counts as two: a third thread would only wait for its turn. `root` has `proc` and `sys`.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cpus, *_quotas(root)])))


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: what the machine has, or what its control groups allow."""
    there_is = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (
        _read(folder / ("memory.limit_in_bytes" if old else "memory.max")) for folder, old in _groups(root, "memory")
    )
    return min([there_is, *(int(limit) for limit in limits if limit.isdigit())])


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that each control group of this process allows, its own and those above it; nothing where all are free."""
    for folder, old in _groups(root, "cpu"):
        quota, period = _version_1(folder) if old else _version_2(folder)
        if quota.isdigit():
            yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folder of each control group of this process, and whether it is of version 1."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # no Linux
        return
    mounted = root / "sys/fs/cgroup"
    for _, controllers, path in groups:  # `0::/a/b` is version 2, `4:cpu,cpuacct:/a/b` version 1
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        own = top / path.lstrip("/")  # a container may see its own group as the top
        for folder in [own, *own.parents][: len(own.relative_to(top).parts) + 1]:
            yield folder, bool(controllers)


def _version_1(folder: Path) -> tuple[str, str]:
    return _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "100000"


def _version_2(folder: Path) -> tuple[str, str]:
    quota, period = (_read(folder / "cpu.max") or "max 100000").split()
    return quota, period


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
