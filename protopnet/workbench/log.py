"""The decisions of a session as a file that only grows: a JSON line each, on the disk before anybody is told.

A process that is killed leaves a decision whole or not at all: a last line without its end counts as never written. Undoing
and redoing are lines too, so that the file is the history of the session.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from protopnet.auditing.decisions import Decision, parse_decision, record_of
from protopnet.errors import UserError

Act = Literal["decide", "undo", "redo"]


class DecisionLog:
    """`decisions.jsonl` of a session's folder, read whole when it is opened. torn: whether its last line was cut off, by a
    process that died while it wrote; that line is taken away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.torn = len(whole) < len(data)
        self.done: list[Decision] = []
        self.undone: list[Decision] = []
        for number, line in enumerate(whole.splitlines(), 1):
            self._read(number, line)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, len(whole))

    def decide(self, decision: Decision) -> None:
        self._write({"act": "decide", "decision": record_of(decision)})
        self._apply("decide", decision)

    def undo(self, who: str) -> Decision:
        """The decision that no longer counts; `UserError` where there is none."""
        if not self.done:
            raise UserError("there is nothing to undo")
        self._write({"act": "undo", "who": who})
        self._apply("undo", None)
        return self.undone[-1]

    def redo(self, who: str) -> Decision:
        """The decision that counts again; `UserError` where there is none."""
        if not self.undone:
            raise UserError("there is nothing to redo")
        self._write({"act": "redo", "who": who})
        self._apply("redo", None)
        return self.done[-1]

    def close(self) -> None:
        os.close(self._file)

    def _apply(self, act: Act, decision: Decision | None) -> None:
        if act == "undo":
            self.undone.append(self.done.pop())
        elif act == "redo":
            self.done.append(self.undone.pop())
        else:
            assert decision is not None
            self.done.append(decision)
            self.undone.clear()

    def _write(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        written = os.write(self._file, line)
        if written < len(line):  # a full disk: what is there would be taken for the beginning of the next line
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise UserError(f"{self.path} can't be written: the disk is full; the decision was not taken")
        os.fsync(self._file)

    def _read(self, number: int, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self._apply(entry["act"], parse_decision(entry["decision"]) if entry["act"] == "decide" else None)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(f"{self.path}, line {number} is damaged ({error}): restore the file from a copy") from None
