"""A bucket that is slow, throttles and fails: moto's S3 server behind a door that answers some requests itself."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
from moto.backends import get_backend
from moto.server import ThreadedMotoServer

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
        self.delay = 0.0  # seconds before each answer
        self.answers: Counter[tuple[str, int]] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def variables(self) -> dict[str, str]:
        """The bucket for the jobs, as the usual environment says it."""
        return VARIABLES | {"AWS_ENDPOINT_URL": self.endpoint}

    def client(self) -> Any:
        """A client that doesn't go through our own code."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=VARIABLES["AWS_DEFAULT_REGION"],
            aws_access_key_id=VARIABLES["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=VARIABLES["AWS_SECRET_ACCESS_KEY"],
        )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _handler(bucket) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self._body()
                time.sleep(bucket.delay)
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


@contextmanager
def failing_bucket_of_moto() -> Iterator[FailingBucket]:
    """Empty, and fails nothing until `failing` is set."""
    get_backend("s3").reset()  # moto's servers in one process share one memory: another test's buckets
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    bucket = FailingBucket(*server.get_host_and_port())
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()
    server.stop()
