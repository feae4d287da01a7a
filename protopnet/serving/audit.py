"""Who asked what, when, and which bundles answered: a line of JSON a request, and nothing of any image.

<audit_log>/2026-11-25-<host>-<process>.jsonl    one file a day and ingress replica, only ever added to
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from protopnet.errors import UserError

_LONGEST = 2_000  # characters of a path or query


class AuditLog:
    """Of one ingress replica. `model`: the short hash of the bundles it answers with."""

    def __init__(self, folder: str, model: str) -> None:
        self._folder, self._model = Path(folder), model
        self._replica = f"{socket.gethostname()}-{os.getpid()}"

    def add(self, *, key: str | None, method: str, path: str, query: str, request_id: str, status: int) -> None:
        now = datetime.now(UTC)
        line = {
            "time": now.isoformat(timespec="milliseconds"),
            "key": key,
            "method": method,
            "path": path[:_LONGEST],
            "query": query[:_LONGEST],
            "model": self._model,
            "status": status,
            "request_id": request_id,
        }
        with (self._folder / f"{now:%Y-%m-%d}-{self._replica}.jsonl").open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def check_folder(folder: str) -> None:
    """`UserError` where no line could be written; makes the folder if it isn't there."""
    writable = "://" not in folder
    if writable:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
    if not writable:
        raise UserError(f"{folder} is no folder that can be written; expected a local one; change audit_log")
