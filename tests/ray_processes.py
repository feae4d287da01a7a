"""Finding and killing processes that a test has started: through /proc, and only its own descendants."""

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def descendants(pid: int) -> dict[int, str]:
    """Process ids and titles of all processes below this one."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if state != "Z":
            children[int(parent)].append(int(stat.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return {child: title(child) for child in found}


def title(pid: int) -> str:
    """What ps shows; Ray writes there what a worker does, e.g. `ray::RayTrainWorker`."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def named(name: str, below: int | None = None) -> list[int]:
    """Ids of the descendants (of this process) whose title begins with the name."""
    return [pid for pid, text in descendants(below or os.getpid()).items() if text.startswith(name)]


def kill_first(name: str, below: int | None = None, timeout: float = 60) -> int:
    """Kill -9 the first descendant of this name, as soon as there is one; returns its id."""
    pids = wait_for(lambda: named(name, below), timeout)
    os.kill(pids[0], signal.SIGKILL)
    return pids[0]


def kill_all(pids: list[int]) -> None:
    """Kill -9 those of Ray's processes that are still there."""
    for pid in pids:
        if "ray" in title(pid):  # and not another process that has been given the number since
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], T], timeout: float = 60) -> T:
    """The first true value of the condition."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"nothing happened for {timeout} s"
        time.sleep(0.05)
    return value
