"""The service against those who ask too much, send too slowly or not at all, or go away: over real HTTP, without Ray."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest
from PIL import Image
from serving import CLASSES, Client, local_app, make_bundle, photo, pixels

from protopnet.pages.pictures import heat_png
from protopnet.predictor import Predictor
from protopnet.serving import answers, bodies

MANY = 64  # requests in work that the settings nobody changes allow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("limits") / "bundle", 0)


@pytest.fixture(scope="module")
def service(bundle: str) -> Iterator[Client]:
    with local_app([bundle]) as client:
        yield client


@contextmanager
def begun(client: Client, path: str, length: int, body: bytes = b"") -> Iterator[socket.socket]:
    """A connection on which a request has begun that says it has a body of this length."""
    address = urlsplit(client.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = f"POST {address.path}{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + body)
        yield connection


def status(connection: socket.socket) -> int:
    return int(connection.recv(100).split()[1])


# ---------------------------------------------------------------------------------------- slow and silent


def test_who_sends_nothing_keeps_nobody_out(service: Client) -> None:
    with ExitStack() as stack:
        for _ in range(2 * MANY):
            stack.enter_context(begun(service, "/v1/predict", 1000))
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda n: service.post("/v1/predict", photo(n)).status, range(8)))
    assert statuses == [200] * 8


def test_who_sends_too_slowly_is_cut_off_and_who_is_only_slow_is_not(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 10,000 bytes a second, after a while."""
    monkeypatch.setattr(bodies, "GRACE_S", 0.4)

    def sent(pieces: list[bytes], length: int) -> int:
        with begun(service, "/v1/predict", length) as connection:
            connection.settimeout(0.1)
            for piece in pieces:
                connection.sendall(piece)
                try:
                    return status(connection)
                except TimeoutError:
                    continue
            connection.settimeout(20)
            return status(connection)

    body = photo(0, 600, 400, quality=95)
    assert len(body) > 20_000
    assert sent([], 1000) == 408
    assert sent([b"x"] * 50, 1000) == 408
    assert sent([body[start : start + 2000] for start in range(0, len(body), 2000)], len(body)) == 200


def test_a_body_has_only_so_long(bundle: str) -> None:
    with local_app([bundle], body_timeout_s=0.3) as client, begun(client, "/v1/explain", 10**6, b"x" * 10**5) as slow:
        began = time.monotonic()
        assert status(slow) == 408
        assert time.monotonic() - began < 3


def test_what_is_being_sent_is_held_within_a_limit_and_given_back(bundle: str) -> None:
    limits = {"max_bytes": 100_000, "ingress": {"body_memory": 150_000}}
    with local_app([bundle], **limits) as client:
        with begun(client, "/v1/predict", 100_000, b"x" * 90_000):
            time.sleep(0.2)
            answer = client.post("/v1/predict", b"x" * 70_000)
            assert (answer.status, answer.json["error"]["code"]) == (503, "overloaded")
            assert client.post("/v1/predict", photo(0)).status == 200
        for _ in range(3):  # that one went away, and what it had with it
            assert client.post("/v1/predict", b"x" * 90_000).status == 415


def test_what_has_been_decoded_is_held_no_longer(bundle: str) -> None:
    """While one waits for a member, there is room for another."""
    limits = {
        "max_bytes": 100_000,
        "ingress": {"body_memory": 100_000},
        "member": {"batch_wait_s": 0.8, "max_batch": 8},
    }
    with local_app([bundle], **limits) as client, ThreadPoolExecutor(1) as pool:
        large = photo(0) + bytes(80_000)  # what follows the end of a JPEG is nobody's business
        first = pool.submit(client.post, "/v1/predict", large)
        time.sleep(0.3)
        assert client.post("/v1/predict", large).status == 200
        assert first.result().status == 200


# ------------------------------------------------------------------------------------------------ too much


@pytest.mark.parametrize(
    ("query", "limits", "named"),
    [
        ("top_classes=4&top_prototypes=12", {"max_evidence": 47}, "max_evidence (47)"),
        ("top_classes=1&top_prototypes=4&maps=png", {"max_evidence": 15}, "max_evidence (15)"),
        ("top_classes=1&top_prototypes=1&maps=values", {"max_evidence": 3}, "max_evidence (3)"),
        ("top_classes=1&class=1&class=2&top_prototypes=5", {"max_evidence": 14}, "max_evidence (14)"),
        ("top_classes=1&class=1&contrast=true&top_prototypes=5", {"max_evidence": 19}, "max_evidence (19)"),
        ("top_classes=1&top_prototypes=4&maps=png&map=gradient", {"max_evidence": 79}, "max_evidence (79)"),
        ("top_classes=1&top_prototypes=4&perturb=true", {"max_evidence": 67}, "max_evidence (67)"),
        ("top_classes=4&top_prototypes=12&maps=values", {"max_answer_bytes": 100_000}, "max_answer_bytes (100,000)"),
    ],
)
def test_too_much_evidence_is_refused_before_the_body_is_read(
    bundle: str, query: str, limits: dict[str, int], named: str
) -> None:
    with local_app([bundle], **limits) as client, begun(client, f"/v1/explain?{query}", 1000) as unread:
        answer = unread.recv(2000).decode()
        assert answer.startswith("HTTP/1.1 422")
        assert '"over_budget"' in answer
        assert named in answer


def test_the_budget_is_that_of_all_images_together(bundle: str) -> None:
    with local_app([bundle], max_evidence=15 * 3, max_total_pixels=3 * 90 * 60) as client:
        files = [(f"{n}.jpg", photo(n)) for n in range(4)]
        assert client.form("/v1/explain", files[:3]).status == 200
        answer = client.form("/v1/explain", files)
        assert (answer.status, answer.json["error"]["code"]) == (422, "over_budget")
        answer = client.form("/v1/predict", files)
        assert (answer.status, answer.json["error"]["code"]) == (413, "too_many_pixels")
        assert "max_total_pixels" in answer.json["error"]["message"]


def test_what_the_settings_nobody_changes_allow_is_enough_for_a_page_of_photos(service: Client) -> None:
    answer = service.form("/v1/explain?maps=png", [(f"{n}.jpg", photo(n)) for n in range(16)])
    assert answer.status == 200
    assert all(len(image["classes"]) == 3 for image in answer.json["images"])


def test_what_the_page_asks_of_one_photo_is_allowed_and_found(service: Client, bundle: str) -> None:
    query = "top_classes=3&top_prototypes=5&contrast=true&maps=png&map=gradient"
    plain, closer = (
        service.post(f"/v1/explain?{asked}", photo(1)) for asked in (query[: -len("&map=gradient")], query)
    )
    maps = [answer.json["images"][0]["heat_maps"] for answer in (plain, closer)]
    assert maps[0].keys() == maps[1].keys()
    assert maps[0] != maps[1]
    [found] = service.post("/v1/explain?top_classes=1&perturb=true", photo(1)).json["images"]
    [expected] = Predictor.load([bundle]).explain(pixels(photo(1)), [(90, 60)], top_classes=1, perturb=True)
    for row, same in zip(found["classes"][0]["evidence"], expected.top.evidence, strict=True):
        assert same.falls is not None
        assert row["falls"] == pytest.approx(same.falls.model_dump(), abs=1e-4)


# -------------------------------------------------------------------------------------------- out of time


def test_work_ends_when_its_time_is_up(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With maps drawn so slowly that the only thread would be busy for seconds after the answer."""
    drawn: list[float] = []

    def slowly(map_HW: object) -> bytes:
        drawn.append(time.monotonic())
        time.sleep(0.25)
        return heat_png(map_HW)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "heat_png", slowly)
    with local_app([bundle], timeout_s=0.8, ingress={"threads": 1}) as client:
        slow = "/v1/explain?maps=png&top_classes=4&top_prototypes=12"
        assert (client.post(slow, photo(0)).status, len(drawn) < 12) == (504, True)
        assert client.post("/v1/explain", photo(1)).status == 200  # the thread is free
        count = len(drawn)
        time.sleep(0.6)
        assert len(drawn) == count


def test_small_images_do_not_wait_for_large_ones(service: Client) -> None:
    """Of six that take all the memory there is, one after the other, a small one overtakes those that wait."""
    sink = io.BytesIO()
    Image.new("1", (7000, 7000)).save(sink, "PNG")
    ended: list[str] = []

    def ask(name: str, data: bytes) -> None:
        assert service.post("/v1/predict", data).status == 200
        ended.append(name)

    with ThreadPoolExecutor(7) as pool:
        asking = [pool.submit(ask, "large", sink.getvalue()) for _ in range(6)]
        time.sleep(0.1)
        asking.append(pool.submit(ask, "small", photo(0)))
        for each in asking:
            each.result()
    assert ended.index("small") <= 2, ended


def test_requests_in_work_are_counted_and_the_places_given_back(bundle: str) -> None:
    """Two places, one image every while: of many at once some are refused, and later ones are not."""
    slow = {"batch_wait_s": 0.3, "max_batch": 8}
    with local_app([bundle], member=slow, ingress={"max_requests": 2}) as client:
        statuses: list[int] = []
        together = threading.Barrier(6)

        def ask(number: int) -> None:
            together.wait()
            statuses.append(client.post("/v1/predict", photo(number)).status)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(6)))
        assert set(statuses) == {200, 503}
        assert client.post("/v1/predict", photo(0)).status == 200


def test_the_limits_are_told(service: Client) -> None:
    limits = service.get("/v1/model").json["limits"]
    assert limits["max_evidence"] == 1000
    assert {"max_bytes", "max_pixels", "max_total_pixels", "max_answer_bytes", "body_timeout_s"} <= set(limits)
    assert len(CLASSES) == 4
