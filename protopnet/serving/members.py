"""One member of the ensemble: a bundle as a deployment of its own, which answers image by image and computes in batches.

Which bundle is meant comes with every question. While a new version rolls out, old and new replicas stand side by side
and either may be asked by an old or a new ingress; a replica that doesn't hold the bundle yet loads it. So an answer is
always that of one set of bundles, never a sum over old and new ones.

Legend: S side of the network's input, K classes, P prototypes, D H W the latent map.
"""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from ray import serve

from protopnet import imaging
from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import true_float32
from protopnet.predictor import Predictor
from protopnet.serving.settings import MemberSettings

KEPT = 2  # bundles in memory: the one served, and while a version rolls out the other
_SENT_ALONG, _PARTS = 90_000, 64  # bytes (Ray's limit is 100 KiB), and how many parts at most
TOLERANCE = 1e-3  # of the logits of the health check's image, relative to the largest


class BundleRef(NamedTuple):
    """A bundle, and the hash it must have."""

    uri: str
    hash: str


class Question(NamedTuple):
    """An image for one bundle. `whole`: all that evidence is made of, not the logits alone."""

    pixels_SS3: np.ndarray
    bundle: BundleRef
    whole: bool


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
        # One thread computes, so that the event loop stays free to collect the next batch and to say it is alive.
        self._worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._idle = asyncio.Event()
        self._idle.set()
        self._bundle = bundle
        self._expected_K = self._worker.submit(self._look_at_probe).result()
        batching: Any = self._answer
        batching.set_max_batch_size(settings.max_batch)
        batching.set_batch_wait_timeout_s(settings.batch_wait_s)

    async def see(self, bundle: BundleRef, whole: bool, images: int, *parts_NS3: np.ndarray) -> list[Seen]:
        """What this member sees of some images, which come in parts of their rows (see `in_parts`)."""
        pixels_BSS3 = np.split(np.concatenate(parts_NS3), images)
        # serve.batch would cut what arrives during a pass into many small batches, and queue those. What waits
        # here until the pass is over becomes one.
        while not self._idle.is_set():
            await self._idle.wait()
        return list(await asyncio.gather(*(self._answer(Question(p, bundle, whole)) for p in pixels_BSS3)))

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0)
    async def _answer(self, questions: list[Question]) -> list[Seen]:
        self._idle.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, self._look, questions)
        finally:
            self._idle.set()

    async def ready(self, bundle: BundleRef) -> bool:
        """True once the bundle is loaded."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._predictor, bundle)
        return True

    async def check_health(self) -> None:
        """Raises where the network no longer sees in a known image what it saw at the start."""
        if self._broken is None:
            logits_K = await asyncio.get_running_loop().run_in_executor(self._worker, self._look_at_probe)
            away = np.abs(logits_K - self._expected_K).max()
            if not away <= TOLERANCE * max(1.0, float(np.abs(self._expected_K).max())):
                self._broken = f"the logits of a known image have moved by {away}"
        if self._broken is not None:
            raise BrokenMember(self._broken)

    # -------------------------------------------------------------------------- in the thread that computes

    def _look(self, questions: Sequence[Question]) -> list[Seen]:
        """Answers in the order of the questions; those about one bundle are one batch."""
        of_bundle: dict[BundleRef, list[int]] = defaultdict(list)
        for place, question in enumerate(questions):
            of_bundle[question.bundle].append(place)
        answers: dict[int, Seen] = {}
        for bundle, places in of_bundle.items():
            whole = any(questions[place].whole for place in places)
            seen = self._forward(bundle, np.stack([questions[place].pixels_SS3 for place in places]), whole)
            answers |= zip(places, seen, strict=True)
        return [
            answers[place] if question.whole else Seen(answers[place].logits_K)
            for place, question in enumerate(questions)
        ]

    def _forward(self, bundle: BundleRef, pixels_BSS3: np.ndarray, whole: bool) -> list[Seen]:
        predictor = self._predictor(bundle)
        images_B3SS = imaging.normalise(torch.from_numpy(pixels_BSS3).to(self._device), predictor.preprocessing)
        if whole and isinstance(predictor.bundles[0].network, ProtoPNet):
            parts = [part.cpu().numpy() for part in predictor.views(images_B3SS)[0]]
        else:
            parts = [predictor.scores(images_B3SS).members_MBK[0].cpu().numpy()]
        if not np.isfinite(parts[0]).all():
            self._broken = "a forward pass gave logits that aren't numbers"
            raise BrokenMember(self._broken)
        return [Seen(*rows) for rows in zip(*parts, strict=True)]

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
        return self._forward(self._bundle, pixels_1SS3, whole=False)[0].logits_K
