"""What is told of training images, by setting: in explanations, over the API, in scores and in pictures."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from serving import SIZE, Client, local_app, make_bundle, photo, pixels

import protopnet
from protopnet.commands import explain
from protopnet.datasets.trained import training_images_of
from protopnet.errors import UserError
from protopnet.evidence.sources import Named, Shown, name_below
from protopnet.exporting import explained
from protopnet.model.bundle import load_bundle
from protopnet.pages import pictures
from protopnet.predictor import Predictor
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.task import ScoreOptions, Scorer, look

SECRET = "/mnt/hospital/patients/Smith_John"  # the data's root is what is above its last folder
BOX = (30, 60, 60, 120)  # of every prototype, on 180 x 120 pixels


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("sources") / "bundle", 0, images=f"{SECRET}/birds")


@pytest.mark.parametrize(
    ("uri", "root", "name"),
    [
        ("/data/birds/train/Jay/1.jpg", "/data/birds", "train/Jay/1.jpg"),
        ("/data/birds2/Jay/1.jpg", "/data/birds", "Jay/1.jpg"),
        ("/data/birds/train/Jay/1.jpg", None, "Jay/1.jpg"),
        ("file:///data/birds/Jay/1.jpg", "/data/birds", "Jay/1.jpg"),
        ("s3://bucket/prefix/Jay/1.jpg", "s3://bucket/prefix", "Jay/1.jpg"),
        ("s3://bucket/prefix/Jay/1.jpg", None, "Jay/1.jpg"),
        ("s3://bucket/1.jpg", "s3://other", "1.jpg"),
        ("s3://bucket/Jay/1.jpg#xywh=1,2,3,4", "s3://bucket", "Jay/1.jpg#xywh=1,2,3,4"),
        ("https://host/a/1.jpg?X-Amz-Signature=secret", None, "a/1.jpg"),
        ("gs://bucket/a/b/c/1.jpg", None, "c/1.jpg"),
        ("C:\\\\Users\\\\smith\\\\birds\\\\1.jpg", None, "birds/1.jpg"),
        ("../../etc/birds/1.jpg", None, "birds/1.jpg"),
        ("~/birds/1.jpg", "/data", "birds/1.jpg"),
        ("/1.jpg", None, "1.jpg"),
        ("Jay/1.jpg", "/data", "Jay/1.jpg"),
        ("birds://train/Jay/0001", None, "Jay/0001"),
    ],
)
def test_a_name_says_nothing_of_where_the_data_lies(uri: str, root: str | None, name: str) -> None:
    assert name_below(uri, root) == name


def everything(client: Client) -> list[bytes]:
    """Every answer that may say something of training images."""
    prototype = "/v1/prototypes/0/4"
    answers = [client.get(path) for path in ("/v1/model", "/v1/prototypes", prototype)]
    answers += [client.post("/v1/explain?top_classes=4&top_prototypes=12&maps=png", photo(1))]
    assert all(answer.status == 200 for answer in answers)
    return [answer.body for answer in answers]


@pytest.mark.parametrize("sources", ["full", "names", "none"])
def test_over_the_api(bundle: str, sources: Named) -> None:
    with local_app([bundle], sources=sources) as client:
        said = b"\n".join(everything(client)).decode()
        source = client.get("/v1/prototypes/0/4").json["source"]
    assert ("hospital" in said) == (sources == "full")
    assert ("/4.jpg" in said) == (sources != "none")
    assert (source["sha256"] is None) == (source["image_id"] is None) == (sources == "none")
    uri = {"full": f"{SECRET}/birds/4.jpg", "names": "birds/4.jpg", "none": None}[sources]
    assert (source["uri"], tuple(source["box"])) == (uri, BOX)


@pytest.mark.parametrize(("sources", "crops_only"), [("names", False), ("names", True), ("none", False)])
def test_pictures_show_the_crop_and_what_surrounds_it_only_where_it_may_be_shown(
    bundle: str, sources: Named, crops_only: bool
) -> None:
    with local_app([bundle], sources=sources, crops_only=crops_only) as client:
        thumbnail = client.get("/v1/prototypes/0/4/thumbnail")
        crop = client.get("/v1/prototypes/0/4/crop")
    shown = np.asarray(pictures.opened(thumbnail.body)).astype(int)
    original = np.asarray(pictures.opened(photo(4))).astype(int)
    assert shown.shape == original.shape == (60, 90, 3)
    inside = np.zeros((60, 90), bool)
    inside[15:30, 30:60] = True
    grey = np.abs(shown[~inside] - 128).mean() < 3
    assert grey == (crops_only or sources == "none")
    assert np.abs(shown[inside] - original[inside]).mean() < 8
    assert Image.open(io.BytesIO(crop.body)).size == (30, 15)
    assert np.abs(np.asarray(pictures.opened(crop.body)).astype(int) - original[15:30, 30:60]).mean() < 12


@pytest.mark.parametrize("sources", ["full", "names", "none"])
def test_in_scores(bundle: str, sources: Named) -> None:
    predictor = Predictor.load([bundle], Shown(sources)).to(torch.device("cpu"))
    scorer = Scorer(predictor, ScoreOptions(batch_size=2, explain=3), torch.device("cpu"))
    rows = pa.table([[0, 1], ["a", "b"], ["a", "b"], [-1, -1], [-1, -1], [0, 1]], schema=MANIFEST_SCHEMA)
    table, _ = scorer(rows, [look(photo(n), {}, [SIZE], 10**6) for n in range(2)])
    for evidence in table["evidence"].to_pylist():
        for entry in evidence:
            name = f"{entry['prototype']}.jpg"
            assert (
                entry["source_uri"]
                == {"full": f"{SECRET}/birds/{name}", "names": f"birds/{name}", "none": None}[sources]
            )


@pytest.mark.parametrize(
    ("options", "leaks"), [([], False), (["--sources", "full"], True), (["--sources", "none"], False)]
)
def test_in_what_the_job_writes(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], leaks: bool
) -> None:
    (tmp_path / "bird.jpg").write_bytes(photo(2))
    arguments = [bundle, str(tmp_path / "bird.jpg"), "--output", str(tmp_path / "out"), "--pictures", "none", *options]
    monkeypatch.setattr(sys, "argv", ["explain", *arguments])
    explain.main()
    written = (tmp_path / "out/explanations.json").read_text()
    assert ("hospital" in written) == leaks
    sources = [e["source"] for entry in json.loads(written)[0]["classes"] for e in entry["evidence"]]
    assert all((source["uri"] is None) == ("none" in options) for source in sources)


@pytest.mark.parametrize(
    ("sources", "crops_only"), [("names", False), ("names", True), ("none", False), ("full", False)]
)
def test_in_a_bundle_that_is_handed_on(bundle: str, tmp_path: Path, sources: Named, crops_only: bool) -> None:
    """It answers as the other does; what was cut away isn't in any of its files."""
    output = tmp_path / "for-others"
    settings = {"bundle": bundle, "output": str(output), "format": "bundle", "sources": sources}
    protopnet.export(settings | {"crops_only": crops_only})
    written = b"".join(path.read_bytes() for path in output.iterdir())
    assert (b"hospital" in written) == (sources == "full")
    rows = pq.read_table(output / "prototypes.parquet").to_pylist()
    uri = {"full": f"{SECRET}/birds/4.jpg", "names": "birds/4.jpg", "none": None}[sources]
    assert rows[4]["uri"] == uri
    assert (rows[4]["sha256"] is None) == (rows[4]["image_id"] is None) == (sources == "none")
    corner = Image.open(io.BytesIO(rows[4]["thumbnail"])).getpixel((2, 2))
    assert (corner == pytest.approx((128, 128, 128), abs=3)) == (crops_only or sources == "none")
    before, after = (
        Predictor.load([folder]).explain(pixels(photo(3)), [(90, 60)])[0] for folder in (bundle, str(output))
    )
    assert [(e.prototype, e.points, e.box) for e in before.classes[0].evidence] == [
        (e.prototype, e.points, e.box) for e in after.classes[0].evidence
    ]
    with pytest.raises(UserError, match="holds a bundle already"):
        protopnet.export(settings)
    if sources == "none":
        with pytest.raises(UserError, match="give the bundle it was made from"):
            training_images_of(pq.read_table(output / "prototypes.parquet"), dataset=None, path="")  # type: ignore[arg-type]


def test_in_the_json_beside_a_graph(bundle: str) -> None:
    for sources in ("names", "none"):
        about = json.dumps(explained(load_bundle(bundle), "onnx", Shown(sources), int8=False))
        assert "hospital" not in about
        assert ("birds/4.jpg" in about) == (sources == "names")
