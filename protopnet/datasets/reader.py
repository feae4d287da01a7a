"""The encoded bytes of a dataset's images, from plain files, shards or `packed` ones, on disk or in a bucket."""

import errno
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from protopnet import storage
from protopnet.datasets.packed import image_column, read_file
from protopnet.imaging import BadImage

_REMOTE_THREADS = 16
_CACHE_BYTES = 256 << 20  # row groups of other programs may be large
_OPEN_SHARDS = 32  # an open shard holds its footer in memory: some 100 kB

Group = tuple[str, int]  # file, row group
Key = TypeVar("Key")
Value = TypeVar("Value")


class ImageReader:
    """Reads images by their place in a manifest. Keeps the last row groups it has read, so reading neighbours
    together is cheap; a single image of a shard costs its row group (about 2 MB, see `shards`).

    May be pickled and may cross a fork: it then starts again with nothing open.
    """

    def __init__(self, cache_groups: int = 16) -> None:
        self.cache_groups = cache_groups
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._groups: OrderedDict[Group, pa.ChunkedArray] = OrderedDict()
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, int]:
        return {"cache_groups": self.cache_groups}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, columns: pa.Table | Mapping[str, Sequence[Any]], indices: Iterable[int]) -> list[bytes]:
        """The images at these rows of a manifest, in the order of the indices.

        columns: the manifest, or its columns `file`, `row_group` and `row`.
        Errors: `OSError` for a file that can't be read, `UserError` for a bucket that can't be reached.
        """
        images = self._read(columns, indices)
        for image in images:
            if isinstance(image, OSError):
                raise image
        return images  # type: ignore[return-value]

    def read_each(
        self, columns: pa.Table | Mapping[str, Sequence[Any]], indices: Iterable[int]
    ) -> list[bytes | BadImage]:
        """As `read`, with a `BadImage` in the place of each file that can't be read (it is gone, say)."""
        return [
            BadImage(f"can't be read: {_plainly(image)}") if isinstance(image, OSError) else image
            for image in self._read(columns, indices)
        ]

    def _read(self, columns: pa.Table | Mapping[str, Sequence[Any]], indices: Iterable[int]) -> list[bytes | OSError]:
        if os.getpid() != self._process:
            self._start()  # handles, threads and locks of the parent process are no use after a fork
        files, groups, rows = _places(columns, list(indices))
        images: list[bytes | OSError] = [b""] * len(files)
        plain = [i for i, group in enumerate(groups) if group < 0]
        for i, image in zip(plain, self._map(_read_file, [files[i] for i in plain], files), strict=True):
            images[i] = image
        wanted: dict[Group, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            if group >= 0:
                wanted[files[i], group].append(i)
        for group_key, values in zip(wanted, self._map(self._group, list(wanted), files), strict=True):
            for i in wanted[group_key]:
                images[i] = values if isinstance(values, OSError) else _image_of(values, rows[i])
        return images

    def _map(self, work: Callable[[Key], Value], keys: list[Key], files: list[str]) -> Iterator[Value]:
        """In threads where most of the time is waiting for a bucket."""
        if len(keys) < 2 or not storage.is_remote(files[0]):
            return map(work, keys)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REMOTE_THREADS)
        return self._pool.map(work, keys)

    def _group(self, key: Group) -> pa.ChunkedArray | OSError:
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
        try:
            images = self._shard(key[0]).images(key[1])
        except pa.ArrowInvalid as error:
            return OSError(f"{key[0]} is damaged: {error}")
        except OSError as error:
            return error
        with self._lock:
            self._groups[key] = images
            while len(self._groups) > self.cache_groups or (len(self._groups) > 1 and self._held() > _CACHE_BYTES):
                self._groups.popitem(last=False)
        return images

    def _held(self) -> int:
        return sum(images.nbytes for images in self._groups.values())

    def _shard(self, file: str) -> "_Shard":
        with self._lock:
            shard = self._shards.setdefault(file, _Shard(file))
            self._shards.move_to_end(file)
            while len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)  # closed when the last thread that reads it lets go
        return shard


class _Shard:
    """One file, read by many threads: each has a handle of its own while it reads, all share the footer."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._footer: pq.FileMetaData | None = None
        self._idle: list[pq.ParquetFile] = []
        self._first = threading.Lock()

    def images(self, row_group: int) -> pa.ChunkedArray:
        """The encoded images of a row group."""
        try:
            handle = self._idle.pop()
        except IndexError:
            handle = self._open()
        column = image_column(handle.schema_arrow)
        if column is None:
            raise OSError(f"{self.file} holds no images")
        images = handle.read_row_group(row_group, columns=[column], use_threads=False).column(0)
        self._idle.append(handle)
        return pc.struct_field(images, "bytes") if column.endswith(".bytes") else images

    def _open(self) -> pq.ParquetFile:
        with self._first:  # the footer is fetched once
            source = storage.open_reader(self.file) if storage.is_remote(self.file) else self.file
            opened = pq.ParquetFile(source, metadata=self._footer, pre_buffer=False)
            self._footer = opened.metadata
        return opened


def _image_of(images: pa.ChunkedArray, row: int) -> bytes | OSError:
    image = images[row].as_py()
    return OSError("this row has no image") if image is None else image


def _read_file(file: str) -> bytes | OSError:
    try:
        return read_file(file)
    except OSError as error:
        return error


def _plainly(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):  # of a bucket: it has the name for its text
        return os.strerror(errno.ENOENT)
    return error.strerror or str(error)


def _places(
    columns: pa.Table | Mapping[str, Sequence[Any]], indices: list[int]
) -> tuple[list[str], list[int], list[int]]:
    if isinstance(columns, pa.Table):
        chosen = columns.select(["file", "row_group", "row"]).take(pa.array(indices, pa.int64()))
        return chosen["file"].to_pylist(), chosen["row_group"].to_pylist(), chosen["row"].to_pylist()
    files, groups, rows = columns["file"], columns["row_group"], columns["row"]
    return (
        [str(files[i]) for i in indices],
        [int(groups[i]) for i in indices],
        [int(rows[i]) for i in indices],
    )
