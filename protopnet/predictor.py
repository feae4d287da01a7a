"""Bundles -> scores and evidence: the one class that evaluation, bulk scoring and serving share.

Knows no Ray: whoever calls it brings the pixels and decides where it runs.

Legend: B images, K classes, M ensemble members.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from protopnet.errors import UserError
from protopnet.explain.evidence import Explainer, Explanation, explaining
from protopnet.explain.ranking import View
from protopnet.model.bundle import Bundle, load_bundle
from protopnet.model.network import ProtoPNet, placed
from protopnet.model.prototypes import true_float32


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
        if not bundles:
            raise UserError("a predictor needs at least one bundle")
        first = bundles[0].info
        for bundle in bundles[1:]:
            if bundle.info.classes != first.classes:
                raise UserError("the bundles of an ensemble must have the same classes in the same order")
            if bundle.info.preprocessing != first.preprocessing:
                raise UserError("the bundles of an ensemble must take images of the same size (model.image_size)")
        self.bundles = list(bundles)
        self.classes: list[str] = list(first.classes)
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
    def scores(self, images_B3HW: torch.Tensor) -> Scores:
        """Scores of normalised images (`imaging.normalise`), in true float32."""
        with true_float32():
            members_MBK = torch.stack([bundle.network(images_B3HW).logits_BK for bundle in self.bundles])
        return Scores(members_MBK.sum(0), members_MBK)

    @cached_property
    def explainer(self) -> Explainer:
        """Raises `UserError` where a bundle is a black-box baseline."""
        return Explainer(self.bundles)

    @torch.inference_mode()
    def views(self, images_B3HW: torch.Tensor) -> list[View]:
        """What each member sees of normalised images: scores, and all that evidence is made of."""
        with true_float32():
            return [_view(explaining(bundle), images_B3HW) for bundle in self.bundles]

    def explain(self, images_B3HW: torch.Tensor, sizes: Sequence[tuple[int, int]], **options: Any) -> list[Explanation]:
        """Scores and evidence of normalised images whose width and height as uploaded were `sizes`.

        Options: as of `Explainer.explain`. One forward pass; evidence for its outputs costs little more.
        """
        return self.explainer.explain(self.views(images_B3HW), sizes, **options)


def _view(network: ProtoPNet, images_B3HW: torch.Tensor) -> View:
    latent_BDHW = network.latent(images_B3HW)
    logits_BK, _, similarities_BP, index_BP = network.classify(latent_BDHW)
    assert similarities_BP is not None  # as of a baseline
    assert index_BP is not None
    return View(logits_BK, similarities_BP, index_BP, latent_BDHW)
