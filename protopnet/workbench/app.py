"""The workbench over HTTP: one process, localhost unless told otherwise, behind the service's own gate.

Ray Serve is not in it: there is one session, which only one process may hold. Decisions are POSTs with JSON: no page of
another origin can send one, since a browser asks first and nobody answers.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from protopnet.errors import UserError
from protopnet.serving.gate import Gate, request_id
from protopnet.serving.ingress import add_page
from protopnet.serving.keys import Keys
from protopnet.serving.refusals import Refusal
from protopnet.workbench.bench import Workbench

_PAGES = (Path(__file__).parents[1] / "serving/page", Path(__file__).parent / "page")
_MOST = 200  # items of a page
_MOST_BYTES = 1_000_000  # of a request: a group of some 10,000 prototypes


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    seat: str = ""
    who: str = Field("", max_length=80)
    decision: dict[str, Any] = {}


def create_app(bench: Workbench, keys: Keys) -> FastAPI:
    """The ASGI application. What can't be done is refused in the service's form, with a sentence."""
    app = FastAPI(title="protopnet workbench", docs_url=None, redoc_url=None, openapi_url=None)
    add_page(app, *_PAGES)

    def answered(route: str, answer: Callable[..., Any]) -> None:
        """A GET whose numbers in the query are the arguments."""

        async def get(request: Request) -> Response:
            return await _answer(request, lambda: answer(request))

        app.add_api_route(route, get, methods=["GET"])

    def done(route: str, act: Callable[[_Body], Any]) -> None:
        async def post(request: Request) -> Response:
            body = await _body(request)
            return await _answer(request, lambda: act(body))

        app.add_api_route(route, post, methods=["POST"])

    catalogue = bench.catalogue
    answered("/v1/state", lambda request: bench.state(request.query_params.get("seat", "")))
    answered("/v1/classes", lambda request: {"classes": catalogue.names, "names": catalogue.classes})
    answered("/v1/findings", lambda request: catalogue.findings(*_window(request)))
    answered("/v1/prototypes", lambda request: catalogue.prototypes(_number(request, "class"), *_window(request)))
    answered("/v1/prototypes/{p}", lambda request: bench.prototype(_path(request, "p")))
    answered("/v1/images/{image_id}", lambda request: catalogue.jpeg(_path(request, "image_id")))
    answered("/v1/worth", lambda request: bench.worth(*_window(request)))
    done("/v1/desk", lambda body: {"seat": bench.desk.sit(body.who.strip() or _nobody())})
    done("/v1/desk/leave", lambda body: {"left": bench.desk.get_up(body.seat)})
    done("/v1/decisions", lambda body: bench.decide(body.seat, body.decision))
    done("/v1/undo", lambda body: bench.undo(body.seat))
    done("/v1/redo", lambda body: bench.redo(body.seat))
    done("/v1/save", lambda body: bench.save(body.seat))
    app.add_middleware(Gate, keys=keys)
    return app


async def _answer(request: Request, answer: Callable[[], Any]) -> Response:
    """Worked out beside the event loop; pictures as they are, all else as JSON."""
    try:
        content = await asyncio.to_thread(answer)
    except UserError as error:
        return Refusal("bad_option", str(error)).response(request_id(request.scope))
    if isinstance(content, bytes):
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})
    return JSONResponse(content, headers={"Cache-Control": "no-store"})


async def _body(request: Request) -> _Body:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refusal("bad_request", "send JSON, with Content-Type: application/json")
    try:
        return _Body.model_validate_json(await _read(request))
    except ValidationError as error:
        raise Refusal("bad_option", error.errors()[0]["msg"]) from None


async def _read(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise Refusal("too_many_bytes", f"a decision has {_MOST_BYTES:,} bytes at most")
    return body


def _window(request: Request) -> tuple[int, int]:
    return _number(request, "offset") or 0, min(_MOST, _number(request, "limit") or 20)


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{name}: {text} is not valid; expected a whole number, at least 0")
    return int(text)


def _path(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not text.isdecimal():
        raise UserError(f"{text} is no number")
    return int(text)


def _nobody() -> str:
    raise UserError("say who you are: the name goes into the record beside each decision")
