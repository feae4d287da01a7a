"""The documented jobs with everything in a bucket: no local path in any setting."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Where the bucket `team` is, as the usual variables say it."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client(variables).create_bucket(Bucket="team")
    yield {**os.environ, **variables}
    server.stop()


def client(variables: dict[str, str]) -> Any:
    """A client that doesn't go through our own code."""
    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        region_name=variables["AWS_DEFAULT_REGION"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
    )


def job(name: str, *arguments: str, environment: dict[str, str], folder: Path) -> str:
    """Run a job from an empty folder; returns what it printed."""
    command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prepare_train_and_evaluate_in_a_bucket(environment: dict[str, str], tmp_path: Path) -> None:
    birds = ["--birds.classes=3", "--birds.size=64", "--birds.train_per_class=6", "--birds.test_per_class=2"]
    job("prepare", *birds, "--output", "s3://team/shards", environment=environment, folder=tmp_path)
    said = job(
        "train",
        *("--config", str(ROOT / "configs/quickstart.yaml"), "--name", "small", "--storage", "s3://team/runs"),
        *("--data.source", "shards", "--data.path", "s3://team/shards"),
        *("--model.image_size", "64", "--model.prototypes", "6", "--train.joint_epochs", "2"),
        environment=environment,
        folder=tmp_path,
    )
    assert said.strip().splitlines()[-1].split() == ["bundle", "s3://team/runs/small/bundle"]
    evaluated = job(
        "evaluate",
        *("s3://team/runs/small/bundle", "s3://team/shards", "--output", "s3://team/evaluation"),
        environment=environment,
        folder=tmp_path,
    )
    assert "6 images (test), 3 classes" in evaluated
    assert not list(tmp_path.iterdir()), "something was written locally"

    def read(key: str) -> dict:
        return json.loads(client(environment).get_object(Bucket="team", Key=key)["Body"].read())

    assert read("runs/small/summary.json")["test_accuracy"] == read("evaluation/metrics.json")["top1"]
