"""The ensemble as the ingress sees it: asks all members at once, adds their logits up, and explains the sum.

Legend: B images of a request, M members, K classes.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from protopnet.evidence.explanation import Explainer
from protopnet.evidence.pieces import Closer, Piece, filled, pieces_of
from protopnet.evidence.ranking import Head, View
from protopnet.evidence.records import Explanation
from protopnet.evidence.sources import Shown, Sources
from protopnet.model.bundle import BundleInfo
from protopnet.model.bundle_head import BundleHead, open_head
from protopnet.model.calibration import Trust
from protopnet.predictor import Scores, check_one_task, sum_up
from protopnet.serving.courier import Courier
from protopnet.serving.members import BrokenMember, BundleRef, Seen, in_parts
from protopnet.serving.refusals import not_ready, overloaded
from protopnet.serving.settings import MemberSettings

ATTEMPTS = 4  # replicas asked before giving up; asking again is safe, an answer changes nothing
_OPENED_AT_ONCE = 4  # bundles
_Found = TypeVar("_Found")


class Ask(Protocol):
    """A call of one member over the network."""

    def __call__(
        self, bundle: BundleRef, whole: bool, images: int, *parts_NS3: np.ndarray
    ) -> Awaitable[list[Seen]]: ...


class AskCloser(Protocol):
    """The same for what similarities rest on."""

    def __call__(
        self, bundle: BundleRef, pieces: Sequence[Piece], gradient: bool, perturb: bool, *parts_NS3: np.ndarray
    ) -> Awaitable[list[Closer]]: ...


class Ensemble:
    """Members by number. Of their bundles only what explanations need is opened: no backbones."""

    def __init__(
        self,
        bundles: Sequence[BundleRef],
        ask: Sequence[Ask],
        settings: MemberSettings,
        shown: Shown,
        ask_closer: Sequence[AskCloser] = (),
    ) -> None:
        self.refs, self._ask_closer = list(bundles), list(ask_closer)
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
        with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:  # most of it is hashing, which needs no lock
            heads = list(pool.map(open_head, [ref.uri for ref in bundles]))
        for ref, head in zip(bundles, heads, strict=True):
            if head.hash != ref.hash:
                raise BrokenMember(f"{ref.uri} has changed since it was deployed: deploy it again")
        self.infos: list[BundleInfo] = [head.info for head in heads]
        check_one_task(self.infos)
        self.classes = self.infos[0].classes
        self.trust = Trust.of([info.calibration for info in self.infos])
        self.sizes = tuple(dict.fromkeys(info.preprocessing.size for info in self.infos))
        self.intensity = self.infos[0].preprocessing.intensity
        self.hash = combined_hash(self.refs)
        self.explainer: Explainer | None = _explainer(heads, shown)
        self.map_cells = max(head.map_cells() for head in heads) if self.explainer else 0

    async def look(self, pixels_B: Sequence[Mapping[int, np.ndarray]], whole: bool) -> list[list[Seen]]:
        """What each member sees of each image, which comes in all `sizes`: M lists of B."""
        wanted = [info.preprocessing.size for info in self.infos]
        asked = [
            c.see(pixels[size], whole) for c, size in zip(self._couriers, wanted, strict=True) for pixels in pixels_B
        ]
        seen = await asyncio.gather(*asked)
        B = len(pixels_B)
        return [list(seen[start : start + B]) for start in range(0, len(seen), B)]

    async def look_closer(
        self,
        explanations: Sequence[Explanation],
        pixels_B: Sequence[Mapping[int, np.ndarray]],
        gradient: bool,
        perturb: bool,
    ) -> list[Explanation]:
        """The explanations of a request's images with what the similarities listed rest on."""

        async def of_member(member: int) -> dict[Piece, Closer]:
            ref, size = self.refs[member], self.infos[member].preprocessing.size
            found: dict[Piece, Closer] = {}
            for image, pixels in enumerate(pixels_B):
                pieces = [p._replace(image=0) for p in pieces_of(explanations, member) if p.image == image]
                call = partial(self._ask_closer[member], ref, pieces, gradient, perturb, *in_parts([pixels[size]]))
                seen = await _answered(call, member)
                found |= {p._replace(image=image): closer for p, closer in zip(pieces, seen, strict=True)}
            return found

        return filled(explanations, await asyncio.gather(*map(of_member, range(len(self.refs)))))

    def scores(self, seen_MB: Sequence[Sequence[Seen]]) -> Scores:
        members = [torch.from_numpy(np.stack([seen.logits_K for seen in row])) for row in seen_MB]
        best_MB = [torch.tensor([float(seen.best) for seen in row]) for row in seen_MB]
        return sum_up(members, best_MB, self.trust)

    def views(self, seen_MB: Sequence[Sequence[Seen]]) -> list[View]:
        """One a member, as `Predictor.views` gives them."""
        parts_M = [list(zip(*row, strict=True))[: len(View._fields)] for row in seen_MB]
        return [View(*(torch.from_numpy(np.stack(part)) for part in parts)) for parts in parts_M]


async def _ask(ask: Ask, member: int, ref: BundleRef, pixels_BSS3: Sequence[np.ndarray], whole: bool) -> list[Seen]:
    return await _answered(partial(ask, ref, whole, len(pixels_BSS3), *in_parts(pixels_BSS3)), member)


async def _answered(call: Callable[[], Awaitable[_Found]], member: int) -> _Found:
    """What a replica of the member answers; if one can't, another is asked."""
    for attempt in range(ATTEMPTS):
        try:
            return await call()
        except BackPressureError:
            raise overloaded(f"member {member} has too many images waiting; try again") from None
        except (RayActorError, BrokenMember, DeploymentUnavailableError):
            # The replica died, broke or is gone: there is another, or will be in a moment.
            await asyncio.sleep(0.1 * 2**attempt)
    raise not_ready(f"member {member} has no replica that answers; try again")


def combined_hash(bundles: Sequence[BundleRef]) -> str:
    """Short name of a set of bundles, in their order."""
    return hashlib.sha256(" ".join(ref.hash for ref in bundles).encode()).hexdigest()[:12]


def _explainer(bundles: Sequence[BundleHead], shown: Shown) -> Explainer | None:
    """None where a member is a black-box baseline."""
    heads = [head for bundle in bundles if (head := _head(bundle)) is not None]
    if len(heads) < len(bundles):
        return None
    sources = [Sources(bundle.table, bundle.info.provenance, shown) for bundle in bundles]
    return Explainer(heads, [bundle.info for bundle in bundles], sources)


def _head(bundle: BundleHead) -> Head | None:
    if bundle.prototypes_PDhw is None or bundle.weights_KP is None:
        return None
    model, classes_P = bundle.info.architecture, np.array(bundle.info.prototype_class, np.int64)
    return Head(bundle.prototypes_PDhw, bundle.weights_KP, classes_P, model.similarity, model.epsilon)


async def all_ready(ready: Sequence[Callable[[BundleRef], Awaitable[bool]]], bundles: Sequence[BundleRef]) -> None:
    """Returns once every member holds its bundle."""
    await asyncio.gather(*(is_ready(ref) for is_ready, ref in zip(ready, bundles, strict=True)))
