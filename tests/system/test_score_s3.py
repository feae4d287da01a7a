"""Images in a bucket, scores into a bucket, and a bucket that throttles and fails: the same rows, nothing lost."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from failing_bucket import VARIABLES, FailingBucket, failing_bucket_of_moto
from running_jobs import ROOT, Jobs
from serving import CLASSES, make_bundle, photo

FAILING = 0.2  # share of the requests


@pytest.fixture(scope="module")
def failing_bucket() -> Iterator[FailingBucket]:
    with failing_bucket_of_moto() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def client(failing_bucket: FailingBucket) -> Any:
    made = failing_bucket.client()
    made.create_bucket(Bucket="team")
    return made


def keys(client: Any, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="team", Prefix=prefix)
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


def parts(client: Any, prefix: str) -> pa.Table:
    tables = [
        pq.read_table(pa.BufferReader(client.get_object(Bucket="team", Key=key)["Body"].read()))
        for key in keys(client, f"{prefix}/parts/part-")
    ]
    return pa.concat_tables(tables).sort_by("uri")


@pytest.mark.slow
def test_a_bucket_that_fails_gives_the_same_rows(
    local_ray: None, failing_bucket: FailingBucket, client: Any, jobs: Jobs, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", 0)
    for n in range(60):
        name = f'{CLASSES[n % 3]}/it\'s "{n}" küken%20.jpg'
        data = photo(n) if n % 20 else b""
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
        client.put_object(Bucket="team", Key=f"in/{name}", Body=data)
    client.put_object(Bucket="team", Key="in/notes.txt", Body=b"no image")
    for path in Path(bundle).iterdir():
        client.put_object(Bucket="team", Key=f"bundle/{path.name}", Body=path.read_bytes())
    settings = ["--explain=2", "--chunk-rows=24", "--batch-size=8"]
    places = ["--bundle", bundle, "--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out"]
    local = jobs.run_here("score", *places, *settings)
    assert local.code == 0, local

    failing_bucket.failing = FAILING
    (tmp_path / "elsewhere").mkdir()
    asked = ["--bundle=s3://team/bundle", "--input=s3://team/in/", "--output=s3://team/scores"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/score.py"), *asked, *settings],
        env={**os.environ, **VARIABLES, "AWS_ENDPOINT_URL": failing_bucket.endpoint, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=400,
    )
    failing_bucket.failing = 0.0
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "elsewhere").iterdir()), "something was written locally"
    failed = {method: count for (method, status), count in failing_bucket.answers.items() if status >= 500}
    assert sum(failed.values()) > 15
    assert {"GET", "PUT"} <= set(failed)

    ours = parts(client, "scores")
    expected = pa.concat_tables(map(pq.read_table, sorted(tmp_path.glob("out/parts/*.parquet")))).sort_by("uri")
    assert len(ours) == 60
    there = [uri.replace("s3://team", str(tmp_path)) for uri in ours["uri"].to_pylist()]
    assert there == expected["uri"].to_pylist()
    assert ours["error"].to_pylist().count("the file is empty") == 3
    dropped = ["image_id", "uri"]  # a bucket has another order
    assert ours.drop_columns(dropped).equals(expected.drop_columns(dropped))
    assert "scores/scores.json" in keys(client, "scores/")
