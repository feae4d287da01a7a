"""The API against its own documentation: whatever is sent, what comes back is documented, and never a defect."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import photo

EXAMPLES = 30  # of each operation
IMAGES = [photo(1), photo(2, 300, 10), photo(3, kind="PNG"), photo(1)[:400], b"", b"GIF89a"]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def operations(service):
    """Of the documented API, by path. Bodies that should be images are images, more or less."""
    for kind in ("image/jpeg", "image/png", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, st.sampled_from(IMAGES))
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    assert {(operation.method, operation.path) for operation in found} == {
        ("post", "/v1/predict"),
        ("post", "/v1/explain"),
        *(
            ("get", path)
            for path in (
                "/v1/model",
                "/v1/watch",
                "/v1/classes",
                "/v1/prototypes",
                "/v1/prototypes/{member}/{prototype}",
            )
        ),
        *(("get", f"/v1/prototypes/{{member}}/{{prototype}}/{name}") for name in ("thumbnail", "crop")),
        *(("get", path) for path in ("/healthz", "/readyz", "/metrics")),
    }
    return found


def test_every_answer_is_documented(operations):
    for operation in operations:
        seen = statuses_of(operation)
        print(operation.method, operation.path, sorted(seen))
        assert 200 in seen, operation.path


def statuses_of(operation):
    """What comes back for requests of all kinds; fails where that isn't documented."""
    seen = set()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy(), prototype=st.none() | st.integers(0, 11))
    def send(case, prototype):
        if prototype is not None and "prototype" in case.path_parameters:
            case.path_parameters = {"member": 0, "prototype": prototype}  # one that there is
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    send()
    return seen
