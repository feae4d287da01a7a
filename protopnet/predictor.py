"""Bundles -> scores and evidence: the one class that evaluation, bulk scoring and serving share.

Knows no Ray: whoever calls it brings the pixels and decides where it runs.

Legend: B images, K classes, M ensemble members.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from protopnet.errors import UserError
from protopnet.evidence.explanation import Explainer, Explanation, explaining
from protopnet.evidence.ranking import View
from protopnet.imaging import Preprocessing
from protopnet.model.bundle import Bundle, BundleInfo, load_bundle
from protopnet.model.network import ProtoPNet, placed
from protopnet.model.prototypes import true_float32

Precision = Literal["float32", "bf16"]


@dataclass(frozen=True)
class Scores:
    """What an ensemble says of a batch: the sum of its members' logits, and each member's own."""

    logits_BK: torch.Tensor
    members_MBK: torch.Tensor

    @property
    def probabilities_BK(self) -> torch.Tensor:
        return self.logits_BK.softmax(1)


class Predictor:
    """One bundle, or several as an ensemble whose logits are added up."""

    def __init__(self, bundles: Sequence[Bundle]):
        check_one_task([bundle.info for bundle in bundles])
        first = bundles[0].info
        self.bundles = list(bundles)
        self.classes: list[str] = list(first.classes)
        self.preprocessing: Preprocessing = first.preprocessing
        self.size: int = first.preprocessing.size

    @classmethod
    def load(cls, uris: Sequence[str]) -> "Predictor":
        return cls([load_bundle(uri) for uri in uris])

    def to(self, device: torch.device) -> "Predictor":
        for bundle in self.bundles:
            placed(bundle.network, device)
        self.__dict__.pop("explainer", None)  # its tensors are those of before the move
        return self

    @torch.inference_mode()
    def scores(
        self, images_B3HW: torch.Tensor, *, precision: Precision = "float32", pad_to: int | None = None
    ) -> Scores:
        """Scores of normalised images (`imaging.normalise`).

        precision: of the backbones; what follows them is float32 always. pad_to: fill a smaller batch up to this
        many images. Sums come out differently in the last bits for another size of batch; for one size, an image's
        scores don't depend on the others in its batch.
        """
        padded_B3HW, images = _padded(images_B3HW, pad_to), len(images_B3HW)
        with _computing(precision, images_B3HW.device):
            members = [bundle.network(padded_B3HW).logits_BK[:images] for bundle in self.bundles]
        return sum_up(members)

    @cached_property
    def explainer(self) -> Explainer:
        """Raises `UserError` where a bundle is a black-box baseline."""
        return Explainer(self.bundles)

    @torch.inference_mode()
    def views(
        self, images_B3HW: torch.Tensor, *, precision: Precision = "float32", pad_to: int | None = None
    ) -> list[View]:
        """What each member sees of normalised images: scores, and all that evidence is made of. Options as `scores`."""
        padded_B3HW, images = _padded(images_B3HW, pad_to), len(images_B3HW)
        with _computing(precision, images_B3HW.device):
            views = [_view(explaining(bundle), padded_B3HW) for bundle in self.bundles]
        return [View(*(tensor_B[:images] for tensor_B in view)) for view in views]

    def explain(self, images_B3HW: torch.Tensor, sizes: Sequence[tuple[int, int]], **options: Any) -> list[Explanation]:
        """Scores and evidence of normalised images whose width and height as uploaded were `sizes`.

        Options: as of `Explainer.explain`. One forward pass; evidence for its outputs costs little more.
        """
        return self.explainer.explain(self.views(images_B3HW), sizes, **options)


def sum_up(members: Sequence[torch.Tensor]) -> Scores:
    """The scores of an ensemble whose members' logits, B x K each, are these."""
    members_MBK = torch.stack(list(members))
    return Scores(members_MBK.sum(0), members_MBK)


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
    """`UserError` unless these bundles can be an ensemble: the same classes, and the same input."""
    if not infos:
        raise UserError("a predictor needs at least one bundle")
    for info in infos[1:]:
        if info.classes != infos[0].classes:
            raise UserError("the bundles of an ensemble must have the same classes in the same order")
        if info.preprocessing != infos[0].preprocessing:
            raise UserError("the bundles of an ensemble must take images of the same size (model.image_size)")


def _view(network: ProtoPNet, images_B3HW: torch.Tensor) -> View:
    latent_BDHW = network.latent(images_B3HW)
    logits_BK, _, similarities_BP, index_BP = network.classify(latent_BDHW)
    assert similarities_BP is not None  # as of a baseline
    assert index_BP is not None
    return View(logits_BK, similarities_BP, index_BP, latent_BDHW)
