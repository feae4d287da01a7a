"""What the quality metrics need to see of images, through the network: places, nearest patches, curves.

Knows no Ray: a pass hands over batches, the metrics (`quality.py`) get plain values. Images without key points are only
looked at for their curves. What is drawn at random comes from the seed and the image's id.

Legend: B images, n of them with key points, P prototypes, K classes, U pairs (image, prototype).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from protopnet.evidence.explanation import explaining
from protopnet.evidence.ranking import Head
from protopnet.model.boxes import upsample
from protopnet.model.prototypes import map_size
from protopnet.predictor import Predictor
from protopnet.quality.key_points import middles, peaks
from protopnet.quality.metrics import EVIDENCE, NEAREST
from protopnet.quality.perturbations import deletion_and_insertion, with_noise

Record = dict[str, Any]  # what was seen of one image, a value a column


class Observer:
    """A bundle, looked at while it classifies. Batches are filled up to `batch_size`, so that an image's numbers don't
    depend on the others in its batch."""

    def __init__(self, predictor: Predictor, batch_size: int, seed: int) -> None:
        self.predictor, self.batch_size, self.seed = predictor, batch_size, seed
        self.network = explaining(predictor.bundles[0])
        self.head = Head.of(self.network)
        classes_P = self.network.prototype_class.cpu().numpy()
        self.own_K = [np.flatnonzero(classes_P == label).tolist() for label in range(len(predictor.classes))]

    def observe(
        self,
        images_B3HW: Tensor,
        image_ids_B: Sequence[int],
        labels_B: Sequence[int],
        with_points: Sequence[int],
        with_curves: Sequence[int],
    ) -> list[Record]:
        """Records of a batch, with the logits of each image. with_points, with_curves: places in the batch of the images
        that have key points, and of those whose curves are wanted."""
        (view,) = self.predictor.views(images_B3HW, pad_to=self.batch_size)
        prediction_B = view.logits_BK.argmax(1)
        records: list[Record] = [
            {"logits": logits, "prediction": prediction}
            for logits, prediction in zip(view.logits_BK.cpu().numpy(), prediction_B.tolist(), strict=True)
        ]
        if with_points:
            seen = [records[place] for place in with_points]
            own = [self.own_K[labels_B[place]] for place in with_points]
            points_nP = self.network.points(view.similarities_BP, prediction_B)[with_points]
            ids_n = [image_ids_B[place] for place in with_points]
            noisy_n3HW = with_noise(images_B3HW[with_points], ids_n, self.seed, self.predictor.preprocessing.std)
            (noisy,) = self.predictor.views(noisy_n3HW, pad_to=self.batch_size)
            latent_nDHW = view.latent_BDHW[with_points]
            _put(seen, "own", own)
            _put(seen, "own_places", self._peaks(latent_nDHW, own))
            _put(seen, "own_contrast", self._contrasts(latent_nDHW, own))
            _put(seen, "own_places_noisy", self._peaks(noisy.latent_BDHW, own))
            _put(seen, "evidence_places", self._peaks(latent_nDHW, [_evidence(points_P) for points_P in points_nP]))
            self._nearest(seen, latent_nDHW, view.similarities_BP[with_points], view.index_BP[with_points])
        for place in with_curves:
            self._curves(records[place], images_B3HW[place], view.latent_BDHW[place])
        return records

    def _peaks(self, latent_nDHW: Tensor, wanted_n: list[list[int]]) -> list[np.ndarray]:
        """Where the wanted prototypes of each image see themselves."""
        return self._of_maps(latent_nDHW, wanted_n, lambda maps_UHW: peaks(maps_UHW, self.predictor.size), (2,))

    def _contrasts(self, latent_nDHW: Tensor, wanted_n: list[list[int]]) -> list[np.ndarray]:
        """How far the best similarity of each is above the mean of its map."""
        return self._of_maps(
            latent_nDHW, wanted_n, lambda m_UHW: (m_UHW.amax((1, 2)) - m_UHW.mean((1, 2))).cpu().numpy()
        )

    def _of_maps(
        self,
        latent_nDHW: Tensor,
        wanted_n: list[list[int]],
        measure: Callable[[Tensor], np.ndarray],
        shape: tuple[int, ...] = (),
    ) -> list[np.ndarray]:
        """Something of the maps of the wanted prototypes of each image."""
        counts = [len(wanted) for wanted in wanted_n]
        if not sum(counts):
            return [np.empty((0, *shape)) for _ in wanted_n]
        image_U, prototype_U = np.repeat(np.arange(len(counts)), counts), np.concatenate(wanted_n).astype(np.int64)
        return np.split(measure(self.head.maps(latent_nDHW, image_U, prototype_U)), np.cumsum(counts)[:-1])

    def _nearest(self, seen: list[Record], latent_nDHW: Tensor, similarities_nP: Tensor, index_nP: Tensor) -> None:
        """To each image the prototypes for which it is among the most similar ones of this batch."""
        # Stable, and images come in the order of their ids: of equal ones the first.
        order = similarities_nP.sort(dim=0, descending=True, stable=True)
        patch_NP = index_nP.gather(0, order.indices[:NEAREST]).cpu().numpy()
        image_NP, similarity_NP = (t[:NEAREST].cpu().numpy() for t in (order.indices, order.values))
        shape = map_size(latent_nDHW, self.network.prototypes)
        latent_shape = (latent_nDHW.shape[2], latent_nDHW.shape[3])
        for image, record in enumerate(seen):
            rank, prototype = np.nonzero(image_NP == image)
            record["nearest"] = prototype
            record["nearest_similarity"] = similarity_NP[rank, prototype]
            record["nearest_places"] = middles(patch_NP[rank, prototype], shape, latent_shape)

    def _curves(self, record: Record, image_3HW: Tensor, latent_DHW: Tensor) -> None:
        """Deletion and insertion of the predicted class, by the mean map of its prototypes."""
        label: int = record["prediction"]
        own = np.array(self.own_K[label], dtype=np.int64)
        if not len(own):
            return

        def probability(images_N3HW: Tensor) -> Tensor:
            return self.predictor.scores(images_N3HW).probabilities_BK[:, label]

        maps_pHW = self.head.maps(latent_DHW[None], np.zeros(len(own), dtype=np.int64), own)
        saliency_HW = upsample(maps_pHW.mean(0, keepdim=True), *image_3HW.shape[1:])[0]
        record["deletion"], record["insertion"] = deletion_and_insertion(probability, image_3HW, saliency_HW)


def _evidence(points_P: Tensor) -> list[int]:
    """Prototypes with the most points, of those that have any."""
    order = points_P.sort(descending=True, stable=True).indices[:EVIDENCE]
    found: list[int] = order[points_P[order] > 0].tolist()
    return found


def _put(records: list[Record], name: str, values: Sequence[Any]) -> None:
    for record, value in zip(records, values, strict=True):
        record[name] = value
