"""Start from data: add-on layers from principal directions, prototypes from k-means, before the first epoch.

Random prototypes start so far from every patch that the log similarity is flat and hardly teaches. One pass over
(a sample of) the training images gives backbone patches instead. Their principal directions go into the first
add-on convolution, each as a pair v and -v so that the ReLU loses nothing; the last convolution scales the two
halves into the steep part of the sigmoid. The k-means centres of each class's patches in that latent space are
the class's first prototypes.

Legend: N sampled patches, C backbone channels, D latent channels, P prototypes, h w prototype size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet
from protopnet.passes.image_pass import NetworkTask, PassOptions, run_pass

# Patches kept from the whole data set: 1 GB of float16 at 512 channels. Enough for 1,000 classes of 1,000 patches.
PATCH_BUDGET = 1_000_000
MOST_BYTES = 4 << 30  # of patches, where they are wide; one an image there is always
IMAGES_PER_CLASS = 64
KMEANS_STEPS = 25
_CHUNK = 4096  # patches that are looked at in more than float16 at a time


@dataclass(frozen=True)
class Shape:
    """How principal coordinates r >= 0 (after the ReLU) enter the latent map: sigmoid(gain * r + bias).

    `whiten`: each coordinate by its own standard deviation; else all by their common one, so that the latent
    map keeps the distances of the backbone's patches.
    """

    gain: float
    bias: float
    whiten: bool


# Measured on 20 classes of CUB with a pretrained ResNet-18: test accuracy at the start and after epochs of warm-up.
# Distances want the geometry of the backbone in the straight part of the sigmoid: 47, 80, 81, 85 % (at 1e-3; whitened
# with gain 2 and bias -2: 17, 62, 71, 73 % at 3e-3). Cosines want sparse maps: 36, 75, 79, 82, 83 % (at 3e-3). Gain 4
# and bias -4 classify 83 % before any training, but training first undoes that (68, 74, 78, 79 %).
DISTANCES = Shape(gain=1.0, bias=0.0, whiten=False)
COSINES = Shape(gain=2.0, bias=-2.0, whiten=True)


@dataclass
class PatchSample:
    """Backbone windows `features_NChw` with the class each comes from; `images` is how many images were seen."""

    features_NChw: torch.Tensor
    labels_N: np.ndarray
    images: int


@dataclass
class PatchTask(NetworkTask):
    """`ImageTask`: some windows of the backbone's feature map of each image, drawn by the image's id."""

    per_image: int
    seed: int

    def __call__(self, images_B3HW: torch.Tensor, rows: pa.Table) -> pa.Table:
        h, w = self.network.prototypes.shape[2:]
        windows_BLd = nn.functional.unfold(self.network.features(images_B3HW), (h, w)).transpose(1, 2)
        windows_BLd = windows_BLd.cpu().to(torch.float16)
        kept = []
        for windows_Ld, image_id in zip(windows_BLd, rows["image_id"].to_pylist(), strict=True):
            random = np.random.default_rng((self.seed, image_id))
            count = min(self.per_image, len(windows_Ld))
            kept.append(windows_Ld[np.sort(random.choice(len(windows_Ld), count, replace=False))].numpy().tobytes())
        return pa.table(
            {
                "image_id": rows["image_id"],
                "label": rows["label"],
                "windows": pa.array(kept, pa.large_binary()),
            }
        )


def sample_patches(
    network: ProtoPNet,
    rows: pa.Table,
    *,
    seed: int,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> PatchSample:
    """One pass over at most IMAGES_PER_CLASS images a class; the same sample for any sharding.

    Patches go to their place as blocks come in: they are in memory once.
    """
    rows = limit_per_class(rows, IMAGES_PER_CLASS, seed)
    per_image = patches_per_image(network, len(rows))
    rows = rows.sort_by("image_id")
    h, w = network.prototypes.shape[2:]
    features_nLChw = torch.empty(len(rows), per_image, network.backbone.channels, h, w, dtype=torch.float16)
    ids = rows["image_id"].to_numpy()
    for images, output in run_pass(rows, PatchTask(network, per_image, seed), options):
        for place, windows in zip(np.searchsorted(ids, output["image_id"].to_numpy()), output["windows"], strict=True):
            given = np.frombuffer(windows.as_buffer(), np.float16)
            features_nLChw[place].numpy().reshape(-1)[:] = given
        on_images(images)
    return PatchSample(features_nLChw.flatten(0, 1), np.repeat(rows["label"].to_numpy(), per_image), len(rows))


def patches_per_image(network: ProtoPNet, images: int) -> int:
    """How many patches of each of so many images are kept."""
    h, w = network.prototypes.shape[2:]
    rows, columns = network.backbone.map_shape(network.preprocessing.size)[1:]
    most = min(PATCH_BUDGET, MOST_BYTES // (2 * network.backbone.channels * h * w))
    return min(max(1, most // max(1, images)), (rows - h + 1) * (columns - w + 1))


def start_bytes(network: ProtoPNet, images: int) -> int:
    """What the driver holds of so many images: their patches in float16, and in float32 as the add-on layers see them."""
    depth, h, w = network.prototypes.shape[1:]
    return images * patches_per_image(network, images) * h * w * (2 * network.backbone.channels + 4 * depth)


def limit_per_class(rows: pa.Table, limit: int, seed: int) -> pa.Table:
    """At most `limit` rows of each class, drawn by seed, in the order of the table."""
    labels = rows["label"].to_numpy()
    random = np.random.default_rng(seed)
    kept = [random.permutation(np.flatnonzero(labels == label))[:limit] for label in np.unique(labels)]
    return rows.take(np.sort(np.concatenate(kept)))


def start_from_patches(network: ProtoPNet, sample: PatchSample, seed: int) -> None:
    """Set the add-on layers and the prototypes of the network from a sample of patches."""
    mean_C, directions_CK, deviations_K = principal_directions(sample.features_NChw)
    shape = COSINES if network.kind == "cosine" else DISTANCES
    set_add_on(network.add_on, mean_C, directions_CK, deviations_K, shape)
    with torch.no_grad():
        network.prototypes.copy_(class_centres(network, latent_windows(network, sample), sample.labels_N, seed))


@torch.no_grad()
def latent_windows(network: ProtoPNet, sample: PatchSample) -> torch.Tensor:
    """The patches as the add-on layers see them, N x Dhw."""
    latent_Nd = torch.empty(len(sample.labels_N), network.prototypes[0].numel())
    for own, chunk in zip(latent_Nd.split(_CHUNK), sample.features_NChw.split(_CHUNK), strict=True):
        own.copy_(network.add_on(chunk.float()).flatten(1))
    return latent_Nd


def principal_directions(cells_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (C), directions as columns (C x C, largest variance first) and standard deviations (C).

    Of N x C cells, or of the cells of N x C x h x w windows; from their moments, in float64.
    """
    count, channels = cells_NC.numel() // cells_NC.shape[1], cells_NC.shape[1]
    sum_C, scatter_CC = torch.zeros(channels).double(), torch.zeros(channels, channels).double()
    for chunk in cells_NC.split(_CHUNK):
        sum_C += chunk.sum((0, *range(2, chunk.dim())), dtype=torch.float64)
    mean_C = sum_C / count
    for chunk in cells_NC.split(_CHUNK):
        centred_nC = chunk.movedim(1, -1).reshape(-1, channels).double() - mean_C
        scatter_CC.addmm_(centred_nC.T, centred_nC)
    variances_C, directions_CC = torch.linalg.eigh(scatter_CC / max(1, count - 1))
    deviations_C = variances_C.clamp_min(0).sqrt().flip(0)
    return mean_C.float(), directions_CC.flip(1).float(), deviations_C.float()


def set_add_on(
    add_on: nn.Module,
    mean_C: torch.Tensor,
    directions_CC: torch.Tensor,
    deviations_C: torch.Tensor,
    shape: Shape = COSINES,
) -> None:
    """Principal coordinates into the first convolution, the identity into those between, the gain into the last."""
    check_directions(add_on)
    first, *middle, last = _convolutions(add_on)
    pairs = math.ceil(first.out_channels / 2)
    # Directions without variance (fewer patches than channels) would be noise blown up by whitening.
    scale_k = deviations_C[:pairs].clamp_min(1e-2 * float(deviations_C[0]) + 1e-12)
    if not shape.whiten:
        scale_k = scale_k.square().mean().sqrt().expand(pairs)
    rows_kC = directions_CC[:, :pairs].T / scale_k[:, None]
    weight_2kC = torch.stack([rows_kC, -rows_kC], dim=1).flatten(0, 1)[: first.out_channels]
    with torch.no_grad():
        first.weight.copy_(weight_2kC.view_as(first.weight))
        assert first.bias is not None
        first.bias.copy_(-(weight_2kC @ mean_C))
        for convolution in middle:
            _set_identity(convolution, 1.0, 0.0)
        _set_identity(last, shape.gain, shape.bias)


def check_directions(add_on: nn.Module) -> None:
    """`UserError` if the add-on layers have more channels than the backbone has directions and their negatives."""
    first = _convolutions(add_on)[0]
    if first.out_channels > 2 * first.in_channels:
        raise UserError(
            f"model.prototype_depth {first.out_channels} is too large for model.start data: the {first.in_channels} "
            f"channels of the backbone are enough for {2 * first.in_channels}; lower it, or set model.start to random"
        )


def _convolutions(add_on: nn.Module) -> list[nn.Conv2d]:
    return [module for module in add_on.modules() if isinstance(module, nn.Conv2d)]


def _set_identity(convolution: nn.Conv2d, gain: float, bias: float) -> None:
    convolution.weight.copy_(gain * torch.eye(convolution.out_channels, convolution.in_channels)[:, :, None, None])
    assert convolution.bias is not None
    convolution.bias.fill_(bias)


def class_centres(network: ProtoPNet, latent_Nd: torch.Tensor, labels_N: np.ndarray, seed: int) -> torch.Tensor:
    """k-means centres of each class's windows in the order of the class's prototypes, as P x D x h x w."""
    prototype_class = network.prototype_class.cpu().numpy()
    centres_Pd = torch.empty(len(prototype_class), latent_Nd.shape[1])
    for label in np.unique(prototype_class):
        own = np.flatnonzero(prototype_class == label)
        points = latent_Nd[torch.from_numpy(labels_N == label)]
        centres_Pd[torch.from_numpy(own)] = kmeans(points, len(own), np.random.default_rng((seed, int(label))))
    return centres_Pd.view_as(network.prototypes)


def kmeans(points_Nd: torch.Tensor, k: int, random: np.random.Generator) -> torch.Tensor:
    """k centres of the points: k-means++ seeds, then Lloyd's steps. With fewer points than k, points repeat."""
    centres_kd = points_Nd[_spread_seeds(points_Nd, k, random)]
    for _ in range(KMEANS_STEPS):
        nearest_N = torch.cdist(points_Nd, centres_kd).argmin(1)
        counts_k = torch.bincount(nearest_N, minlength=k)
        sums_kd = torch.zeros_like(centres_kd).index_add_(0, nearest_N, points_Nd)
        moved_kd = torch.where(counts_k[:, None] > 0, sums_kd / counts_k[:, None].clamp_min(1), centres_kd)
        if torch.equal(moved_kd, centres_kd):
            break
        centres_kd = moved_kd
    return centres_kd


def _spread_seeds(points_Nd: torch.Tensor, k: int, random: np.random.Generator) -> list[int]:
    """k-means++: each next seed with probability proportional to its squared distance from those before."""
    seeds = [int(random.integers(len(points_Nd)))]
    distance_N = torch.full((len(points_Nd),), torch.inf, dtype=torch.float64)
    while len(seeds) < k:
        distance_N = torch.minimum(distance_N, (points_Nd - points_Nd[seeds[-1]]).double().square().sum(1))
        total = float(distance_N.sum())
        chances = (distance_N / total).numpy() if total > 0 else None
        seeds.append(int(random.choice(len(points_Nd), p=chances)))
    return seeds
