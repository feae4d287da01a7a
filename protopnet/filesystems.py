"""The file system behind a location, opened once a process: local, S3, or whatever fsspec knows.

fsspec is loaded when a file is asked for: what only computes does without it.
"""

import functools
import os
import threading
from typing import TYPE_CHECKING, Any

from protopnet.errors import UserError

if TYPE_CHECKING:
    import fsspec

WEB = ("http", "https")  # a file each: no folders, nothing is written
_ATTEMPTS = 10  # of one request to a bucket

_open_filesystems: "dict[tuple[object, ...], fsspec.AbstractFileSystem]" = {}
_opening = threading.Lock()


def is_remote(uri: str) -> bool:
    """True for anything with a scheme other than `file://`."""
    return "://" in uri and not uri.startswith("file://")


def filesystem(uri: str) -> "tuple[fsspec.AbstractFileSystem, str]":
    """The file system of a location, and the path on it.

    One file system a process: s3fs must not be carried over a fork, and a change of the AWS environment
    (another endpoint, other credentials) gives another one.
    """
    scheme = uri.split("://", 1)[0] if is_remote(uri) else "file"
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "FSSPEC_"))))
    key = (os.getpid(), scheme, settings if scheme == "s3" else ())
    opened = _open_filesystems.get(key)
    if opened is None:
        with _opening:
            opened = _open_filesystems.get(key) or _open_filesystem(scheme, uri)
            _open_filesystems[key] = opened
    if scheme == "file":
        return opened, os.path.abspath(uri.removeprefix("file://"))
    return opened, uri.rstrip("/") if scheme in WEB else uri.split("://", 1)[1].strip("/")


@functools.cache
def unsupported(scheme: str) -> str | None:
    """Why nothing can be read of a storage of this kind, and what to do; None where it can. `file` and `s3` always can."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # fsspec knows it: it says what to install
        return str(error)
    except ValueError:
        return "storage of this kind isn't supported; use a local path or s3://bucket/…"
    return None


def _open_filesystem(scheme: str, uri: str) -> "fsspec.AbstractFileSystem":
    import fsspec

    # Listings aren't cached: other processes write the same folders.
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = _retrying()
    if refusal := unsupported(scheme):
        raise UserError(f"{uri}: {refusal}")
    return fsspec.filesystem(scheme, skip_instance_cache=True, **options)


def _retrying() -> dict[str, Any]:
    """How often S3 is asked again when it is busy or fails, unless the environment says it (`AWS_MAX_ATTEMPTS`).

    boto's own default gives up after four: with thousands of requests to a throttled bucket, one of them will.
    """
    retries = {"mode": os.environ.get("AWS_RETRY_MODE", "standard"), "total_max_attempts": _ATTEMPTS}
    return {} if "AWS_MAX_ATTEMPTS" in os.environ else {"retries": retries}
