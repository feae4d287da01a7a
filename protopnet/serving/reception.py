"""What a request with images passes before the members see them: body, budget, room, time, and memory to decode in.

A request takes one of the `ingress.max_requests` places once its body is here, and keeps it until it is answered, or
until its time is up or its client gone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import Request

from protopnet.config import IntensitySettings
from protopnet.imaging import BYTES_A_PIXEL
from protopnet.serving.bodies import read_body
from protopnet.serving.memory import Memory, trim
from protopnet.serving.refusals import Refusal, overloaded
from protopnet.serving.settings import SMALL_PART, AppSettings
from protopnet.serving.uploads import Picture, Upload, decode, measure, uploads_in

_LARGE = 100_000_000  # bytes for decoding one image, after which what was freed is given back at once
CheckBudget = Callable[[int], None]  # of a request with so many images; raises `Refusal`


class Reception:
    """Of one ingress replica. `sizes`: in pixels of the members' inputs; `intensity`: theirs, too."""

    def __init__(self, settings: AppSettings, sizes: Sequence[int], intensity: IntensitySettings) -> None:
        self._settings, self._sizes, self._intensity = settings, sizes, intensity
        self._bodies = Memory(settings.ingress.body_memory, "what is being sent")
        # Small images have a part of the memory to themselves, and never wait for large ones.
        small = settings.ingress.decode_memory // SMALL_PART
        self._small, self._most_small = Memory(small, "decoding"), small // 2
        self._large = Memory(settings.ingress.decode_memory - small, "decoding")
        self._pool = ThreadPoolExecutor(settings.ingress.threads, "decode")
        self._in_work = 0

    @asynccontextmanager
    async def pictures(self, request: Request, check_budget: CheckBudget) -> AsyncIterator[list[Picture]]:
        """The images of a request; the block that answers it has `timeout_s`. Raises `Refusal`."""
        check_budget(1)
        self._check_room()  # those over the count are refused unread
        with self._bodies.growing() as share:
            body = await read_body(request, self._settings, self._bodies, share)
            with self._room():
                try:
                    async with asyncio.timeout(self._settings.timeout_s):
                        uploads = await uploads_in(request, body, self._settings)
                        check_budget(len(uploads))
                        decoded = await self._decoded(uploads)
                        del body, uploads  # what is left to do needs the pixels alone
                        self._bodies.let_go(share)
                        yield decoded
                except TimeoutError:
                    message = f"no answer within {self._settings.timeout_s:g} s; try again later"
                    raise Refusal("timeout", message) from None

    def _check_room(self) -> None:
        if self._in_work >= self._settings.ingress.max_requests:
            raise overloaded(f"{self._in_work} requests are in work already; try again")

    @contextmanager
    def _room(self) -> Iterator[None]:
        self._check_room()
        self._in_work += 1
        try:
            yield
        finally:
            self._in_work -= 1

    async def _decoded(self, uploads: Sequence[Upload]) -> list[Picture]:
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._pool, measure, uploads, self._settings)
        return list(await asyncio.gather(*map(self._decode, uploads, pixels)))

    async def _decode(self, upload: Upload, pixels: int) -> Picture:
        loop, size = asyncio.get_running_loop(), pixels * BYTES_A_PIXEL
        memory = self._small if size <= self._most_small else self._large
        await memory.take(size)
        work = self._pool.submit(self._decode_now, upload, size)
        # When the thread is done with it, which for a request that was given up is later than now.
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(memory.give_back, size))
        return await asyncio.wrap_future(work)

    def _decode_now(self, upload: Upload, size: int) -> Picture:
        try:
            return decode(upload, self._sizes, self._settings, self._intensity)
        finally:
            if size >= _LARGE:
                trim()
