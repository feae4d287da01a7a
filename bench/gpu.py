"""Every hot path on one device, in one run: against its limit, and against the authors' way; with peak memory.

    python bench/gpu.py [--backbone resnet50 --size 224 --batch 128 --prototypes 2000 --classes 200] [--record]

Needs torch, torchvision, pyarrow and pydantic (with what these bring along), no Ray, no data and no weights: pixels are
made up, weights random, and cost what others cost. On a GPU the sizes are those of CUB-200-2011 and of large problems; on a
CPU they are small. Times are taken in turns (see README); *of the bare work* is the ratio that the limit is on:

joint step          to forward and backward of the backbone alone, in the same precision and memory order
…, compiled         the same, both with `torch.compile` (on a GPU, or with `--compile 1`)
push, nearest …     to the forward passes up to the latent map
predict             to the forward pass of the backbone alone
explain             to predict

Augmentation, last layer and prototype layer have no bare work: the authors' way is what they are relative to. Of the last
layer, theirs is 20 epochs through the network, ours a pass and the solver; the epochs and the pass are extrapolated from a
batch. 100,000 prototypes may take 1 GB. Their ways are in `authors_way.py` and `authors_push.py`.
On a CPU that others use too: `OMP_NUM_THREADS=1 … --threads 1 --clock cpu`.
Memory is the peak above what was there before: of the GPU, or of this process where the work is on the CPU.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import authors_way
import numpy as np
import torch
from authors_push import authors_push
from common import RESULTS, Ratio, arguments_of, bundle_of, conclude, seconds, table, take_turns
from joint_step import Subject
from last_layer_size import made_up
from PIL import Image
from prototype_layer import PeakMemory, ours

from protopnet import imaging
from protopnet.config import AugmentSettings, ModelSettings
from protopnet.datasets import augment
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import true_float32
from protopnet.passes.candidates import Cutoff, Reducer, local_nearest
from protopnet.predictor import Predictor
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.newton import solve_here
from protopnet.training.solver import RowBlock

SMALL = {"backbone": "resnet18", "size": 224, "batch": 16, "prototypes": 200, "classes": 20, "rows": 2_000, "maps": 8}
FULL = {
    "backbone": "resnet50",
    "size": 224,
    "batch": 128,
    "prototypes": 2_000,
    "classes": 200,
    "rows": 12_000,
    "maps": 64,
}
EPOCHS, AUTHORS_BATCH = 20, 80  # of the authors' last layer
SPARE = 64  # as the passes keep
Work = Callable[[], object]


@dataclass
class Case:
    """A hot path: `ours`, and where there are such `bare`, what the limit is relative to, and the authors' way.

    number: of units in a call of ours. least: of bare's time over ours; of the authors' where nothing is bare. memory: most
    bytes. passes: so many calls of bare belong to ours, and so many an epoch of `authors` to the authors' way: neither is
    run whole. host: it computes on the CPU.
    """

    number: int
    unit: str
    ours: Work
    bare: Work | None = None
    authors: Work | None = None
    least: float | None = None
    memory: float | None = None
    passes: float = 0.0
    host: bool = False


class Hot:
    """The network, its pixels, and the cases."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.random = np.random.default_rng(0)
        shape = (arguments.batch, arguments.size, arguments.size, 3)
        self.pixels_BHWC = self.random.integers(0, 256, shape, dtype=np.uint8)
        self.labels_B = np.arange(arguments.batch) % arguments.classes
        self.settings = ModelSettings.model_validate(
            {"backbone": arguments.backbone, "image_size": arguments.size, "prototypes": arguments.prototypes}
        )
        bundle = bundle_of(self.settings, arguments.classes, self.device)
        assert isinstance(bundle.network, ProtoPNet)
        self.network, self.predictor = bundle.network, Predictor([bundle])
        pixels = torch.from_numpy(self.pixels_BHWC).to(self.device)
        self.images_B3HW = imaging.normalise(pixels, self.network.preprocessing)
        self._among_patches()
        self.plain = authors_way.AuthorsNetwork(self.network)

    @torch.inference_mode()
    def _among_patches(self) -> None:
        """Prototypes as a push leaves them: on patches of these images."""
        patches_ND = self.network.latent(self.images_B3HW).permute(0, 2, 3, 1).flatten(0, 2)
        chosen = self.random.integers(0, len(patches_ND), len(self.network.prototypes))
        self.network.prototypes.copy_(patches_ND[torch.from_numpy(chosen).to(self.device)][:, :, None, None])

    def cases(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """By name; each is made when its turn has come, so that memory is not of all at once."""
        yield "joint step", self.joint_step
        if self.arguments.compile:
            yield "joint step, compiled", partial(self.joint_step, compiled=True)
        yield "augmentation", self.augmentation
        yield "augmentation on the device", partial(self.augmentation, on_device=True)
        yield "push map", self.push_map
        yield "nearest patches of all", self.nearest_of_all
        yield "last layer", self.last_layer
        for prototypes in (2_000, 100_000):
            yield f"prototype layer, P = {prototypes:,}", partial(self.prototype_layer, prototypes)
        yield "predict", self.predict
        yield "predict, bf16", partial(self.predict, precision="bf16")
        yield "explain", self.explain

    # -------------------------------------------------------------------------------------------- training

    def joint_step(self, compiled: bool = False) -> Case:
        subject = Subject(argparse.Namespace(**vars(self.arguments), cut="", depth=128, similarity="log"))
        if compiled:
            subject.network.backbone.compile()
        plain = authors_way.AuthorsNetwork(subject.network)
        labels_B = subject.batch[1].to(self.device)
        images_B3HW = subject.images_B3HW.contiguous()

        def authors() -> None:
            plain.joint_step(images_B3HW, labels_B)

        return Case(len(labels_B), "img", subject.joint_step, subject.bare, authors, 0.90)

    def augmentation(self, on_device: bool = False) -> Case:
        """Views of photographs of 500 x 375 pixels, smooth as photographs are."""
        batch, size = min(32, self.arguments.batch), self.arguments.size
        coarse_BHW3 = self.random.integers(0, 256, (batch, 12, 16, 3), dtype=np.uint8)
        photos = [Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC) for coarse in coarse_BHW3]
        warps = [augment.draw(AugmentSettings(), *photo.size, self.random) for photo in photos]
        pairs = list(zip(photos, warps, strict=True))

        def authors() -> None:
            np.stack([authors_way.augmented(photo, warp, size) for photo, warp in pairs])

        if not on_device:
            each = lambda: np.stack([augment.apply(photo, warp, size) for photo, warp in pairs])  # noqa: E731
            return Case(batch, "img", each, authors=authors, least=1.0, host=True)
        photos_BHW3 = torch.from_numpy(np.stack([np.asarray(photo) for photo in photos]))
        matrices_B33 = torch.from_numpy(np.stack([warp.matrix for warp in warps])).float().to(self.device)
        whole = lambda: authors_way.on_device(photos_BHW3.to(self.device), matrices_B33, size)  # noqa: E731
        return Case(batch, "img", whole, authors=authors, least=1.0)

    def last_layer(self) -> Case:
        """Ours: the solver and a pass, which is extrapolated from `predict`. Theirs: all extrapolated from a step."""
        rows, classes, prototypes = (getattr(self.arguments, name) for name in ("rows", "classes", "prototypes"))
        made = argparse.Namespace(rows=rows, prototypes=prototypes, classes=classes, seed=0, spread=1.4)
        block = RowBlock(*made_up(made), classes, device=self.device)
        off_KP = off_class_KP(np.arange(prototypes) * classes // prototypes, classes)
        anchor, start = anchor_KP(off_KP, 1.0), np.where(off_KP, -0.5, 1.0)
        labels_B = torch.from_numpy(self.labels_B).to(self.device)
        return Case(
            rows,
            "row",
            lambda: solve_here(block, anchor, off_KP, l1=1e-4, ridge=1e-4, initial=start),
            lambda: self.predictor.scores(self.images_B3HW),
            lambda: self.plain.last_layer_step(self.images_B3HW, labels_B),
            10.0,
            passes=rows / len(self.labels_B),
        )

    def prototype_layer(self, prototypes: int) -> Case:
        depth, side = 128, 7
        latent = torch.rand(self.arguments.maps, depth, side, side, device=self.device, requires_grad=True)
        layer = torch.rand(prototypes, depth, 1, 1, device=self.device, requires_grad=True)
        latent.grad, layer.grad = torch.ones_like(latent), torch.ones_like(layer)  # the result, not extra
        plain = partial(authors_way.prototype_layer, latent, layer)
        memory = 1e9 if prototypes == 100_000 else None
        return Case(len(latent), "map", partial(ours, latent, layer), authors=plain, least=1.0, memory=memory)

    # ------------------------------------------------------------------------------------- without gradients

    def _batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self.pixels_BHWC, self.labels_B)] * 2

    def _latent(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        with torch.inference_mode(), true_float32():
            pixels = torch.from_numpy(pixels_BHWC).to(self.device)
            return self.network.latent(imaging.normalise(pixels, self.network.preprocessing))

    def _forward_only(self) -> None:
        for pixels_BHWC, _ in self._batches():
            self._latent(pixels_BHWC)

    def _nearest(self, k: int, spare: int, **how: Any) -> None:
        """As a `NearestTask` and `collect` do it."""
        one_per_image = how["one_per_image"]
        cutoff, best = Cutoff(len(self.network.prototypes), k), Reducer(k, spare, one_per_image=one_per_image)
        for number, (pixels_BHWC, labels_B) in enumerate(self._batches()):
            ids_B = number * len(labels_B) + np.arange(len(labels_B))
            with torch.inference_mode(), true_float32():
                latent_BDHW = self._latent(pixels_BHWC)
                given = (self.network.prototypes, self.network.kind, k)
                found = local_nearest(latent_BDHW, ids_B, labels_B, *given, spare=spare, **how)
            best.add(cutoff.passing(found, one_per_image=one_per_image))
        best.result()

    def push_map(self) -> Case:
        classes_P = self.network.prototype_class.cpu().numpy()
        most = int(np.bincount(classes_P).max())  # as `candidates_needed` of distinct patches
        push = partial(self._nearest, most, 0, one_per_image=False, prototype_class_P=classes_P)
        authors = lambda: authors_push(self.network, self._batches(), None)  # noqa: E731
        return Case(2 * len(self.labels_B), "img", push, self._forward_only, authors, 0.90)

    def nearest_of_all(self) -> Case:
        nearest = partial(self._nearest, 5, SPARE, one_per_image=True, vectors=False)
        authors = lambda: authors_way.nearest_of_all(self.network, self._batches(), 5)  # noqa: E731
        return Case(2 * len(self.labels_B), "img", nearest, self._forward_only, authors, 0.75)

    def predict(self, precision: str = "float32") -> Case:
        @torch.inference_mode()
        def bare() -> None:
            with true_float32() if precision == "float32" else torch.autocast(self.device, torch.bfloat16):
                self.network.backbone(self.images_B3HW)

        scores = partial(self.predictor.scores, self.images_B3HW, precision=precision)
        authors = partial(self.plain.predict, self.images_B3HW.contiguous())
        return Case(len(self.labels_B), "img", scores, bare, authors, 0.85)

    def explain(self) -> Case:
        side, batch = self.arguments.size, len(self.labels_B)
        ours_ = partial(
            self.predictor.explain, self.images_B3HW, [(side, side)] * batch, top_classes=2, top_prototypes=5
        )
        predict = partial(self.predictor.scores, self.images_B3HW)
        authors = partial(self.plain.explain, self.images_B3HW.contiguous(), side, 5)
        return Case(batch, "img", ours_, predict, authors, 1 / 1.3)


def measured(case: Case, rounds: int, clock: str) -> dict[str, Any]:
    """Seconds of a call of each, peak memory of ours and the authors', and the two ratios."""
    device = "cpu" if case.host or not torch.cuda.is_available() else "cuda"
    peaks = {}
    for name, work in {"ours": case.ours, "authors": case.authors}.items():
        if work is not None:
            with PeakMemory(device) as memory:
                work()
            peaks[name] = memory.peak
    works = {"ours": case.ours, "bare": case.bare, "authors": case.authors}
    times = take_turns(
        {name: partial(seconds, work, clock) for name, work in works.items() if work is not None}, rounds
    )
    if case.passes:
        a_pass = times.pop("bare")
        times["ours"] = [own + case.passes * one for own, one in zip(times["ours"], a_pass, strict=True)]
        times["authors"] = [EPOCHS * case.passes * one for one in times["authors"]]
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "peak_bytes": peaks,
        "of_bare": Ratio.of(times["bare"], times["ours"]) if "bare" in times else None,
        "of_authors": Ratio.of(times["authors"], times["ours"]) if case.authors else None,
    }


def main() -> None:
    defaults = FULL if torch.cuda.is_available() else SMALL
    arguments = arguments_of(
        __doc__, **defaults, compile=int(torch.cuda.is_available()), rounds=5, clock="wall", only=""
    )
    hot, shown, figures, checks = Hot(arguments), {}, {}, {}
    for name, made in hot.cases():
        if arguments.only not in name:
            continue
        case = made()
        found = measured(case, arguments.rounds, arguments.clock)
        limited = found["of_bare"] or found["of_authors"]
        if case.least is not None:
            checks[name] = (limited.median, case.least)
        if case.memory is not None:
            checks[f"{name}: 1 GB / memory"] = (case.memory / max(1, found["peak_bytes"]["ours"]), 1.0)
        shown[name] = _cells(case, found)
        print(f"{name}: {1e3 * found['seconds']['ours']:.1f} ms", flush=True)
        figures[name] = _figures(found)
        del case
        torch.cuda.empty_cache()
    text = table(shown)
    if arguments.record:
        (RESULTS / f"gpu_{hot.device}.txt").write_text(text + "\n")
    conclude(f"gpu_{hot.device}", arguments, figures, checks)


def _cells(case: Case, found: dict[str, Any]) -> dict[str, str]:
    spent, peaks = found["seconds"], found["peak_bytes"]
    return {
        "ms": f"{1e3 * spent['ours']:.1f}",
        "rate": f"{case.number / spent['ours']:,.0f} {case.unit}/s",
        "of the bare work": f"{found['of_bare']}" if found["of_bare"] else "",
        "asked": f"{case.least:.2f}" if case.least is not None else "",
        "of the authors' way": f"{found['of_authors']}" if found["of_authors"] else "",
        "MB": f"{peaks['ours'] / 1e6:,.0f}",
        "authors' MB": f"{peaks['authors'] / 1e6:,.0f}" if "authors" in peaks else "",
    }


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    ratios = {name: ratio.as_figures() for name in ("of_bare", "of_authors") if (ratio := found[name])}
    return {
        "milliseconds": {name: round(1e3 * value, 3) for name, value in found["seconds"].items()},
        "peak_mb": {name: round(value / 1e6, 1) for name, value in found["peak_bytes"].items()},
        **ratios,
    }


if __name__ == "__main__":
    main()
