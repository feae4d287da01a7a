"""Bundles -> scores and evidence: the one class that evaluation, bulk scoring and serving share.

Knows no Ray: whoever calls it brings the pixels and decides where it runs.

Legend: B images, K classes, M ensemble members.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from protopnet import imaging
from protopnet.errors import UserError
from protopnet.evidence import changes, saliency
from protopnet.evidence.explanation import Explainer, explaining
from protopnet.evidence.pieces import Closer, Piece, filled, pieces_of
from protopnet.evidence.ranking import View
from protopnet.evidence.records import Explanation, MapKind
from protopnet.evidence.sources import Shown
from protopnet.imaging import Preprocessing
from protopnet.model.bundle import Bundle, BundleInfo, load_bundle
from protopnet.model.calibration import Trust
from protopnet.model.network import ProtoPNet, placed
from protopnet.model.prototypes import true_float32

Precision = Literal["float32", "bf16"]
PIECES = 4  # looked at more closely at a time: a pass with gradients keeps what all layers gave
Images = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """What an ensemble says of a batch: the sum of its members' logits, and each member's own.

    best_MB: similarity of each image to the prototype it is most like, of each member; NaN for a baseline.
    """

    logits_BK: torch.Tensor
    members_MBK: torch.Tensor
    best_MB: torch.Tensor
    trust: Trust

    @property
    def probabilities_BK(self) -> torch.Tensor:
        return self.trust.probabilities(self.logits_BK)

    @property
    def unknown_B(self) -> torch.Tensor | None:
        """Which images look like nothing that it knows; None where it can't say."""
        return self.trust.unknown(self.best_MB)

    def only(self, keep_B: torch.Tensor) -> "Scores":
        """Of the images that a mask keeps."""
        keep_B = keep_B.to(self.logits_BK.device)
        return Scores(self.logits_BK[keep_B], self.members_MBK[:, keep_B], self.best_MB[:, keep_B], self.trust)


class Predictor:
    """One bundle, or several as an ensemble whose logits are added up.

    shown: what explanations tell of training images.
    """

    def __init__(self, bundles: Sequence[Bundle], shown: Shown | None = None):
        check_one_task([bundle.info for bundle in bundles])
        self.bundles, self.shown = list(bundles), shown or Shown()
        self.classes: list[str] = list(bundles[0].info.classes)
        self.inputs: list[Preprocessing] = [bundle.info.preprocessing for bundle in bundles]
        self.intensity = self.inputs[0].intensity
        self.sizes: tuple[int, ...] = tuple(dict.fromkeys(wanted.size for wanted in self.inputs))
        self.trust = Trust.of([bundle.info.calibration for bundle in bundles])

    @classmethod
    def load(cls, uris: Sequence[str], shown: Shown | None = None) -> "Predictor":
        return cls([load_bundle(uri) for uri in uris], shown)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input of all members; `UserError` where they don't agree."""
        if len(set(self.inputs)) > 1:
            raise UserError("the bundles of this ensemble take different images: take one of them at a time")
        return self.inputs[0]

    @property
    def size(self) -> int:
        """Side of the input, as `preprocessing`."""
        return self.preprocessing.size

    def look_at(self, photos: Sequence[Image.Image]) -> list[torch.Tensor]:
        """What each member takes of upright RGB images, for `scores`, `views` and `explain`."""
        pixels = {size: [imaging.resize(photo, size) for photo in photos] for size in self.sizes}
        return self.normalised({size: torch.from_numpy(np.stack(of_size)) for size, of_size in pixels.items()})

    def normalised(self, pixels: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """What each member takes of a batch, given as uint8 pixels in each of `sizes`. One tensor for members alike."""
        images = {wanted: imaging.normalise(pixels[wanted.size], wanted) for wanted in set(self.inputs)}
        return [images[wanted] for wanted in self.inputs]

    def to(self, device: torch.device) -> "Predictor":
        for bundle in self.bundles:
            placed(bundle.network, device)
        self.__dict__.pop("explainer", None)  # its tensors are those of before the move
        return self

    @torch.inference_mode()
    def scores(self, images: Images, *, precision: Precision = "float32", pad_to: int | None = None) -> Scores:
        """Scores of normalised images: one batch for all members, or one a member where they take different ones.

        precision: of the backbones; what follows them is float32 always. pad_to: fill a smaller batch up to this
        many images. Sums come out differently in the last bits for another size of batch; for one size, an image's
        scores don't depend on the others in its batch.
        """
        members = self._each(images, pad_to, precision, _scored)
        return sum_up([logits_BK for logits_BK, _ in members], [best_B for _, best_B in members], self.trust)

    @cached_property
    def explainer(self) -> Explainer:
        """Raises `UserError` where a bundle is a black-box baseline."""
        return Explainer.of(self.bundles, self.shown)

    @torch.inference_mode()
    def views(self, images: Images, *, precision: Precision = "float32", pad_to: int | None = None) -> list[View]:
        """What each member sees of normalised images: scores, and all that evidence is made of. Options as `scores`."""
        look = self._each(images, pad_to, precision, lambda bundle, padded_B3HW: _view(explaining(bundle), padded_B3HW))
        return [View(*parts) for parts in look]

    def _each(
        self,
        images: Images,
        pad_to: int | None,
        precision: Precision,
        compute: Callable[[Bundle, torch.Tensor], tuple[torch.Tensor, ...]],
    ) -> list[list[torch.Tensor]]:
        """What each member computes of its batch, filled up to `pad_to` images; without the rows of those."""
        of_members = self._of_members(images)
        padded = {id(batch): _padded(batch, pad_to) for batch in of_members}
        with _computing(precision, of_members[0].device):
            found = [compute(b, padded[id(batch)]) for b, batch in zip(self.bundles, of_members, strict=True)]
        return [[part[: len(batch)] for part in parts] for parts, batch in zip(found, of_members, strict=True)]

    def explain(
        self,
        images: Images,
        sizes: Sequence[tuple[int, int]],
        *,
        map: MapKind = "gradient",
        perturb: bool = False,
        **options: Any,
    ) -> list[Explanation]:
        """Scores and evidence of normalised images whose width and height as uploaded were `sizes`.

        Options: as of `Explainer.explain`. One forward pass; evidence for its outputs costs little more. Not so, for each
        prototype listed, maps by `gradient` (a pass forwards and back) and `perturb`, what its similarity rests on
        (six passes).
        """
        found = self.explainer.explain(self.views(images), sizes, **options)
        gradient = map == "gradient" and bool(options.get("maps"))
        if not gradient and not perturb:
            return found
        closer: list[dict[Piece, Closer]] = []
        for member, batch in enumerate(self._of_members(images)):
            pieces = pieces_of(found, member)
            seen = self.look_closer(member, batch, pieces, gradient=gradient, perturb=perturb)
            closer.append(dict(zip(pieces, seen, strict=True)))
        return filled(found, closer)

    def look_closer(
        self, member: int, images_B3HW: torch.Tensor, pieces: Sequence[Piece], *, gradient: bool, perturb: bool
    ) -> list[Closer]:
        """What a member's similarities at these places rest on. gradient: pixels; perturb: their qualities."""
        network, field = explaining(self.bundles[member]), self.explainer.fields[member]
        found = []
        for start in range(0, len(pieces), PIECES):
            some = pieces[start : start + PIECES]
            images_U3HW = images_B3HW[[piece.image for piece in some]]
            maps: Any = [None] * len(some)
            fallen: Sequence[Any] = [None] * len(some)
            if gradient:
                maps = saliency.small(saliency.saliency(network, images_U3HW, some)).cpu().numpy()
            if perturb:
                fallen = changes.falls(network, field, images_U3HW, some)
            found += [Closer(*each) for each in zip(maps, fallen, strict=True)]
        return found

    def _of_members(self, images: Images) -> list[torch.Tensor]:
        return [images] * len(self.bundles) if isinstance(images, torch.Tensor) else list(images)


def sum_up(members: Sequence[torch.Tensor], best_MB: Sequence[torch.Tensor], trust: Trust) -> Scores:
    """The scores of an ensemble whose members' logits, B x K each, are these, and their best similarities."""
    members_MBK = torch.stack(list(members))
    return Scores(members_MBK.sum(0), members_MBK, torch.stack(list(best_MB)), trust)


def _computing(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    return true_float32() if precision == "float32" else torch.autocast(device.type, torch.bfloat16)


def _padded(images_B3HW: torch.Tensor, size: int | None) -> torch.Tensor:
    """The images followed by empty ones, `size` in all; in the same memory order."""
    missing = (size or 0) - len(images_B3HW)
    if missing <= 0:
        return images_B3HW
    empty = torch.zeros_like(images_B3HW[:1]).expand(missing, -1, -1, -1)
    return torch.cat([images_B3HW, empty]).contiguous(memory_format=torch.channels_last)


def check_one_task(infos: Sequence[BundleInfo]) -> None:
    """`UserError` unless these bundles can be an ensemble: the same classes in the same order, the same intensities."""
    if not infos:
        raise UserError("a predictor needs at least one bundle")
    for info in infos[1:]:
        if info.classes != infos[0].classes:
            raise UserError("the bundles of an ensemble must have the same classes in the same order")
        if info.preprocessing.intensity != infos[0].preprocessing.intensity:
            raise UserError("the bundles of an ensemble must have been trained with the same data.intensity")


def _scored(bundle: Bundle, images_B3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    seen = bundle.network(images_B3HW)
    return seen.logits_BK, seen.best_B


def _view(network: ProtoPNet, images_B3HW: torch.Tensor) -> View:
    latent_BDHW = network.latent(images_B3HW)
    logits_BK, _, similarities_BP, index_BP = network.classify(latent_BDHW)
    assert similarities_BP is not None  # as of a baseline
    assert index_BP is not None
    return View(logits_BK, similarities_BP, index_BP, latent_BDHW)
