"""The service on Serve among clients that mean no good: what they cost in memory, and what others notice of them."""

import asyncio
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from documents import section
from PIL import Image
from ray_processes import named
from serving import Answer, Client, LocalServe, photo

PIXELS = (7000, 7000)  # nearly the largest that is decoded
CLIENTS = 100  # hostile ones, and as many who cancel
GOOD = 20


@pytest.fixture(scope="module")
def target(local_serve: LocalServe, bundles: list[str]) -> Iterator[Client]:
    yield local_serve.deploy("target", bundles[:1], timeout_s=120)
    local_serve.delete("target")


def stated_bytes() -> float:
    """What docs/operations.md says that an ingress replica takes at most."""
    [gigabytes] = re.findall(r"at most \*\*([\d.]+) GB\*\*", section("Limits", "docs/operations.md"))
    return float(gigabytes) * 1e9


class Peak:
    """Largest memory of the ingress replica since this began."""

    def __init__(self) -> None:
        [pid] = named("ray::ServeReplica:target:ingress")
        self._process = Path(f"/proc/{pid}")
        (self._process / "clear_refs").write_text("5")

    @property
    def bytes(self) -> int:
        [line] = [line for line in (self._process / "status").read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])


def large(kind: str, mode: str, **options: object) -> bytes:
    sink = io.BytesIO()
    Image.new(mode, PIXELS).save(sink, kind, **options)
    return sink.getvalue()


def test_large_pictures_of_any_kind_take_no_more_memory_than_stated(target: Client) -> None:
    rgba, jpeg = large("PNG", "RGBA", compress_level=1), large("JPEG", "RGB", progressive=True, subsampling=0)
    pictures = [rgba, jpeg, large("PNG", "I;16"), large("JPEG2000", "RGB")] * 2
    peak = Peak()
    with ThreadPoolExecutor(len(pictures)) as pool:
        statuses = list(pool.map(lambda data: target.post("/v1/predict", data).status, pictures))
    print(f"{peak.bytes / 1e9:.2f} GB at most")
    assert statuses == [200] * len(pictures)
    assert peak.bytes < stated_bytes()


async def _crowd(url: str, count: int, seconds: Callable[[int], float]) -> int:
    """That many clients that send a photo and go away after so many seconds; how many had an answer by then."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def send(number: int) -> bool:
            try:
                async with asyncio.timeout(seconds(number)), session.post(url, data=photo(number % 8)) as answer:
                    await answer.read()
                    return True
            except TimeoutError:
                return False

        return sum(await asyncio.gather(*(send(number) for number in range(count))))


def test_crowds_that_cancel_leave_nothing_behind(target: Client) -> None:
    """Batching queues and routers have stuck on that before. Later requests are answered, all of them."""
    chance = np.random.default_rng(0)
    for route in ("predict", "explain", "explain?maps=png"):
        answered = asyncio.run(_crowd(f"{target.url}/v1/{route}", CLIENTS, lambda _: float(chance.uniform(0, 0.4))))
        print(f"{answered} of {CLIENTS} stayed for their answer")
        assert answered < CLIENTS
        assert target.get("/readyz").status == 200
        with ThreadPoolExecutor(4) as pool:
            later = list(pool.map(lambda n: target.post("/v1/explain", photo(n % 8)).status, range(24)))
        assert later == [200] * 24
        assert target.get("/readyz").status == 200


def _good(target: Client, seconds: float) -> tuple[list[Answer], list[float]]:
    """Answers that well-meaning clients get, and how long they wait for one."""
    answers, latencies = list[Answer](), list[float]()
    end = time.monotonic() + seconds

    def ask(number: int) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            answers.append(target.post("/v1/predict", photo(number % 8)))
            latencies.append(time.monotonic() - began)
            time.sleep(0.2)

    with ThreadPoolExecutor(GOOD) as pool:
        list(pool.map(ask, range(GOOD)))
    return answers, latencies


def test_the_well_meaning_are_answered_among_the_hostile(target: Client) -> None:
    """Silent ones, slow ones, bodies too large, bombs, and requests for all evidence there is."""
    bomb = large("PNG", "1")
    _, alone = _good(target, 5)
    peak, stop = Peak(), threading.Event()
    refused: list[int] = []

    async def hostile() -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def slowly(pause: float):  # type: ignore[no-untyped-def]
                while not stop.is_set():
                    yield b"x" * 10
                    await asyncio.sleep(pause)

            async def client(number: int) -> None:
                kinds = [
                    lambda: session.post(f"{target.url}/v1/predict", data=slowly(60)),
                    lambda: session.post(f"{target.url}/v1/explain", data=slowly(0.5)),
                    lambda: session.post(f"{target.url}/v1/predict", data=b"x" * 21_000_000),
                    lambda: session.post(f"{target.url}/v1/predict", data=bomb),
                    lambda: session.post(
                        f"{target.url}/v1/explain?top_classes=100&top_prototypes=100&maps=values", data=photo(0)
                    ),
                ]
                while not stop.is_set():
                    try:
                        async with asyncio.timeout(10), kinds[number % len(kinds)]() as answer:
                            refused.append(answer.status)
                    except (TimeoutError, aiohttp.ClientError):
                        pass
                    await asyncio.sleep(1)

            clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
            while not stop.is_set():
                await asyncio.sleep(0.1)
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(hostile()))
    thread.start()
    try:
        answers, among = _good(target, 10)
    finally:
        stop.set()
        thread.join(60)
    p99 = [float(np.percentile(latencies, 99)) for latencies in (alone, among)]
    print(f"p99 {p99[0]:.2f} s alone, {p99[1]:.2f} s among the hostile; {peak.bytes / 1e9:.2f} GB at most")
    assert {answer.status for answer in answers} <= {200, 503}
    assert sum(answer.status == 200 for answer in answers) > 0.9 * len(answers)
    assert refused
    assert {status for status in refused if status >= 500} <= {503}
    assert peak.bytes < stated_bytes()
    assert target.get("/readyz").status == 200
