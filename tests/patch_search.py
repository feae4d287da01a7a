"""Latent maps of some images and the patches of all of them nearest to some prototypes, found one by one."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from protopnet.passes.candidates import (
    local_nearest,
    merge_nearest,
)

Place = tuple[int, int, int]  # image, row, column
Candidate = tuple[float, int, int, int]  # distance and place


@dataclass
class Search:
    """Latent maps with labels, and prototypes with classes; image ids are the places in the list."""

    latents: torch.Tensor
    labels: np.ndarray
    prototypes: torch.Tensor
    classes: np.ndarray
    kind: str = "log"

    def nearest(
        self, k: int, images: np.ndarray | None = None, batch: int = 16, spare: int = 0, **options: bool
    ) -> pa.Table:
        """The map over batches of these images, and its reduce."""
        images = np.arange(len(self.labels)) if images is None else images
        cuts = [images[start : start + batch] for start in range(0, len(images), batch)]
        return merge_nearest([self.map(cut, k, spare=spare, **options) for cut in cuts], k, spare)

    def map(
        self, images: np.ndarray, k: int, any_class: bool = False, one_per_image: bool = False, spare: int = 0
    ) -> pa.Table:
        return local_nearest(
            self.latents[torch.from_numpy(images)],
            images,
            self.labels[images],
            self.prototypes,
            self.kind,
            k,
            prototype_class_P=None if any_class else self.classes,
            one_per_image=one_per_image,
            spare=spare,
        )

    def all_patches(self, prototype: int, any_class: bool = False) -> list[Candidate]:
        """Every patch that the prototype may see, the nearest first, in float64 by the definition."""
        p = self.prototypes[prototype].double().numpy()
        _, h, w = p.shape
        found = []
        for image, latent in enumerate(self.latents.double().numpy()):
            if any_class or self.labels[image] == self.classes[prototype]:
                for row in range(latent.shape[1] - h + 1):
                    for column in range(latent.shape[2] - w + 1):
                        patch = latent[:, row : row + h, column : column + w]
                        found.append((float(((patch - p) ** 2).sum()), image, row, column))
        return sorted(found)


def places(table: pa.Table, prototype: int) -> list[Place]:
    own = table.filter(pa.compute.equal(table["prototype"], prototype))
    return list(zip(own["image_id"].to_pylist(), own["row"].to_pylist(), own["column"].to_pylist(), strict=True))
