"""A plain push, done the way the paper's authors do it: to measure ours against, not to be used.

Written from the description in the notes: batches of 75 in file order, latent maps and the distances to all
prototypes copied to numpy, then a Python loop over the prototypes. A prototype that has found a nearer patch of its
class takes it, and at once writes its pictures: the original image, the same under a heat map of its activation, the
crop around the highest activations, and the activation map itself.

Legend: B images of a batch, P prototypes, D channels, H W cells.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from protopnet import imaging
from protopnet.model.network import ProtoPNet

PERCENTILE = 95
EPSILON = 1e-4


def authors_push(
    network: ProtoPNet, batches: Iterable[tuple[np.ndarray, np.ndarray]], folder: str | None
) -> np.ndarray:
    """The nearest patch of its class for each prototype, as P×D; pictures go to the folder, if there is one."""
    classes_P = network.prototype_class.cpu().numpy()
    best_P = np.full(len(classes_P), np.inf)
    patches_PD = np.zeros(network.prototypes.shape[:2], np.float32)
    for pixels_BHWC, labels_B in batches:
        latent_BDHW, distances_BPHW = (found.cpu().numpy() for found in maps(network, pixels_BHWC))
        for prototype, label in enumerate(classes_P):
            own = np.flatnonzero(labels_B == label)
            if not len(own):
                continue
            distances_bHW = distances_BPHW[own, prototype]
            nearest = distances_bHW.min()
            if nearest >= best_P[prototype]:
                continue
            image, row, column = np.unravel_index(distances_bHW.argmin(), distances_bHW.shape)
            best_P[prototype] = nearest
            patches_PD[prototype] = latent_BDHW[own[image], :, row, column]
            if folder is not None:
                _write_pictures(Path(folder), prototype, pixels_BHWC[own[image]], distances_bHW[image])
    return patches_PD


@torch.no_grad()
def maps(network: ProtoPNet, pixels_BHWC: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent maps and the distances of all patches to all prototypes."""
    pixels = torch.from_numpy(pixels_BHWC).to(network.prototypes.device)
    latent_BDHW = network.latent(imaging.normalise(pixels, network.preprocessing))
    return latent_BDHW, distances(latent_BDHW, network.prototypes)


def distances(latent_BDHW: torch.Tensor, prototypes_PD11: torch.Tensor) -> torch.Tensor:
    """As the authors write them: convolutions, the squares of the map summed up once for each prototype."""
    squares_BPHW = F.conv2d(latent_BDHW**2, torch.ones_like(prototypes_PD11))
    products_BPHW = F.conv2d(latent_BDHW, prototypes_PD11)
    norms_P11 = (prototypes_PD11**2).sum(dim=(1, 2, 3))[:, None, None]
    return F.relu(squares_BPHW - 2 * products_BPHW + norms_P11)


def _write_pictures(folder: Path, prototype: int, pixels_HWC: np.ndarray, distances_HW: np.ndarray) -> None:
    from matplotlib import colormaps

    activation_HW = np.log((distances_HW + 1) / (distances_HW + EPSILON))
    height, width = pixels_HWC.shape[:2]
    large = np.asarray(Image.fromarray(activation_HW).resize((width, height), Image.Resampling.BICUBIC))
    scaled = (large - large.min()) / max(large.max() - large.min(), 1e-12)
    heat = colormaps["jet"](scaled)[:, :, :3]
    overlay = (255 * np.clip(0.5 * pixels_HWC / 255 + 0.3 * heat, 0, 1)).astype(np.uint8)
    rows, columns = np.nonzero(large >= np.percentile(large, PERCENTILE))
    crop = pixels_HWC[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    np.save(folder / f"prototype-self-act{prototype}.npy", activation_HW)
    for name, picture in {"-original": pixels_HWC, "-original_with_self_act": overlay, "": crop}.items():
        Image.fromarray(picture).save(folder / f"prototype-img{name}{prototype}.png")
