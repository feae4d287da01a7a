"""What every request passes before and after its route: identity, key, and what is counted, logged and written down.

Pure ASGI, around the whole application: whatever goes wrong further in becomes one shape of error here.
"""

import asyncio
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protopnet.serving.audit import AuditLog
from protopnet.serving.keys import Key, Keys
from protopnet.serving.metrics import Metrics
from protopnet.serving.refusals import Refusal

logger = logging.getLogger("ray.serve")  # Serve writes it as JSON, with the request's id

# Without a key: health for orchestrators, and what holds nothing of the model: the page and the documentation.
_OPEN = {"/", "/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/favicon.ico"}
_OPEN_BELOW = ("/page/", "/docs/")
_GONE = 499  # counted where nobody is listening any more


class Gate:
    """Around the application, which any of the `keys` opens. metrics: where requests are counted; audit_log: where
    it is written down who asked what."""

    def __init__(
        self, app: ASGIApp, keys: Keys, metrics: Metrics | None = None, audit_log: AuditLog | None = None
    ) -> None:
        self._app, self._keys, self._metrics, self._audit_log = app, keys, metrics, audit_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        answer = _Answer(send, with_body=scope["method"] != "HEAD")
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        key: Key | None = None
        try:
            key = await self._key(scope)
            if key is not None and scope["method"] == "POST":
                with key.working():
                    await self._app(scope, receive, answer)
            else:
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
            if self._audit_log is not None and not _is_open(_path(scope)):
                self._write_down(self._audit_log, scope, key, answer.status)

    async def _key(self, scope: Scope) -> Key | None:
        if not self._keys.wanted or _is_open(_path(scope)):
            return None
        key = await self._keys.find(Headers(scope=scope).get("authorization", ""))
        if key is None:
            message = "send the header `Authorization: Bearer <token>` with a token of this service"
            raise Refusal("unauthorized", message, {"WWW-Authenticate": "Bearer"})
        return key

    def _write_down(self, audit_log: AuditLog, scope: Scope, key: Key | None, status: int) -> None:
        try:
            audit_log.add(
                key=key.name if key is not None else None,
                method=scope["method"],
                path=_path(scope),
                query=scope["query_string"].decode("latin-1"),
                request_id=request_id(scope),
                status=status,
            )
        except OSError:
            logger.exception("the audit log can't be written")


def _path(scope: Scope) -> str:
    """Below the prefix of the application."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def _is_open(path: str) -> bool:
    return path in _OPEN or path.startswith(_OPEN_BELOW)


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
