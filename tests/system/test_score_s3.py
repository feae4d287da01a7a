"""Images in a bucket, scores into a bucket, and a bucket that throttles and fails: the same rows, nothing lost."""

import http.client
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from running_jobs import ROOT, Jobs
from serving import CLASSES, make_bundle, photo

FAILING = 0.2  # share of the requests
ANSWERS = {
    503: ("SlowDown", "Please reduce your request rate."),
    500: ("InternalError", "We had a problem. Try again."),
}
VARIABLES = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class FailingBucket:
    """Stands before a server that speaks S3, and answers a share of the requests itself, with an error."""

    def __init__(self, host: str, port: int) -> None:
        self.behind = (host, port)
        self.chance = random.Random(4)
        self.failing = 0.0
        self.answers: Counter[tuple[str, int]] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _handler(bucket) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self._body()
                if bucket.chance.random() < bucket.failing:
                    self._fail()
                    return
                behind = http.client.HTTPConnection(*bucket.behind, timeout=60)
                behind.request(self.command, self.path, body, dict(self.headers))
                answer = behind.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content)
                behind.close()
                bucket.answers[self.command, answer.status] += 1

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                del self.headers["Transfer-Encoding"]
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                self.headers["Content-Length"] = str(len(body))
                return body

            def _fail(self) -> None:
                status = bucket.chance.choice(list(ANSWERS))
                code, message = ANSWERS[status]
                body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)
                bucket.answers[self.command, status] += 1

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture(scope="module")
def failing_bucket() -> Iterator[FailingBucket]:
    server = ThreadedMotoServer(port=0)
    server.start()
    bucket = FailingBucket(*server.get_host_and_port())
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()
    server.stop()


@pytest.fixture(scope="module")
def client(failing_bucket: FailingBucket) -> Any:
    """A client that doesn't go through our own code."""
    made = boto3.client(
        "s3",
        endpoint_url=failing_bucket.endpoint,
        region_name=VARIABLES["AWS_DEFAULT_REGION"],
        aws_access_key_id=VARIABLES["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=VARIABLES["AWS_SECRET_ACCESS_KEY"],
    )
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
    failing_bucket: FailingBucket, client: Any, jobs: Jobs, tmp_path: Path
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
    local = jobs.run("score", "--bundle", bundle, "--input", f"{tmp_path}/in", "--output", f"{tmp_path}/out", *settings)
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
