"""Carries images to a member, many in one call: what comes while calls are out goes together with the next one.

A call between Serve's processes costs milliseconds of CPU whatever it carries, and an image alone in a forward pass
half as much again as one of four. So images wait for company: a lone one next to nothing, some milliseconds while
others are being looked at and a replica has nothing to do, and where all are busy until a call would be half full. Nothing
else gathers: what is in a call is one forward pass.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

from protopnet.serving.members import Seen
from protopnet.serving.refusals import overloaded

Call = Callable[[Sequence[np.ndarray], bool], Awaitable[list[Seen]]]
# Images in a call from which on more make each hardly cheaper (ResNet-18 on a CPU: 36, 27, 26 ms an image for 2, 4, 8).
COMPANY = 4
PATIENCE_S = 0.01


class _Waiting(NamedTuple):
    pixels_SS3: np.ndarray
    whole: bool
    answer: asyncio.Future[Seen]
    since: float


class Courier:
    """To one member, for one event loop. `replicas`: of the member; `most`: images in a call; `room`: images that may
    wait, above which they are refused; how long an image waits for company: `wait_s` where no other is being looked at,
    else `patience_s`."""

    def __init__(
        self,
        call: Call,
        *,
        replicas: int,
        most: int,
        room: int,
        wait_s: float = 0.0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._call, self._replicas, self._most, self._room = call, replicas, most, room
        self._wait_s, self._patience_s = wait_s, max(wait_s, patience_s)
        self._waiting: deque[_Waiting] = deque()
        self._out: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def see(self, pixels_SS3: np.ndarray, whole: bool) -> Seen:
        """What the member sees of an image. Raises what the call raises, and `Refusal` where there is no room."""
        if len(self._waiting) >= self._room:
            raise overloaded(f"{len(self._waiting)} images are waiting already; try again")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Seen] = loop.create_future()
        self._waiting.append(_Waiting(pixels_SS3, whole, answer, loop.time()))
        self._send()
        return await answer

    def _send(self) -> None:
        while self._waiting and self._worthwhile():
            load = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            load = [item for item in load if not item.answer.done()]  # whose request has given up meanwhile
            if load:
                task = asyncio.create_task(self._carry(load))
                self._out.add(task)
                task.add_done_callback(self._returned)

    def _worthwhile(self) -> bool:
        """Whether what waits should go now. If only later, a timer is set."""
        out, waiting = len(self._out), len(self._waiting)
        if out >= self._replicas:  # each has one in work: a second keeps a replica busy when that one ends
            return out < 2 * self._replicas and 2 * waiting >= self._most
        if waiting >= min(COMPANY, self._most):
            return True
        loop = asyncio.get_running_loop()
        left = self._waiting[0].since + (self._patience_s if out else self._wait_s) - loop.time()
        if left > 0 and self._timer is None:
            self._timer = loop.call_later(left, self._time_is_up)
        return left <= 0

    def _time_is_up(self) -> None:
        self._timer = None
        self._send()

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._out.discard(task)
        self._send()

    async def _carry(self, load: Sequence[_Waiting]) -> None:
        try:
            seen = await self._call([item.pixels_SS3 for item in load], any(item.whole for item in load))
        except Exception as error:
            for item in load:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        for item, each in zip(load, seen, strict=True):
            if not item.answer.done():
                item.answer.set_result(each)
