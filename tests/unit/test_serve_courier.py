"""The courier between ingress and member: nothing is lost, nothing is mixed up, and calls grow under load."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.courier import Courier
from serve.members import Seen
from serve.refusals import Refusal


def image(number):
    return np.full((1, 1, 3), number)


class Member:
    """Answers each image with its number, after a while; fails where one of them is the bad one."""

    def __init__(self, bad=None):
        self.calls, self.bad = [], bad

    async def __call__(self, images, whole):
        numbers = [int(pixels[0, 0, 0]) for pixels in images]
        self.calls.append((numbers, whole))
        await asyncio.sleep(0.001)
        if self.bad in numbers:
            raise ValueError("a bad image")
        return [Seen(np.array([number])) for number in numbers]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 7))
def test_each_image_gets_its_own_answer(count, at_once, most):
    async def run():
        member = Member()
        courier = Courier(member, at_once=at_once, most=most, room=100)
        seen = await asyncio.gather(*(courier.see(image(n), whole=n == 3) for n in range(count)))
        assert [int(each.logits_K[0]) for each in seen] == list(range(count))
        assert sorted(n for numbers, _ in member.calls for n in numbers) == list(range(count))
        assert max(len(numbers) for numbers, _ in member.calls) <= most
        assert all(whole == (3 in numbers) for numbers, whole in member.calls)
        return member.calls

    calls = asyncio.run(run())
    assert len(calls) <= at_once + -(-max(0, count - at_once) // most)  # after the first ones each is as full as can be


def test_a_failed_call_fails_for_those_in_it_alone():
    async def run():
        courier = Courier(Member(bad=5), at_once=1, most=3, room=100)
        return await asyncio.gather(*(courier.see(image(n), False) for n in range(9)), return_exceptions=True)

    failed = [n for n, each in enumerate(asyncio.run(run())) if isinstance(each, ValueError)]
    assert 5 in failed
    assert len(failed) <= 3


def test_there_is_room_for_so_many_and_again_later():
    async def run():
        courier = Courier(Member(), at_once=1, most=2, room=3)
        results = await asyncio.gather(*(courier.see(image(n), False) for n in range(8)), return_exceptions=True)
        assert [isinstance(each, Refusal) for each in results] == [False] * 4 + [True] * 4
        assert (await courier.see(image(9), False)).logits_K[0] == 9

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_not_sent():
    async def run():
        member = Member()
        courier = Courier(member, at_once=1, most=4, room=100)
        first = asyncio.create_task(courier.see(image(0), False))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(courier.see(image(1), False), 0.0005)
        await first
        assert (await courier.see(image(2), False)).logits_K[0] == 2
        assert member.calls == [([0], False), ([2], False)]

    asyncio.run(run())
