"""What the service refuses, over real HTTP: with which status and code, and how soon."""

import socket
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from serving import Client, LocalServe, photo

TOKEN = "a-long-secret"


@pytest.fixture(scope="module")
def strict(local_serve: LocalServe, bundles: list[str], tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Small limits, a token, and members so slow that a request runs out of time."""
    tokens = tmp_path_factory.mktemp("secrets") / "tokens"
    tokens.write_text(f"an-older-secret\n{TOKEN}\n")
    opened = local_serve.deploy(
        "strict",
        bundles[:1],
        token_file=str(tokens),
        cors_origins=["https://birds.example"],
        max_bytes=20_000,
        max_pixels=10_000,
        max_images=2,
        timeout_s=0.4,
        body_timeout_s=0.4,
        member={"batch_wait_s": 1.0, "max_batch": 8},
        ingress={"max_requests": 3},
    )
    return Client(opened.url, {"Authorization": f"Bearer {TOKEN}"})


def test_health(service, strict):
    for client in (service, Client(strict.url)):  # the second without its token
        assert client.get("/healthz").json == {"status": "ok"}
        assert client.get("/readyz").json["status"] == "ready"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (None, 400, "bad_request"),
        (b"", 400, "bad_request"),
        (b"hello", 415, "not_an_image"),
        (b"https://example.org/bird.jpg", 415, "not_an_image"),
        (photo(0)[:500], 400, "bad_image"),
    ],
)
@pytest.mark.parametrize("route", ["predict", "explain"])
def test_what_is_no_image(service, route, body, status, code):
    answer = service.post(f"/v1/{route}", body)
    assert (answer.status, answer.error) == (status, code)


def test_the_message_names_the_bad_one_of_several_files(service):
    answer = service.form("/v1/predict", [("good.jpg", photo(0)), ("notes.txt", b"hello")])
    assert (answer.status, answer.error) == (415, "not_an_image")
    assert answer.json["error"]["message"].startswith("notes.txt: ")


def test_broken_forms(service):
    kind = {"Content-Type": "multipart/form-data; boundary=frontier"}
    for body in (b"--frontier\r\nnonsense", b"", b"--frontier--\r\n"):
        assert service.post("/v1/predict", body, **kind).error == "bad_request", body
    no_boundary = service.post("/v1/predict", b"x", **{"Content-Type": "multipart/form-data"})
    assert (no_boundary.status, no_boundary.error) == (400, "bad_request")
    field = service.form("/v1/predict", [("top_classes", b"3")])
    assert (field.status, field.error) == (422, "bad_option")
    assert service.form("/v1/predict", [("empty.jpg", b"")]).error == "bad_request"


@pytest.mark.parametrize(
    "query",
    [
        "top_classes=0",
        "top_classes=many",
        "top_class=3",
        "maps=jpeg",
        "abstain_below=2",
        "abstain_below=nan",
        "top_prototypes=101",
        "class=",
        "class=" + "x" * 300,
        "&".join(["class=1"] * 30),
    ],
)
def test_bad_options(service, query):
    answer = service.post(f"/v1/explain?{query}", photo(0))
    assert (answer.status, answer.error) == (422, "bad_option")


def test_options_of_explain_are_not_those_of_predict(service):
    assert service.post("/v1/predict?maps=png", photo(0)).status == 422


@pytest.mark.parametrize("path", ["?limit=0", "?limit=201", "?offset=-1", "?member=x", "/x/1", "/0/1.5", "?page=2"])
def test_bad_options_of_prototypes(service, path):
    answer = service.get(f"/v1/prototypes{path}")
    assert (answer.status, answer.error) == (422, "bad_option")


def test_an_unknown_class_is_told_the_nearest(service):
    for answer in (
        service.post("/v1/predict?class=Nothern+Cardinl", photo(0)),
        service.post("/v1/explain?class=Nothern+Cardinl", photo(0)),
        service.get("/v1/prototypes?class=Nothern+Cardinl"),
    ):
        assert (answer.status, answer.error) == (404, "unknown_class")
        assert "002.Northern_Cardinal" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/prototypes/0/12", "unknown_prototype"),
        ("/v1/prototypes/0/-1", "unknown_prototype"),
        ("/v1/prototypes/1/0", "unknown_prototype"),
        ("/v1/prototypes/-1/0/crop", "unknown_prototype"),
        ("/v1/prototypes?member=4", "unknown_prototype"),
        ("/v1/prototypes/0/0/thumbnail", "no_picture"),
        ("/v1/prototypes/0/0/crop", "no_picture"),
        ("/v1/nothing", "not_found"),
        ("/v2/predict", "not_found"),
    ],
)
def test_what_there_is_not(service, path, code):
    answer = service.get(path)
    assert (answer.status, answer.error) == (404, code)


def test_other_methods(service):
    for method, path in (("GET", "/v1/predict"), ("DELETE", "/v1/model"), ("POST", "/healthz"), ("PUT", "/")):
        answer = service.send(method, path, None)
        assert (answer.status, answer.error) == (405, "method_not_allowed"), path


@contextmanager
def begun(strict, path, rest):
    """A connection on which the first bytes of a request have been sent, `rest` after its first headers."""
    address = urlsplit(strict.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = f"POST {address.path}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(head.encode() + rest)
        yield connection


def test_a_body_that_says_it_is_too_large_is_refused_before_it_comes(strict):
    """Only the head of the request is sent: had the service waited for the body, it would wait for ever."""
    with begun(strict, "/v1/predict", b"Content-Length: 20001\r\n\r\n") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_becomes_too_large_is_refused_before_its_end(strict):
    """In chunks, without saying how many, and never the last one."""
    with begun(strict, "/v1/explain", b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        for _ in range(3):
            connection.sendall(b"1f40\r\n" + b"x" * 8000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_too_much_of_anything(strict):
    assert strict.post("/v1/predict", b"x" * 20_001).error == "too_many_bytes"
    assert strict.form("/v1/predict", [("a.jpg", b"x" * 20_001)]).error == "too_many_bytes"
    assert strict.post("/v1/predict", photo(0, 200, 100)).error == "too_many_pixels"
    for count in (3, 5):
        answer = strict.form("/v1/predict", [(f"{n}.jpg", photo(n)) for n in range(count)])
        assert (answer.status, answer.error) == (413, "too_many_images")


def test_no_answer_in_time(strict):
    for route in ("predict", "explain"):
        started = time.monotonic()
        answer = strict.post(f"/v1/{route}", photo(0))
        assert (answer.status, answer.error) == (504, "timeout")
        assert time.monotonic() - started < 5


def test_a_body_that_never_ends_runs_out_of_time(strict):
    with begun(strict, "/v1/predict", b"Content-Length: 1000\r\n\r\nabc") as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "é"}]
)
def test_without_the_token_nothing_but_health_page_and_documentation(strict, header):
    stranger = Client(strict.url, header)
    for path in ("/v1/model", "/v1/prototypes", "/v1/prototypes/0/1/crop", "/metrics", "/v1/nothing"):
        answer = stranger.get(path)
        assert (answer.status, answer.error) == (401, "unauthorized"), path
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert stranger.post("/v1/predict", photo(0)).error == "unauthorized"
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/"):
        assert stranger.get(path).status == 200, path


def test_any_token_of_the_file_opens(strict):
    assert strict.get("/v1/model").status == 200
    assert Client(strict.url, {"Authorization": "bearer an-older-secret"}).get("/v1/model").status == 200


def test_browsers_of_other_origins_are_kept_out_unless_configured(service, strict):
    origin = {"Origin": "https://birds.example"}
    assert "Access-Control-Allow-Origin" not in service.get("/v1/model", **origin).headers
    assert strict.get("/v1/model", **origin).headers["Access-Control-Allow-Origin"] == "https://birds.example"
    assert "Access-Control-Allow-Origin" not in strict.get("/v1/model", Origin="https://other.example").headers
    preflight = Client(strict.url).send(
        "OPTIONS", "/v1/predict", None, **origin, **{"Access-Control-Request-Method": "POST"}
    )
    assert preflight.status == 200
