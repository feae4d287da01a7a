"""Bundles that answer beside those served, unseen by clients: whether they would have said the same is counted."""

import asyncio
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from prometheus_client.samples import Sample

from protopnet.predictor import Scores
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.metrics import Metrics, shadow_of
from protopnet.serving.schemas import Answers, ShadowSeen

_AT_ONCE = 4  # requests; what comes above them isn't shown to the shadow, so that it takes nothing from those served
_log = logging.getLogger("ray.serve")


class Shadow:
    """Of one ingress replica. Nothing that goes wrong here reaches a client."""

    def __init__(self, ensemble: Ensemble, metrics: Metrics) -> None:
        self.ensemble, self._metrics = ensemble, metrics
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self, pixels_B: Sequence[Mapping[int, np.ndarray]], served: Scores) -> None:
        """Begin to ask, and go on; pixels in all `sizes` of its ensemble, and what was answered."""
        first = [self.ensemble.classes[label] for label in served.logits_BK.argmax(1).tolist()]
        if len(self._tasks) >= _AT_ONCE:
            self._count(first, ["missed"] * len(first))
            return
        task = asyncio.get_running_loop().create_task(self._compare(pixels_B, first))
        self._tasks.add(task)  # the loop itself keeps no hold of it
        task.add_done_callback(self._tasks.discard)

    def report(self, samples: Sequence[Sample]) -> ShadowSeen:
        """What the metrics of all replicas say of it beside the model served, whose samples these are."""
        counts = shadow_of(samples, self.ensemble.hash)
        classes = {name: Answers(**counts[name]) for name in sorted(counts, key=lambda name: -counts[name]["other"])}
        totals = {answer: sum(each[answer] for each in counts.values()) for answer in Answers.model_fields}
        return ShadowSeen(model=self.ensemble.hash, classes=classes, **totals)

    async def _compare(self, pixels_B: Sequence[Mapping[int, np.ndarray]], first: list[str]) -> None:
        try:
            scores = self.ensemble.scores(await self.ensemble.look(pixels_B, whole=False))
            own = [self.ensemble.classes[label] for label in scores.logits_BK.argmax(1).tolist()]
            answers = ["same" if mine == theirs else "other" for mine, theirs in zip(own, first, strict=True)]
        except Exception as error:  # whatever it is, the service goes on
            _log.warning("the shadow gave no answer: %s: %s", type(error).__name__, error)
            answers = ["missed"] * len(first)
        self._count(first, answers)

    def _count(self, classes: Sequence[str], answers: Sequence[str]) -> None:
        self._metrics.shadowed(self.ensemble.hash, list(zip(classes, answers, strict=True)))
