"""Who works in a folder: a small file that its owner renews, so that two jobs never write the same results.

    <folder>/lease.json      host, process and a count that grows while the owner lives

A dead owner's lease is taken over: on its own machine at once, elsewhere when the count has stood still for a while
(clocks of two machines are never compared).
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from protopnet import storage
from protopnet.errors import UserError

RENEW_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
SETTLE_SECONDS = 1.0  # after which two jobs that began at the same moment in a bucket see who came last


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Lease:
    """A folder, to be worked in by this process alone while the block runs.

    waiting: is told what is waited for, where it isn't clear whether the owner still lives. Entering raises `UserError`
    if another job works there; `check` if one has taken it since (this one was thought dead).
    """

    def __init__(self, folder: str, setting: str, waiting: Callable[[str], None] = _to_stderr) -> None:
        self.uri, self.folder, self.setting = storage.join(folder, "lease.json"), folder, setting
        self.waiting = waiting
        self.own = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
        self.own["token"] = secrets.token_hex(8)
        self._count = 0
        self._stop = threading.Event()
        self._lost = False

    def __enter__(self) -> "Lease":
        found = self._read()
        if found is not None and self._lives(found):
            raise UserError(self._taken(found))
        self._write()
        if storage.is_remote(self.uri):
            time.sleep(SETTLE_SECONDS)
        if (found := self._read()) is not None and found["token"] != self.own["token"]:
            raise UserError(self._taken(found))
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError, UserError):
            if not self._lost and (found := self._read()) is not None and found["token"] == self.own["token"]:
                storage.delete_file(self.uri)

    def check(self) -> None:
        """`UserError` if another job has taken the folder over."""
        if self._lost:
            raise UserError(
                f"{self.folder} was taken over by another job while this one was thought dead; it stops here"
            )

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            with suppress(OSError, UserError):  # a bucket that fails for a moment: the next time, then
                found = self._read()
                if found is not None and found["token"] != self.own["token"]:
                    self._lost = True
                    return
                self._write()

    def _write(self) -> None:
        self._count += 1
        storage.write_json(self.uri, self.own | {"count": self._count})

    def _read(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = storage.read_json(self.uri)
        except FileNotFoundError:
            return None
        return found

    def _lives(self, found: dict[str, Any]) -> bool:
        if found["host"] == self.own["host"]:
            return bool(_born(found["pid"]) == found["born"])
        self.waiting(f"waits to see whether process {found['pid']} on {found['host']} still works in {self.folder}")
        deadline = time.monotonic() + EXPIRE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, EXPIRE_SECONDS / 10))
            now = self._read()
            if now is None:
                return False
            if (now["token"], now["count"]) != (found["token"], found["count"]):
                return True
        return False

    def _taken(self, found: dict[str, Any]) -> str:
        return (
            f"another job works in {self.folder}: process {found['pid']} on {found['host']}; wait for it, stop it, or "
            f"choose another {self.setting}"
        )


def _born(pid: int) -> str | None:
    """When a process of this machine began, so that a number used again is not taken for it; None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] == "Z" else after_name[19]
    except OSError:
        return ""  # no such file system: any process of this number counts
