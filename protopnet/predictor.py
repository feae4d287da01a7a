"""Bundles -> scores: the one class that evaluation, bulk scoring and serving share.

Knows no Ray: whoever calls it brings the pixels and decides where it runs.

Legend: B images, K classes, M ensemble members.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protopnet.errors import UserError
from protopnet.model.bundle import Bundle, load_bundle
from protopnet.model.network import placed
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
                raise UserError(
                    "the bundles of an ensemble must take images of the same size (model.image_size)"
                )
        self.bundles = list(bundles)
        self.classes: list[str] = list(first.classes)
        self.size: int = first.preprocessing.size

    @classmethod
    def load(cls, uris: Sequence[str]) -> "Predictor":
        return cls([load_bundle(uri) for uri in uris])

    def to(self, device: torch.device) -> "Predictor":
        for bundle in self.bundles:
            placed(bundle.network, device)
        return self

    @torch.inference_mode()
    def scores(self, images_B3HW: torch.Tensor) -> Scores:
        """Scores of normalised images (`imaging.normalise`), in true float32."""
        with true_float32():
            members_MBK = torch.stack([bundle.network(images_B3HW).logits_BK for bundle in self.bundles])
        return Scores(members_MBK.sum(0), members_MBK)
