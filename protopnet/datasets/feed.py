"""Images of manifest rows for a network, batch after batch, read and decoded in threads beside it.

For passes without gradients: in order, once, nothing kept. Training has its own `loader`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from protopnet.datasets.reader import ImageReader
from protopnet.imaging import BadImage

Picture = TypeVar("Picture")
Decode = Callable[[bytes | BadImage, dict[str, Any]], Picture]

_USED_OF_ROW = ("uri", "image_id", "copy", "width", "height")


class Feed(Generic[Picture]):
    """Decodes one batch and reads another while the caller works on the one before.

    decode: from the encoded bytes of an image, or the reason why there are none, and its row, to whatever the
    caller wants of it. What it raises is raised to the caller.
    """

    def __init__(self, decode: Decode[Picture], threads: int) -> None:
        self.decode = decode
        self.reader = ImageReader()
        self.decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.fetcher = ThreadPoolExecutor(1, thread_name_prefix="read")  # a bucket makes it wait, not the network

    def batches(self, slices: Sequence[pa.Table]) -> Iterator[tuple[pa.Table, list[Picture]]]:
        """Slices of a manifest, each with its images."""
        ahead = [self.fetcher.submit(self._fetch, rows) for rows in slices[:2]]
        for index, rows in enumerate(slices):
            pictures = [future.result() for future in ahead.pop(0).result()]
            if index + 2 < len(slices):
                ahead.append(self.fetcher.submit(self._fetch, slices[index + 2]))
            yield rows, pictures

    def _fetch(self, rows: pa.Table) -> list[Future[Picture]]:
        encoded = self.reader.read_each(rows, np.arange(len(rows)))
        known = rows.select([name for name in _USED_OF_ROW if name in rows.column_names]).to_pylist()
        return [self.decoders.submit(self.decode, data, row) for data, row in zip(encoded, known, strict=True)]
