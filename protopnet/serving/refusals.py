"""What a client is told when there is no answer: one JSON shape for every error, and a code for programs."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.responses import Response

# Status and meaning of every code. The documentation of each route is made from here.
CODES: dict[str, tuple[int, str]] = {
    "bad_request": (400, "no image in the body, or a broken multipart body"),
    "bad_image": (400, "an image, but damaged or cut off"),
    "unauthorized": (401, "the bearer token is missing or wrong"),
    "not_allowed": (403, "this service may not read that place"),
    "not_found": (404, "there is nothing at this path"),
    "unknown_class": (404, "no such class; the message names the nearest ones"),
    "unknown_prototype": (404, "no such member or prototype"),
    "unknown_batch": (404, "no such batch, or no such part of it"),
    "no_picture": (404, "the bundle has no picture of this prototype"),
    "method_not_allowed": (405, "the path knows other methods than this one"),
    "slow_body": (408, "the body came too slowly: not within `body_timeout_s`, or below `min_rate`"),
    "cannot_explain": (409, "a member is a black-box baseline: it predicts, but can't explain"),
    "too_many_bytes": (413, "the body is larger than `max_bytes`"),
    "too_many_pixels": (413, "an image has more pixels than `max_pixels`, or all have more than `max_total_pixels`"),
    "too_many_images": (413, "more images than `max_images`"),
    "not_an_image": (415, "the bytes aren't an image of a known kind"),
    "bad_option": (422, "an option that isn't known, or a value out of its bounds"),
    "over_budget": (422, "more evidence asked for than `max_evidence` or `max_answer_bytes` allow"),
    "too_many_requests": (429, "this key has had its share for now; try again after the seconds of `Retry-After`"),
    "internal": (500, "a defect of the service; its log has more under the request id"),
    "overloaded": (503, "too much to do; try again after the seconds of `Retry-After`"),
    "not_ready": (503, "the members aren't all up yet; try again after the seconds of `Retry-After`"),
    "timeout": (504, "no answer within `timeout_s` of the body"),
}


class Refusal(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(self, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.status = CODES[code][0]
        self.headers = dict(headers or {})

    def response(self, request_id: str) -> Response:
        error = {"code": self.code, "message": self.message, "request_id": request_id}
        content = json.dumps({"error": error}, ensure_ascii=False)
        return Response(content, self.status, self.headers, media_type="application/json")


def overloaded(message: str, retry_after_s: int = 1) -> Refusal:
    return Refusal("overloaded", message, {"Retry-After": str(retry_after_s)})


def too_many_requests(message: str, retry_after_s: int) -> Refusal:
    return Refusal("too_many_requests", f"{message}; try again", {"Retry-After": str(retry_after_s)})


def not_ready(message: str, retry_after_s: int = 2) -> Refusal:
    return Refusal("not_ready", message, {"Retry-After": str(retry_after_s)})


def documented(codes: Iterable[str], model: type) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a FastAPI route that may refuse with these codes."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status, meaning = CODES[code]
        entry = found.setdefault(status, {"model": model, "description": "", "content": {"application/json": {}}})
        entry["description"] += ("; " if entry["description"] else "") + f"`{code}`: {meaning}"
        examples = entry["content"]["application/json"].setdefault("examples", {})
        error = {"code": code, "message": f"{meaning}.", "request_id": "5f2b8c0e-8a4f-4a53-9d0b-3d7b3f6f1c11"}
        examples[code] = {"value": {"error": error}}
        if status in (429, 503):
            seconds = {"description": "seconds to wait", "schema": {"type": "integer"}}
            entry["headers"] = {"Retry-After": seconds}
    return found
