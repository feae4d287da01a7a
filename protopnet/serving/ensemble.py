"""The ensemble as the ingress sees it: asks all members at once, adds their logits up, and explains the sum.

Legend: B images of a request, M members, K classes.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from protopnet.evidence.explanation import Explainer
from protopnet.evidence.ranking import View
from protopnet.evidence.sources import Shown
from protopnet.model.bundle import Bundle, BundleInfo
from protopnet.model.network import ProtoPNet
from protopnet.predictor import Predictor, Scores, sum_up
from protopnet.serving.courier import Courier
from protopnet.serving.members import BrokenMember, BundleRef, Seen, in_parts
from protopnet.serving.refusals import not_ready, overloaded
from protopnet.serving.settings import MemberSettings

ATTEMPTS = 4  # replicas asked before giving up; asking again is safe, an answer changes nothing


class Ask(Protocol):
    """A call of one member over the network."""

    def __call__(
        self, bundle: BundleRef, whole: bool, images: int, *parts_NS3: np.ndarray
    ) -> Awaitable[list[Seen]]: ...


class Ensemble:
    """Members by number. Of their bundles only what explanations need is kept: no backbones."""

    def __init__(
        self, bundles: Sequence[BundleRef], ask: Sequence[Ask], settings: MemberSettings, shown: Shown
    ) -> None:
        self.refs = list(bundles)
        self._couriers = [
            Courier(
                partial(_ask, ask[member], member, ref),
                replicas=settings.max_replicas,
                most=settings.max_batch,
                room=settings.max_queue,
                wait_s=settings.batch_wait_s,
            )
            for member, ref in enumerate(bundles)
        ]
        predictor = Predictor.load([ref.uri for ref in bundles])
        for ref, bundle in zip(bundles, predictor.bundles, strict=True):
            if bundle.hash != ref.hash:
                raise BrokenMember(f"{ref.uri} has changed since it was deployed: deploy it again")
        self.classes, self.sizes = predictor.classes, predictor.sizes
        self.infos: list[BundleInfo] = [bundle.info for bundle in predictor.bundles]
        self.hash = combined_hash(self.refs)
        self.explainer: Explainer | None = _explainer(predictor.bundles, shown)
        self.map_cells = max(_map_cells(bundle) for bundle in predictor.bundles)

    async def look(self, pixels_B: Sequence[Mapping[int, np.ndarray]], whole: bool) -> list[list[Seen]]:
        """What each member sees of each image, which comes in all `sizes`: M lists of B."""
        wanted = [info.preprocessing.size for info in self.infos]
        asked = [
            c.see(pixels[size], whole) for c, size in zip(self._couriers, wanted, strict=True) for pixels in pixels_B
        ]
        seen = await asyncio.gather(*asked)
        B = len(pixels_B)
        return [list(seen[start : start + B]) for start in range(0, len(seen), B)]

    def scores(self, seen_MB: Sequence[Sequence[Seen]]) -> Scores:
        return sum_up([torch.from_numpy(np.stack([seen.logits_K for seen in row])) for row in seen_MB])

    def views(self, seen_MB: Sequence[Sequence[Seen]]) -> list[View]:
        """One a member, as `Predictor.views` gives them."""
        return [View(*(torch.from_numpy(np.stack(part)) for part in zip(*row, strict=True))) for row in seen_MB]


async def _ask(ask: Ask, member: int, ref: BundleRef, pixels_BSS3: Sequence[np.ndarray], whole: bool) -> list[Seen]:
    parts_NS3 = in_parts(pixels_BSS3)
    for attempt in range(ATTEMPTS):
        try:
            return await ask(ref, whole, len(pixels_BSS3), *parts_NS3)
        except BackPressureError:
            raise overloaded(f"member {member} has too many images waiting; try again") from None
        except (RayActorError, BrokenMember, DeploymentUnavailableError):
            # The replica died, broke or is gone: there is another, or will be in a moment.
            await asyncio.sleep(0.1 * 2**attempt)
    raise not_ready(f"member {member} has no replica that answers; try again")


def combined_hash(bundles: Sequence[BundleRef]) -> str:
    """Short name of a set of bundles, in their order."""
    return hashlib.sha256(" ".join(ref.hash for ref in bundles).encode()).hexdigest()[:12]


def _map_cells(bundle: Bundle) -> int:
    """Of an activation map, prototypes of one cell being the least there are."""
    _, rows, columns = bundle.network.backbone.map_shape(bundle.info.preprocessing.size)
    return rows * columns


def _explainer(bundles: Sequence[Bundle], shown: Shown) -> Explainer | None:
    if not all(isinstance(bundle.network, ProtoPNet) for bundle in bundles):
        return None
    return Explainer(bundles, shown)


async def all_ready(ready: Sequence[Callable[[BundleRef], Awaitable[bool]]], bundles: Sequence[BundleRef]) -> None:
    """Returns once every member holds its bundle."""
    await asyncio.gather(*(is_ready(ref) for is_ready, ref in zip(ready, bundles, strict=True)))
