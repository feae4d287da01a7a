"""The service as its clients meet it: bundles to serve, images to send, and requests over HTTP."""

import io
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from protopnet import imaging
from protopnet.config import ModelSettings
from protopnet.model.bundle import PROTOTYPE_SCHEMA, save_bundle
from protopnet.model.calibration import Calibration
from protopnet.model.network import ProtoPNet, build_network, set_phase
from protopnet.model.usual import Usual

SIZE = 64
CLASSES = ["001.Blue_Jay", "002.Northern_Cardinal", "003.Winter_Wren", "7"]
_MODEL = ModelSettings(
    backbone="resnet18", cut="layer2", image_size=SIZE, prototype_depth=16, prototypes=12, similarity="log"
)


def photo(seed: int = 0, width: int = 90, height: int = 60, kind: str = "JPEG", **options: Any) -> bytes:
    """An image with coarse patterns, so that different ones look different to a network."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sink, kind, **options)
    return sink.getvalue()


def pixels(*encoded: bytes) -> torch.Tensor:
    """Normalised input of the network, as every path without augmentation makes it."""
    pixels_BHWC = torch.from_numpy(np.stack([imaging.load(data, SIZE) for data in encoded]))
    return imaging.normalise(pixels_BHWC, imaging.Preprocessing(size=SIZE))


def make_bundle(
    folder: Path, seed: int, kind: str = "protopnet", images: str = "images", calibrated: bool = False
) -> str:
    """A bundle with random weights, and a record of where below `images` each prototype is from.

    calibrated: it also keeps how these photos usually look to it; its probabilities and answers are the same.
    """
    torch.manual_seed(seed)
    settings = _MODEL.model_copy(update={"kind": kind})
    network = build_network(settings, len(CLASSES), start_weights=False)
    network.train()
    with torch.no_grad():
        for _ in range(3):  # BatchNorm's statistics, without which all images look alike
            network(pixels(*(photo(n) for n in range(16))))
    set_phase(network, "eval")
    if isinstance(network, ProtoPNet):
        _move_onto_patches(network)
        with torch.no_grad():
            network.last_layer.weight += 0.1 * torch.randn_like(network.last_layer.weight)
            network.last_layer.weight *= 0.1  # so that not all probabilities are 1
    table = _prototype_rows(network, images) if isinstance(network, ProtoPNet) else None
    provenance = {"seed": seed, "data": {"path": str(Path(images).parent)}}
    save_bundle(
        str(folder), network, settings, CLASSES, provenance, table, _calibration(network) if calibrated else None
    )
    return str(folder)


@torch.no_grad()
def _calibration(network: Any) -> Calibration:
    seen = network(pixels(*(photo(n) for n in range(40))))
    top_n2 = seen.logits_BK.softmax(1).topk(2).values.double().numpy()
    return Calibration(
        temperature=1,
        split="validation",
        images=40,
        error_before=0.1,
        error_after=0.1,
        accuracy=0.95,
        abstain_below=None,
        coverage=0,
        unknown_below=None,
        similarity=Usual.of(seen.best_B.numpy()),
        margin=Usual.of(top_n2[:, 0] - top_n2[:, 1]),
    )


@torch.no_grad()
def _move_onto_patches(network: ProtoPNet) -> None:
    latents_BDHW = network.latent(pixels(*(photo(n) for n in range(len(network.prototypes)))))
    network.prototypes.copy_(latents_BDHW[:, :, 3:4, 5:6])


def _prototype_rows(network: ProtoPNet, images: str) -> pa.Table:
    rows = [
        {
            "prototype": number,
            "class": label,
            "class_name": CLASSES[label],
            "image_id": number,
            "uri": f"{images}/{number}.jpg",
            "sha256": "ab",
            "width": 180,
            "height": 120,
            "row": 3,
            "column": 5,
            "box": [30, 60, 60, 120],
            "receptive_field": [0, 0, 120, 180],
            "self_similarity": 9.2,
            "activation_map": np.linspace(0, 1, 64).reshape(8, 8).tolist(),
            "thumbnail": photo(number) if number else None,  # the first has no picture
            "name": "red bill" if number == 1 else None,
        }
        for number, label in enumerate(network.prototype_class.tolist())
    ]
    return pa.Table.from_pylist(rows, PROTOTYPE_SCHEMA)


@dataclass(frozen=True)
class Answer:
    """Of the service."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The code of an error, whose shape is the documented one."""
        assert self.headers["Content-Type"] == "application/json", self
        error = self.json["error"]
        assert set(error) == {"code", "message", "request_id"}, self
        assert error["request_id"] == self.headers["X-Request-ID"], self
        assert error["message"], self
        assert "\n" not in error["message"], self
        return str(error["code"])


@dataclass(frozen=True)
class Client:
    """Of one application. `url` ends without a slash."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, None, **headers)

    def post(self, path: str, body: bytes | None, **headers: str) -> Answer:
        return self.send("POST", path, body, **headers)

    def form(self, path: str, files: Sequence[tuple[str, bytes]]) -> Answer:
        body, kind = form(files)
        return self.send("POST", path, body, **{"Content-Type": kind})

    def send(self, method: str, path: str, body: bytes | None, **headers: str) -> Answer:
        sent = {"Content-Type": "application/octet-stream", **self.headers, **headers}
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read(), error.headers)


def form(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart/form-data body, and its content type. A name without a file name is a plain field."""
    parts = []
    for name, data in files:
        file = f'; filename="{name}"' if "." in name else ""
        parts.append(f'--frontier\r\nContent-Disposition: form-data; name="image"{file}\r\n\r\n'.encode() + data)
    return b"\r\n".join([*parts, b"--frontier--\r\n"]), "multipart/form-data; boundary=frontier"


@contextmanager
def local_app(bundles: Sequence[str], prefix: str = "", **settings: Any) -> Iterator[Client]:
    """The service on a port of this machine, without Serve: its members are asked where they are."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from protopnet.evidence.sources import Shown
    from protopnet.serving.app import references
    from protopnet.serving.ensemble import Ensemble
    from protopnet.serving.ingress import create_app
    from protopnet.serving.keys import Keys
    from protopnet.serving.members import Member
    from protopnet.serving.metrics import Metrics
    from protopnet.serving.service import Service
    from protopnet.serving.settings import AppSettings

    refs, args = references(bundles), AppSettings.model_validate({"bundles": list(bundles), **settings})
    members = [Member(ref, args.member, threads=1) for ref in refs]
    shown = Shown(args.sources, args.crops_only)
    ensemble = Ensemble(
        refs, [member.see for member in members], args.member, shown, [member.look_closer for member in members]
    )
    service = Service(args, ensemble, [member.ready for member in members], Metrics(ensemble.hash))
    app = Starlette(routes=[Mount(prefix, create_app(service, Keys(args.token_file)))])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(256)  # whoever comes before the server is up waits for it
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}{prefix}")
        finally:
            server.should_exit = True
            thread.join(30)


class LocalServe:
    """Serve on the Ray that the tests share, for any number of applications beside one another."""

    # Every forward pass by one thread, as in the tests themselves: then sums come out the same, bit for bit.
    MEMBER: ClassVar[dict[str, Any]] = {"threads": 1, "cpus": 0.01}

    def __init__(self) -> None:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": self.port}, logging_config={"encoding": "JSON"})

    def deploy(self, name: str, bundles: Sequence[str], prefix: str | None = None, **settings: Any) -> Client:
        """Start an application, or update the one of this name; returns once it answers."""
        from ray import serve

        from protopnet.serving.app import build
        from protopnet.serving.settings import AppSettings

        member = self.MEMBER | settings.pop("member", {})
        ingress = {"cpus": 0.01} | settings.pop("ingress", {})
        args = AppSettings.model_validate({"bundles": list(bundles), "member": member, "ingress": ingress, **settings})
        prefix = f"/{name}" if prefix is None else prefix
        serve.run(build(args), name=name, route_prefix=prefix)
        return Client(f"http://127.0.0.1:{self.port}{prefix.rstrip('/')}")

    def delete(self, name: str) -> None:
        from ray import serve

        serve.delete(name)

    def stop(self) -> None:
        from ray import serve

        serve.shutdown()
