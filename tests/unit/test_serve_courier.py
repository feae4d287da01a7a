"""The courier between ingress and member: nothing is lost, nothing is mixed up, and calls grow under load."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protopnet.serving.courier import Courier
from protopnet.serving.members import Seen
from protopnet.serving.refusals import Refusal


def image(number):
    return np.full((1, 1, 3), number)


class Member:
    """Answers each image with its number, after a while; fails where one of them is the bad one."""

    def __init__(self, bad=None, seconds=0.001):
        self.calls, self.bad, self.seconds = [], bad, seconds

    async def __call__(self, images, whole):
        numbers = [int(pixels[0, 0, 0]) for pixels in images]
        self.calls.append((numbers, whole))
        await asyncio.sleep(self.seconds)
        if self.bad in numbers:
            raise ValueError("a bad image")
        return [Seen(np.array([number])) for number in numbers]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 7))
def test_each_image_gets_its_own_answer(count, replicas, most):
    async def run():
        member = Member()
        courier = Courier(member, replicas=replicas, most=most, room=100)
        seen = await asyncio.gather(*(courier.see(image(n), whole=n == 3) for n in range(count)))
        assert [int(each.logits_K[0]) for each in seen] == list(range(count))
        assert sorted(n for numbers, _ in member.calls for n in numbers) == list(range(count))
        assert max(len(numbers) for numbers, _ in member.calls) <= most
        assert all(whole == (3 in numbers) for numbers, whole in member.calls)
        return member.calls

    calls = asyncio.run(run())
    first = 2 * replicas  # one in work and one ahead for each; after those each is as full as can be
    assert len(calls) <= first + -(-max(0, count - first) // most)


def test_a_lone_image_goes_at_once_and_those_beside_it_wait_for_company():
    async def run():
        member = Member(seconds=0.2)
        courier = Courier(member, replicas=2, most=8, room=100, patience_s=60)
        asking = [asyncio.create_task(courier.see(image(n), False)) for n in range(4)]
        await asyncio.sleep(0.02)
        alone = list(member.calls)
        asking.append(asyncio.create_task(courier.see(image(4), False)))
        await asyncio.sleep(0.02)
        together = list(member.calls)
        await asyncio.gather(*asking)
        return alone, together

    alone, together = asyncio.run(run())
    assert alone == [([0], False)]
    assert together == [([0], False), ([1, 2, 3, 4], False)]


def test_company_is_waited_for_only_so_long_where_a_replica_is_free():
    async def run():
        member = Member(seconds=0.5)
        courier = Courier(member, replicas=2, most=8, room=100, patience_s=0.02)
        asking = [asyncio.create_task(courier.see(image(n), False)) for n in range(2)]
        await asyncio.sleep(0.01)
        before = list(member.calls)
        await asyncio.sleep(0.1)
        after = list(member.calls)
        await asyncio.gather(*asking)
        return before, after

    before, after = asyncio.run(run())
    assert before == [([0], False)]
    assert after == [([0], False), ([1], False)]


def test_where_every_replica_is_busy_half_a_batch_goes_ahead():
    async def run():
        member = Member(seconds=0.1)
        courier = Courier(member, replicas=1, most=8, room=100, patience_s=0)
        await asyncio.gather(*(courier.see(image(n), False) for n in range(12)))
        return [numbers for numbers, _ in member.calls]

    assert asyncio.run(run()) == [[0], [1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]]


def test_a_failed_call_fails_for_those_in_it_alone():
    async def run():
        courier = Courier(Member(bad=5), replicas=1, most=3, room=100)
        return await asyncio.gather(*(courier.see(image(n), False) for n in range(9)), return_exceptions=True)

    failed = [n for n, each in enumerate(asyncio.run(run())) if isinstance(each, ValueError)]
    assert 5 in failed
    assert len(failed) <= 3


def test_there_is_room_for_so_many_and_again_later():
    async def run():
        courier = Courier(Member(), replicas=1, most=8, room=3)
        results = await asyncio.gather(*(courier.see(image(n), False) for n in range(8)), return_exceptions=True)
        assert [isinstance(each, Refusal) for each in results] == [False] * 4 + [True] * 4
        assert (await courier.see(image(9), False)).logits_K[0] == 9

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_not_sent():
    async def run():
        member = Member()
        courier = Courier(member, replicas=1, most=4, room=100)
        first = asyncio.create_task(courier.see(image(0), False))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(courier.see(image(1), False), 0.0005)
        await first
        assert (await courier.see(image(2), False)).logits_K[0] == 2
        assert member.calls == [([0], False), ([2], False)]

    asyncio.run(run())
