"""Memory shared out among requests: never more than there is, first come first served, and nothing lost on the way."""

import asyncio
import random

import pytest

from protopnet.imaging import BYTES_A_PIXEL, MAX_PIXELS
from protopnet.serving.memory import Memory
from protopnet.serving.refusals import Refusal
from protopnet.serving.settings import SMALL_PART, AppSettings


def test_who_comes_first_is_served_first_also_where_a_smaller_one_would_fit() -> None:
    async def run() -> list[str]:
        memory, order = Memory(10, "this"), list[str]()

        async def take(name: str, size: int) -> None:
            await memory.take(size)
            order.append(name)

        await memory.take(8)
        waiting = [asyncio.create_task(take(name, size)) for name, size in (("large", 9), ("small", 1))]
        await asyncio.sleep(0)
        assert order == []
        memory.give_back(8)
        await asyncio.gather(*waiting)
        return order

    assert asyncio.run(run()) == ["large", "small"]


def test_never_more_than_there_is_and_nothing_lost_whoever_gives_up() -> None:
    chance = random.Random(0)

    async def run() -> None:
        memory, used = Memory(100, "this"), 0

        async def work(size: int) -> None:
            nonlocal used
            await memory.take(size)
            used += size
            assert used <= 100
            try:
                await asyncio.sleep(chance.random() / 500)
            finally:
                used -= size
                memory.give_back(size)

        tasks = [asyncio.create_task(work(chance.randint(1, 60))) for _ in range(300)]
        for task in chance.sample(tasks, 150):
            await asyncio.sleep(0.0002)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(memory.take(100), 1)  # all of it is there

    asyncio.run(run())


def test_who_gives_up_at_the_moment_of_being_served_gives_back() -> None:
    async def run() -> None:
        memory = Memory(10, "this")
        await memory.take(10)
        waiting = asyncio.create_task(memory.take(10))
        await asyncio.sleep(0)
        memory.give_back(10)  # now it has it, and doesn't know yet
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(memory.take(10), 1)

    asyncio.run(run())


def test_a_share_grows_until_nothing_is_left() -> None:
    memory = Memory(10, "bodies")
    with memory.growing() as share:
        memory.grow(share, 6)
        with memory.growing() as other:
            memory.grow(other, 3)
            with pytest.raises(Refusal, match="no memory left for bodies"):
                memory.grow(other, 2)
        memory.grow(share, 4)
    with memory.growing() as share:
        memory.grow(share, 10)


def test_one_image_of_the_largest_size_always_has_room() -> None:
    settings = AppSettings()
    large = settings.ingress.decode_memory - settings.ingress.decode_memory // SMALL_PART
    assert BYTES_A_PIXEL * MAX_PIXELS <= large < 1.05 * BYTES_A_PIXEL * MAX_PIXELS
    with pytest.raises(ValueError, match="ingress.decode_memory must be at least 6857142858"):
        AppSettings(max_pixels=250_000_000)
    with pytest.raises(ValueError, match="ingress.body_memory"):
        AppSettings(max_bytes=10**9)
