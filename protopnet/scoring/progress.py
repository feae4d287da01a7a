"""How far the scoring is, from what the actors report: images a second, and the time left."""

import time
from typing import Any

from protopnet.progress import Reporter
from protopnet.words import duration

_NOTE_SECONDS = 15


class ChunkProgress:
    """Adds up chunks that are done and those under way; a chunk that is begun again counts from its beginning."""

    def __init__(self, reporter: Reporter, images: int):
        self.reporter, self.images = reporter, images
        self.finished = 0
        self.running: dict[int, int] = {}
        self.ready: float | None = None  # when the first actor had loaded its weights
        self.noted = time.time()
        reporter.begin("score", images)

    def on_message(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.ready = min(self.ready or message["ready"], message["ready"])
            self.noted = time.time()
        elif "written" in message:
            self.running.pop(message["written"], None)
            self.finished += message["images"]
        else:
            self.running[message["chunk"]] = message["done"]
        self._show()

    def _show(self) -> None:
        done = min(self.images, self.finished + sum(self.running.values()))
        self.reporter.advance(done)
        now = time.time()
        if self.ready and done and now - self.noted >= _NOTE_SECONDS:
            self.noted = now
            rate = done / max(1e-3, now - self.ready)
            left = duration((self.images - done) / rate)
            self.reporter.note(f"{done:,} of {self.images:,} images, {rate:,.1f} img/s, {left} left")
