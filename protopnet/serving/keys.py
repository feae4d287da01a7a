"""Who may ask: the keys of `token_file`, each with a name and, where wanted, limits of its own.

    2f0c…71  pathology  a_minute=120 at_once=4

A line a key: its token, then a name, then limits in any order; all but the token may be left out. The file is read again
when it changes, so keys come and go without a restart.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from protopnet import storage
from protopnet.errors import UserError
from protopnet.serving.refusals import too_many_requests

logger = logging.getLogger("ray.serve")

REREAD_S, REREAD_BUCKET_S = 2.0, 30.0  # at most so long a key is taken after its line is gone
_PATIENCE_S = 5.0  # with a bucket that doesn't answer
_LIMITS = ("a_minute", "at_once")


class Key:
    """A key and what is in use of its limits. a_minute, at_once: requests with images of one ingress replica."""

    def __init__(self, token: bytes, name: str, a_minute: int | None = None, at_once: int | None = None) -> None:
        self.token, self.name = token, name
        self.limits = (a_minute, at_once)
        self._left, self._since, self._in_work = float(a_minute or 0), time.monotonic(), 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """A request with images of this key. `Refusal` where it has had its share."""
        a_minute, at_once = self.limits
        if at_once is not None and self._in_work >= at_once:
            raise too_many_requests(f"{self.name} has {at_once} requests in work, as many as it may", 1)
        if a_minute is not None:
            now = time.monotonic()
            self._left = min(a_minute, self._left + (now - self._since) * a_minute / 60)
            self._since = now
            if self._left < 1:
                wait_s = -(-(1 - self._left) * 60 // a_minute)
                raise too_many_requests(f"{self.name} may ask {a_minute} times a minute", max(1, int(wait_s)))
            self._left -= 1
        self._in_work += 1
        try:
            yield
        finally:
            self._in_work -= 1


class Keys:
    """Those of a file. None: whoever reaches the service may ask."""

    def __init__(self, uri: str | None) -> None:
        self._uri = uri
        self._keys = read_keys(uri) if uri is not None else []
        self._read, self._reading = time.monotonic(), asyncio.Lock()

    @property
    def wanted(self) -> bool:
        return self._uri is not None

    async def find(self, authorization: str) -> Key | None:
        """The key of a header `Bearer <token>`, or None."""
        await self._read_again()
        scheme, _, given = authorization.partition(" ")
        # Every token is compared whole, so that the time taken says nothing about them.
        found = [key for key in self._keys if hmac.compare_digest(given.strip().encode(), key.token)]
        return found[0] if found and scheme.lower() == "bearer" else None

    async def _read_again(self) -> None:
        async with self._reading:
            if self._uri is None:
                return
            every_s = REREAD_BUCKET_S if storage.is_remote(self._uri) else REREAD_S
            if time.monotonic() - self._read < every_s:
                return
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    read = await asyncio.to_thread(read_keys, self._uri)
            except (UserError, OSError, TimeoutError) as error:  # a mistake must neither lock all out nor let all in
                logger.error("the keys stay as they were: %s", error)
            else:
                before = {key.token: key for key in self._keys}
                self._keys = [_kept(before.get(key.token), key) for key in read]
            self._read = time.monotonic()


def read_keys(uri: str) -> list[Key]:
    """The keys of a file. `UserError` where there is none in it, or a line isn't one."""
    try:
        lines = storage.read_bytes(uri).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no file {uri}; expected one bearer token a line; change token_file") from None
    except UnicodeDecodeError:
        raise UserError(f"{uri} isn't text in UTF-8; expected one bearer token a line; change token_file") from None
    keys = [_key(words, f"{uri}, line {number}") for number, line in enumerate(lines, 1) if (words := line.split())]
    if not keys:
        raise UserError(f"{uri} has no token in it; expected one a line; change token_file")
    return keys


def _key(words: list[str], place: str) -> Key:
    token, *more = words
    names = [word for word in more if "=" not in word]
    given = dict(word.split("=", 1) for word in more if "=" in word)
    if len(names) > 1 or any(name not in _LIMITS or not value.isdecimal() for name, value in given.items()):
        raise UserError(
            f"{place} isn't a key; expected a token, then if wanted a name without spaces, a_minute=120, at_once=4"
        )
    # A name for who has none, which says nothing of the token and stays when lines change places.
    name = names[0] if names else f"key-{hashlib.sha256(token.encode()).hexdigest()[:8]}"
    return Key(token.encode(), name, **{limit: int(value) for limit, value in given.items()})


def _kept(before: Key | None, now: Key) -> Key:
    """The key of before, with what is in use of it, unless something about it has changed."""
    return before if before is not None and (before.name, before.limits) == (now.name, now.limits) else now
