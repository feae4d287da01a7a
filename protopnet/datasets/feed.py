"""Batches of pictures, read and decoded in threads beside whoever takes them: training, accuracy, passes, scoring."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from protopnet.datasets.reader import ImageReader
from protopnet.imaging import BadImage

Source = TypeVar("Source")
Batch = TypeVar("Batch")
Item = TypeVar("Item")
Picture = TypeVar("Picture")
Decode = Callable[[bytes | BadImage, dict[str, Any]], Picture]

_USED_OF_ROW = ("uri", "image_id", "copy", "width", "height")


class Feed(Generic[Source, Batch, Item, Picture]):
    """Reads one batch and makes the pictures of others while the caller works on the one before.

    read: from what says which images a batch has to the batch and its items; called in one thread, since a bucket makes
    it wait, not the network. make: from an item to its picture; called in `threads`. What they raise is raised to the
    caller. `ahead` batches are in memory beside the caller's.
    """

    def __init__(
        self,
        read: Callable[[Source], tuple[Batch, Sequence[Item]]],
        make: Callable[[Item], Picture],
        threads: int,
        ahead: int = 2,
    ) -> None:
        self.read, self.make, self.ahead = read, make, ahead
        self.makers = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.fetcher = ThreadPoolExecutor(1, thread_name_prefix="read")

    def batches(self, sources: Iterable[Source]) -> Iterator[tuple[Batch, list[Picture]]]:
        """Each batch with its pictures, in order; sources are taken as they are needed."""
        waiting: deque[Future[tuple[Batch, list[Future[Picture]]]]] = deque()
        try:
            for source in sources:
                waiting.append(self.fetcher.submit(self._fetch, source))
                if len(waiting) > self.ahead:
                    yield self._made(waiting.popleft())
            while waiting:
                yield self._made(waiting.popleft())
        finally:
            for batch in waiting:  # the caller has had enough
                batch.cancel()

    def _fetch(self, source: Source) -> tuple[Batch, list[Future[Picture]]]:
        batch, items = self.read(source)
        return batch, [self.makers.submit(self.make, item) for item in items]

    def _made(self, fetched: Future[tuple[Batch, list[Future[Picture]]]]) -> tuple[Batch, list[Picture]]:
        batch, pictures = fetched.result()
        return batch, [picture.result() for picture in pictures]


def manifest_feed(decode: Decode[Picture], threads: int) -> Feed[pa.Table, pa.Table, Any, Picture]:
    """A feed from slices of a manifest, as they come, to the slices and their pictures.

    decode: from the encoded bytes of an image, or the reason why there are none, and its row, to whatever the caller wants.
    """
    reader = ImageReader()

    def read(rows: pa.Table) -> tuple[pa.Table, list[Any]]:
        known = rows.select([name for name in _USED_OF_ROW if name in rows.column_names]).to_pylist()
        return rows, list(zip(reader.read_each(rows, np.arange(len(rows))), known, strict=True))

    return Feed(read, lambda item: decode(*item), threads)
