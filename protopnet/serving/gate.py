"""What every request passes before and after its route: identity, token, and what is counted and logged.

Pure ASGI, around the whole application: whatever goes wrong further in becomes one shape of error here.
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protopnet.serving.metrics import Metrics
from protopnet.serving.refusals import Refusal

logger = logging.getLogger("ray.serve")  # Serve writes it as JSON, with the request's id

# Without a token: health for orchestrators, and what holds nothing of the model: the page and the documentation.
_OPEN = {"/", "/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/favicon.ico"}
_OPEN_BELOW = ("/page/", "/docs/")
_GONE = 499  # counted where nobody is listening any more


class Gate:
    """Around the application. `tokens`: any of them opens it; none: it is open. metrics: where requests are counted."""

    def __init__(self, app: ASGIApp, tokens: Sequence[bytes], metrics: Metrics | None) -> None:
        self._app, self._tokens, self._metrics = app, list(tokens), metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        answer = _Answer(send, with_body=scope["method"] != "HEAD")
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            self._check_token(scope)
            await self._app(scope, receive, answer)
        except Refusal as refusal:
            await answer.refuse(refusal, scope, receive)
        except ClientDisconnect:
            answer.status = _GONE
        except asyncio.CancelledError:  # by Serve, whose client has gone
            answer.status = _GONE
            raise
        except Exception:
            logger.exception("a defect while answering")
            await answer.refuse(Refusal("internal", "a defect of the service; its log has more"), scope, receive)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            if self._metrics is not None:
                self._metrics.request(route, answer.status, time.perf_counter() - started)

    def _check_token(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self._tokens or path in _OPEN or path.startswith(_OPEN_BELOW):
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Every token is compared whole, so that the time taken says nothing about them.
        matches = [hmac.compare_digest(given.strip().encode(), token) for token in self._tokens]
        if scheme.lower() != "bearer" or not any(matches):
            message = "send the header `Authorization: Bearer <token>` with a token of this service"
            raise Refusal("unauthorized", message, {"WWW-Authenticate": "Bearer"})


class _Answer:
    """The `send` of a request, which remembers whether and how the answer began."""

    def __init__(self, send: Send, *, with_body: bool) -> None:
        self._send, self._with_body = send, with_body
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
        elif not self._with_body and "body" in message:
            message = {**message, "body": b""}
        await self._send(message)

    async def refuse(self, refusal: Refusal, scope: Scope, receive: Receive) -> None:
        """Say why there is no answer, unless one has begun already."""
        if not self.status:
            await refusal.response(request_id(scope))(scope, receive, self)


def request_id(scope: Scope) -> str:
    """As the client sent it in X-Request-ID, or as Serve's proxy made it up. The proxy puts it on the response."""
    return Headers(scope=scope).get("x-request-id") or str(uuid.uuid4())
