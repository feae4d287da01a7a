"""How long a decision in the workbench takes, beside solving the same step from the beginning as jobs/prune.py does.

    python bench/workbench.py [--prototypes 2000 --images 6000 --classes 200 --times 20] [--record]

Made-up latent maps of CUB-200-2011's shape: each class has parts of its own, some shared with three others, on a noisy
background; prototypes are patches of them. Similarities, connections and all that follows are computed as in a session.

quick      seconds until accuracy, flips and the KKT residual of the own-class solution are shown
optimal    seconds until the certified optimum is; a few of each, since a second decision would not wait for it
last layer seconds of the last layer that jobs/prune.py solves for the same step, from the connections of the bundle
pass       seconds of the pass over the images that it makes before: EXTRAPOLATED from a batch of 32 through a ResNet-18,
           without reading and decoding, which favours it; a session makes this pass once
"""

import shutil
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import arguments_of, conclude, seconds, table

from protopnet.auditing.decisions import Decision, parse_decision
from protopnet.auditing.draft import Draft
from protopnet.auditing.prune import Corrections, Corrector
from protopnet.auditing.settling import Prototypes, patch_grid
from protopnet.budget import PassPlan
from protopnet.config import RunSettings
from protopnet.datasets.rows import MANIFEST_SCHEMA, Dataset
from protopnet.datasets.trained import trained_with
from protopnet.model.network import ProtoPNet, build_network
from protopnet.model.prototypes import min_distances, similarity
from protopnet.passes.image_pass import PLAIN, PassOptions
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.workbench.cache import Cache
from protopnet.workbench.fit import Rows, resolve
from protopnet.workbench.log import DecisionLog
from protopnet.workbench.session import Session

DEPTH, SIDE = 64, 7
NOISE, VALIDATION = 0.2, 0.1


def main() -> None:
    arguments = arguments_of(__doc__, prototypes=2000, images=6000, classes=200, times=20, solved=3, seed=0)
    folder = Path(tempfile.mkdtemp())
    try:
        session = made_session(arguments, folder)
        rows, figures = {}, {}
        once = seconds_of_a_pass(session.corrector().network, arguments.images)
        for name, decisions in made_decisions(session, arguments).items():
            figures[name] = measure(session, decisions, arguments.solved) | {"pass": once}
            rows[name] = {
                key: f"{value:.2f}" if key != "residual" else f"{value:.1e}" for key, value in figures[name].items()
            }
            print(f"{name}: {rows[name]}", flush=True)
        session.close()
    finally:
        shutil.rmtree(folder)
    table(rows)
    slowest = max(each["quick p99"] for each in figures.values())
    ratio = min((each["pass"] + each["last layer"]) / each["quick p50"] for each in figures.values())
    checks = {
        "1 s / the slowest quick answer (p99)": (1 / slowest, 1.0),
        "pass and last layer of jobs/prune.py / quick answer (p50)": (ratio, 20.0),
    }
    conclude("workbench", arguments, figures, checks)


def measure(session: Session, decisions: list[Decision], solved: int) -> dict[str, float]:
    """Each decision is undone before the next."""
    quick, optimal, prune, residuals = [], [], [], []
    for number, decision in enumerate(decisions):
        quick.append(seconds(lambda decision=decision: session.decide(decision)))
        residuals.append(session.effect.residual)
        if number < solved:
            started = time.perf_counter()
            assert session.wait().state == "optimal", session.effect
            optimal.append(quick[-1] + time.perf_counter() - started)
            prune.append(seconds(lambda: from_the_beginning(session)))
        session.undo("bench")
    return {
        "quick p50": statistics.median(quick),
        "quick p99": float(np.percentile(quick, 99)),
        "residual": float(np.median(residuals)),
        "optimal": statistics.median(optimal),
        "last layer": statistics.median(prune),
    }


@torch.inference_mode()
def seconds_of_a_pass(network: ProtoPNet, images: int) -> float:
    images_B3HW = torch.rand(32, 3, 224, 224)
    network(images_B3HW)
    return seconds(lambda: network(images_B3HW)) * images / 32


def from_the_beginning(session: Session) -> None:
    """The last layer of `jobs/prune.py`: from the connections of the bundle, less those of what is gone."""
    fit, corrector = session.fit, session.corrector()
    there = [p for p in range(len(session.class_P)) if session.place(p)]
    rows = Rows(fit.rows.similarities_nP[:, there], fit.rows.labels_n, fit.rows.image_ids_n)
    start = corrector.start.connections_KP.numpy()[:, there]
    places = (fit.whole_anchor_KP[:, there], fit.off_KP[:, there])
    assert resolve(rows, start, *places, fit.settings).converged


def made_decisions(session: Session, arguments: Any) -> dict[str, list[Decision]]:
    random = np.random.default_rng(arguments.seed)
    about = {"who": "bench", "when": datetime.now(UTC)}
    chosen = [session.known.ref(int(p)) for p in random.choice(arguments.prototypes, arguments.times, replace=False)]
    others = [session.known.ref(beside(session.class_P, ref.number)) for ref in chosen]
    corner = [0.0, 1 - 1 / SIDE, 1 / SIDE, 1.0]
    pairs = list(zip(chosen, reversed(chosen), strict=True))
    records: dict[str, list[dict[str, Any]]] = {
        "drop": [{"decide": "drop", "prototype": ref} for ref in chosen],
        "not this patch": [{"decide": "not-this-patch", "prototype": ref} for ref in chosen],
        "elsewhere": [{"decide": "not-this-patch", "prototype": ref, "elsewhere": True} for ref in chosen],
        "not in region": [{"decide": "not-in-region", "region": corner, "class": ref.class_name} for ref in chosen],
        "merge": [{"decide": "merge", "prototype": a, "into": b} for a, b in zip(chosen, others, strict=True)],
        "not on background": [
            {"decide": "not-in-region", "region": "background", "class": ref.class_name} for ref in chosen
        ],
        "must be used": [{"decide": "must-be-used", "prototype": ref, "floor": 1.5} for ref in chosen],
        "keep": [{"decide": "keep", "prototype": ref} for ref in chosen],
        "name": [{"decide": "name", "prototype": ref, "name": "red bill"} for ref in chosen],
        "group": [{"decide": "group", "prototypes": list(pair), "group": "bill"} for pair in pairs],
    }
    return {name: [parse_decision(about | each) for each in several] for name, several in records.items()}


def beside(class_P: np.ndarray, p: int) -> int:
    """Another prototype of the same class."""
    return next(int(q) for q in np.flatnonzero(class_P == class_P[p]) if q != p)


# ------------------------------------------------------------------------------------- made-up images


def made_session(arguments: Any, folder: Path) -> Session:
    """A session whose bundle has its optimal connections."""
    K, P, n = arguments.classes, arguments.prototypes, arguments.images
    run = RunSettings.model_validate(
        {
            "data": {"source": "folder", "path": "made-up"},
            "model": {"backbone": "resnet18", "image_size": 224, "prototype_depth": DEPTH, "prototypes": P},
            "last_layer": {"copies": 0},
        }
    )
    network = build_network(run.model, K)
    assert isinstance(network, ProtoPNet)
    network.eval()
    random = np.random.default_rng(arguments.seed)
    labels = np.sort(np.arange(n) % K)
    split = np.where(random.random(n) < VALIDATION, "validation", "train")
    latents, parts_at = made_latents(random, labels, K, P // K)
    places = made_places(random, labels, split, parts_at, P // K)
    with torch.no_grad():
        for p, (image, row, column) in enumerate(places):
            network.prototypes[p, :, 0, 0] = torch.from_numpy(latents[image, :, row, column])
        found = []
        for start in range(0, n, 64):
            distances, _ = min_distances(
                torch.from_numpy(latents[start : start + 64]), network.prototypes, network.kind
            )
            found.append(similarity(distances, network.kind, network.epsilon).numpy())
    names = [f"class {label}" for label in range(K)]
    rows = pa.Table.from_pylist(
        [
            {"image_id": i, "uri": f"{i}.jpg", "sha256": f"{i}", "label": label, "class_name": names[label]}
            | {"split": str(split[i]), "width": 224, "height": 224}
            for i, label in enumerate(labels.tolist())
        ],
        MANIFEST_SCHEMA,
    )
    dataset = Dataset(names, rows, {}, pa.table({}))
    cached = pa.table({"image_id": np.arange(n), "copy": np.full(n, PLAIN, np.int32), "label": labels, "split": split})
    similarities = np.concatenate(found)
    cache = Cache(cached, similarities, latents)
    optimum = solved(similarities, labels, split, network, run)
    with torch.no_grad():
        network.last_layer.weight.copy_(torch.from_numpy(optimum))
    known = Prototypes(sources(places, labels, names), patch_grid(network, run.model), "made-up")
    trained = trained_with({"settings": run.model_dump(mode="json")}, "made-up")
    corrector = Corrector(network, Draft.of(network, places), dataset, trained, run.model, Corrections(), known)
    plan = PassPlan(actors=1, cpus=1, gpus=0, threads=arguments.threads, in_driver=True)
    session = Session(corrector, cache, DecisionLog(folder / "decisions.jsonl"), PassOptions(plan))
    print(f"{P:,} prototypes, {n:,} images, {K} classes: {session.effect.accuracy_after:.1%} of {session.shown} right")
    return session


def made_latents(random: np.random.Generator, labels: np.ndarray, K: int, own: int) -> tuple[np.ndarray, np.ndarray]:
    """Latent maps n x D x H x W in (0, 1), and at which cell each part of the class is in each image."""
    parts = random.random((K, own, DEPTH), np.float32)
    shared = random.random((-(-K // 4), own, DEPTH), np.float32)
    for part in range(own // 2):  # half of the parts are nearly those of the three classes beside
        parts[:, part] = shared[np.arange(K) // 4, part] + 0.05 * random.standard_normal((K, DEPTH))
    latents = 0.5 + 0.2 * random.standard_normal((len(labels), SIDE * SIDE, DEPTH), np.float32)
    cells = np.argsort(random.random((len(labels), SIDE * SIDE)), axis=1)[:, :own]
    seen = parts[labels] + NOISE * random.standard_normal((len(labels), own, DEPTH), np.float32)
    np.put_along_axis(latents, cells[:, :, None], seen, axis=1)
    maps = np.clip(latents, 0.001, 0.999).transpose(0, 2, 1).reshape(len(labels), DEPTH, SIDE, SIDE)
    return np.ascontiguousarray(maps), cells


def made_places(
    random: np.random.Generator, labels: np.ndarray, split: np.ndarray, parts_at: np.ndarray, own: int
) -> list[tuple[int, int, int]]:
    """For each class and part the patch of a training image that shows it."""
    places = []
    for label in range(int(labels.max()) + 1):
        images = np.flatnonzero((labels == label) & (split == "train"))
        for part in range(own):
            image = int(random.choice(images))
            places.append((image, *divmod(int(parts_at[image, part]), SIDE)))
    return places


def solved(similarities: np.ndarray, labels: np.ndarray, split: np.ndarray, network: ProtoPNet, run: Any) -> np.ndarray:
    train = split == "train"
    rows = Rows(similarities[train], labels[train], np.flatnonzero(train))
    off = off_class_KP(network.prototype_class.numpy(), network.last_layer.out_features)
    anchor = anchor_KP(off, run.model.own_connection)
    solution = resolve(rows, anchor, anchor, off, run.last_layer)
    print(f"from the start: {solution.iterations} iterations, {np.count_nonzero(solution.weights):,} connections")
    return solution.weights


def sources(places: list[tuple[int, int, int]], labels: np.ndarray, names: list[str]) -> pa.Table:
    return pa.table(
        {
            "sha256": [f"{image}" for image, _, _ in places],
            "uri": [f"{image}.jpg" for image, _, _ in places],
            "row": [row for _, row, _ in places],
            "column": [column for _, _, column in places],
            "class": [int(labels[image]) for image, _, _ in places],
            "class_name": [names[labels[image]] for image, _, _ in places],
        }
    )


if __name__ == "__main__":
    main()
