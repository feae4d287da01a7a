"""Memory that a replica may use for something, shared out among requests: with it the size of a replica is a number."""

import asyncio
import ctypes
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from protopnet.serving.refusals import overloaded


class Memory:
    """So many bytes, for one event loop. `what` they are for is said to those who find none left."""

    def __init__(self, size: int, what: str) -> None:
        self._left, self._what = size, what
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int) -> None:
        """Wait until it is there: first come, first served. To be given back."""
        if not self._waiting and size <= self._left:
            self._left -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size)
            raise
        finally:
            self._serve()

    def give_back(self, size: int) -> None:
        self._left += size
        self._serve()

    @contextmanager
    def growing(self) -> Iterator["Share"]:
        """A share that grows; given back at the end of the block, if not before."""
        share = Share()
        try:
            yield share
        finally:
            self.let_go(share)

    def grow(self, share: "Share", size: int) -> None:
        """`Refusal` where there isn't so much left."""
        if size > self._left:
            raise overloaded(f"there is no memory left for {self._what}; try again")
        self._left -= size
        share.size += size

    def let_go(self, share: "Share") -> None:
        """Of all of it."""
        self.give_back(share.size)
        share.size = 0

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._left):
            size, turn = self._waiting.popleft()
            if not turn.done():  # else its request has given up
                self._left -= size
                turn.set_result(None)


class Share:
    """What one request has of it."""

    size = 0


def trim() -> None:
    """Give the system back what was freed: the C library keeps it otherwise, for each thread apart."""
    if hasattr(_libc, "malloc_trim"):  # glibc
        _libc.malloc_trim(0)


_libc = ctypes.CDLL(None)
