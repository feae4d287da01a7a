"""Scoring on Ray: every image has one row, whatever the image, the cut, and what gets lost on the way."""

import hashlib
import json
import os
import shutil
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from ray_processes import named, wait_for
from serving import CLASSES, make_bundle, photo

from protopnet.cluster import plan_pass
from protopnet.config import ComputeSettings, DataSettings
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.shards import write_shards
from protopnet.errors import UserError
from protopnet.lease import Lease
from protopnet.passes.image_pass import PassOptions
from protopnet.predictor import Predictor
from protopnet.progress import LineReporter
from protopnet.quality.evaluate import evaluate
from protopnet.scoring.job import ScoreSettings, score
from protopnet.scoring.tally import Tally

NAMES = ["plain.jpg", "a b.JPG", 'it\'s "quoted".jpeg', "küken-鳥.jpg", "50%20#1?.jpg", "new\nline.jpg", "[x]*.jpg"]
_HEADER = b"IHDR" + struct.pack(">IIBBBBB", 65536, 65536, 8, 2, 0, 0, 0)  # four billion pixels
BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + _HEADER + struct.pack(">I", zlib.crc32(_HEADER))
BOMB += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
BAD = {
    "empty.jpg": b"",
    "text.png": b"this is no picture",
    "cut.jpg": photo(1)[:300],
    "header.jpg": b"\xff\xd8\xff\xe0 and no more",
    "phone.heic": b"\0\0\0\x18ftypheic" + bytes(50),
    "bomb.png": BOMB,
    "cut.gif": photo(2, kind="GIF")[:60],
    "cut.tif": photo(3, kind="TIFF")[:500],
}


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scored_bundles")
    return [make_bundle(folder / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 41 images, names of every kind."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(41):
        name = NAMES[number] if number < len(NAMES) else f"{number}.jpg"
        path = folder / CLASSES[number % 3] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo(number, width=60 + number))
    return folder


Scoring = Callable[..., tuple[dict[str, Any], Tally]]


@pytest.fixture
def run(pair: list[str], tmp_path: Path) -> Scoring:
    """Score something into `<tmp_path>/out`, the settings as given."""

    def scoring(
        source: Path | str, out: str = "out", members: int = 1, **settings: Any
    ) -> tuple[dict[str, Any], Tally]:
        given = {"bundle": pair[:members], "input": str(source), "output": str(tmp_path / out), "batch_size": 8}
        return score(ScoreSettings(**(given | settings)), LineReporter(), time.time())

    return scoring


def table_of(folder: Path) -> pa.Table:
    return pads.dataset(str(folder / "parts")).to_table().sort_by("image_id")


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.parquet")}


def test_the_scores_are_those_of_an_evaluation(run: Scoring, pair: list[str], photos: Path, tmp_path: Path) -> None:
    dataset = scan_folder(str(photos), DataSettings(source="folder", path=str(photos), validation=0, test=0), 0)
    predictor = Predictor.load(pair)
    # The classes of a bundle must be those of the data there; here one may be missing.
    table = dataset.table.set_column(
        dataset.table.column_names.index("label"),
        "label",
        pc.index_in(dataset.table["class_name"], value_set=pa.array(CLASSES)).cast(pa.int32()),
    )
    options = PassOptions(plan=plan_pass(ComputeSettings()), batch_size=8, blocks=3)
    metrics = evaluate(predictor, table, str(tmp_path / "evaluation"), options=options)
    expected = pq.read_table(tmp_path / "evaluation/predictions.parquet").sort_by("uri")

    summary, _ = run(photos, members=2, chunk_rows=15, top=4)
    scores = table_of(tmp_path / "out").sort_by("uri")
    assert scores["uri"].to_pylist() == expected["uri"].to_pylist()
    logits = [[e["logit"] for e in sorted(row, key=lambda e: e["class"])] for row in scores["top"].to_pylist()]
    np.testing.assert_array_equal(np.array(logits, np.float32), np.array(expected["logits"].to_pylist(), np.float32))
    for column in ("prediction", "label"):
        assert scores[column].to_pylist() == expected[column].to_pylist(), column
    np.testing.assert_allclose(scores["probability"], expected["probability"], rtol=1e-6)
    assert summary["accuracy"] == metrics["top1"]
    assert (summary["images"], summary["labelled"], summary["bad"], summary["parts"]) == (41, 41, 0, 3)


def test_every_bad_image_is_a_row_with_its_reason(run: Scoring, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(photos, folder)
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    (folder / "locked.jpg").symlink_to(tmp_path / "nowhere")
    summary, tally = run(folder, explain=2, chunk_rows=16)
    scores = table_of(tmp_path / "out")
    assert sorted(scores["uri"].to_pylist()) == sorted(str(path) for path in folder.rglob("*") if not path.is_dir())
    assert scores["image_id"].to_pylist() == list(range(41 + len(BAD) + 1))
    errors = {Path(row["uri"]).name: row["error"] for row in scores.to_pylist() if row["error"]}
    assert set(errors) == {*BAD, "locked.jpg"}
    assert errors["empty.jpg"] == "the file is empty"
    assert errors["locked.jpg"] == "can't be read: No such file or directory"
    assert "max_pixels (50000000)" in errors["bomb.png"]
    assert (tally.bad, sum(summary["errors"].values()), summary["scored"]) == (len(errors), len(errors), 41)
    good = scores.filter(pc.is_null(scores["error"]))
    assert {len(row) for row in good["evidence"].to_pylist()} == {2}
    for row in good.to_pylist():
        for piece in row["evidence"]:
            top, left, bottom, right = piece["box"]
            assert 0 <= top < bottom <= row["height"]
            assert 0 <= left < right <= row["width"]


def test_any_cut_gives_the_same_rows(run: Scoring, photos: Path, tmp_path: Path) -> None:
    run(photos, out="one", chunk_rows=41, explain="all")
    run(photos, out="many", chunk_rows=3, explain="all", compute=ComputeSettings(pass_workers=2))
    assert table_of(tmp_path / "many").equals(table_of(tmp_path / "one"))
    assert len(stamps(tmp_path / "many")) == 14


def test_the_same_command_makes_what_is_missing_and_nothing_else(run: Scoring, photos: Path, tmp_path: Path) -> None:
    first, _ = run(photos, chunk_rows=10)
    out, whole = tmp_path / "out", table_of(tmp_path / "out")
    before = stamps(out)
    again, _ = run(photos, chunk_rows=10)
    assert stamps(out) == before
    assert again == first
    (out / "parts/part-00001.parquet").unlink()
    (out / "job/done/00003.json").unlink()
    summary, _ = run(photos, chunk_rows=10)
    changed = {name for name, stamp in stamps(out).items() if before.get(name) != stamp}
    assert changed == {"part-00001.parquet", "part-00003.parquet"}
    assert summary["run"]["images"] == 20
    assert table_of(out).equals(whole)
    with pytest.raises(UserError, match="--explain 0, not 2"):
        run(photos, chunk_rows=10, explain=2)
    with pytest.raises(UserError, match="other bundles"):
        run(photos, chunk_rows=10, members=2)


def test_a_lost_actor_costs_nothing(run: Scoring, photos: Path, tmp_path: Path) -> None:
    run(photos, out="whole", chunk_rows=2, explain=2)
    lost: list[int] = []

    class Killing(LineReporter):
        def advance(self, images_done: int) -> None:
            if images_done and not lost:
                lost.extend(named("ray::MapWorker"))
                for pid in lost:
                    os.kill(pid, signal.SIGKILL)

    settings = ScoreSettings(
        bundle=[json.loads((tmp_path / "whole/scores.json").read_text())["bundles"][0]["uri"]],
        input=str(photos),
        output=str(tmp_path / "out"),
        batch_size=8,
        chunk_rows=2,
        explain=2,
    )
    summary, _ = score(settings, Killing(), time.time())
    assert lost
    wait_for(lambda: not set(lost) & set(named("ray::")))
    assert summary["images"] == 41
    assert table_of(tmp_path / "out").equals(table_of(tmp_path / "whole"))


def test_two_jobs_never_write_one_output(run: Scoring, photos: Path, tmp_path: Path) -> None:
    with Lease(str(tmp_path / "out"), "--output"):
        with pytest.raises(UserError, match="another job works in .*choose another --output"):
            run(photos)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["lease.json"]
    run(photos)
    assert not (tmp_path / "out/lease.json").exists()


def test_a_list_in_partitions(run: Scoring, photos: Path, tmp_path: Path) -> None:
    """One image listed twice is two rows; one that isn't there is a row as well."""
    twice = photos / CLASSES[0] / NAMES[0]
    rest = [str(path) for path in sorted(photos.rglob("*.jpg"))[:9]]
    listed = [str(twice), *rest, "gone.jpg", str(twice)]
    pq.write_table(pa.table({"uri": listed}), tmp_path / "list.parquet")
    run(tmp_path / "list.parquet", partition_by="class_name", chunk_rows=4)
    scores = table_of(tmp_path / "out")
    assert scores["uri"].to_pylist() == [*listed[:-2], str(tmp_path / "gone.jpg"), listed[-1]]
    first, last = scores.to_pylist()[0], scores.to_pylist()[-1]
    assert first == last | {"image_id": 0}
    assert scores["error"].to_pylist().count(None) == 11
    folders = {path.name for path in (tmp_path / "out/parts").iterdir()}
    assert folders == {"without-class_name"} | {
        f"class_name-{name}" for name in scores["class_name"].drop_null().unique().to_pylist()
    }


def test_a_growing_folder(run: Scoring, photos: Path, tmp_path: Path) -> None:
    """What was scored stays as it is; what is new has rows of its own, as if it had been there from the beginning."""
    source = tmp_path / "in"
    shutil.copytree(photos, source)
    late = sorted(source.rglob("*.jpg"))[::4]
    for path in late:
        path.rename(tmp_path / path.name)
    run(source, chunk_rows=8)
    before, first = stamps(tmp_path / "out"), table_of(tmp_path / "out")
    for path in late:
        (tmp_path / path.name).rename(path)
    summary, tally = run(source, chunk_rows=8, incremental=True)
    assert (summary["images"], summary["run"]["images"], tally.images) == (41, len(late), 41)
    assert stamps(tmp_path / "out").items() >= before.items()
    scores = table_of(tmp_path / "out")
    assert scores.slice(0, len(first)).equals(first)
    assert sorted(scores["uri"].to_pylist()[len(first) :]) == sorted(map(str, late))
    whole, _ = run(source, out="whole")
    columns = ["uri", "prediction", "logit", "label"]
    assert scores.select(columns).sort_by("uri").equals(table_of(tmp_path / "whole").select(columns).sort_by("uri"))
    assert whole["predictions"] == summary["predictions"]


def test_shards_one_image_and_none(run: Scoring, tmp_path: Path) -> None:
    row = {"label": 0, "split": "train", "width": 90, "height": 60, "parts": None}
    rows = []
    for n in range(5):
        data = photo(n)
        about = {
            "uri": f"u{n}",
            "class_name": CLASSES[n % 2],
            "image": data,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        rows.append(row | about)
        (tmp_path / f"{n}.jpg").write_bytes(data)
    write_shards(rows, str(tmp_path / "shards"), CLASSES[:2], {})
    run(tmp_path / "shards", out="from-shards")
    scores = table_of(tmp_path / "from-shards")
    assert scores["uri"].to_pylist() == [f"u{n}" for n in range(5)]
    assert scores["label_name"].to_pylist() == [CLASSES[n % 2] for n in range(5)]
    summary, _ = run(tmp_path / "3.jpg", out="single")
    assert (summary["images"], summary["accuracy"]) == (1, None)
    (single,) = table_of(tmp_path / "single").to_pylist()
    assert single["logit"] == scores["logit"][3].as_py()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        run(tmp_path / "empty", out="none")


def test_bf16_records_how_far_it_is_from_float32(run: Scoring, photos: Path, tmp_path: Path) -> None:
    summary, _ = run(photos, precision="bf16", chunk_rows=16)
    measured = summary["precision"]["against_float32"]
    exact, _ = run(photos, out="exact", chunk_rows=16)
    ours, theirs = table_of(tmp_path / "out"), table_of(tmp_path / "exact")
    assert measured["images"] == 41
    assert measured["same_prediction"] == pc.sum(pc.equal(ours["prediction"], theirs["prediction"])).as_py()
    assert 0 < measured["largest_logit_difference"] < 2
    assert "against_float32" not in exact["precision"]


def test_what_it_says_on_the_way(run: Scoring, photos: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("protopnet.scoring.progress._NOTE_SECONDS", 0)
    run(photos, chunk_rows=4)
    said = capsys.readouterr().out
    assert "of 41 images, " in said
    assert "img/s, " in said
    assert " left" in said
    (photos / CLASSES[0] / "late.jpg").write_bytes(photo(99))
    try:
        summary, _ = run(photos, chunk_rows=4)
    finally:
        (photos / CLASSES[0] / "late.jpg").unlink()
    said = capsys.readouterr().out
    assert "42 images now, 41 when this job began" in said
    assert "41 of 41 images done before" in said
    assert "42 images now" in summary["input"]["changed"]
