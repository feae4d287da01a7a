"""Serve bundles over HTTP from this machine: the page at /, the API, and its documentation at /docs.

    python -m serve
    python -m serve --bundles runs/a/bundle,runs/b/bundle --port 8080

Several bundles make an ensemble. For a cluster: `serve deploy serve/config.yaml`, with the same settings as `args`.
"""

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path

import ray
from pydantic import Field
from ray import serve
from ray.serve.config import HTTPOptions

from protopnet.cli import parse
from protopnet.cluster import connect
from protopnet.config import ComputeSettings
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.serving.app import NAME, build
from protopnet.serving.courier import PATIENCE_S
from protopnet.serving.settings import AppSettings


class ServeSettings(AppSettings):
    """Settings of `python -m serve`."""

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: reachable from elsewhere")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    address: str | None = Field(None, description="Ray cluster to run on; a local Ray when left out")


@exit_with_a_sentence
def main() -> None:
    settings = parse(ServeSettings, description=__doc__)
    args = AppSettings(**{name: getattr(settings, name) for name in AppSettings.model_fields})
    application = build(args)
    check_free(settings.host, settings.port)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    connect(ComputeSettings(address=settings.address))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port), logging_config={"encoding": "JSON"})
    serve.run(application, name=NAME)
    print(f"serving  {', '.join(settings.bundles)}")
    print(f"page     http://{settings.host}:{settings.port}/")
    print(f"API      http://{settings.host}:{settings.port}/docs")
    print(f"logs     {_logs()}", flush=True)
    stop.wait()
    print("stopping; what was taken on is answered first", flush=True)
    # Members and ingress are told to end at the same time: images that wait for company must be with a member by then.
    time.sleep(settings.member.batch_wait_s + PATIENCE_S)
    serve.delete(NAME)  # waits for the requests in work, which shutting down Serve with its proxy doesn't
    serve.shutdown()
    ray.shutdown()


def check_free(host: str, port: int) -> None:
    """`UserError` where something listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"can't listen at {host}:{port} ({os.strerror(error.errno or 0)}); change port") from None


def _logs() -> Path:
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs" / "serve"
