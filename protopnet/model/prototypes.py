"""Distances between prototypes and the patches of latent maps, exact in float32, and similarities.

Training needs only the nearest patch of each image to each prototype. `min_distances` finds it
for a chunk of prototypes at a time, so that memory grows with B x P and never with B x P x L:
with 100,000 prototypes the full map of distances would be 49 times larger than the result.

Shapes: B images, P prototypes, D channels, H W rows and columns of the latent map, h w of a
prototype, L patches an image (stride 1, no padding), Q = D*h*w numbers in a patch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["log", "linear", "cosine"]

# Added under the root of a patch's norm, and the divisor that keeps cosines below 1 (notes, section D).
COSINE_EPSILON = 1e-4
COSINE_DIVISOR = 1.01

# Numbers in the buffer that holds the distances of one chunk: on a CPU it should stay in the cache.
_BUFFER_CPU = 1 << 21
_BUFFER_ACCELERATOR = 1 << 25
# Squared distances below this are computed again by differences where no gradient is needed: the
# expansion rounds them by up to 1e-7 of the squared norms, which is 1e-5 and more.
CLOSE = 1e-2
# Numbers of patches that `distance_maps_of_pairs` has in memory at a time.
_PATCH_NUMBERS = 1 << 22
# Pairs (image, prototype) that the backward pass sorts or gathers at a time.
_PAIRS = 1 << 20


@contextmanager
def true_float32() -> Iterator[None]:
    """Within it float32 products are float32: no TF32, no bfloat16, no autocast.

    Near a prototype the log similarity is steep: TF32 operands alone move a distance of 0 to
    about 1e-3, and a similarity of 9.2 to 7.7.
    """
    backends: Any = torch.backends
    flags: tuple[Any, ...] = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def min_distances(z_BDHW: Tensor, prototypes_PDhw: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Distance of each prototype to its nearest patch of each image, and which patch that is.

    Returns `distances_BP` (squared L2, or 1 - cosine for the kind `cosine`) and `index_BP`, the
    patch in row-major order; the first one where several are equally near. Differentiable in both
    arguments; without gradients, distances near 0 are exact rather than those of the expansion.
    Computes in float32 (float64 if it is given that), whatever the autocast around it.
    """
    with true_float32():
        terms = expansion(z_BDHW, prototypes_PDhw, kind)
        distances_BP, index_BP = _NearestPatch.apply(*terms)
        if kind != "cosine" and not distances_BP.requires_grad:
            image, prototype = (distances_BP < CLOSE).nonzero(as_tuple=True)
            near = (image, index_BP[image, prototype], prototype)
            distances_BP[image, prototype] = _by_difference(terms[0], terms[1], *near)
    return distances_BP, index_BP


def distance_maps(z_BDHW: Tensor, prototypes_PDhw: Tensor, kind: Kind) -> Tensor:
    """Distance of every prototype to every patch: `d_BPHW`, rows and columns counted in patches.

    For explanations and checks, where the maps themselves are wanted; memory is B x P x L.
    """
    with true_float32():
        patches_BLQ, prototypes_PQ, patch_terms_BL, prototype_terms_P, factor = expansion(z_BDHW, prototypes_PDhw, kind)
        d_NP = torch.addmm(prototype_terms_P, patches_BLQ.flatten(0, 1), prototypes_PQ.t(), alpha=factor)
        if patch_terms_BL is not None:
            d_NP = d_NP + patch_terms_BL.flatten()[:, None]
        d_BLP = d_NP.clamp(min=0).unflatten(0, patches_BLQ.shape[:2])
        if kind != "cosine" and not d_BLP.requires_grad:
            near = (d_BLP < CLOSE).nonzero(as_tuple=True)
            d_BLP[near] = _by_difference(patches_BLQ, prototypes_PQ, *near)
    return d_BLP.transpose(1, 2).unflatten(2, map_size(z_BDHW, prototypes_PDhw)).contiguous()


def distance_maps_of_pairs(
    z_BDHW: Tensor, prototypes_PDhw: Tensor, image_U: np.ndarray, prototype_U: np.ndarray, kind: Kind
) -> Tensor:
    """Distance of one prototype to every patch of one image, for U pairs of them: `d_UHW`, from differences.

    For the few prototypes that are evidence, where `distance_maps` would be mostly for nothing.
    """
    patches_BLQ, prototypes_PQ = patches(z_BDHW, *prototypes_PDhw.shape[2:]), prototypes_PDhw.flatten(1)
    if kind == "cosine":
        patches_BLQ, prototypes_PQ = _normalised(patches_BLQ), _normalised(prototypes_PQ)
    chunk = max(1, _PATCH_NUMBERS // patches_BLQ[0].numel())
    maps = [patches_BLQ.new_empty(0, patches_BLQ.shape[1])]
    for image_u, prototype_u in zip(_split(image_U, chunk), _split(prototype_U, chunk), strict=True):
        patches_uLQ, prototypes_u1Q = patches_BLQ[image_u], prototypes_PQ[prototype_u][:, None]
        if kind == "cosine":
            maps.append(1 - (patches_uLQ @ prototypes_u1Q.transpose(1, 2))[:, :, 0])
        else:
            maps.append((patches_uLQ - prototypes_u1Q).square_().sum(-1))
    return torch.cat(maps).unflatten(1, map_size(z_BDHW, prototypes_PDhw))


def _split(indices: np.ndarray, size: int) -> tuple[Tensor, ...]:
    return torch.from_numpy(indices).split(size)


def paired_distances(patches_NDhw: Tensor, prototypes_NDhw: Tensor, kind: Kind) -> Tensor:
    """Distance of each patch to the prototype beside it, from differences in float64: `d_N`.

    Equal patches give equal numbers, and a patch is at exactly 0 from itself (for the squared distance).
    """
    patches_NQ, prototypes_NQ = patches_NDhw.double().flatten(1), prototypes_NDhw.double().flatten(1)
    if kind == "cosine":
        return 1 - (_normalised(patches_NQ) * _normalised(prototypes_NQ)).sum(-1)
    return (patches_NQ - prototypes_NQ).square().sum(-1)


def similarity(distances: Tensor, kind: Kind, epsilon: float = 1e-4) -> Tensor:
    """Similarity of each distance, in the same shape.

    log: log((d + 1) / (d + epsilon)); linear: -d; cosine: max(0, (1 - d) / 1.01), d = 1 - cosine.
    """
    if kind == "log":
        # The same number as log((d + 1) / (d + epsilon)), without its rounding where d is large.
        return torch.log1p((1 - epsilon) / (distances + epsilon))
    if kind == "linear":
        return -distances
    return F.relu((1 - distances) / COSINE_DIVISOR)


def map_size(z_BDHW: Tensor, prototypes_PDhw: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of the prototypes' size on the latent map."""
    return (
        z_BDHW.shape[2] - prototypes_PDhw.shape[2] + 1,
        z_BDHW.shape[3] - prototypes_PDhw.shape[3] + 1,
    )


def patches(z_BDHW: Tensor, height: int, width: int) -> Tensor:
    """The patches of each latent map in row-major order, as `patches_BLQ` with Q in the order D, h, w."""
    if (height, width) == (1, 1):
        return z_BDHW.flatten(2).transpose(1, 2)  # no copy where the map is channels_last
    windows_BDHWhw = z_BDHW.unfold(2, height, 1).unfold(3, width, 1)
    return windows_BDHWhw.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def expansion(
    z_BDHW: Tensor, prototypes_PDhw: Tensor, kind: Kind
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, float]:
    """What d = patch term + (factor * <patch, prototype> + prototype term) is made of.

    Squared L2: |z|^2 + (-2<z, p> + |p|^2), summed in the order in which the authors sum it.
    Cosine: both divided by their norms, 0 + (-<z, p> + 1).
    """
    dtype = torch.promote_types(torch.promote_types(z_BDHW.dtype, prototypes_PDhw.dtype), torch.float32)
    patches_BLQ = patches(z_BDHW.to(dtype), *prototypes_PDhw.shape[2:])
    prototypes_PQ = prototypes_PDhw.to(dtype).flatten(1)
    if kind == "cosine":
        ones_P = prototypes_PQ.new_ones(len(prototypes_PQ))
        return _normalised(patches_BLQ), _normalised(prototypes_PQ), None, ones_P, -1.0
    return patches_BLQ, prototypes_PQ, patches_BLQ.square().sum(-1), prototypes_PQ.square().sum(-1), -2.0


def _by_difference(
    patches_BLQ: Tensor, prototypes_PQ: Tensor, image: Tensor, patch: Tensor, prototype: Tensor
) -> Tensor:
    """Squared distances of some (image, patch, prototype), without cancellation: one a triple."""
    chunk = max(1, _BUFFER_CPU // prototypes_PQ.shape[1])
    triples = zip(image.split(chunk), patch.split(chunk), prototype.split(chunk), strict=True)
    return torch.cat([(patches_BLQ[b, at] - prototypes_PQ[p]).square().sum(-1) for b, at, p in triples])


def _normalised(vectors: Tensor) -> Tensor:
    return vectors / (vectors.square().sum(-1, keepdim=True) + COSINE_EPSILON).sqrt()


class _NearestPatch(torch.autograd.Function):
    """min over l of max(0, patch term_bl + (factor * <patch_bl, prototype_p> + prototype term_p))."""

    @staticmethod
    def forward(
        ctx: Any,
        patches_BLQ: Tensor,
        prototypes_PQ: Tensor,
        patch_terms_BL: Tensor | None,
        prototype_terms_P: Tensor,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        B, L, _ = patches_BLQ.shape
        P = len(prototypes_PQ)
        patches_NQ = patches_BLQ.flatten(0, 1)
        distances_BP = patches_NQ.new_empty(B, P)
        index_BP = torch.empty(B, P, dtype=torch.int64, device=patches_NQ.device)
        chunk = _chunk(patches_NQ, P)
        buffer = patches_NQ.new_empty(B * L * chunk)
        for start in range(0, P, chunk):
            part = slice(start, min(start + chunk, P))
            prototypes_CQ = prototypes_PQ[part]
            d_NC = buffer[: B * L * len(prototypes_CQ)].view(B * L, -1)
            torch.addmm(prototype_terms_P[part], patches_NQ, prototypes_CQ.t(), alpha=factor, out=d_NC)
            if patch_terms_BL is not None:
                d_NC += patch_terms_BL.flatten()[:, None]
            # Before the minimum, not after: patches rounded to below 0 are equally near, the first wins.
            d_NC.clamp_(min=0)
            distances_BP[:, part], index_BP[:, part] = d_NC.view(B, L, -1).min(dim=1)
        ctx.factor = factor
        ctx.save_for_backward(patches_BLQ, prototypes_PQ, distances_BP, index_BP)
        ctx.mark_non_differentiable(index_BP)
        return distances_BP, index_BP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BP: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Each (image, prototype) touches one patch: sums over few rows, in a fixed order.

        A 1/L part of the numbers of the equivalent matrix products, and no product to lose bits in.
        """
        patches_BLQ, prototypes_PQ, distances_BP, index_BP = ctx.saved_tensors
        weights_BP = grad_BP.masked_fill(distances_BP <= 0, 0)  # the gradient of max(0, d)
        grad_patches = grad_patch_terms = grad_prototypes = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            grad_patches, grad_patch_terms = _sum_over_prototypes(
                prototypes_PQ, index_BP, weights_BP, patches_BLQ.shape[1]
            )
            grad_patches.mul_(ctx.factor)
        if ctx.needs_input_grad[1]:
            grad_prototypes = _sum_over_images(patches_BLQ, index_BP, weights_BP).mul_(ctx.factor)
        grad_prototype_terms = weights_BP.sum(0) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[2]:
            grad_patch_terms = None
        return grad_patches, grad_prototypes, grad_patch_terms, grad_prototype_terms, None


def _chunk(patches_NQ: Tensor, P: int) -> int:
    """Prototypes at a time; at least 64, below which matrix products become slow."""
    return _prototypes_at_a_time(len(patches_NQ), P, patches_NQ.device.type == "cpu")


def _prototypes_at_a_time(patches: int, P: int, on_cpu: bool) -> int:
    numbers = _BUFFER_CPU if on_cpu else _BUFFER_ACCELERATOR
    return max(1, min(P, max(64, numbers // max(1, patches))))


def buffer_bytes(patches: int, P: int, on_cpu: bool = False) -> int:
    """Memory that `min_distances` works in, for so many patches of a batch and so many prototypes."""
    return 4 * patches * _prototypes_at_a_time(patches, P, on_cpu)


def _sum_over_images(patches_BLQ: Tensor, index_BP: Tensor, weights_BP: Tensor) -> Tensor:
    """sum over b of weight_bp * patch_b,index_bp: `sums_PQ`."""
    B, L, _ = patches_BLQ.shape
    patches_NQ = patches_BLQ.flatten(0, 1)
    first_row_B1 = L * torch.arange(B, device=index_BP.device)[:, None]
    chunk = max(1, _PAIRS // B)
    sums = []
    for index_BC, weights_BC in zip(index_BP.split(chunk, dim=1), weights_BP.split(chunk, dim=1), strict=True):
        rows_CB = (index_BC + first_row_B1).t().contiguous()
        sums.append(F.embedding_bag(rows_CB, patches_NQ, mode="sum", per_sample_weights=weights_BC.t().contiguous()))
    return torch.cat(sums)


def _sum_over_prototypes(prototypes_PQ: Tensor, index_BP: Tensor, weights_BP: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Over the p with index_bp = l: sum of weight_bp * prototype_p, and of weight_bp: `_BLQ`, `_BL`."""
    P = len(prototypes_PQ)
    sums, totals = [], []
    chunk = max(1, _PAIRS // P)
    for index_CP, weights_CP in zip(index_BP.split(chunk), weights_BP.split(chunk), strict=True):
        C = len(index_CP)
        patch_CP, order_CP = _small_integers(index_CP, L).sort(dim=1, stable=True)
        sorted_weights = weights_CP.gather(1, order_CP).flatten()
        every_patch_CL = torch.arange(L, device=index_BP.device, dtype=patch_CP.dtype).repeat(C, 1)
        first_pair_C1 = P * torch.arange(C, device=index_BP.device)[:, None]
        offsets = (torch.searchsorted(patch_CP, every_patch_CL) + first_pair_C1).flatten()
        sums.append(
            F.embedding_bag(order_CP.flatten(), prototypes_PQ, offsets, mode="sum", per_sample_weights=sorted_weights)
        )
        every_pair = torch.arange(C * P, device=index_BP.device)
        totals.append(F.embedding_bag(every_pair, sorted_weights[:, None], offsets, mode="sum"))
    return torch.cat(sums).unflatten(0, (-1, L)), torch.cat(totals).view(-1, L)


def _small_integers(index: Tensor, L: int) -> Tensor:
    """The same indices in fewer bytes: they sort twice as fast."""
    return index.to(torch.int16 if L < 2**15 else torch.int32)
