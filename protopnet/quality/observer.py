"""What the quality metrics need to see of images, through the network: places, nearest patches, curves.

Knows no Ray: a pass hands over batches, the metrics (`quality.py`) get plain values. Images without key points or a mask
are only looked at for their curves. What is drawn at random comes from the seed and the image's id.

Legend: B images, n of them with key points or a mask, P prototypes, K classes, U pairs (image, prototype).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protopnet.evidence.explanation import explaining
from protopnet.evidence.pieces import Piece
from protopnet.evidence.ranking import Head, View
from protopnet.evidence.records import MapKind
from protopnet.model.boxes import activation_boxes, upsample
from protopnet.model.prototypes import map_size
from protopnet.predictor import Predictor
from protopnet.quality.key_points import middles, peaks
from protopnet.quality.metrics import EVIDENCE, NEAREST
from protopnet.quality.perturbations import deletion_and_insertion, only_in_focus, overlaps, with_noise

Record = dict[str, Any]  # what was seen of one image, a value a column


class Observer:
    """A bundle, looked at while it classifies. Batches are filled up to `batch_size`, so that an image's numbers don't
    depend on the others in its batch."""

    def __init__(self, predictor: Predictor, batch_size: int, seed: int, map: MapKind = "gradient") -> None:
        self.predictor, self.batch_size, self.seed, self.map = predictor, batch_size, seed, map
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
        that have key points or a mask, and of those whose curves are wanted."""
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
            self._curves(records[place], images_B3HW[place], View(*(part[place : place + 1] for part in view)))
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

    def _curves(self, record: Record, image_3HW: Tensor, view: View) -> None:
        """Deletion and insertion of the predicted class, by the maps of its prototypes, each with the weight of its points;
        and how far these maps' boxes move when what is beside them is blurred. view: of this image alone."""
        label: int = record["prediction"]
        own = np.array(self.own_K[label], dtype=np.int64)
        if not len(own):
            return

        def probability(images_N3HW: Tensor) -> Tensor:
            return self.predictor.scores(images_N3HW).probabilities_BK[:, label]

        saliency_HW = self._saliency(image_3HW, view, label, own)
        record["deletion"], record["insertion"] = deletion_and_insertion(probability, image_3HW, saliency_HW)
        record["misalignment"] = self._misalignment(image_3HW, view.latent_BDHW, own)

    def _saliency(self, image_3HW: Tensor, view: View, label: int, own: np.ndarray) -> Tensor:
        """What the points of a class rest on, on the whole image."""
        connections_p = self.network.last_layer.weight[label, own]
        maps_pHW = self.head.maps(view.latent_BDHW, np.zeros(len(own), dtype=np.int64), own)
        if self.map == "gradient":
            points_p = (view.similarities_BP[0, own] * connections_p).clamp(min=0)
            columns = maps_pHW.shape[2]
            pieces = [
                Piece(0, p, cell // columns, cell % columns)
                for p, cell in zip(own.tolist(), view.index_BP[0, own].tolist(), strict=True)
            ]
            found = self.predictor.look_closer(0, image_3HW[None], pieces, gradient=True, perturb=False)
            maps_pHW = torch.from_numpy(np.array([piece.saliency_YX for piece in found])).to(image_3HW)
            weights_p = points_p if bool(points_p.any()) else torch.ones_like(points_p)  # a similarity below 0 has none
        else:
            weights_p = connections_p
        mean_1HW = (maps_pHW * weights_p[:, None, None]).sum(0, keepdim=True)
        return upsample(mean_1HW, *image_3HW.shape[1:])[0]

    def _misalignment(self, image_3HW: Tensor, latent_1DHW: Tensor, own: np.ndarray) -> list[float]:
        size = self.predictor.size
        boxes_p4 = activation_boxes(self.head.maps(latent_1DHW, np.zeros(len(own), dtype=np.int64), own), size)
        latent_pDHW = self.network.latent(only_in_focus(image_3HW, boxes_p4))
        moved_p4 = activation_boxes(self.head.maps(latent_pDHW, np.arange(len(own)), own), size)
        moved: list[float] = (1 - overlaps(boxes_p4, moved_p4)).tolist()
        return moved


def _evidence(points_P: Tensor) -> list[int]:
    """Prototypes with the most points, of those that have any."""
    order = points_P.sort(descending=True, stable=True).indices[:EVIDENCE]
    found: list[int] = order[points_P[order] > 0].tolist()
    return found


def _put(records: list[Record], name: str, values: Sequence[Any]) -> None:
    for record, value in zip(records, values, strict=True):
        record[name] = value
