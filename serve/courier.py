"""Carries images to a member, many in one call: what comes while calls are out goes together with the next one.

A call between Serve's processes costs milliseconds of CPU, whatever it carries. A lone image is sent at once; under load
the calls grow, and their cost is shared.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from serve.members import Seen
from serve.refusals import overloaded

Call = Callable[[Sequence[np.ndarray], bool], Awaitable[list[Seen]]]
_Waiting = tuple[np.ndarray, bool, asyncio.Future[Seen]]


class Courier:
    """To one member, for one event loop. `at_once`: calls that may be out; `most`: images in one; `room`: images that may
    wait, above which they are refused."""

    def __init__(self, call: Call, *, at_once: int, most: int, room: int) -> None:
        self._call, self._at_once, self._most, self._room = call, at_once, most, room
        self._waiting: deque[_Waiting] = deque()
        self._out: set[asyncio.Task[None]] = set()

    async def see(self, pixels_SS3: np.ndarray, whole: bool) -> Seen:
        """What the member sees of an image. Raises what the call raises, and `Refusal` where there is no room."""
        if len(self._waiting) >= self._room:
            raise overloaded(f"{len(self._waiting)} images are waiting already; try again")
        answer: asyncio.Future[Seen] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels_SS3, whole, answer))
        self._send()
        return await answer

    def _send(self) -> None:
        while self._waiting and len(self._out) < self._at_once:
            load = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            load = [item for item in load if not item[2].done()]  # whose request has given up meanwhile
            if load:
                task = asyncio.create_task(self._carry(load))
                self._out.add(task)
                task.add_done_callback(self._returned)

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._out.discard(task)
        self._send()

    async def _carry(self, load: list[_Waiting]) -> None:
        answers = [answer for _, _, answer in load]
        try:
            seen = await self._call([pixels_SS3 for pixels_SS3, _, _ in load], any(whole for _, whole, _ in load))
        except Exception as error:
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
            return
        for answer, each in zip(answers, seen, strict=True):
            if not answer.done():
                answer.set_result(each)
