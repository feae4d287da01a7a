"""Many requests at once, replicas that die or break, and a new model while requests come in."""

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import ray
from ray_processes import descendants, kill_first, named, wait_for
from serving import Answer, Client, LocalServe, photo

PHOTOS = [photo(n) for n in range(8)]
ROOM = 8  # requests that the service below takes on at a time
MEGABYTES = 250  # that its processes may grow by under a flood


@pytest.fixture(scope="module")
def busy(local_serve: LocalServe, bundles: list[str]) -> Iterator[Client]:
    yield local_serve.deploy("busy", bundles[:1], ingress={"max_requests": ROOM}, health_period_s=0.5)
    local_serve.delete("busy")


@pytest.fixture
def expected(busy: Client) -> list[dict[int, float]]:
    return [_logits(busy.post("/v1/predict?top_classes=4", data)) for data in PHOTOS]


def _logits(answer: Answer) -> dict[int, float]:
    assert answer.status == 200, answer
    return {entry["class"]: entry["logit"] for entry in answer.json["images"][0]["classes"]}


def _is_right(answer: Answer, expected: dict[int, float]) -> bool:
    return _logits(answer) == pytest.approx(expected, rel=1e-4)


async def _flood(url: str, count: int) -> list[Answer | Exception]:
    """That many requests at once, each on a connection of its own."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def send(number: int) -> Answer:
            async with session.post(f"{url}/v1/predict?top_classes=4", data=PHOTOS[number % len(PHOTOS)]) as answer:
                return Answer(answer.status, await answer.read(), answer.headers)

        return await asyncio.gather(*(send(number) for number in range(count)), return_exceptions=True)


def _resident() -> int:
    """Bytes of memory of all of Serve's processes."""
    pids = [pid for pid, title in descendants(os.getpid()).items() if "SERVE" in title or "Serve" in title]
    assert pids
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def test_of_two_hundred_requests_at_once_each_is_answered_or_refused(busy, expected):
    before = _resident()
    answers = asyncio.run(_flood(busy.url, 200))
    grown = (_resident() - before) / 2**20
    statuses: Counter[int] = Counter()
    for number, answer in enumerate(answers):
        assert isinstance(answer, Answer), answer  # none is lost
        statuses[answer.status] += 1
        if answer.status == 200:
            assert _is_right(answer, expected[number % len(PHOTOS)])
        else:
            assert (answer.status, answer.error) == (503, "overloaded")
            assert int(answer.headers["Retry-After"]) >= 1
    assert set(statuses) == {200, 503}
    assert statuses[200] >= ROOM
    assert grown < MEGABYTES
    assert busy.post("/v1/predict", PHOTOS[0]).status == 200


class Load:
    """Clients that ask one thing after the other, and again where they are told to come back."""

    def __init__(self, client: Client, expected: list[list[dict[int, float]]], clients: int = 3) -> None:
        self.client, self.expected = client, expected
        self.right: Counter[int] = Counter()  # by the version of the model
        self.wrong: list[Answer] = []
        self.refused: list[Answer] = []
        self.broken_off = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(clients)]

    def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            number += 1
            try:
                answer = self.client.post("/v1/predict?top_classes=4", PHOTOS[number % len(PHOTOS)])
            except OSError:
                self.broken_off += 1
                time.sleep(0.1)
                continue
            if answer.status != 200:
                self.refused.append(answer)
                time.sleep(0.1)
                continue
            versions = [n for n, known in enumerate(self.expected) if _is_right(answer, known[number % len(PHOTOS)])]
            if versions:
                self.right[versions[0]] += 1
            else:
                self.wrong.append(answer)

    def wait_for(self, more: int, version: int = 0) -> None:
        """Until that many more right answers of this version have come."""
        wanted = self.right[version] + more
        wait_for(lambda: self.right[version] >= wanted, 60)


@contextmanager
def load(client: Client, *expected: list[dict[int, float]]) -> Iterator[Load]:
    running = Load(client, list(expected))
    for thread in running._threads:
        thread.start()
    try:
        yield running
    finally:
        running._stop.set()
        for thread in running._threads:
            thread.join(60)


def test_a_member_killed_under_load_costs_no_answer(busy, expected):
    with load(busy, expected) as running:
        running.wait_for(10)
        kill_first("ray::ServeReplica:busy:member-0")
        running.wait_for(30)
    assert not running.wrong
    assert not running.broken_off
    assert {answer.status for answer in running.refused} <= {503}


def test_an_ingress_killed_under_load_costs_no_wrong_answer(busy, expected):
    with load(busy, expected) as running:
        running.wait_for(10)
        kill_first("ray::ServeReplica:busy:ingress")
        running.wait_for(30)
    assert not running.wrong


def test_a_broken_replica_gives_no_wrong_answer_and_is_replaced(busy, expected):
    [name] = [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "busy#member-0" in actor["name"]
    ]
    pids = named("ray::ServeReplica:busy:member-0")

    def damage(replica: Any) -> None:
        """In the member's process: its prototypes are no numbers any more."""
        member = replica._replica_impl._user_callable_wrapper._callable
        for predictor in member._predictors.values():
            predictor.bundles[0].network.prototypes.data.fill_(float("nan"))

    with load(busy, expected) as running:
        running.wait_for(5)
        ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(damage))
        wait_for(lambda: named("ray::ServeReplica:busy:member-0") not in ([], pids), 60)
        running.wait_for(20)
    assert not running.wrong
    assert {answer.error for answer in running.refused} <= {"not_ready", "overloaded"}


def test_a_new_bundle_rolls_out_without_a_failed_request(local_serve, busy, bundles, expected):
    """Answers are wholly those of the old model until they are wholly those of the new one."""
    preview = local_serve.deploy("preview", bundles[1:2])
    after = [_logits(preview.post("/v1/predict?top_classes=4", data)) for data in PHOTOS]
    local_serve.delete("preview")
    with load(busy, expected, after) as running:
        running.wait_for(10, version=0)
        local_serve.deploy("busy", bundles[1:2], ingress={"max_requests": ROOM}, health_period_s=0.5)
        running.wait_for(20, version=1)
    assert not running.wrong
    assert not running.refused
    assert not running.broken_off
    assert _is_right(busy.post("/v1/predict?top_classes=4", PHOTOS[0]), after[0])
