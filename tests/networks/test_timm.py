"""timm's networks as backbones: their maps, and the whole way from training to scoring."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from serving import photo
from torch import nn

from protopnet import imaging
from protopnet.config import BirdSettings, DataSettings, ModelSettings, TrainSettings
from protopnet.datasets.open import open_dataset
from protopnet.errors import UserError
from protopnet.model.backbones import build_backbone
from protopnet.model.bundle import load_bundle, save_bundle
from protopnet.model.losses import objective_of
from protopnet.model.network import ProtoPNet, build_network, set_phase
from protopnet.model.receptive_field import _probed, receptive_field
from protopnet.passes.describe import DescribeTask
from protopnet.passes.nearest_patches import NearestTask
from protopnet.passes.push import PushResult, apply_push, choose
from protopnet.predictor import Predictor
from protopnet.scoring.manifest import MANIFEST_SCHEMA
from protopnet.scoring.task import ScoreOptions, Scorer, look
from protopnet.training.step import Stepper

CPU, SIZE = torch.device("cpu"), 64
CLASSES = ["jay", "wren"]
# One of each family, the smallest there is.
FAMILIES = (
    "test_vit",  # plain, with a class token
    "vit_tiny_patch16_dinov3_qkvb",  # rotary positions, register tokens
    "swin_tiny_patch4_window7_224",
    "test_convnext",
    "tf_efficientnet_lite0",
    "regnetx_002",
    "mobilenetv3_small_050",
    "densenet121",
    "dpn48b",
    "test_maxvit",
    "test_mambaout",
)


def own_features(network: Any, x_B3HW: torch.Tensor) -> torch.Tensor:
    """What timm's `forward_features` gives, as a map: without the tokens before the patches, channels first."""
    features = network.forward_features(x_B3HW)
    if features.ndim == 3:
        patches_BLC = features[:, network.num_prefix_tokens :]
        side = int(patches_BLC.shape[1] ** 0.5)
        return patches_BLC.transpose(1, 2).unflatten(2, (side, side))
    return features.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else features


def whole(name: str, **options: Any) -> nn.Module:
    """timm's network as timm makes it."""
    sized = {"img_size": SIZE} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, pretrained=False, **sized, **options).eval()


def filled(name: str, network: nn.Module, cut: str | None = None) -> nn.Module:
    """The backbone with the weights of timm's network."""
    backbone = build_backbone(f"timm/{name}", cut, SIZE).eval()
    own = backbone.features.state_dict()
    backbone.features.load_state_dict({key: network.state_dict()[key] for key in own})
    return backbone


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_is_that_of_timm_itself(name: str) -> None:
    network = whole(name)
    backbone: Any = filled(name, network)
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        actual = backbone(x)
        expected = network.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
        features = own_features(network, x)
    assert torch.equal(actual, expected)
    assert backbone.map_shape(SIZE) == actual.shape[1:]
    if name == "tf_efficientnet_lite0":  # timm's features have one convolution more than its last map
        features = expected
    torch.testing.assert_close(actual, features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cut", "index"), [("test_vit", "blocks.2", 2), ("tf_efficientnet_lite0", "blocks.2", 2)]
)
def test_a_cut_is_one_of_timms_own_maps_and_what_lies_beyond_is_not_kept(name: str, cut: str, index: int) -> None:
    network = whole(name)
    backbone = filled(name, network, cut)
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        assert torch.equal(backbone(x), network.forward_intermediates(x, indices=[index], intermediates_only=True)[0])
    assert not any("blocks.3" in key or "norm." in key.split("blocks.")[0] for key in backbone.state_dict())


@pytest.mark.parametrize(("name", "cut"), [("resnet18", "layer2"), ("vgg11", "features.13")])
def test_probing_finds_the_field_that_the_layers_say(name: str, cut: str) -> None:
    backbone = build_backbone(name, cut, 128).eval()
    _, rows, _ = backbone.map_shape(128)
    assert _probed(backbone, rows, 128) == receptive_field(backbone, 128)


@pytest.mark.parametrize(
    ("name", "cut", "size"),
    [("test_vit", None, 64), ("mobilenetv3_small_050", None, 64), ("swin_tiny_patch4_window7_224", "layers.0", 64)],
)
def test_cells_that_see_all_or_by_windows_are_said_to_see_the_whole_image(
    name: str, cut: str | None, size: int
) -> None:
    field = receptive_field(build_backbone(f"timm/{name}", cut, size).eval(), size)
    assert [field.interval(cell, size) for cell in range(field.cells)] == [(0, size)] * field.cells


def test_the_field_of_a_convolutional_network_of_timm() -> None:
    """EfficientNet-Lite up to its second stage: 3 x 3 (stride 2), 3 x 3, 3 x 3 (stride 2), 3 x 3, with TensorFlow's
    padding on the right and below."""
    field = receptive_field(build_backbone("timm/tf_efficientnet_lite0", "blocks.1", SIZE).eval(), SIZE)
    assert (field.cells, field.jump, field.size) == (16, 4, 3 + 2 * 2 + 2 * 2 + 4 * 2)


def test_nothing_in_a_network_is_drawn_at_random() -> None:
    """Swin is made with stochastic depth by default: a run that goes on would train differently from one that didn't."""
    backbone = build_backbone("timm/swin_tiny_patch4_window7_224", "layers.0", SIZE).train()
    x = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(backbone(x), backbone(x))


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        ("timm/convnext_tinny", None, "model.backbone 'timm/convnext_tinny' does not exist in timm; .*convnext_tiny"),
        ("timm/resnet18.a9_in1k", None, r"model.backbone .* did you mean .*timm/resnet18\.a1_in1k"),
        ("timm/hf-hub:a/b", None, "does not exist in timm"),
        ("timm/test_vit", "blocks.77", r"model\.cut 'blocks\.77' .* did you mean blocks"),
        ("tf_efficientnet_lite0", None, "timm/NAME"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, cut: str | None, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        build_backbone(name, cut, SIZE)
    assert "\n" not in str(error.value)


def test_images_are_prepared_as_the_weights_were_trained(tmp_path: Path) -> None:
    model = ModelSettings(backbone="timm/tf_efficientnet_lite2", prototypes=2, prototype_depth=8)
    assert model.image_size == 260
    assert ModelSettings(backbone="timm/tf_efficientnet_lite2", image_size=SIZE).image_size == SIZE
    assert ModelSettings(backbone="resnet18").image_size == 224
    network = build_network(model, 2)
    assert network.preprocessing == imaging.Preprocessing(size=260, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_bundle(str(tmp_path), network, model, CLASSES, {})
    assert load_bundle(str(tmp_path)).network.preprocessing == network.preprocessing
    pixels = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 260, 3, 2).transpose(2, 3)
    assert imaging.normalise(pixels, network.preprocessing).unique().tolist() == [-1, 1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for n in range(3):
            (folder / name / f"{n}.jpg").write_bytes(photo(10 * number + n))
    data = DataSettings(source="folder", path=str(folder), validation=0, test=0)
    source: Any = SimpleNamespace(data=data, birds=BirdSettings(), seed=0)
    return open_dataset(source, str(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_trains_is_pushed_explains_and_scores(name: str, dataset: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ModelSettings(
        backbone=f"timm/{name}", image_size=SIZE, prototypes=4, prototype_depth=8, similarity="cosine"
    )
    network = build_network(model, len(CLASSES))
    assert isinstance(network, ProtoPNet)
    rows = dataset.split("train")
    encoded = [Path(uri).read_bytes() for uri in rows["uri"].to_pylist()]
    pixels_BHWC = torch.from_numpy(np.stack([imaging.load(data, SIZE) for data in encoded]))

    # A step of training moves every parameter that learns.
    set_phase(network, "joint")
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    labels = torch.from_numpy(rows["label"].to_numpy().copy())
    train = TrainSettings(precision="float32")
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    step = Stepper(network, network, optimiser, objective_of(network, train, labels, len(CLASSES)), train)
    terms = step((pixels_BHWC, labels.long()))
    assert torch.isfinite(terms["total"])
    still = [n for n, parameter in network.named_parameters() if torch.equal(parameter, before[n])]
    assert all(n == "last_layer.weight" or "bias" in n or "token" in n or "gamma" in n for n in still), still

    # The push: each prototype onto the nearest patch of its class, and the record of where it came from.
    set_phase(network, "eval")
    images = imaging.normalise(pixels_BHWC, network.preprocessing)
    with torch.inference_mode():
        best = NearestTask(network, k=2).to(CPU)(images, rows)
        chosen = choose(best, network.prototype_class.numpy(), distinct=True)
        apply_push(network, PushResult(chosen, 0))
        task = DescribeTask(network, chosen, CLASSES).to(CPU)
        won = sorted(set(chosen["image_id"].to_pylist()))
        described = pa.concat_tables(task(images[n : n + 1], rows.slice(n, 1)) for n in won).sort_by("prototype")
    assert described["prototype"].to_pylist() == [0, 1, 2, 3]
    save_bundle(str(tmp_path), network, model, CLASSES, {}, described)

    # The bundle: the same scores, the same map, evidence that adds up.
    predictor = Predictor.load([str(tmp_path)]).to(CPU)
    with torch.inference_mode():
        torch.testing.assert_close(predictor.scores(images).logits_BK, network(images).logits_BK)
    explained = predictor.explain(images, [(90, 60)] * len(rows), top_prototypes=4)
    for logits_K, explanation in zip(predictor.scores(images).logits_BK, explained, strict=True):
        points = sum(evidence.points for evidence in explanation.top.evidence)
        assert points == pytest.approx(float(logits_K.max()), abs=1e-4)
    manifest = pa.table([range(6), *[rows["uri"].to_pylist()] * 2, [-1] * 6, [-1] * 6, [0] * 6], schema=MANIFEST_SCHEMA)
    scorer = Scorer(predictor, ScoreOptions(batch_size=6, explain=2), CPU)
    scored, _ = scorer(manifest, [look(data, {}, [SIZE], 10**6) for data in encoded])
    assert scored["prediction"].to_pylist() == predictor.scores(images).logits_BK.argmax(1).tolist()


def test_neither_timm_nor_the_compiler_is_imported_for_one_of_torchvision_s_and_the_compiler_works_as_ever() -> None:
    code = """
import sys, torch
from protopnet.model.backbones import build_backbone
backbone = build_backbone("squeezenet1_0", None, 64)
backbone(torch.zeros(1, 3, 64, 64))
print([name for name in ("timm", "torch._dynamo", "torch._dynamo.utils") if name in sys.modules])
roi_align = sys.modules["torchvision.ops.roi_align"]
print(torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item())
print(roi_align.is_compile_supported("cpu") == torch._dynamo.utils.is_compile_supported("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n2.0\nTrue\n", done.stderr
