"""Named keys: what a line says, limits of their own, changes without a restart, and the log of who asked what."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import Client, local_app, make_bundle, photo

from protopnet.errors import UserError
from protopnet.serving import keys
from protopnet.serving.app import build
from protopnet.serving.keys import Key, Keys, read_keys
from protopnet.serving.refusals import Refusal
from protopnet.serving.settings import AppSettings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("keys") / "bundle", 0)


def test_a_line_is_a_token_a_name_and_limits(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(" one \n\ntwo lab\nthree ward a_minute=120 at_once=4\nfour at_once=2\n")
    read = read_keys(str(file))
    assert [key.token for key in read] == [b"one", b"two", b"three", b"four"]
    assert [key.name for key in read[1:3]] == ["lab", "ward"]
    assert [key.limits for key in read] == [(None, None), (None, None), (120, 4), (None, 2)]
    assert read[0].name.startswith("key-")
    assert "one" not in read[0].name
    file.write_text("zero\none\n")
    assert read_keys(str(file))[1].name == read[0].name


@pytest.mark.parametrize("text", [" \n", "a b c", "a per_minute=3", "a a_minute=many", "a a_minute=-1"])
def test_a_file_without_keys_or_with_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(UserError, match="tokens"):
        read_keys(str(file))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="change token_file"):
        read_keys("/no/such/file")


def test_a_share_a_minute_comes_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    key = Key(b"x", "ward", a_minute=6)
    for _ in range(6):
        with key.working():
            pass
    with pytest.raises(Refusal, match="ward may ask 6 times a minute") as refused, key.working():
        pass
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "10")
    now += 10.5
    with key.working():
        pass
    with pytest.raises(Refusal), key.working():
        pass


def test_keys_come_and_go_without_a_restart(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REREAD_S", 0.0)
    file = tmp_path / "tokens"
    file.write_text("old lab")
    with local_app([bundle], token_file=str(file)) as client:

        def status(token: str) -> int:
            return client.get("/v1/model", Authorization=f"Bearer {token}").status

        assert (status("old"), status("new")) == (200, 401)
        file.write_text("new lab")
        assert (status("old"), status("new")) == (401, 200)
        for mistake in ("", "a line of many words"):
            file.write_text(mistake)
            assert (status("old"), status("new"), status("a")) == (401, 200, 401)
        file.unlink()
        assert (status("old"), status("new")) == (401, 200)


def test_what_is_in_use_of_a_key_stays_when_the_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REREAD_S", 0.0)
    file = tmp_path / "tokens"
    file.write_text("one lab at_once=1\n")

    async def run() -> None:
        those = Keys(str(file))
        key = await those.find("Bearer one")
        assert key is not None
        with key.working():
            file.write_text("one lab at_once=1\ntwo\n")
            again = await those.find("bearer one")
            assert again is not None
            with pytest.raises(Refusal), again.working():
                pass
            file.write_text("one lab at_once=2\n")
            more = await those.find("Bearer one")
            assert more is not None
            with more.working():
                pass

    asyncio.run(run())


def test_one_key_with_all_it_may_keeps_no_other_out(bundle: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("a ward at_once=1\nb lab\n")
    with local_app([bundle], token_file=str(file), member={"batch_wait_s": 0.5, "max_batch": 8}) as client:
        together = threading.Barrier(6)

        def ask(number: int) -> tuple[str, int]:
            token = "ab"[number % 2]
            together.wait()
            return token, client.post("/v1/predict", photo(number), Authorization=f"Bearer {token}").status

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        assert sorted(status for token, status in answers if token == "a") == [200, 429, 429]
        assert [status for token, status in answers if token == "b"] == [200] * 3


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in folder.iterdir() for line in file.read_text().splitlines()]


def test_who_asked_what_is_written_down(bundle: str, tmp_path: Path) -> None:
    file, folder = tmp_path / "tokens", tmp_path / "audit"
    file.write_text("a-secret ward\n")
    folder.mkdir()
    with local_app([bundle], token_file=str(file), audit_log=str(folder)) as anybody:
        known = Client(anybody.url, {"Authorization": "Bearer a-secret"})
        model = known.get("/v1/model").json["model"]
        known.post("/v1/explain?class=7", photo(0), **{"X-Request-ID": "mine"})
        known.form("/v1/predict", [("Smith_John.jpg", b"no image")])
        anybody.get("/v1/prototypes")
        for path in ("/healthz", "/readyz", "/", "/docs"):
            anybody.get(path)
    written = lines(folder)
    assert [(line["key"], line["method"], line["path"], line["status"]) for line in written] == [
        ("ward", "GET", "/v1/model", 200),
        ("ward", "POST", "/v1/explain", 200),
        ("ward", "POST", "/v1/predict", 415),
        (None, "GET", "/v1/prototypes", 401),
    ]
    assert {line["model"] for line in written} == {model}
    assert (written[1]["query"], written[1]["request_id"]) == ("class=7", "mine")
    text = json.dumps(written)
    assert "a-secret" not in text
    assert "Smith" not in text


def test_a_folder_that_cannot_be_written_is_named(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (str(tmp_path / "file" / "below"), "s3://bucket/audit"):
        with pytest.raises(UserError, match="change audit_log"):
            build(AppSettings(bundles=[bundle], audit_log=folder))
