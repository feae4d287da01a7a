"""Start from parts: on made-up maps where it is known which cell is which part, and through a real network."""

import functools

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.model.network import ProtoPNet, build_network
from protopnet.model.prototypes import distance_maps
from protopnet.model.receptive_field import receptive_field
from protopnet.training.parts import (
    MapSample,
    MapTask,
    check_parts,
    class_parts,
    find_parts,
    foreground,
    quiet_directions,
    start_from_parts,
)

CLASSES, PARTS, SIDE, CHANNELS = 4, 3, 6, 128
SETTINGS = {
    "backbone": "squeezenet1_0",
    "cut": "features.4",
    "image_size": 96,
    "add_on": "linear",
    "pool": 3,
    "similarity": "cosine",
    "start": "parts",
    "prototype_depth": 24,
    "prototypes": CLASSES * PARTS,
}


def network(**changes: object) -> ProtoPNet:
    torch.manual_seed(0)
    built = build_network(ModelSettings.model_validate(SETTINGS | changes), CLASSES)
    assert isinstance(built, ProtoPNet)
    return built.eval()


def animals(per_class: int = 12, seed: int = 0) -> tuple[MapSample, Tensor]:
    """Maps of animals of known parts on a background that tells nothing, and the part of each cell (-1 for none). A part
    looks a little different in each class. Noise goes where the background varies most."""
    random = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)  # what parts look like doesn't depend on the images drawn
    parts_GC = F.normalize(torch.randn(PARTS, CHANNELS, generator=fixed), dim=1)
    kinds_KGC = 0.4 * F.normalize(torch.randn(CLASSES, PARTS, CHANNELS, generator=fixed), dim=2)
    body_C, loud_C = F.normalize(torch.randn(2, CHANNELS, generator=fixed), dim=1)
    labels_N = torch.arange(CLASSES).repeat_interleave(per_class)
    N, L = len(labels_N), SIDE * SIDE
    maps_NLC = 0.02 * torch.randn(N, L, CHANNELS, generator=random)
    maps_NLC += 1.5 * torch.randn(N, L, 1, generator=random) * loud_C
    animal = slice(SIDE, 3 * SIDE)  # two rows of six cells, shared by the parts at random
    order_NM = torch.stack([torch.randperm(2 * SIDE, generator=random) for _ in range(N)])
    part_NL = torch.full((N, L), -1)
    part_NL[:, animal] = order_NM % PARTS
    looks_NGC = 6 * body_C + 4 * (parts_GC + kinds_KGC[labels_N])
    maps_NLC[:, animal] += torch.stack(
        [looks_GC[part_L] for looks_GC, part_L in zip(looks_NGC, part_NL[:, animal], strict=True)]
    )
    noisy_NLC = maps_NLC + 2 * torch.randn(N, L, 1, generator=random) * loud_C
    plain, noisy = (t.transpose(1, 2).reshape(N, CHANNELS, SIDE, SIDE).half() for t in (maps_NLC, noisy_NLC))
    return MapSample(plain, noisy, labels_N), part_NL


def own_places(net: ProtoPNet, maps_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """The cell each image's own prototypes see themselves in: `_NG`."""
    with torch.no_grad():
        d_NPL = distance_maps(net.add_on(maps_NCHW.float()), net.prototypes, net.kind).flatten(2)
    own_NG = PARTS * labels_N[:, None] + torch.arange(PARTS)
    return d_NPL.argmin(2).gather(1, own_NG)


@functools.cache
def started(seed: int = 0) -> ProtoPNet:
    net = network()
    start_from_parts(net, animals()[0], seed)
    return net


def test_prototype_g_of_every_class_is_the_same_part_also_under_noise_and_on_images_not_seen() -> None:
    net = started()
    unseen, part_NL = animals(seed=1)
    for maps_NCHW in (unseen.plain_NCHW, unseen.noisy_NCHW):
        part_NG = part_NL.gather(1, own_places(net, maps_NCHW, unseen.labels_N))
        meant_G = part_NG.mode(0).values
        assert sorted(meant_G.tolist()) == list(range(PARTS))
        assert ((part_NG == meant_G).float().mean(0) > 0.95).all()


def test_the_prototypes_of_a_start_are_patches_of_their_classes() -> None:
    """The push finds them where they are: of one of the class's training images a cell is the prototype itself."""
    net, (sample, _) = started(), animals()
    with torch.no_grad():
        d_NPL = distance_maps(net.add_on(sample.plain_NCHW.float()), net.prototypes, net.kind).flatten(2)
    nearest_KP = torch.stack([d_NPL[sample.labels_N == label].amin((0, 2)) for label in range(CLASSES)])
    own_P = nearest_KP.gather(0, net.prototype_class[None])[0]
    assert own_P.max() < 1e-4


def test_prototypes_tell_the_classes_apart_and_points_add_up_to_logits() -> None:
    net = started()
    unseen, _ = animals(seed=2)
    with torch.no_grad():
        output = net.classify(net.add_on(unseen.plain_NCHW.float()))
        assert output.similarities_BP is not None
        points_BP = net.points(output.similarities_BP, unseen.labels_N)
    assert (output.logits_BK.argmax(1) == unseen.labels_N).float().mean() > 0.95
    torch.testing.assert_close(points_BP.sum(1), output.logits_BK.gather(1, unseen.labels_N[:, None])[:, 0])


def test_directions_that_noise_moves_come_last_and_along_each_noise_has_variance_1() -> None:
    random = torch.Generator().manual_seed(0)
    spread_C, noise_C = torch.tensor([9.0, 3.0, 1.0, 0.5]), torch.tensor([6.0, 0.1, 0.1, 0.4])
    plain_NLC = 5 + spread_C * torch.randn(200, 20, 4, generator=random)
    noisy_NLC = plain_NLC + noise_C * torch.randn(200, 20, 4, generator=random)
    mean_C, directions_CD = quiet_directions(plain_NLC, noisy_NLC, 4)
    torch.testing.assert_close(mean_C, plain_NLC.flatten(0, 1).mean(0))
    order = directions_CD.abs() * noise_C[:, None]  # in units of the noise, so that channels can be compared
    assert order.argmax(0)[:2].tolist() == [1, 2]
    change_nD = ((noisy_NLC - plain_NLC) @ directions_CD).flatten(0, 1)
    assert ((change_nD.var(0) < 1.05) & (change_nD.var(0) > 0.05)).all()  # the floor counts as noise too
    off_CC = torch.cov(((plain_NLC - mean_C) @ directions_CD).flatten(0, 1).T)
    assert (off_CC - off_CC.diag().diag()).abs().max() < 1e-2 * off_CC.diag().max()


def test_the_foreground_is_the_animal() -> None:
    sample, _ = animals()
    cells_NLC = sample.plain_NCHW.float().flatten(2).transpose(1, 2)
    chosen_NF = foreground(cells_NLC)
    assert chosen_NF.shape[1] == int(0.3 * SIDE * SIDE)
    assert ((chosen_NF >= SIDE) & (chosen_NF < 3 * SIDE)).float().mean() > 0.98
    torch.testing.assert_close(foreground(cells_NLC), chosen_NF)


def test_every_image_counts_once_for_a_class_and_the_least_typical_half_not_at_all() -> None:
    """One of four images is far from the part, and one has it twice: neither moves the mean."""
    part, other = torch.eye(2)
    typical = F.normalize(torch.tensor([1.0, 0.1]), dim=0)
    seen_NFD = torch.stack([torch.stack(cells) for cells in [(typical, other)] * 2 + [(other, other)] * 2])
    seen_NFD[1, 1] = typical
    start_KGD = class_parts(seen_NFD, part[None], torch.zeros(4, dtype=torch.long), classes=2)
    torch.testing.assert_close(start_KGD[0, 0], typical)
    torch.testing.assert_close(start_KGD[1, 0], part)  # a class without images


def test_the_same_seed_gives_the_same_start_and_another_other_parts_or_order() -> None:
    first, again, other = started(0), started.__wrapped__(0), started(1)
    assert torch.equal(first.prototypes, again.prototypes)
    assert torch.equal(first.add_on[0].weight, again.add_on[0].weight)
    assert not torch.equal(first.prototypes, other.prototypes)


def test_images_that_are_all_equal_do_no_harm() -> None:
    net = network()
    flat = torch.ones(8, CHANNELS, SIDE, SIDE).half()
    start_from_parts(net, MapSample(flat, flat, torch.arange(8) % CLASSES), seed=0)
    assert all(torch.isfinite(tensor).all() for tensor in net.parameters())


def test_more_parts_than_clusters_repeat() -> None:
    cells = F.normalize(torch.eye(3), dim=1).repeat(4, 1)[None]
    parts_GD = find_parts(cells, 3, seed=0)
    torch.testing.assert_close((cells[0] @ parts_GD.T).amax(1), torch.ones(12))


def test_maps_are_those_the_add_on_layers_see_and_noise_is_drawn_by_image() -> None:
    net = network()
    task = MapTask(net, seed=0)
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    rows = pa.table({"image_id": [5, 6, 7], "label": [0, 1, 2]})
    with torch.no_grad():
        together = task(images, rows)
        alone = task(images[1:2], rows.slice(1, 1))
        expected = net.features(images)
    for name in ("plain", "noisy"):
        read = [np.frombuffer(table[name][at].as_py(), np.float16) for table, at in ((together, 1), (alone, 0))]
        np.testing.assert_allclose(read[0], read[1], rtol=5e-3, atol=5e-3)
    shown = np.frombuffer(together["plain"][0].as_py(), np.float16).reshape(expected.shape[1:])
    np.testing.assert_allclose(shown, expected[0].numpy(), rtol=2e-3, atol=2e-3)
    assert together["plain"][0] != together["noisy"][0]


def test_a_patch_made_prototype_sees_itself_where_it_is() -> None:
    """Pool and linear layer are part of the network: what a push stores is encoded again to the same."""
    net = network()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z_BDHW = net.latent(images)
        net.prototypes[4] = z_BDHW[1, :, 2:3, 3:4]
        output = net(images)
    assert output.index_BP[1, 4] == 2 * z_BDHW.shape[3] + 3
    assert output.similarities_BP[1, 4] == pytest.approx(1 / 1.01, abs=1e-4)


def test_a_pooled_map_has_the_mean_of_the_neighbours_there_are() -> None:
    net, plain = network(), network(pool=1)
    plain.load_state_dict(net.state_dict())
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled_CHW, cells_CHW = net.features(images)[0], plain.features(images)[0]
    torch.testing.assert_close(pooled_CHW[:, 2, 2], cells_CHW[:, 1:4, 1:4].mean((1, 2)))
    torch.testing.assert_close(pooled_CHW[:, 0, 0], cells_CHW[:, :2, :2].mean((1, 2)))
    seen, alone = receptive_field(net.backbone, 96, net.pool), receptive_field(net.backbone, 96)
    assert (seen.cells, seen.size) == (alone.cells, alone.size + 2 * alone.jump)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_on": "regular"}, "model.add_on linear"),
        ({"similarity": "log"}, "model.similarity cosine"),
        ({"start": "data"}, "set model.start to parts"),
        ({"pool": 2}, "odd"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ModelSettings.model_validate(SETTINGS | changes)


def test_more_channels_than_directions_are_refused() -> None:
    with pytest.raises(UserError, match="has 128 channels"):
        check_parts(network(prototype_depth=129))
