"""The workbench over HTTP, without a browser: what is asked and answered, who may decide, and what is refused."""

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_session import OPTIONS, made_bundle, made_corrector
from PIL import Image
from starlette.testclient import TestClient

from protopnet.auditing.audit import audit_bundle
from protopnet.auditing.audit_files import write_audit
from protopnet.auditing.findings import AuditSettings
from protopnet.auditing.prune import Corrector
from protopnet.config import DataSettings
from protopnet.errors import UserError
from protopnet.serving.keys import Keys
from protopnet.workbench.app import create_app
from protopnet.workbench.bench import Workbench
from protopnet.workbench.cache import Cache, write_cache
from protopnet.workbench.catalogue import Catalogue
from protopnet.workbench.desk import Desk
from protopnet.workbench.log import DecisionLog
from protopnet.workbench.session import Session


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestTheDesk:
    def test_one_person_decides_at_a_time(self) -> None:
        clock = Clock()
        desk = Desk(clock)
        anna = desk.sit("anna")
        with pytest.raises(UserError, match="anna is deciding"):
            desk.sit("bo")
        clock.now = 50
        assert desk.person(anna) == "anna"
        clock.now = 100  # seen 50 s ago
        with pytest.raises(UserError, match="anna"):
            desk.sit("bo")
        clock.now = 111
        bo = desk.sit("bo")
        assert desk.holder() == "bo"
        with pytest.raises(UserError, match="bo is deciding now"):
            desk.person(anna)
        assert not desk.get_up(anna)
        assert desk.get_up(bo)
        assert desk.holder() is None
        with pytest.raises(UserError, match="sit down first"):
            desk.person(bo)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corrector, Path]:
    """Cache and audit of a made bundle."""
    folder = tmp_path_factory.mktemp("prepared")
    corrector = made_corrector(folder)
    bundle = made_bundle(folder, corrector)
    last_layer = corrector.trained.last_layer
    write_cache(folder / "cache", corrector.network, corrector.model, corrector.dataset, "here", last_layer, OPTIONS)
    settings = AuditSettings(train_patches=4, own_patches=4)
    result = audit_bundle(bundle, corrector.dataset, settings, OPTIONS)
    write_audit(str(folder / "audit"), result, bundle, settings, "bundle", "data")
    return corrector, folder


Connect = Callable[..., TestClient]


@pytest.fixture
def connect(prepared: tuple[Corrector, Path], tmp_path: Path) -> Iterator[Connect]:
    corrector, folder = prepared
    sessions: list[Session] = []

    def connect(token_file: Path | None = None) -> TestClient:
        cache = Cache.load(folder / "cache", "here", corrector.dataset, corrector.trained.last_layer)
        assert cache is not None
        sessions.append(Session(corrector, cache, DecisionLog(tmp_path / "decisions.jsonl"), OPTIONS))
        catalogue = Catalogue(
            folder / "audit", corrector.dataset, corrector.known.grid, DataSettings(max_pixels=1_000_000)
        )
        bench = Workbench(sessions[-1], catalogue, Desk(), tmp_path, lambda: "the/new/bundle")
        return TestClient(create_app(bench, Keys(str(token_file) if token_file else None)))

    yield connect
    for session in sessions:
        session.close()


@pytest.fixture
def client(connect: Connect) -> TestClient:
    return connect()


def sit(client: TestClient, who: str = "anna") -> str:
    return str(client.post("/v1/desk", json={"who": who}).json()["seat"])


def decide(client: TestClient, seat: str, **decision: Any) -> Any:
    return client.post("/v1/decisions", json={"seat": seat, "decision": decision})


def test_findings_and_prototypes_come_a_page_at_a_time(client: TestClient) -> None:
    whole = client.get("/v1/findings?limit=200").json()
    assert whole["total"] == len(whole["items"]) > 2
    pages, offset = [], 0
    while offset is not None:
        page = client.get(f"/v1/findings?limit=2&offset={offset}").json()
        pages += page["items"]
        offset = page["next"]
    assert pages == whole["items"]
    assert [each["severity"] for each in pages] == sorted(
        (each["severity"] for each in pages), key=["serious", "worth a look", "minor"].index
    )
    assert all(each["prototypes"] for each in pages)
    of_tit = client.get("/v1/prototypes?class=1").json()
    assert [each["prototype"] for each in of_tit["items"]] == [3, 4, 5]
    assert client.get("/v1/prototypes?limit=2&offset=8").json()["next"] is None


def test_a_prototype_with_its_patches_and_pictures(client: TestClient) -> None:
    found = client.get("/v1/prototypes/4").json()
    assert (found["prototype"], found["class_name"], found["gone"], found["moved"]) == (4, "tit", False, False)
    assert {split: len(patches) for split, patches in found["nearest"].items()} == {"train": 4, "validation": 5}
    assert found["source"]["box"] == found["box"]
    for image in [found["source"], *found["nearest"]["validation"]]:
        picture = Image.open(io.BytesIO(client.get(f"/v1/images/{image['image_id']}").content))
        assert picture.size == (48, 48)
    decided_by = [client.get(f"/v1/prototypes/{p}").json()["deciding"]["total"] for p in range(9)]
    assert sum(decided_by) == 6


def test_a_decision_and_what_it_changes(client: TestClient) -> None:
    seat = sit(client)
    answer = decide(client, seat, decide="drop", prototype=4, why="a twig").json()
    assert answer["effect"]["number"] == 1
    assert answer["undo"] == "drop"
    assert client.get("/v1/prototypes/4").json()["gone"]
    assert client.get("/v1/prototypes/4").json()["decided"][0]["why"] == "a twig"
    worth = client.get("/v1/worth").json()
    listed = [each["prototype"] for each in worth["needed"] + worth["free"]]
    assert sorted(listed) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert client.post("/v1/undo", json={"seat": seat}).json()["redo"] == "drop"
    assert not client.get("/v1/prototypes/4").json()["gone"]
    moved = decide(client, seat, decide="not-this-patch", prototype=4, elsewhere=True).json()
    assert moved["effect"]["state"] in ("solving", "optimal")
    after = client.get("/v1/prototypes/4").json()
    assert after["moved"]
    assert after["source"]["image_id"] != client.get("/v1/prototypes/3").json()["source"]["image_id"] or after["moved"]
    named = decide(client, seat, decide="name", prototype=4, name="red bill")
    assert named.status_code == 200
    assert client.get("/v1/prototypes/4").json()["name"] == "red bill"
    grouped = decide(client, seat, decide="group", prototypes=[0, 4], group="bill")
    assert grouped.status_code == 200
    assert client.get("/v1/prototypes/0").json()["group"] == "bill"


def test_decisions_of_before_that_no_longer_apply_are_listed(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    seat = sit(client)
    for p in (1, 5):
        assert decide(client, seat, decide="drop", prototype=p).json()["lapsed"] == []
    log = tmp_path / "decisions.jsonl"
    first, second = map(json.loads, log.read_text().splitlines())
    first["decision"]["prototype"]["sha256"] = "f" * 64  # an image on which the new training put none
    log.write_text("".join(json.dumps(each) + "\n" for each in (first, second)))
    again = connect()
    (lapsed,) = again.get("/v1/state").json()["lapsed"]
    assert (lapsed["decide"], lapsed["who"]) == ("drop", "anna")
    assert "no prototype of the bundle is the patch of" in lapsed["why"]
    assert [again.get(f"/v1/prototypes/{p}").json()["gone"] for p in (1, 5)] == [False, True]


def test_what_is_saved_is_a_file_for_the_job(client: TestClient, tmp_path: Path) -> None:
    seat = sit(client)
    assert client.post("/v1/save", json={"seat": seat}).status_code == 422  # nothing decided
    decide(client, seat, decide="drop", prototype=4)
    client.post("/v1/save", json={"seat": seat})
    content = yaml.safe_load((tmp_path / "corrections.yaml").read_text())
    assert content["made_for"] == "here"
    assert [each["decide"] for each in content["decisions"]] == ["drop"]
    assert content["decisions"][0]["who"] == "anna"
    assert content["decisions"][0]["prototype"]["sha256"]
    deadline = time.monotonic() + 10
    while (saved := client.get("/v1/state").json()["saved"])["state"] == "working" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (saved["state"], saved["bundle"]) == ("done", "the/new/bundle")


def test_only_who_sits_at_the_desk_decides(client: TestClient) -> None:
    assert decide(client, "", decide="drop", prototype=4).status_code == 422
    seat = sit(client)
    refused = client.post("/v1/desk", json={"who": "bo"})
    assert refused.status_code == 422
    assert "anna is deciding" in refused.json()["error"]["message"]
    assert client.get("/v1/state?seat=other").json()["holder"] == "anna"
    assert not client.get("/v1/state?seat=other").json()["yours"]
    assert client.get(f"/v1/state?seat={seat}").json()["yours"]
    assert "anna is deciding now" in decide(client, "other", decide="drop", prototype=4).json()["error"]["message"]
    client.post("/v1/desk/leave", json={"seat": seat})
    assert sit(client, "bo")


@pytest.mark.parametrize(
    ("decision", "said"),
    [
        ({"decide": "explode", "prototype": 1}, "no such decision"),
        ({"decide": "drop", "prototype": 99}, "there is no 99"),
        ({"decide": "drop"}, "prototype: Field required"),
        ({"decide": "merge", "prototype": 0, "into": 4}, "two classes"),
        ({"decide": "drop", "prototype": 1, "who": "somebody", "when": 3}, None),
    ],
)
def test_what_can_t_be_decided_is_said(client: TestClient, decision: dict[str, Any], said: str | None) -> None:
    answer = decide(client, sit(client), **decision)
    if said is None:  # who and when are the server's to say
        assert answer.status_code == 200
        assert client.get("/v1/prototypes/1").json()["decided"][0]["who"] == "anna"
    else:
        assert answer.status_code == 422
        assert said in answer.json()["error"]["message"]


def test_the_gate_and_other_origins(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("secret")
    client = connect(tmp_path / "tokens")
    assert client.get("/").status_code == 200
    assert client.get("/page/bench.js").status_code == 200
    assert client.get("/v1/state").status_code == 401
    allowed = {"Authorization": "Bearer secret"}
    assert client.get("/v1/state", headers=allowed).status_code == 200
    plain = client.post("/v1/desk", content='{"who": "x"}', headers=allowed | {"Content-Type": "text/plain"})
    assert plain.status_code == 400
    large = client.post("/v1/desk", content=b'"' * 2_000_000, headers=allowed | {"Content-Type": "application/json"})
    assert large.status_code == 413
    assert client.get("/v1/images/9999", headers=allowed).status_code == 422
    assert client.get("/v1/findings?offset=-1", headers=allowed).status_code == 422
