"""A ProtoPNet as one graph without branches that depend on the images, for exporting: what `Predictor` sees of a batch.

Shapes: B images, P prototypes, K classes, D channels, H W of the latent map, L patches an image, Q numbers in a patch.
"""

import torch
from torch import Tensor, nn

from protopnet.model.network import ProtoPNet
from protopnet.model.prototypes import CLOSE, expansion, similarity


class OneGraph(nn.Module):
    """Normalised images x_B3HW -> logits_BK, similarities_BP, and places_BP: the most similar patch, row by row."""

    def __init__(self, network: ProtoPNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network = self.network
        z_BDHW = network.add_on(network.features(x_B3HW))
        patches_BLQ, prototypes_PQ, patch_terms_BL, prototype_terms_P, factor = expansion(
            z_BDHW, network.prototypes, network.kind
        )
        d_BLP = prototype_terms_P + factor * (patches_BLQ @ prototypes_PQ.t())
        if patch_terms_BL is not None:
            d_BLP = d_BLP + patch_terms_BL[:, :, None]
        d_BP, places_BP = d_BLP.clamp(min=0).min(dim=1)
        if network.kind != "cosine":
            # Near 0 the expansion rounds too much, here as in `min_distances`: the nearest patch once more, by difference.
            index_BPQ = places_BP[:, :, None].expand(-1, -1, prototypes_PQ.shape[1])
            nearest_BPQ = patches_BLQ.gather(1, index_BPQ)
            d_BP = torch.where(d_BP < CLOSE, (nearest_BPQ - prototypes_PQ).square().sum(-1), d_BP)
        similarities_BP = similarity(d_BP, network.kind, network.epsilon)
        return network.last_layer(similarities_BP), similarities_BP, places_BP
