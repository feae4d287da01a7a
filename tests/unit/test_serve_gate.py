"""What every request passes, without a server: how it is counted, and what becomes of it."""

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from protopnet.serving.gate import Gate
from protopnet.serving.keys import Keys


class Counted:
    """What the metrics are told."""

    def __init__(self) -> None:
        self.statuses: list[int] = []

    def request(self, route: str, status: int, seconds: float) -> None:
        self.statuses.append(status)


def scope(method: str = "GET", path: str = "/v1/model", **headers: str) -> Scope:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": pairs, "query_string": b""}


async def nothing_more() -> Any:
    await asyncio.sleep(3600)


async def through(gate: Gate, asked: Scope, receive: Receive = nothing_more) -> list[Any]:
    """The messages of the answer."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await gate(asked, receive, send)
    return sent


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["method"] == "GET"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def test_head_is_get_without_the_body() -> None:
    async def run() -> None:
        start, body = await through(Gate(hello, Keys(None), Counted(), None), scope("HEAD"))  # type: ignore[arg-type]
        assert (start["status"], dict(start["headers"])[b"content-length"]) == (200, b"5")
        assert body["body"] == b""

    asyncio.run(run())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_request_whose_client_has_gone_is_counted_as_such(method: str) -> None:
    async def for_ever(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3600)

    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    async def run() -> None:
        counted = Counted()
        asked = asyncio.create_task(through(Gate(for_ever, Keys(None), counted, None), scope(method)))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await through(Gate(gone, Keys(None), counted, None), scope(method))  # type: ignore[arg-type]
        assert counted.statuses == [499, 499]

    asyncio.run(run())
