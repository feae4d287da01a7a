"""The deployment that speaks HTTP, and the application it runs: routes, page, documentation, and the gate before them."""

import asyncio
import hashlib
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import protopnet
from protopnet import storage
from protopnet.errors import UserError
from protopnet.evidence.sources import Shown
from protopnet.serving import about
from protopnet.serving.ensemble import Ensemble, all_ready
from protopnet.serving.gate import Gate, request_id
from protopnet.serving.members import BundleRef
from protopnet.serving.metrics import Metrics
from protopnet.serving.refusals import Refusal
from protopnet.serving.routes import api, operations, refusal_of
from protopnet.serving.service import Service
from protopnet.serving.settings import AppSettings

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class Ingress:
    """Replicas of this deployment hold the heads of all members, and ask them for the rest."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, settings: AppSettings, bundles: Sequence[BundleRef], *members: DeploymentHandle
    ) -> None:
        ask, ready = [member.see.remote for member in members], [member.ready.remote for member in members]
        self._settings, self._tokens = settings, read_tokens(settings.token_file)
        shown = Shown(settings.sources, settings.crops_only)
        ensemble = await asyncio.to_thread(Ensemble, bundles, ask, settings.member, shown)
        # Before this a rolling update would send requests to a replica whose members are still loading.
        await all_ready(ready, bundles)
        self._service = Service(settings, ensemble, ready, Metrics())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._tokens)


def create_app(service: Service, tokens: Sequence[bytes]) -> FastAPI:
    """The ASGI application of one replica."""
    app: FastAPI = FastAPIOffline(
        title="protopnet",
        version=protopnet.__version__,
        description=about.ABOUT,
        redoc_url=None,
        static_url="/docs/static",
    )
    bearer = [Security(HTTPBearer(auto_error=False))] if tokens else []
    app.include_router(api(service, bearer))
    app.include_router(operations(service, bearer))
    add_page(app, _PAGE)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(Gate, tokens=tokens, metrics=service.metrics)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app


def read_tokens(uri: str | None) -> list[bytes]:
    """The tokens of the file, one a line. Raises `UserError` where there is none in it."""
    if uri is None:
        return []
    try:
        lines = storage.read_bytes(uri).splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no file {uri}; expected one bearer token a line; change token_file") from None
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise UserError(f"{uri} has no token in it; expected one a line; change token_file")
    return tokens


async def _refused(request: Request, error: Exception) -> Response:
    """What FastAPI and Starlette refuse by themselves, in our shape."""
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 405: "method_not_allowed"}
        refusal = Refusal(codes.get(error.status_code, "bad_request"), str(error.detail), error.headers)
    else:
        refusal = refusal_of(error)
    return refusal.response(request_id(request.scope))


@dataclass(frozen=True)
class _File:
    """A file of the page, in memory."""

    content: bytes
    kind: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> "_File":
        content = path.read_bytes()
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return cls(content, kind, f'"{hashlib.sha256(content).hexdigest()[:24]}"')

    def response(self, request: Request) -> Response:
        headers = _PAGE_HEADERS | {"ETag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.kind)


def add_page(app: FastAPI, *folders: Path) -> None:
    """The web page: `index.html` of the last of these folders at /, all their files below /page/."""
    files = {path.name: _File.read(path) for folder in folders for path in sorted(folder.glob("*")) if path.is_file()}

    def send(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, f"there is no page {name}")
        return files[name].response(request)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return send("index.html", request)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        return send(name, request)
