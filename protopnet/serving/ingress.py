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
from protopnet.evidence.sources import Shown
from protopnet.serving import about
from protopnet.serving.audit import AuditLog, check_folder
from protopnet.serving.ensemble import Ensemble, all_ready
from protopnet.serving.gate import Gate, request_id
from protopnet.serving.keys import Keys
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
    """Replicas of this deployment hold the heads of all members, and ask them for the rest.

    members: of the bundles, then of the shadow's.
    """

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self,
        settings: AppSettings,
        bundles: Sequence[BundleRef],
        shadow: Sequence[BundleRef],
        *members: DeploymentHandle,
    ) -> None:
        ask, ready = [member.see.remote for member in members], [member.ready.remote for member in members]
        self._keys, M = Keys(settings.token_file), len(bundles)
        shown = Shown(settings.sources, settings.crops_only)
        closer = [member.look_closer.remote for member in members[:M]]
        ensemble = await asyncio.to_thread(Ensemble, bundles, ask[:M], settings.member, shown, closer)
        beside = await asyncio.to_thread(Ensemble, shadow, ask[M:], settings.member, shown) if shadow else None
        # Before this a rolling update would send requests to a replica whose members are still loading.
        await all_ready(ready, [*bundles, *shadow])
        if ensemble.explainer is not None:
            fields = [member.field.remote(ref) for member, ref in zip(members[:M], bundles, strict=True)]
            ensemble.explainer.fields = await asyncio.gather(*fields)
        self._service = Service(settings, ensemble, ready[:M], Metrics(ensemble.hash), beside)
        if settings.audit_log is not None:
            check_folder(settings.audit_log)  # on the node that this replica is on

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service, self._keys)


def create_app(service: Service, keys: Keys) -> FastAPI:
    """The ASGI application of one replica."""
    app: FastAPI = FastAPIOffline(
        title="protopnet",
        version=protopnet.__version__,
        description=about.ABOUT,
        redoc_url=None,
        static_url="/docs/static",
    )
    bearer = [Security(HTTPBearer(auto_error=False))] if keys.wanted else []
    app.include_router(api(service, bearer))
    app.include_router(operations(service, bearer))
    add_page(app, _PAGE)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    audit_log = AuditLog(folder, service.ensemble.hash) if (folder := service.settings.audit_log) else None
    app.add_middleware(Gate, keys=keys, metrics=service.metrics, audit_log=audit_log)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    return app


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
