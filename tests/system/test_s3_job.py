"""The documented jobs with everything in a bucket that throttles and fails: no local path in any setting."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failing_bucket import FailingBucket, failing_bucket_of_moto
from ray_processes import descendants, kill_all
from running_jobs import ROOT

FAILING = 0.05  # share of the requests that are answered 500 or 503


@pytest.fixture(scope="module")
def bucket() -> Iterator[FailingBucket]:
    with failing_bucket_of_moto() as made:
        made.client().create_bucket(Bucket="team")
        made.failing = FAILING
        yield made


def start(name: str, *arguments: str, bucket: FailingBucket, folder: Path) -> subprocess.Popen[str]:
    """Start a job from an empty folder."""
    environment = {**os.environ, **bucket.variables, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    return out


def test_the_whole_way_in_a_bucket_that_fails(bucket: FailingBucket, tmp_path: Path) -> None:
    def job(name: str, *arguments: str) -> str:
        return finish(start(name, *arguments, bucket=bucket, folder=tmp_path))

    birds = ["--birds.classes=3", "--birds.size=64", "--birds.train_per_class=6", "--birds.test_per_class=2"]
    job("prepare", *birds, "--output", "s3://team/shards")
    training = (
        *("--config", str(ROOT / "configs/quickstart.yaml"), "--name", "small", "--storage", "s3://team/runs"),
        *("--data.source", "shards", "--data.path", "s3://team/shards"),
        *("--model.image_size", "64", "--model.prototypes", "6", "--train.joint_epochs", "2"),
    )
    killed = start("train", *training, bucket=bucket, folder=tmp_path)
    assert killed.stdout
    assert any("epoch 1/2" in line for line in killed.stdout)
    orphans = list(descendants(killed.pid))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    said = job("train", *training)
    kill_all(orphans)
    assert "done before" in said
    assert said.strip().splitlines()[-1].split() == ["bundle", "s3://team/runs/small/bundle"]
    bundle = "s3://team/runs/small/bundle"
    assert "6 images (test), 3 classes" in job(
        "evaluate", bundle, "s3://team/shards", "--output", "s3://team/evaluation"
    )
    job("score", "--bundle", bundle, "--input", "s3://team/shards", "--output", "s3://team/scores", "--explain", "2")
    assert not list(tmp_path.iterdir()), "something was written locally"

    bucket.failing = 0
    client = bucket.client()

    def read(key: str) -> bytes:
        return client.get_object(Bucket="team", Key=key)["Body"].read()

    accuracy = json.loads(read("runs/small/summary.json"))["test_accuracy"]
    assert accuracy == json.loads(read("evaluation/metrics.json"))["top1"]
    assert json.loads(read("scores/scores.json"))["images"] == 24
    keys = [found["Key"] for found in client.list_objects_v2(Bucket="team", Prefix="scores/parts/")["Contents"]]
    rows = [row for key in keys for row in pq.read_table(pa.BufferReader(read(key))).to_pylist()]
    assert len(rows) == len({row["uri"] for row in rows}) == 24
    assert all(len(row["evidence"]) == 2 for row in rows)
    failed = sum(count for (_, status), count in bucket.answers.items() if status in (500, 503))
    assert failed > 10, bucket.answers
