"""Files on a local path, in a bucket (`s3://…`) or wherever fsspec can read, through one small set of functions.

What is written here appears whole or not at all: a local file is written under a hidden name, synced and
renamed; an object in S3 becomes visible when its upload is complete. Credentials and endpoint come from the
usual environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_PROFILE`, …).

A *location* (uri) is a plain local path, `file://…`, `s3://bucket/key`, or another kind that fsspec knows: `https://…`
to read, `gs://…` and `abfs://…` with their packages. The functions give back absolute local paths or full URIs.
A file that isn't there is a `FileNotFoundError`; what only the user can put right (no such bucket, wrong
credentials, nobody at the endpoint) is a `UserError`.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow.fs as pafs

from protopnet.errors import UserError
from protopnet.filesystems import WEB, filesystem, is_remote

if TYPE_CHECKING:
    import fsspec

_UNFINISHED = ".unfinished"  # suffix of a file that is being written, or was when its process was killed
_THREADS = 16  # requests in flight when many objects are moved


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, with single slashes between; an empty part is left out."""
    pieces = [piece for piece in (part.strip("/") for part in parts) if piece]
    return "/".join([uri.rstrip("/"), *pieces] if uri else pieces) or uri


@contextlib.contextmanager
def _said_plainly(uri: str) -> Iterator[None]:
    """Turn failures that only the user can put right into one line."""
    try:
        yield
    except _boto_errors() as error:
        raise UserError(f"{uri} can't be reached: {error}; check AWS_ENDPOINT_URL and the AWS credentials") from error
    except PermissionError as error:
        if not is_remote(uri):
            raise
        raise UserError(f"{uri}: access denied ({error}); check the AWS credentials") from error
    except FileNotFoundError as error:
        if is_remote(uri) and "NoSuchBucket" in str(error.__cause__):
            raise UserError(f"{uri}: there is no bucket of this name") from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{uri}: {error.strerror}; make room or choose another place") from error
        if is_remote(uri) and isinstance(error.__cause__, _boto_errors()):
            # Not a fault of this one file: it must not pass for one.
            raise UserError(f"{uri}: the bucket kept failing ({error}); the same command goes on from here") from error
        raise
    except Exception as error:
        # What the web answers, a 403 say, is the fault of one file; aiohttp is loaded only where it is asked.
        if uri.startswith(WEB) and type(error).__module__.startswith("aiohttp"):
            raise OSError(str(error) or type(error).__name__) from error
        raise


def _boto_errors() -> tuple[type[Exception], ...]:
    """What the client of S3 raises, once it is loaded."""
    loaded = sys.modules.get("botocore.exceptions")
    return (loaded.BotoCoreError, loaded.ClientError) if loaded else ()


def _require_bucket(uri: str) -> None:
    """`UserError` if the bucket isn't there: s3fs lists one that doesn't exist as empty."""
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        if is_remote(uri) and not fs.exists(path.split("/", 1)[0]):
            raise UserError(f"{uri}: there is no bucket of this name")


def located(uri: str) -> str:
    """The location in the form in which it is recorded: absolute local path or URI, no slash at the end."""
    _, path = filesystem(uri)
    return _full(uri, path) if is_remote(uri) else path


def _full(uri: str, path: str) -> str:
    """The location of a path on the file system that `uri` is on."""
    return path if "://" in path else f"{uri.split('://', 1)[0]}://{path.strip('/')}"


def exists(uri: str) -> bool:
    """True for a file and for a folder with something in it."""
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        return bool(fs.exists(path))


def is_folder(uri: str) -> bool:
    """True for a local folder, and for a prefix under which there are objects; the web has no folders."""
    if uri.startswith(WEB):
        return False
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        return bool(fs.isdir(path))


def read_bytes(uri: str) -> bytes:
    """The whole file. Errors: `FileNotFoundError`, `UserError`."""
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        return bytes(fs.cat_file(path))


def read_range(uri: str, first: int, number: int) -> bytes:
    """`number` bytes from the one at `first` on; fewer where the file ends before."""
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        return bytes(fs.cat_file(path, start=first, end=first + number)) if number else b""


def read_json(uri: str) -> Any:
    """The content of a JSON file; one that isn't JSON is a `UserError`."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri} isn't a JSON file: {error}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all; folders above it are made."""
    with open_writer(uri) as handle:
        handle.write(data)


def write_json(uri: str, obj: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_bytes(uri, (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode())


def open_reader(uri: str, ahead: int = 0) -> IO[bytes]:
    """A file to read piece by piece. ahead: bytes read at once beyond what is asked for, for those who read on."""
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        if not is_remote(uri):
            return open(path, "rb")
        if uri.startswith(WEB) and not fs.info(path).get("partial"):  # a server that sends files whole
            return io.BytesIO(fs.cat_file(path))
        kind = {"cache_type": "readahead", "block_size": ahead} if ahead else {"cache_type": "none"}
        return fs.open(path, "rb", **kind)


@contextlib.contextmanager
def open_writer(uri: str) -> Iterator[IO[bytes]]:
    """A file to write piece by piece; it appears when the block ends well, and not at all otherwise."""
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        yield from _remote_writer(fs, path) if is_remote(uri) else _local_writer(path)


def _local_writer(path: str) -> Iterator[IO[bytes]]:
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    unfinished = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(6)}{_UNFINISHED}")
    try:
        with open(unfinished, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make a rename last through a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remote_writer(fs: "fsspec.AbstractFileSystem", path: str) -> Iterator[IO[bytes]]:
    handle = fs.open(path, "wb")
    try:
        yield handle
    except BaseException:
        # Closing would complete the upload and show half a file.
        with contextlib.suppress(Exception):
            handle.discard()
        handle.closed = True
        raise
    handle.close()


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Every file below a folder, sorted, as full locations; links to folders are followed.

    What a killed process left half-written isn't listed. A folder that isn't there has no files.
    """
    if not is_remote(uri):
        try:
            return sorted(path for path in _local_files(located(uri)) if path.endswith(suffix))
        except PermissionError as error:
            raise UserError(f"{error.filename} can't be listed: {error.strerror}") from error
    fs, path = filesystem(uri)
    with _said_plainly(uri):
        found = fs.find(path)
    if not found:
        _require_bucket(uri)
    return sorted(_full(uri, name) for name in found if name.endswith(suffix) and not name.endswith("/"))


def each_file(uri: str) -> Iterator[str]:
    """The files of `list_files` one after another; of a local folder or S3 only a folder's or a page are held at a time.

    Folder by folder in the order of names, or in the bucket's order of keys: always the same for the same files.
    """
    if not is_remote(uri):
        try:
            yield from _local_files(located(uri))
        except PermissionError as error:
            raise UserError(f"{error.filename} can't be listed: {error.strerror}") from error
        return
    if not uri.startswith("s3://"):
        yield from list_files(uri)
        return
    fs, path = filesystem(uri)
    bucket, _, prefix = path.partition("/")
    page: dict[str, Any] = {"NextContinuationToken": None}
    while "NextContinuationToken" in page:
        token = page["NextContinuationToken"]
        further = {"ContinuationToken": token} if token else {}
        with _said_plainly(uri):
            page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", **further)
        for found in page.get("Contents", []):
            if not found["Key"].endswith("/"):
                yield f"s3://{bucket}/{found['Key']}"


def _local_files(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(real):
        return  # a link back to where we came from
    with os.scandir(folder) as entries:
        in_order = sorted(entries, key=lambda entry: entry.name)
    for entry in in_order:
        if entry.is_dir():
            yield from _local_files(entry.path, (*above, real))
        elif not entry.name.endswith(_UNFINISHED):
            yield entry.path


def delete_file(uri: str) -> None:
    """Remove one file; one that isn't there is no error."""
    fs, path = filesystem(uri)
    with _said_plainly(uri), contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def delete_unfinished(uri: str, prefix: str) -> None:
    """Remove what killed processes left of files directly in a folder whose names begin with `prefix`.

    In a bucket there is nothing to see of them (a rule for incomplete uploads clears them away).
    """
    if not is_remote(uri):
        for path in Path(located(uri)).iterdir():
            if path.name.startswith(f".{prefix}") and path.name.endswith(_UNFINISHED):
                path.unlink(missing_ok=True)


def delete_tree(uri: str) -> None:
    """Remove a folder and everything in it; one that isn't there is no error."""
    path = filesystem(uri)[1]
    if not path.strip("/") or (is_remote(uri) and "/" not in path):
        raise ValueError(f"refusing to delete a whole disk or bucket: {uri}")
    if not is_remote(uri):
        if os.path.islink(path) or os.path.isfile(path):
            os.unlink(path)
        else:
            shutil.rmtree(path, ignore_errors=not os.path.exists(path))
        return
    _each(delete_file, [(f,) for f in list_files(uri)])


def _each(action: Any, arguments: list[tuple[str, ...]]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda given: action(*given), arguments):
            pass


def check_writable(uri: str, setting: str = "storage") -> None:
    """Write and remove a small file; `UserError` with the reason and the setting to change if that fails."""
    probe = join(uri, f".writable-{secrets.token_hex(4)}")
    try:
        write_bytes(probe, b"can this be written?")
        delete_file(probe)
    except OSError as error:
        raise UserError(
            f"{uri} can't be written: {error.strerror or error}; set {setting} to a place that can"
        ) from error
    except UserError as error:
        raise UserError(f"{str(error).replace(probe, uri)}; or set {setting} to another place") from error


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The same location for pyarrow, Ray Data and Ray Train."""
    fs, path = filesystem(uri)
    if is_remote(uri):
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path
    return pafs.LocalFileSystem(), path
