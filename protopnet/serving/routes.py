"""The API's routes: what is asked, what is answered, and what may go wrong, for the documentation as for the client."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from starlette.responses import Response

from protopnet.serving import about
from protopnet.serving.batches import Batches
from protopnet.serving.refusals import Refusal, documented
from protopnet.serving.schemas import (
    Batch,
    BatchOptions,
    ClassOptions,
    ClassPage,
    Error,
    ExplainedImages,
    ExplainOptions,
    Health,
    Model,
    PictureOptions,
    Prediction,
    PredictOptions,
    PrototypeDetail,
    PrototypeOptions,
    PrototypePage,
    Readiness,
    Watch,
)
from protopnet.serving.service import Service

_ANY = ("unauthorized", "internal")
_IMAGES = (
    *("bad_request", "bad_image", "unknown_class", "too_many_bytes", "too_many_pixels", "too_many_images"),
    *("not_an_image", "bad_option", "slow_body", "too_many_requests", "overloaded", "not_ready", "timeout"),
)
_UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "what the client has (`If-None-Match`) is what there is"},
}
_JPEG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
    **_UNCHANGED,
}


_PARQUET_TYPE = "application/vnd.apache.parquet"
_PARQUET: dict[int | str, dict[str, Any]] = {
    200: {"content": {_PARQUET_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
}
_Id = Annotated[str, PathParameter(pattern="^[0-9a-f]{24}$")]


def _refusals(*codes: str) -> dict[int | str, dict[str, Any]]:
    return documented((*_ANY, *codes), Error)


def _json(content: str | bytes, status: int = 200) -> Response:
    """JSON that pydantic has written already: FastAPI would check and write it a second time."""
    return Response(content, status, media_type="application/json")


def api(service: Service, dependencies: Sequence[Any]) -> APIRouter:
    """Everything below /v1. `dependencies`: what the documentation says of the token."""
    router = APIRouter(prefix="/v1", dependencies=list(dependencies))
    _add_images(router, service)
    _add_prototypes(router, service)
    if service.batches is not None:
        _add_batches(router, service.batches)
    return router


def _add_images(router: APIRouter, service: Service) -> None:
    @router.post(
        "/predict",
        tags=["images"],
        summary="Which class",
        response_model=Prediction,
        responses=_refusals(*_IMAGES),
        openapi_extra=about.BODY,
    )
    async def predict(request: Request, options: Annotated[PredictOptions, Query()]) -> Response:
        """The most probable classes of one or several images, without reasons."""
        return _json(await service.predict(request, options))

    @router.post(
        "/explain",
        tags=["images"],
        summary="Which class, and why",
        response_model=ExplainedImages,
        responses=_refusals(*_IMAGES, "cannot_explain", "over_budget"),
        openapi_extra=about.BODY,
    )
    async def explain(request: Request, options: Annotated[ExplainOptions, Query()]) -> Response:
        """The same with evidence: for each class the prototypes with the most points, where in the image they are, and
        which training image each comes from. Ask "why not a cardinal?" with `class=Cardinal`, and with `contrast=true`
        what tells the answer from it."""
        return _json(await service.explain(request, options))

    @router.get(
        "/model", tags=["model"], summary="What is served", response_model=Model, responses=_refusals() | _UNCHANGED
    )
    async def model(request: Request) -> Response:
        """Classes, members of the ensemble, and limits. With an ETag, as all of it may be megabytes."""
        catalogue = service.catalogue
        headers = {"ETag": catalogue.etag(catalogue.model_json), "Cache-Control": "private, no-cache"}
        if headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(catalogue.model_json, headers=headers, media_type="application/json")

    @router.get(
        "/watch",
        tags=["model"],
        summary="The model in use",
        response_model=Watch,
        responses=_refusals(),
    )
    async def watch() -> Response:
        """The images answered since this model was deployed, of all replicas, beside those it was calibrated on: how
        similar they are to what it knows, how sure it is of them, and how far that is from what is usual. Some ten
        seconds late."""
        return _json(await service.watch())

    @router.get(
        "/classes",
        tags=["model"],
        summary="Search the classes",
        response_model=ClassPage,
        responses=_refusals("bad_option"),
    )
    async def classes(options: Annotated[ClassOptions, Query()]) -> Response:
        """Those with a text in their name, a page at a time."""
        return _json(service.catalogue.classes(options).model_dump_json())


def _add_prototypes(router: APIRouter, service: Service) -> None:
    catalogue = service.catalogue

    @router.get(
        "/prototypes",
        tags=["prototypes"],
        summary="Page through the prototypes",
        response_model=PrototypePage,
        responses=_refusals("unknown_class", "unknown_prototype", "bad_option"),
    )
    async def prototypes(options: Annotated[PrototypeOptions, Query()]) -> Response:
        """All of them, or those of a class or a member, in the order (class, member, prototype)."""
        return _json((await catalogue.page(options)).model_dump_json())

    @router.get(
        "/prototypes/{member}/{prototype}",
        tags=["prototypes"],
        summary="One prototype",
        response_model=PrototypeDetail,
        responses=_refusals("unknown_prototype", "bad_option"),
    )
    async def prototype(member: int, prototype: int) -> Response:
        """Where it comes from, what it looks like to itself, and which classes it speaks for or against."""
        return _json((await asyncio.to_thread(catalogue.detail, member, prototype)).model_dump_json())

    def add_picture(name: str, summary: str, picture: Callable[[int, int], bytes]) -> None:
        @router.get(
            f"/prototypes/{{member}}/{{prototype}}/{name}",
            tags=["prototypes"],
            summary=summary,
            name=name,
            response_class=Response,
            responses=_refusals("unknown_prototype", "no_picture", "bad_option") | _JPEG,
        )
        async def send(
            request: Request, member: int, prototype: int, options: Annotated[PictureOptions, Query()]
        ) -> Response:
            """JPEG, with an ETag. With `v`, the `model` of /v1/model, it may be cached for good."""
            etag = catalogue.etag(name, member, prototype)
            for_good = options.v == catalogue.model.model
            caching = "private, max-age=31536000, immutable" if for_good else "private, no-cache"
            headers = {"ETag": etag, "Cache-Control": caching}
            if etag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            jpeg = await asyncio.to_thread(picture, member, prototype)
            return Response(jpeg, headers=headers, media_type="image/jpeg")

    add_picture("thumbnail", "The training image it comes from", catalogue.thumbnail)
    add_picture("crop", "The patch alone", catalogue.crop)


def _add_batches(router: APIRouter, batches: Batches) -> None:
    @router.post(
        "/batch",
        tags=["batches"],
        summary="Score a folder or a list",
        status_code=202,
        response_model=Batch,
        responses=_refusals("not_allowed", "bad_option", "overloaded"),
    )
    async def begin(options: Annotated[BatchOptions, Query()]) -> Response:
        """Begins `jobs/score.py` on the cluster and answers at once. Asked again, it says how far it is."""
        return _json((await asyncio.to_thread(batches.begin, options)).model_dump_json(), 202)

    @router.get(
        "/batch/{number}",
        tags=["batches"],
        summary="How far a batch is",
        response_model=Batch,
        responses=_refusals("unknown_batch", "bad_option"),
    )
    async def find(number: _Id) -> Response:
        """Its state, and when it is finished its counts and the names of its parts."""
        return _json((await asyncio.to_thread(batches.find, number)).model_dump_json())

    @router.get(
        "/batch/{number}/{part}",
        tags=["batches"],
        summary="A part of a batch's scores",
        response_class=Response,
        responses=_refusals("unknown_batch", "bad_option") | _PARQUET,
    )
    async def part(number: _Id, part: str) -> Response:
        """Parquet, a row an image."""
        return Response(await asyncio.to_thread(batches.part, number, part), media_type=_PARQUET_TYPE)


def operations(service: Service, dependencies: Sequence[Any]) -> APIRouter:
    """Health and metrics."""
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", summary="Alive", response_model=Health, responses=documented(["internal"], Error))
    async def healthz() -> Response:
        """200 as long as this process answers. Never needs a token."""
        return _json(Health().model_dump_json())

    @router.get(
        "/readyz", summary="Ready", response_model=Readiness, responses=documented(["internal", "not_ready"], Error)
    )
    async def readyz() -> Response:
        """200 when every member of the ensemble answers. Never needs a token."""
        await service.check_ready()
        return _json(Readiness(model=service.ensemble.hash).model_dump_json())

    @router.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses=_refusals() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        dependencies=list(dependencies),
    )
    async def metrics() -> Response:
        """Of all replicas on all nodes. Ray collects them every ten seconds."""
        return Response(await service.metrics_text(), media_type="text/plain; version=0.0.4")

    return router


def refusal_of(error: Exception) -> Refusal:
    """FastAPI's own errors in our shape."""
    errors: Sequence[dict[str, Any]] = getattr(error, "errors", list)()
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    if first["type"] == "extra_forbidden":
        return Refusal("bad_option", f"there is no option {name!r}")
    return Refusal("bad_option", f"{name}: {_lowered(first['msg'])}, not {str(first.get('input'))[:80]!r}")


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
