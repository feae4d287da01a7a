"""What the routes call: a request with images in, JSON out. Decoding and explaining run beside the event loop."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request

from protopnet.evidence.records import Explanation
from protopnet.predictor import Scores
from protopnet.quality.watch import report, watched
from protopnet.serving import answers
from protopnet.serving import metrics as counted
from protopnet.serving.allowance import check_allowance
from protopnet.serving.batches import Batches
from protopnet.serving.catalogue import Catalogue
from protopnet.serving.ensemble import Ensemble, all_ready
from protopnet.serving.gate import request_id
from protopnet.serving.members import BundleRef
from protopnet.serving.metrics import Metrics
from protopnet.serving.reception import Reception
from protopnet.serving.refusals import Refusal, not_ready
from protopnet.serving.schemas import ExplainedImages, ExplainOptions, Prediction, PredictOptions, Watch
from protopnet.serving.settings import AppSettings
from protopnet.serving.shadow import Shadow
from protopnet.serving.uploads import Picture

_READY_S = 5
_Found = TypeVar("_Found")


class Service:
    """One ingress replica's. `ready`: asks each member whether it holds its bundle."""

    def __init__(
        self,
        settings: AppSettings,
        ensemble: Ensemble,
        ready: Sequence[Callable[[BundleRef], Awaitable[bool]]],
        metrics: Metrics,
        shadow: Ensemble | None = None,
    ) -> None:
        self.settings, self.ensemble, self.metrics = settings, ensemble, metrics
        self._shadow = Shadow(shadow, metrics) if shadow is not None else None
        self.catalogue = Catalogue(ensemble, settings)
        uris = [ref.uri for ref in ensemble.refs]
        self.batches = Batches(settings.batch, uris, ensemble.hash) if settings.batch is not None else None
        self._ready = list(ready)
        sizes = tuple(dict.fromkeys((*ensemble.sizes, *(shadow.sizes if shadow is not None else ()))))
        self._reception = Reception(settings, sizes, ensemble.intensity)
        threads = settings.ingress.threads
        self._explaining = ThreadPoolExecutor(threads, "explain", initializer=torch.set_num_threads, initargs=(1,))

    async def predict(self, request: Request, options: PredictOptions) -> str:
        asked, below = await self._labels(options), self._abstain_below(options)
        async with self._reception.pictures(request, lambda images: None) as pictures:
            seen_MB = await self.ensemble.look([picture.pixels for picture in pictures], whole=False)
            scores = self.ensemble.scores(seen_MB)
            images = answers.predicted(self.ensemble.classes, pictures, scores, options, asked, below)
        self._count("/v1/predict", scores, [image.abstained for image in images])
        self._ask_shadow(pictures, scores)
        answer = Prediction(request_id=request_id(request.scope), model=self.ensemble.hash, images=images)
        return answer.model_dump_json()

    async def explain(self, request: Request, options: ExplainOptions) -> str:
        if self.ensemble.explainer is None:
            raise Refusal("cannot_explain", "a member is a black-box baseline, which can't explain; use /v1/predict")
        asked, below = await self._labels(options), self._abstain_below(options)

        def finished(found: Sequence[Explanation], check_wanted: Callable[[], None]) -> str:
            images = answers.pictured(found, pictures, options, below, check_wanted)
            self._count("/v1/explain", scores, [image.abstained for image in images])
            answer = ExplainedImages.model_construct(
                request_id=request_id(request.scope), model=self.ensemble.hash, images=images
            )
            return answer.model_dump_json()

        async with self._reception.pictures(request, partial(self._check_allowance, options)) as pictures:
            pixels = [picture.pixels for picture in pictures]
            seen_MB = await self.ensemble.look(pixels, whole=True)
            scores = self.ensemble.scores(seen_MB)
            self._ask_shadow(pictures, scores)
            with _wanted() as check_wanted:
                found = await self._beside(
                    answers.explained, self.ensemble, pictures, seen_MB, options, asked, check_wanted
                )
                if options.gradient or options.perturb:
                    found = await self.ensemble.look_closer(found, pixels, options.gradient, options.perturb)
                return await self._beside(finished, found, check_wanted)

    async def _beside(self, work: Callable[..., _Found], *given: Any) -> _Found:
        """The work in a thread of those that explain."""
        return await asyncio.get_running_loop().run_in_executor(self._explaining, work, *given)

    async def check_ready(self) -> None:
        try:
            async with asyncio.timeout(_READY_S):
                await all_ready(self._ready, self.ensemble.refs)
        except (TimeoutError, RayError, RayServeException) as error:
            raise not_ready(f"the members aren't all up ({type(error).__name__})") from None

    async def metrics_text(self) -> str:
        return await asyncio.to_thread(counted.collect)

    async def watch(self) -> str:
        """The images that all replicas have answered, beside what is usual and what the shadow says."""
        samples = counted.samples_of(await self.metrics_text(), self.ensemble.hash)
        seen = report(counted.seen_by(samples), self.ensemble.trust)
        return Watch(**dict(seen), shadow=self._shadow and self._shadow.report(samples)).model_dump_json()

    def _ask_shadow(self, pictures: Sequence[Picture], scores: Scores) -> None:
        if self._shadow is not None:
            self._shadow.look([picture.pixels for picture in pictures], scores)

    def _count(self, route: str, scores: Scores, abstained_B: Sequence[bool]) -> None:
        self.metrics.images(route, watched(scores, self.ensemble.classes, abstained_B))

    def _check_allowance(self, options: ExplainOptions, images: int) -> None:
        catalogue, ensemble = self.catalogue.model, self.ensemble
        check_allowance(
            options,
            images,
            classes=len(ensemble.classes),
            prototypes=catalogue.prototypes,
            map_cells=ensemble.map_cells,
            settings=self.settings,
        )

    async def _labels(self, options: PredictOptions) -> list[int]:
        return [await self.catalogue.label(text) for text in options.asked]

    def _abstain_below(self, options: PredictOptions) -> float | None:
        return self.catalogue.model.abstain_below if options.abstain_below is None else options.abstain_below


@contextmanager
def _wanted() -> Iterator[Callable[[], None]]:
    """A function that raises once the block has been left: then nobody waits for what a thread is at."""
    given_up = threading.Event()

    def check_wanted() -> None:
        if given_up.is_set():
            raise _GivenUp

    try:
        yield check_wanted
    finally:
        given_up.set()


class _GivenUp(Exception):
    """Nobody waits for the answer any more. Nobody hears of this either."""
