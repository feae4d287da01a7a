"""The start from parts over real images: one sample however the work is cut, and prototypes the push need not move."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from protopnet.config import ModelSettings
from protopnet.model.network import ProtoPNet, build_network, placed
from protopnet.passes.push import apply_push, push
from protopnet.training.parts import sample_maps, start_from_parts

MODEL = ModelSettings(
    backbone="resnet18",
    cut="layer2",
    image_size=64,
    prototype_depth=16,
    prototypes=9,
    similarity="cosine",
    add_on="linear",
    pool=3,
    start="parts",
)
CLASSES = 3  # of the birds


def parts_network() -> ProtoPNet:
    torch.manual_seed(0)
    built = placed(build_network(MODEL, CLASSES), torch.device("cpu"))
    assert isinstance(built, ProtoPNet)
    return built


def test_the_sample_is_the_same_however_the_work_is_cut(rows: pa.Table, options: Callable) -> None:
    whole = sample_maps(parts_network(), rows, seed=0, options=options())
    cut = sample_maps(parts_network(), rows, seed=0, options=options(workers=2, blocks=7, batch=5))
    assert torch.equal(whole.labels_N, cut.labels_N)
    torch.testing.assert_close(whole.plain_NCHW, cut.plain_NCHW, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(whole.noisy_NCHW, cut.noisy_NCHW, rtol=2e-3, atol=2e-3)
    assert whole.labels_N.tolist() == rows.sort_by("image_id")["label"].to_pylist()


def test_the_push_finds_prototypes_where_they_are(rows: pa.Table, options: Callable) -> None:
    network = parts_network()
    start_from_parts(network, sample_maps(network, rows, seed=0, options=options(in_driver=True)), seed=0)
    before = network.prototypes.detach().flatten(1).clone()
    result = push(network, rows, distinct=False, options=options(in_driver=True))
    # As far as float16 keeps the maps it learned from.
    assert result.chosen["distance"].to_numpy().max() < 1e-3
    apply_push(network, result)
    moved = 1 - torch.cosine_similarity(network.prototypes.flatten(1), before)
    assert moved.max() < 1e-3
    assert np.isfinite(result.vectors_Pd).all()
