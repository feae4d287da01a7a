"""The ingress of a very large ensemble: how long it takes to start, its memory, and how long clients wait for it.

    python bench/large.py [--classes 10000 --prototypes 100000 --members 8] [--record]

Bundles are made up: a ResNet-18, prototypes of little depth, and connections from each prototype to its own class alone,
so that their files have holes where others would have zeros. What the members see of an image is drawn at random: their
forward passes, for which each takes 4 GB at that size, are not part of this. All else is what a replica does: opening and
checking the bundles, adding up, explaining with heat maps, listing prototypes, pictures, and looking for a class that there
isn't. It computes with one thread, as a replica does for each request.
"""

import argparse
import asyncio
import hashlib
import io
import json
import statistics
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import arguments_of, conclude, table
from PIL import Image

from protopnet.config import ModelSettings
from protopnet.evidence.sources import Shown
from protopnet.imaging import Preprocessing
from protopnet.model.bundle import FORMAT_VERSION, INFO, PROTOTYPE_SCHEMA, PROTOTYPES, TENSORS, BundleInfo, parquet
from protopnet.serving import answers
from protopnet.serving.app import references
from protopnet.serving.catalogue import Catalogue
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.members import BundleRef, Seen
from protopnet.serving.refusals import Refusal
from protopnet.serving.schemas import ExplainedImages, ExplainOptions, PredictOptions, PrototypeOptions
from protopnet.serving.settings import AppSettings, MemberSettings
from protopnet.serving.uploads import Picture

DEPTH, SIDE, CELLS = 8, 224, 7
START_S, MEMORY_GB, ANSWER_S, LIST_S = 60, 4, 2, 0.05


def make_bundle(folder: Path, seed: int, classes: int, prototypes: int) -> str:
    """As jobs/train.py would leave it, but for the backbone's tensors, which an ingress doesn't open."""
    folder.mkdir(parents=True)
    label_P = np.arange(prototypes) * classes // prototypes
    vectors_PDhw = np.random.default_rng(seed).random((prototypes, DEPTH, 1, 1), np.float32)
    _write_tensors(folder / TENSORS, vectors_PDhw, label_P, classes)
    rows = parquet(_rows(label_P))
    (folder / PROTOTYPES).write_bytes(rows)
    info = BundleInfo(
        format_version=FORMAT_VERSION,
        architecture=ModelSettings(backbone="resnet18", image_size=SIDE, prototype_depth=DEPTH, prototypes=prototypes),
        similarity="log",
        classes=[f"{k:05d}.Kind_{k}_of_bird" for k in range(classes)],
        prototype_class=label_P.tolist(),
        preprocessing=Preprocessing(size=SIDE),
        provenance={"data": {"path": "/data/images"}, "seed": seed},
        sha256=_sha256_of(folder / TENSORS),
        prototypes_sha256=hashlib.sha256(rows).hexdigest(),
    )
    (folder / INFO).write_text(info.model_dump_json())
    return str(folder)


def _write_tensors(path: Path, vectors_PDhw: np.ndarray, label_P: np.ndarray, classes: int) -> None:
    """safetensors, with holes for the connections that are 0."""
    P, size = len(label_P), 4 * classes * len(label_P)
    header = {
        "prototypes": {"dtype": "F32", "shape": vectors_PDhw.shape, "data_offsets": [0, vectors_PDhw.nbytes]},
        "last_layer.weight": {
            "dtype": "F32",
            "shape": [classes, P],
            "data_offsets": [vectors_PDhw.nbytes, vectors_PDhw.nbytes + size],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + vectors_PDhw.tobytes())
        start = file.tell()
        file.truncate(start + size)
        for k in range(classes):
            first, last = np.searchsorted(label_P, [k, k + 1]).tolist()
            file.seek(start + 4 * (k * P + first))
            file.write(np.ones(last - first, np.float32).tobytes())


def _rows(label_P: np.ndarray) -> pa.Table:
    P = len(label_P)
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).resize((192, 256)).save(sink, "JPEG", quality=88)
    box = [[32, 32, 96, 96]] * P
    columns = {
        "prototype": np.arange(P),
        "class": label_P,
        "class_name": [f"{k:05d}" for k in label_P.tolist()],
        "image_id": np.arange(P),
        "uri": [f"/data/images/train/{k:05d}/{p:06d}.jpg" for p, k in enumerate(label_P.tolist())],
        "sha256": [hashlib.sha256(str(p).encode()).hexdigest() for p in range(P)],
        **{name: np.full(P, value) for name, value in (("width", 192), ("height", 256), ("row", 3), ("column", 3))},
        "box": box,
        "receptive_field": box,
        "self_similarity": np.full(P, 9.2),
        "activation_map": [np.linspace(0, 1, CELLS**2).reshape(CELLS, CELLS).tolist()] * P,
        "thumbnail": [sink.getvalue()] * P,
        **{name: pa.nulls(P) for name in ("name", "group")},
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in PROTOTYPE_SCHEMA], PROTOTYPE_SCHEMA)


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_up(classes: int, prototypes: int, seed: int) -> Seen:
    """What a member sees of an image."""
    draw = np.random.default_rng(seed)
    return Seen(
        draw.normal(size=classes).astype(np.float32),
        draw.gamma(1, 1, prototypes).astype(np.float32),
        draw.integers(0, CELLS**2, prototypes),
        draw.random((DEPTH, CELLS, CELLS), np.float32),
    )


def memory_gb() -> float:
    """Of this process, PyTorch and Ray included; without pages of the bundles' files, which the system may drop."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024 / 1e9


async def waits(ensemble: Ensemble, catalogue: Catalogue, seen_M: Sequence[Seen]) -> dict[str, tuple[float, float]]:
    """Seconds of each thing that clients ask for: the first time, and in the median."""
    picture = Picture(None, 640, 480, {})
    seen_MB = [[seen] for seen in seen_M]

    async def explain() -> int:
        options = ExplainOptions(maps="png")
        found = answers.explained(ensemble, [picture], seen_MB, options, [], None, lambda: None)
        return len(ExplainedImages.model_construct(request_id="", model="", images=found).model_dump_json())

    async def predict() -> int:
        scores = ensemble.scores(seen_MB)
        return len(answers.predicted(ensemble.classes, [picture], scores, PredictOptions(), [], None))

    async def page(**options: Any) -> int:
        return len((await catalogue.page(PrototypeOptions.model_validate(options))).model_dump_json())

    async def unknown() -> int:
        try:
            return await catalogue.label("Kind 1234 of brid")
        except Refusal as refusal:
            return len(refusal.message)

    last = len(ensemble.infos[0].prototype_class or []) - 1
    things: dict[str, Callable[[], Awaitable[object]]] = {
        "explain, 3 classes x 5 prototypes with maps": explain,
        "predict": predict,
        "prototypes?limit=1": lambda: page(limit=1),
        "prototypes?limit=1&offset=…": lambda: page(limit=1, offset=len(seen_M) * last),
        "prototypes?limit=24&class=…": lambda: page(limit=24, **{"class": ensemble.classes[-1]}),
        "prototypes?limit=24&member=…": lambda: page(limit=24, member=len(seen_M) - 1),
        "one prototype": lambda: asyncio.to_thread(catalogue.detail, 0, last),
        "its crop": lambda: asyncio.to_thread(catalogue.crop, 0, last // 2),
        "a class that isn't there": unknown,
    }
    return {name: await timed(thing) for name, thing in things.items()}


async def timed(thing: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        await thing()
        times.append(time.perf_counter() - started)
    return times[0], statistics.median(times)


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    K, P, M = arguments.classes, arguments.prototypes, arguments.members
    with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:  # so that its memory isn't counted
        uris = list(elsewhere.map(make_bundle, [folder / str(m) for m in range(M)], range(M), [K] * M, [P] * M))
    seen_M = [made_up(K, P, seed) for seed in range(M)]
    started = time.perf_counter()

    async def nobody(ref: BundleRef, whole: bool, images: int, *parts_NS3: np.ndarray) -> list[Seen]:
        raise AssertionError("members aren't asked here")

    ensemble = Ensemble(references(uris), [nobody] * M, MemberSettings(), Shown())
    catalogue = Catalogue(ensemble, AppSettings(bundles=uris))
    start_s = time.perf_counter() - started
    found = asyncio.run(waits(ensemble, catalogue, seen_M))
    needed = memory_gb()
    print(f"{K:,} classes, {P:,} prototypes, {M} members: start {start_s:.1f} s, {needed:.2f} GB")
    table({name: {"first ms": f"{1e3 * a:.1f}", "median ms": f"{1e3 * b:.1f}"} for name, (a, b) in found.items()})
    listing = max(first for name, (first, _) in found.items() if name.startswith("prototypes?"))
    slowest = max(found["explain, 3 classes x 5 prototypes with maps"][0], found["predict"][0])
    figures = {
        "start_seconds": round(start_s, 2),
        "memory_gb": round(needed, 3),
        "milliseconds": {
            name: {"first": round(1e3 * a, 2), "median": round(1e3 * b, 2)} for name, (a, b) in found.items()
        },
    }
    checks = {
        f"{START_S} s / start": (START_S / start_s, 1.0),
        f"{MEMORY_GB} GB / memory": (MEMORY_GB / needed, 1.0),
        f"{ANSWER_S} s / first explanation or prediction": (ANSWER_S / slowest, 1.0),
        f"{1e3 * LIST_S:.0f} ms / slowest first listing": (LIST_S / listing, 1.0),
    }
    return figures, checks


def main() -> None:
    arguments = arguments_of(__doc__, classes=10_000, prototypes=100_000, members=8)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures, checks = measure(arguments, Path(folder))
    conclude("large", arguments, figures, checks)


if __name__ == "__main__":
    main()
