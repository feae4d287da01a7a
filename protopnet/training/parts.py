"""Start from parts: prototype g of every class is part g, found over all classes, on the foreground.

Two looks at each training image, plain and with noise, give all that is needed; the backbone doesn't learn.

1. The add-on layer: directions in which images differ most, measured in units of what noise does to them. What noise
   moves most is thereby nearly left out: maps stay where they are when an image gets noisy.
2. The foreground: of each image the cells highest in the first principal direction of all cells.
3. Parts: k-means by cosine of the foreground cells of all classes.
4. Prototypes: for part g of a class the mean of the cells most like it, one an image, of the half of its images that
   have the most typical ones. Every image counts once, and background can't win.
5. Then prototypes and the add-on layer learn to tell the classes apart, held to where parts were seen: `part_lessons`.

How much each step brings: docs/results.md. Legend: N images, C backbone channels, D latent channels, L = H*W cells,
G parts, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet
from protopnet.passes.image_pass import NetworkTask, PassOptions, run_pass
from protopnet.quality.perturbations import with_noise
from protopnet.training.part_lessons import Lesson, learn
from protopnet.training.start import IMAGES_PER_CLASS, PATCH_BUDGET, kmeans, limit_per_class, principal_directions

FOREGROUND = 0.3  # share of an image's cells
NOISE_FLOOR = 1e-2  # added to every direction's noise, a share of the mean: no direction is free of it
KMEANS_TRIES = 5


@dataclass
class MapSample:
    """Whole maps of images, plain and with noise, as float16, and the images' classes."""

    plain_NCHW: Tensor
    noisy_NCHW: Tensor
    labels_N: Tensor


@dataclass
class MapTask(NetworkTask):
    """`ImageTask`: what the add-on layers see of each image, and of the same with noise."""

    seed: int

    def __call__(self, images_B3HW: Tensor, rows: pa.Table) -> pa.Table:
        noisy_B3HW = with_noise(images_B3HW, rows["image_id"].to_pylist(), self.seed, self.preprocessing.std)
        columns = {
            name: pa.array([map_CHW.numpy().tobytes() for map_CHW in self._maps(x_B3HW)], pa.large_binary())
            for name, x_B3HW in (("plain", images_B3HW), ("noisy", noisy_B3HW))
        }
        return pa.table({"image_id": rows["image_id"], "label": rows["label"], **columns})

    def _maps(self, x_B3HW: Tensor) -> Tensor:
        return self.network.features(x_B3HW).to("cpu", torch.float16).contiguous()


def check_parts(network: ProtoPNet) -> None:
    """`UserError` if the latent map has more channels than there are directions."""
    if network.prototypes.shape[1] > network.backbone.channels:
        raise UserError(
            f"model.prototype_depth {network.prototypes.shape[1]} is too large for model.start parts: the backbone's "
            f"map has {network.backbone.channels} channels; lower it to at most that"
        )


def sample_maps(
    network: ProtoPNet,
    rows: pa.Table,
    *,
    seed: int,
    options: PassOptions,
    on_images: Callable[[int], None] = lambda images: None,
) -> MapSample:
    """One pass over so many images of each class as there is room for; the same sample for any sharding."""
    C, H, W = network.backbone.map_shape(network.preprocessing.size)
    classes = len(np.unique(rows["label"].to_numpy()))
    room = max(1, PATCH_BUDGET // (2 * H * W * classes))
    outputs = []
    for images, output in run_pass(
        limit_per_class(rows, min(IMAGES_PER_CLASS, room), seed), MapTask(network, seed), options
    ):
        outputs.append(output)
        on_images(images)
    table = pa.concat_tables(outputs).sort_by("image_id")
    plain_NCHW, noisy_NCHW = (
        torch.from_numpy(np.stack([np.frombuffer(data.as_py(), np.float16) for data in table[name]]).copy())
        .view(len(table), C, H, W)
        for name in ("plain", "noisy")
    )  # fmt: skip
    return MapSample(plain_NCHW, noisy_NCHW, torch.from_numpy(table["label"].to_numpy().copy()).long())


def start_from_parts(network: ProtoPNet, sample: MapSample, seed: int) -> None:
    """Set the add-on layer and the prototypes of the network; the sample's images are what it learns from."""
    network.cpu()
    plain_NLC, noisy_NLC = _cells(sample.plain_NCHW), _cells(sample.noisy_NCHW)
    foreground_NF = foreground(plain_NLC)
    mean_C, directions_CD = quiet_directions(plain_NLC, noisy_NLC, network.prototypes.shape[1])
    convolution = network.add_on[0]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight.copy_(directions_CD.T.view_as(convolution.weight))
        convolution.bias.copy_(-(mean_C @ directions_CD))
    plain_NLD, noisy_NLD = ((cells_NLC - mean_C) @ directions_CD for cells_NLC in (plain_NLC, noisy_NLC))
    directions_NLD = F.normalize(plain_NLD, dim=2)
    seen_NFD = _gather(directions_NLD, foreground_NF)
    counts_K = np.bincount(network.prototype_class.cpu().numpy())
    parts_GD = find_parts(seen_NFD, int(counts_K.max()), seed)
    start_KGD = class_parts(seen_NFD, parts_GD, sample.labels_N, len(counts_K))
    with torch.no_grad():
        network.prototypes.copy_(start_KGD.view_as(network.prototypes))
    places_NG = places(directions_NLD, foreground_NF, F.normalize(start_KGD, dim=2)[sample.labels_N])
    height, width = sample.plain_NCHW.shape[2:]
    lesson = Lesson((plain_NLD, noisy_NLD), sample.labels_N, places_NG, (height, width))
    learn(network, lesson, seed)


def quiet_directions(plain_NLC: Tensor, noisy_NLC: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Mean (C), and directions as columns (C x D) in which cells vary most compared with what noise does to them.

    Generalised eigenvectors of the covariance of cells and that of their change; along each, noise has variance 1.
    """
    cells_nC, change_nC = plain_NLC.flatten(0, 1), (noisy_NLC - plain_NLC).flatten(0, 1).double()
    mean_C = cells_nC.mean(0)
    centred_nC = (cells_nC - mean_C).double()
    spread_CC = centred_nC.T @ centred_nC / len(cells_nC)
    noise_CC = change_nC.T @ change_nC / len(cells_nC)
    # Where nothing varies at all (dead channels, equal images) any direction is as good: the floor keeps it finite.
    floor = NOISE_FLOOR * float(noise_CC.trace()) / len(noise_CC) + 1e-9 * float(spread_CC.trace()) + 1e-12
    root_CC = torch.linalg.cholesky(noise_CC + floor * torch.eye(len(noise_CC), dtype=torch.float64))
    half_CC = torch.linalg.solve_triangular(root_CC, spread_CC, upper=False)
    _, vectors_CC = torch.linalg.eigh(torch.linalg.solve_triangular(root_CC, half_CC.T, upper=False))
    directions_CC = torch.linalg.solve_triangular(root_CC.T, vectors_CC.flip(1), upper=True)
    return mean_C, directions_CC[:, :depth].float()


def foreground(cells_NLC: Tensor) -> Tensor:
    """Of each image the cells highest in the first principal direction, its sign such that it grows with a cell's
    norm: indices `_NF`."""
    flat_nC = cells_NLC.flatten(0, 1)
    mean_C, directions_CC, _ = principal_directions(flat_nC)
    height_n, norm_n = (flat_nC - mean_C) @ directions_CC[:, 0], flat_nC.norm(dim=1)
    along = ((height_n - height_n.mean()) * (norm_n - norm_n.mean())).sum()
    height_NL = (height_n if along >= 0 else -height_n).view(cells_NLC.shape[:2])
    return height_NL.topk(max(1, int(FOREGROUND * height_NL.shape[1])), dim=1).indices


def find_parts(seen_NFD: Tensor, parts: int, seed: int) -> Tensor:
    """The best of some k-means of cells of length 1, as directions of length 1: `parts_GD`."""
    cells_nD = seen_NFD.flatten(0, 1)
    tries = [F.normalize(kmeans(cells_nD, parts, np.random.default_rng((seed, t))), dim=1) for t in range(KMEANS_TRIES)]
    fits = [float((cells_nD @ parts_GD.T).amax(1).mean()) for parts_GD in tries]
    return tries[int(np.argmax(fits))]


def class_parts(seen_NFD: Tensor, parts_GD: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """For each class and part the mean of the cells most like the part, one an image, over the half of the class's
    images that are most like it: `_KGD`. A class without images gets the part itself."""
    likeness_NFG = seen_NFD @ parts_GD.T
    best_NG = likeness_NFG.argmax(1)
    cells_NGD, likeness_NG = _gather(seen_NFD, best_NG), likeness_NFG.amax(1)
    start_KGD = parts_GD.repeat(classes, 1, 1)
    for label in labels_N.unique().tolist():
        own_n = (labels_N == label).nonzero()[:, 0]
        kept_hG = likeness_NG[own_n].topk(max(1, len(own_n) // 2), dim=0).indices
        for part in range(len(parts_GD)):
            start_KGD[label, part] = cells_NGD[own_n[kept_hG[:, part]], part].mean(0)
    return start_KGD


def places(cells_NLD: Tensor, foreground_NF: Tensor, own_NGD: Tensor) -> Tensor:
    """The foreground cell most like each of an image's own prototypes: `_NG`. Both of length 1."""
    likeness_NFG = _gather(cells_NLD, foreground_NF) @ own_NGD.transpose(1, 2)
    return foreground_NF.gather(1, likeness_NFG.argmax(1))


def _cells(maps_NCHW: Tensor) -> Tensor:
    return maps_NCHW.float().flatten(2).transpose(1, 2).contiguous()


def _gather(cells_NLD: Tensor, index_NF: Tensor) -> Tensor:
    return cells_NLD.gather(1, index_NF[:, :, None].expand(-1, -1, cells_NLD.shape[2]))
