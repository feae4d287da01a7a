"""What a similarity rests on: its pixels, and their qualities, on networks of which it is known."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from serving import make_bundle, photo, pixels
from torch import Tensor, nn

from protopnet.config import ModelSettings
from protopnet.evidence.changes import falls
from protopnet.evidence.pieces import Piece, similarities
from protopnet.evidence.saliency import MAP_SIDE, blurred, saliency, small
from protopnet.imaging import Preprocessing
from protopnet.model.backbones import Backbone
from protopnet.model.network import ProtoPNet, build_network, set_phase
from protopnet.model.receptive_field import ReceptiveField, receptive_field
from protopnet.predictor import Predictor

SIDE = 64
REDS, GREYS = ((0.9, 0.15, 0.1), (0.75, 0.3, 0.15)), ((0.2, 0.2, 0.2), (0.7, 0.7, 0.7))
MIDDLE = Piece(image=0, prototype=0, row=3, column=4)


def made_up(*layers: nn.Module, kind: str = "cosine", image: Tensor | None = None) -> ProtoPNet:
    """A network of these layers, whose prototypes are what it sees at `MIDDLE` of an image."""
    backbone = Backbone("made-up", None, nn.Sequential(*layers), Preprocessing(size=SIDE), [])
    settings = ModelSettings(prototype_depth=backbone.channels, prototypes=2, similarity=kind)
    network = ProtoPNet(backbone, settings, 2)
    with torch.no_grad():
        network.add_on = nn.Sequential(nn.Identity(), nn.Identity())
        network.prototypes[:] = network.latent(stripes(REDS) if image is None else image)[:, :, 3:4, 4:5]
    set_phase(network, "eval")
    return network


def stripes(colours: Sequence[Sequence[float]]) -> Tensor:
    """Of two colours, normalised."""
    colours_23, prepared = torch.tensor(colours), Preprocessing(size=SIDE)
    stripes_YX = (torch.arange(SIDE)[:, None] + 2 * torch.arange(SIDE)) // 3 % 2
    normal_23 = (colours_23 - torch.tensor(prepared.mean)) / torch.tensor(prepared.std)
    return normal_23[stripes_YX].permute(2, 0, 1)[None].contiguous()


def fixed(weights: Sequence[Sequence[Sequence[Sequence[float]]]], **options: int) -> nn.Conv2d:
    weights_OIhw = torch.tensor(weights)
    layer = nn.Conv2d(weights_OIhw.shape[1], len(weights_OIhw), weights_OIhw.shape[2], bias=False, **options)
    layer.weight.data.copy_(weights_OIhw)
    return layer


def of_colour() -> ProtoPNet:
    """Sees means of colours, and the differences between channels alone."""
    channels = [[[[1.0]], [[-1.0]], [[0.0]]], [[[0.0]], [[1.0]], [[-1.0]]], [[[-1.0]], [[0.0]], [[1.0]]]]
    return made_up(nn.AvgPool2d(8), fixed(channels))


def of_edges() -> ProtoPNet:
    """Sees how strong grey edges are in four directions, and nothing of colour."""
    kernels = torch.tensor([[[0, 0, 0], [-1, 2, -1], [0, 0, 0]], [[0, -1, 0], [0, 2, 0], [0, -1, 0]],
                            [[-1, 0, 0], [0, 2, 0], [0, 0, -1]], [[0, 0, -1], [0, 2, 0], [-1, 0, 0]]]).float()  # fmt: skip
    std_3 = torch.tensor(Preprocessing(size=SIDE).std)
    grey = (kernels[:, None] * (torch.tensor([0.299, 0.587, 0.114]) * std_3)[None, :, None, None]).tolist()
    return made_up(fixed(grey, padding=1), nn.ReLU(), nn.AvgPool2d(8), kind="linear", image=stripes(GREYS))


def fall_of(network: ProtoPNet, image_13YX: Tensor) -> dict[str, float]:
    field = receptive_field(network.backbone, SIDE, network.pool)
    [found] = falls(network, field, image_13YX, [MIDDLE])
    return found


def test_a_network_that_sees_colour_alone_rests_on_hue_and_not_on_shape() -> None:
    found = fall_of(of_colour(), stripes(REDS))
    assert found["hue"] > 0.5
    assert abs(found["shape"]) < 0.05
    assert abs(found["sharpness"]) < 0.05


def test_a_network_that_sees_grey_edges_alone_rests_on_sharpness_and_not_on_hue() -> None:
    found = fall_of(of_edges(), stripes(GREYS))
    assert found["sharpness"] > 3 * abs(found["hue"])
    assert found["shape"] > 0


def test_what_the_patch_cannot_see_stays_as_it_is() -> None:
    network = of_colour()
    field = receptive_field(network.backbone, SIDE, network.pool)
    assert (field.size, field.jump) == (8, 8)
    before = stripes(REDS)
    elsewhere = before.clone()
    elsewhere[:, :, :24] = 0  # rows above the patch
    assert falls(network, field, before, [MIDDLE]) == falls(network, field, elsewhere, [MIDDLE])


@pytest.mark.parametrize("backbone", ["resnet18", "timm/tf_efficientnet_lite0"])
def test_a_map_is_shares_of_the_pixels_that_a_patch_can_see(backbone: str) -> None:
    torch.manual_seed(0)
    settings = ModelSettings(backbone=backbone, image_size=SIDE, prototype_depth=8, prototypes=4)
    network = build_network(settings, 2, start_weights=False)
    assert isinstance(network, ProtoPNet)
    set_phase(network, "eval")
    maps_2YX = saliency(network, torch.randn(2, 3, SIDE, SIDE), [Piece(0, 1, 0, 1), Piece(1, 3, 1, 0)])
    assert maps_2YX.shape == (2, SIDE, SIDE)
    assert float(maps_2YX.min()) >= 0
    assert maps_2YX.sum((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert small(maps_2YX).shape == (2, MAP_SIDE, MAP_SIDE)


def test_the_map_is_where_the_network_looks() -> None:
    """A cell sees 8 x 8 pixels, of which only the upper left ones are bright."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[:, :, 24:26, 32:34] = 1
    image[:, :, :, 60:] = 5  # brighter, but out of sight
    network = made_up(nn.AvgPool2d(2), nn.ReLU(), nn.AvgPool2d(4), image=image)
    [map_YX] = saliency(network, image, [MIDDLE])
    assert divmod(int(map_YX.argmax()), SIDE) == pytest.approx((25, 33), abs=2)
    assert float(map_YX[19:31, 27:39].sum()) > 0.9


def test_a_network_without_finer_layers_has_a_map_of_pixels() -> None:
    [map_YX] = saliency(of_colour(), stripes(REDS), [MIDDLE])
    assert float(map_YX[22:34, 30:42].sum()) > 0.9


def test_gradients_are_those_of_the_similarity_at_the_place() -> None:
    network, x = of_edges(), stripes(REDS).requires_grad_(True)
    output = network(x)
    at_the_best = Piece(0, 0, *divmod(int(output.index_BP[0, 0]), 8))
    [found] = similarities(network, x, [at_the_best]).tolist()
    assert found == pytest.approx(float(output.similarities_BP[0, 0]), abs=1e-4)


def test_a_blurred_image_keeps_its_mean_and_what_is_even() -> None:
    even = torch.full((1, 3, 20, 20), 0.7)
    assert torch.allclose(blurred(even, 2.0), even, atol=1e-6)
    dot = torch.zeros(1, 1, 41, 41)
    dot[0, 0, 20, 20] = 1
    assert float(blurred(dot, 3.0).sum()) == pytest.approx(1, abs=1e-4)
    assert float(blurred(dot, 3.0)[0, 0, 20, 20]) == pytest.approx(1 / (2 * np.pi * 9), rel=0.02)


class TestInExplanations:
    @pytest.fixture(scope="class")
    def predictor(self, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
        folder = tmp_path_factory.mktemp("bundles")
        return Predictor.load([make_bundle(folder / str(seed), seed) for seed in (0, 1)])

    def test_every_row_has_its_own(self, predictor: Predictor) -> None:
        options = {"top_prototypes": 3, "most_similar": 2, "contrast": True, "maps": True}
        sizes = [(90, 60), (180, 120)]
        found = predictor.explain(pixels(photo(1), photo(2)), sizes, perturb=True, **options)
        alone = predictor.explain(pixels(photo(2)), sizes[1:], perturb=True, **options)[0]
        for row, same in zip(found[1].rows(), alone.rows(), strict=True):
            assert row.saliency_map is not None
            assert np.array(row.saliency_map) == pytest.approx(np.array(same.saliency_map), abs=1e-4)
            assert row.falls is not None
            assert row.falls.hue == pytest.approx(same.falls.hue, abs=1e-3)
            assert row.shown_map == row.saliency_map
        plain = predictor.explain(pixels(photo(2)), sizes[1:], map="similarity", **options)[0]
        for row, same in zip(plain.rows(), alone.rows(), strict=True):
            assert (row.saliency_map, row.falls, row.shown_map) == (None, None, row.activation_map)
            assert (row.prototype, row.box, row.activation_map) == (same.prototype, same.box, same.activation_map)

    def test_what_a_patch_can_see_is_said_where_it_is_less_than_the_image(self, predictor: Predictor) -> None:
        predictor.explainer.fields = [ReceptiveField(cells=8, jump=8, size=2 * SIDE, start=4)] * 2
        assert {row.receptive_field for row in predictor.explain(pixels(photo(1)), [(90, 60)])[0].rows()} == {None}
        predictor.explainer.fields = [receptive_field(of_colour().backbone, SIDE)] * 2
        for row in predictor.explain(pixels(photo(1)), [(128, 64)])[0].rows():
            top, left = 8 * row.row, 16 * row.column
            assert row.receptive_field == (top, left, top + 8, left + 16)
        del predictor.explainer.fields
