"""The body of a request, counted and timed while it comes in: who sends slowly, or nothing, keeps nobody else waiting."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from protopnet.serving.memory import Memory, Share
from protopnet.serving.refusals import Refusal
from protopnet.serving.settings import AppSettings

GRACE_S = 5.0  # before a body must have come at the least rate


async def read_body(request: Request, settings: AppSettings, memory: Memory, share: Share) -> bytes:
    """All of it; its bytes are taken from `memory` as they come.

    Raises `Refusal` where it is too large, by its Content-Length or as soon as it has become so, or too slow.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:19]) > settings.max_bytes:
        raise _too_many_bytes(settings)
    started, pieces, size = asyncio.get_running_loop().time(), list[bytes](), 0
    while True:
        allowed_s = min(settings.body_timeout_s, GRACE_S + size / settings.min_rate)
        try:
            async with asyncio.timeout_at(started + allowed_s):
                message = await request.receive()
        except TimeoutError:
            raise _too_slow(settings) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        size += len(piece)
        if size > settings.max_bytes:
            raise _too_many_bytes(settings)
        memory.grow(share, len(piece))
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _too_many_bytes(settings: AppSettings) -> Refusal:
    return Refusal("too_many_bytes", f"the body has more than {settings.max_bytes:,} bytes; send a smaller image")


def _too_slow(settings: AppSettings) -> Refusal:
    return Refusal(
        "slow_body",
        f"the body must come within {settings.body_timeout_s:g} s, and after {GRACE_S:g} s with at least "
        f"{settings.min_rate:,} bytes a second",
    )
