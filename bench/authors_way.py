"""Plain implementations of the paper's authors' ways, written from the description in the notes: to measure ours against.

PyTorch's own precision (cuDNN may round to TF32) and memory order. See `authors_push.py` for their push.

Legend: B images, P prototypes, K classes, D channels, H W cells.
"""

import copy
import heapq
import io
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from authors_push import EPSILON, PERCENTILE, distances, maps
from PIL import Image
from torch import Tensor

from protopnet.datasets.augment import Warp
from protopnet.model.network import ProtoPNet

RATE = 1e-4
COEFFICIENTS = {"cross_entropy": 1.0, "cluster": 0.8, "separation": -0.08, "l1": 1e-4}


class AuthorsNetwork:
    """A copy of a network, used as the authors use theirs."""

    def __init__(self, network: ProtoPNet) -> None:
        self.network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
        prototype_class_P, classes = self.network.prototype_class, self.network.last_layer.out_features
        self.identity_PK = F.one_hot(prototype_class_P, classes).float()
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=RATE)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, least distances, and the whole map of distances."""
        latent_BDHW = self.network.add_on(self.network.backbone(images_B3HW))
        distances_BPHW = distances(latent_BDHW, self.network.prototypes)
        size = tuple(distances_BPHW.shape[2:])
        least_BP = -F.max_pool2d(-distances_BPHW, kernel_size=size).flatten(1)
        return self.network.last_layer(_log(least_BP)), least_BP, distances_BPHW

    def joint_step(self, images_B3HW: Tensor, labels_B: Tensor) -> None:
        """One batch of their joint epoch, with what it logs."""
        logits_BK, least_BP, _ = self.forward(images_B3HW)
        furthest = float(self.network.prototypes[0].numel())
        own_BP = self.identity_PK[:, labels_B].t()
        inverted_B = torch.max((furthest - least_BP) * own_BP, dim=1).values
        inverted_others_B = torch.max((furthest - least_BP) * (1 - own_BP), dim=1).values
        average_B = (least_BP * (1 - own_BP)).sum(1) / (1 - own_BP).sum(1)
        terms = {
            "cross_entropy": F.cross_entropy(logits_BK, labels_B),
            "cluster": torch.mean(furthest - inverted_B),
            "separation": torch.mean(furthest - inverted_others_B),
            "l1": (self.network.last_layer.weight * (1 - self.identity_PK.t())).norm(p=1),
        }
        self.optimiser.zero_grad()
        sum(COEFFICIENTS[name] * term for name, term in terms.items()).backward()  # type: ignore[union-attr]
        self.optimiser.step()
        [term.item() for term in (*terms.values(), average_B.mean())]

    def last_layer_step(self, images_B3HW: Tensor, labels_B: Tensor) -> None:
        """One batch of their last-layer epochs: the whole network forward, the connections back."""
        with torch.no_grad():
            latent_BDHW = self.network.add_on(self.network.backbone(images_B3HW))
            least_BP = distances(latent_BDHW, self.network.prototypes).flatten(2).min(dim=2).values
        weight_KP = self.network.last_layer.weight.detach().requires_grad_()
        l1 = (weight_KP * (1 - self.identity_PK.t())).norm(p=1)
        (F.cross_entropy(_log(least_BP) @ weight_KP.t(), labels_B) + COEFFICIENTS["l1"] * l1).backward()

    @torch.no_grad()
    def predict(self, images_B3HW: Tensor) -> Tensor:
        return self.forward(images_B3HW)[0].cpu()

    @torch.no_grad()
    def explain(self, images_B3HW: Tensor, side: int, prototypes: int) -> list[tuple[int, ...]]:
        """Image after image, the boxes of the strongest prototypes of the two best classes, from maps enlarged by PIL."""
        boxes = []
        for image_3HW in images_B3HW:
            logits_1K, least_1P, distances_1PHW = self.forward(image_3HW[None])
            activation_P = _log(least_1P)[0].cpu().numpy()
            maps_PHW = _log(distances_1PHW)[0].cpu().numpy()
            for label in logits_1K[0].topk(2).indices.tolist():
                points_P = activation_P * self.network.last_layer.weight[label].cpu().numpy()
                boxes += [_box(maps_PHW[p], side) for p in np.argsort(-points_P)[:prototypes]]
        return boxes


def prototype_layer(latent_BDHW: Tensor, prototypes_PD11: Tensor) -> None:
    """Forward and backward, the whole map of distances by autograd."""
    distances_BPHW = distances(latent_BDHW, prototypes_PD11)
    least_BP = -F.max_pool2d(-distances_BPHW, kernel_size=tuple(distances_BPHW.shape[2:])).flatten(1)
    _log(least_BP).sum().backward()


def nearest_of_all(network: ProtoPNet, batches: Iterable[tuple[np.ndarray, np.ndarray]], k: int) -> list[list]:
    """Their search for the nearest patches of any class: a heap a prototype, all distances in numpy."""
    heaps: list[list] = [[] for _ in network.prototypes]
    number = 0
    for pixels_BHWC, labels_B in batches:
        _, distances_BPHW = maps(network, pixels_BHWC)
        for distances_PHW, label in zip(distances_BPHW.cpu().numpy(), labels_B, strict=True):
            number += 1
            for prototype, distances_HW in enumerate(distances_PHW):
                row, column = np.unravel_index(distances_HW.argmin(), distances_HW.shape)
                found = (-float(distances_HW[row, column]), number, int(label), int(row), int(column))
                (heapq.heappush if len(heaps[prototype]) < k else heapq.heappushpop)(heaps[prototype], found)
    return heaps


def augmented(photo: Image.Image, warp: Warp, size: int) -> np.ndarray:
    """The same view as their offline set has it: warped at full size, written and read as JPEG, then resized.

    One interpolation at full size, where the package Augmentor does two; that favours it.
    """
    width, height = photo.size
    to_source = np.diag([width, height, 1.0]) @ warp.matrix @ np.diag([1 / width, 1 / height, 1.0])
    coefficients = tuple((to_source / to_source[2, 2]).ravel()[:8])
    full = photo.transform((width, height), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    full.save(file, "JPEG")
    return np.asarray(Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def on_device(photos_BHW3: Tensor, matrices_B33: Tensor, size: int) -> Tensor:
    """The same views as `protopnet.datasets.augment.apply` makes, but for its reduction, a batch at a time on a device."""
    middle = (torch.arange(size, device=photos_BHW3.device) + 0.5) / size
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    places_n3 = torch.stack([x, y, torch.ones_like(x)], dim=-1).flatten(0, 1)
    source_Bn3 = places_n3 @ matrices_B33.transpose(1, 2)
    grid_BYX2 = (2 * source_Bn3[..., :2] / source_Bn3[..., 2:] - 1).unflatten(1, (size, size))
    photos_B3HW = photos_BHW3.permute(0, 3, 1, 2).float()
    warped = F.grid_sample(photos_B3HW, grid_BYX2, mode="bilinear", padding_mode="border", align_corners=False)
    return warped.round().to(torch.uint8).permute(0, 2, 3, 1)


def _log(distances_any: Tensor) -> Tensor:
    return torch.log((distances_any + 1) / (distances_any + EPSILON))


def _box(map_HW: np.ndarray, side: int) -> tuple[int, ...]:
    large = np.asarray(Image.fromarray(map_HW).resize((side, side), Image.Resampling.BICUBIC))
    rows, columns = np.nonzero(large >= np.percentile(large, PERCENTILE))
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1
