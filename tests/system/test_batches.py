"""Whole folders over the API: begun, asked after, fetched; from allowed places only."""

import io
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
from ray_processes import wait_for
from serving import Client, LocalServe, photo, pixels

from protopnet.predictor import Predictor


def ask(client: Client, place: Path | str, more: str = "") -> dict:
    answer = client.post(f"/v1/batch?input={quote(str(place))}{more}", b"")
    assert answer.status == 202, answer
    found: dict = answer.json
    return found


def ended(client: Client, number: str) -> dict:
    def state() -> dict | None:
        found: dict = client.get(f"/v1/batch/{number}").json
        return None if found["state"] == "running" else found

    return wait_for(state, 120)


def test_a_folder_is_scored_as_a_batch(local_serve: LocalServe, bundles: list[str], tmp_path: Path) -> None:
    photos = [photo(n) for n in range(5)]
    for name in ("birds", "empty", "elsewhere"):
        (tmp_path / name).mkdir()
    for n, data in enumerate(photos):
        (tmp_path / "birds" / f"{n}.jpg").write_bytes(data)
    (tmp_path / "birds" / "link").symlink_to(tmp_path / "elsewhere")
    places = {"inputs": [str(tmp_path / "birds"), str(tmp_path / "empty")], "output": str(tmp_path / "scored")}
    client = local_serve.deploy("batches", bundles[:1], batch=places)

    begun = ask(client, tmp_path / "birds", "&explain=2")
    assert begun["state"] == "running"
    assert client.post(f"/v1/batch?input={quote(str(tmp_path / 'empty'))}", b"").error == "overloaded"  # one at once
    found = ended(client, begun["id"])
    assert (found["state"], found["images"], found["scored"], found["bad"]) == ("finished", 5, 5, 0), found
    assert found["watch"]["images"] == 5
    assert ask(client, tmp_path / "birds", "&explain=2") == found  # asked again, nothing is done again
    [part] = found["parts"]
    rows = pq.read_table(io.BytesIO(client.get(f"/v1/batch/{found['id']}/{part}").body)).sort_by("uri")
    expected_BK = Predictor.load(bundles[:1]).scores(pixels(*photos)).logits_BK
    np.testing.assert_allclose(rows["logit"], expected_BK.amax(1), rtol=1e-4)
    assert [len(evidence) for evidence in rows["evidence"].to_pylist()] == [2] * 5

    failed = ended(client, ask(client, tmp_path / "empty")["id"])
    assert failed["state"] == "failed"
    assert "holds no images" in failed["problem"]
    for place in ("elsewhere", "birds/link", "birds/../elsewhere", ""):
        refused = client.post(f"/v1/batch?input={quote(str(tmp_path / place))}", b"")
        assert (refused.status, refused.error) == (403, "not_allowed")
    assert client.get(f"/v1/batch/{'0' * 24}").error == "unknown_batch"
    assert client.get(f"/v1/batch/{found['id']}/..%2Fscores.json").status == 404
    assert client.get("/v1/batch/..").status in (404, 422)
    local_serve.delete("batches")
