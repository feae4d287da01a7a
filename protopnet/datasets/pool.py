"""Work on a stream of items in threads, in order, holding only a few at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from protopnet import storage
from protopnet.machine import usable_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map(work, items)` in threads. Unlike an executor's map it takes items only as results are fetched."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def threads_for(uri: str, cores: int | None = None) -> int:
    """Threads that decode images from a location: one a core; from a bucket more, since most of them wait."""
    cores = cores or usable_cpus()
    return max(16, 2 * cores) if storage.is_remote(uri) else cores
