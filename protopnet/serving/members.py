"""One member of the ensemble: a bundle as a deployment of its own, which sees the images of a call in one forward pass.

Which bundle is meant comes with every question. While a new version rolls out, old and new replicas stand side by side
and either may be asked by an old or a new ingress; a replica that doesn't hold the bundle yet loads it. So an answer is
always that of one set of bundles, never a sum over old and new ones.

Legend: S side of the network's input, K classes, P prototypes, D H W the latent map.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from ray.serve.metrics import Histogram

from protopnet import imaging
from protopnet.evidence.pieces import Closer, Piece
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import true_float32
from protopnet.model.receptive_field import ReceptiveField
from protopnet.predictor import PIECES, Predictor
from protopnet.serving.settings import MemberSettings

KEPT = 2  # bundles in memory: the one served, and while a version rolls out the other
_SIZES: list[float] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
_SENT_ALONG, _PARTS = 90_000, 64  # bytes (Ray's limit is 100 KiB), and how many parts at most
TOLERANCE = 1e-3  # of the logits of the health check's image, relative to the largest
_Found = TypeVar("_Found")


class BundleRef(NamedTuple):
    """A bundle, and the hash it must have."""

    uri: str
    hash: str


def in_parts(images_SS3: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The rows of some images of one size, one after the other, in parts that are small enough for Ray to send them
    along with a call: what is larger goes through its object store, which costs milliseconds."""
    rows_NS3 = np.concatenate(images_SS3)
    count = -(-len(rows_NS3) // max(1, _SENT_ALONG // rows_NS3[0].nbytes))
    return np.array_split(rows_NS3, count) if count <= _PARTS else [rows_NS3]


class Seen(NamedTuple):
    """What a member sees of an image: a `View` of a batch of one, as arrays."""

    logits_K: np.ndarray
    similarities_P: np.ndarray | None = None
    index_P: np.ndarray | None = None
    latent_DHW: np.ndarray | None = None
    best: float = np.nan  # similarity to the prototype it is most like


class BrokenMember(Exception):
    """This replica can't give right answers; another one may."""


class Member:
    """Replicas of this deployment hold the network of one bundle. `bundle` is loaded before the first question."""

    def __init__(self, bundle: BundleRef, settings: MemberSettings, threads: int) -> None:
        self._device = torch.device("cuda" if settings.gpus else "cpu")
        self._predictors: OrderedDict[BundleRef, Predictor] = OrderedDict()
        self._broken: str | None = None
        # For the life of the process: entering and leaving it in a thread can't change the flags under another.
        self._precision = ExitStack()
        self._precision.enter_context(true_float32())
        # One thread computes, so that the event loop stays free to take in the next call and to say it is alive.
        self._worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._sizes = Histogram("protopnet_batch_images", description="Images a forward pass", boundaries=_SIZES)
        self._bundle = bundle
        self._expected_K = self._worker.submit(self._look_at_probe).result()

    async def see(self, bundle: BundleRef, whole: bool, images: int, *parts_NS3: np.ndarray) -> list[Seen]:
        """What this member sees of some images, in one forward pass. They come in parts of their rows (see `in_parts`).

        whole: all that evidence is made of, not the logits alone.
        """
        pixels_BSS3 = np.stack(np.split(np.concatenate(parts_NS3), images))
        return await self._in_worker(self._look, bundle, pixels_BSS3, whole)

    async def look_closer(
        self, bundle: BundleRef, pieces: Sequence[Piece], gradient: bool, perturb: bool, *parts_NS3: np.ndarray
    ) -> list[Closer]:
        """What the similarities at some places of one image rest on. It comes in parts of its rows (see `in_parts`)."""
        pixels_1SS3 = np.concatenate(parts_NS3)[None]
        found: list[Closer] = []
        for start in range(0, len(pieces), PIECES):  # others are looked at in between
            some = pieces[start : start + PIECES]
            found += await self._in_worker(self._look_closer, bundle, pixels_1SS3, some, gradient, perturb)
        return found

    async def field(self, bundle: BundleRef) -> ReceptiveField | None:
        """What the bundle's patches can see; none where it is a black-box baseline."""
        return await self._in_worker(self._field, bundle)

    async def ready(self, bundle: BundleRef) -> bool:
        """True once the bundle is loaded."""
        await self._in_worker(self._predictor, bundle)
        return True

    async def check_health(self) -> None:
        """Raises where the network no longer sees in a known image what it saw at the start."""
        if self._broken is None:
            logits_K = await self._in_worker(self._look_at_probe)
            away = np.abs(logits_K - self._expected_K).max()
            if not away <= TOLERANCE * max(1.0, float(np.abs(self._expected_K).max())):
                self._broken = f"the logits of a known image have moved by {away}"
        if self._broken is not None:
            raise BrokenMember(self._broken)

    async def _in_worker(self, work: Callable[..., _Found], *given: Any) -> _Found:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *given)

    # -------------------------------------------------------------------------- in the thread that computes

    def _look(self, bundle: BundleRef, pixels_BSS3: np.ndarray, whole: bool) -> list[Seen]:
        predictor = self._predictor(bundle)
        images_B3SS = imaging.normalise(torch.from_numpy(pixels_BSS3).to(self._device), predictor.preprocessing)
        if whole and isinstance(predictor.bundles[0].network, ProtoPNet):
            [view] = predictor.views(images_B3SS)
            parts, best_B = [part.cpu().numpy() for part in view], view.best_B
        else:
            scores = predictor.scores(images_B3SS)
            parts, best_B = [scores.members_MBK[0].cpu().numpy()], scores.best_MB[0]
        if not np.isfinite(parts[0]).all():
            self._broken = "a forward pass gave logits that aren't numbers"
            raise BrokenMember(self._broken)
        self._sizes.observe(len(pixels_BSS3))
        return [Seen(*rows)._replace(best=best) for *rows, best in zip(*parts, best_B.tolist(), strict=True)]

    def _look_closer(
        self, bundle: BundleRef, pixels_1SS3: np.ndarray, pieces: Sequence[Piece], gradient: bool, perturb: bool
    ) -> list[Closer]:
        predictor = self._predictor(bundle)
        images_13SS = imaging.normalise(torch.from_numpy(pixels_1SS3).to(self._device), predictor.preprocessing)
        return predictor.look_closer(0, images_13SS, pieces, gradient=gradient, perturb=perturb)

    def _field(self, bundle: BundleRef) -> ReceptiveField | None:
        predictor = self._predictor(bundle)
        return predictor.explainer.fields[0] if isinstance(predictor.bundles[0].network, ProtoPNet) else None

    def _predictor(self, bundle: BundleRef) -> Predictor:
        """The bundle's, loaded now if it isn't yet."""
        found = self._predictors.get(bundle)
        if found is None:
            found = Predictor.load([bundle.uri]).to(self._device)
            if found.bundles[0].hash != bundle.hash:
                raise BrokenMember(f"{bundle.uri} isn't the bundle any more that was deployed: deploy it again")
            self._predictors[bundle] = found
        self._predictors.move_to_end(bundle)
        while len(self._predictors) > KEPT:
            self._predictors.popitem(last=False)
        return found

    def _look_at_probe(self) -> np.ndarray:
        """Logits of an image that is always the same."""
        size = self._predictor(self._bundle).size
        pixels_1SS3 = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        return self._look(self._bundle, pixels_1SS3, whole=False)[0].logits_K
