"""Who may decide: one person at a time; the others read, and see who it is.

A seat is held while its browser goes on asking how things are, and for a minute after. The folder itself is held by this
process (`protopnet.lease`).
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from protopnet.errors import UserError

SILENT_SECONDS = 60.0


@dataclass
class Desk:
    """The one seat. clock: seconds."""

    clock: Callable[[], float] = time.monotonic
    who: str | None = None
    _seat: str = ""
    _seen: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sit(self, who: str) -> str:
        """A seat for somebody; `UserError` while another is there."""
        with self._lock:
            if self._taken():
                raise UserError(
                    f"{self.who} is deciding: wait until {self.who} gets up or has been silent for a minute"
                )
            self.who, self._seat, self._seen = who, secrets.token_hex(8), self.clock()
            return self._seat

    def seen(self, seat: str) -> bool:
        """Whether this is the seat; if so it is held on to."""
        with self._lock:
            if not seat or not secrets.compare_digest(seat, self._seat):
                return False
            self._seen = self.clock()
            return True

    def get_up(self, seat: str) -> bool:
        """Make room for the next; whether this was the seat."""
        with self._lock:
            own = bool(seat) and secrets.compare_digest(seat, self._seat)
            if own:
                self.who, self._seat = None, ""
            return own

    def holder(self) -> str | None:
        """Who is deciding, as far as is known."""
        with self._lock:
            return self.who if self._taken() else None

    def person(self, seat: str) -> str:
        """Who sits there; `UserError` for a seat that isn't held any more."""
        if not self.seen(seat):
            other = self.holder()
            raise UserError(f"{other} is deciding now" if other else "sit down first: say who you are")
        assert self.who is not None
        return self.who

    def _taken(self) -> bool:
        return bool(self._seat) and self.clock() - self._seen < SILENT_SECONDS
