"""Cutting torchvision's networks and loading weights. The 17 themselves are in test_golden."""

import argparse
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

from protopnet.errors import UserError
from protopnet.model.backbones import build_backbone
from protopnet.model.receptive_field import receptive_field
from protopnet.model.weights import load_weights


def output_of(network: nn.Module, module: str, x: torch.Tensor) -> torch.Tensor:
    """What the named module of the whole network computes."""
    found = []
    handle = network.get_submodule(module).register_forward_hook(lambda *call: found.append(call[2].clone()))
    with torch.inference_mode():
        network.eval()(x)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(
    ("name", "cut", "module"),
    [
        ("squeezenet1_0", None, "features"),
        ("resnet18", "layer2", "layer2"),
        ("resnet18", "layer2.0", "layer2.0"),
        ("resnet18", "layer2.0.conv1", "layer2.0.conv1"),  # inside a branch: traced
        ("mobilenet_v3_small", None, "features"),
        ("efficientnet_b0", "features.4", "features.4"),
        ("shufflenet_v2_x0_5", None, "conv5"),
        ("mnasnet0_5", None, "layers"),
        ("regnet_x_400mf", None, "trunk_output"),
        ("densenet121", "features.denseblock2", "features.denseblock2"),
        ("convnext_tiny", None, "features"),
        ("swin_t", None, "permute"),
    ],
)
def test_the_map_is_the_output_of_the_module_named_in_cut(name, cut, module):
    whole = get_model(name, weights=None)
    backbone = build_backbone(name, cut).eval()
    own = backbone.features.state_dict()
    backbone.features.load_state_dict({key: whole.state_dict()[key] for key in own})
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        actual = backbone(x)
    torch.testing.assert_close(actual, output_of(whole, module, x))
    assert backbone.map_shape(96) == actual.shape[1:]
    assert backbone.channels == actual.shape[1]


@pytest.mark.parametrize("name", ["googlenet", "maxvit_t"])
def test_networks_with_branches_are_traced(name):
    backbone = build_backbone(name).train()
    with torch.inference_mode():
        assert backbone(torch.rand(2, 3, 224, 224)).shape[1:] == backbone.map_shape(224)
    assert backbone.training


def test_what_lies_beyond_the_cut_is_not_kept():
    names = build_backbone("resnet18", "layer2").state_dict()
    assert not any("layer3" in name or "fc" in name for name in names)
    assert "features.layer2.1.bn2.running_var" in names


def test_finding_the_shape_leaves_the_mode_of_each_module():
    backbone = build_backbone("resnet18", "layer1")
    backbone.features.get_submodule("bn1").eval()
    backbone.map_shape(64)
    assert not backbone.features.get_submodule("bn1").training
    assert backbone.features.get_submodule("layer1").training


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        ("vgg61", None, "model.backbone 'vgg61' does not exist in torchvision; did you mean .*vgg16"),
        ("foo", None, "model.backbone 'foo' .* expected for example vgg11"),
        ("fcn_resnet50", None, "model.backbone"),
        ("resnet18", "layer5", "model.cut 'layer5' .* did you mean layer"),
        ("resnet18", "fc", "model.cut 'fc' of resnet18 has no feature map|can't take"),
        ("vit_b_16", None, "vit_b_16.* in model.cut"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, cut, expected):
    with pytest.raises(UserError, match=expected) as error:
        build_backbone(name, cut)
    assert "\n" not in str(error.value)


def test_images_too_small_for_a_network_are_refused():
    with pytest.raises(UserError, match=r"model\.image_size"):
        build_backbone("squeezenet1_0").map_shape(16)


def test_receptive_field_of_squeezenet_is_known():
    field = receptive_field(build_backbone("squeezenet1_0"), 224)
    assert (field.cells, field.jump) == (13, 16)
    assert field.interval(6, 224)[1] - field.interval(6, 224)[0] <= 224


def test_receptive_field_is_the_whole_image_where_a_network_looks_at_all_of_it():
    field = receptive_field(build_backbone("mobilenet_v3_small"), 224)
    assert [field.interval(cell, 224) for cell in range(field.cells)] == [(0, 224)] * field.cells


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def noise(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other weights of the same network."""
    return {name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


class TestWeights:
    @pytest.fixture(scope="class")
    def whole(self):
        return get_model("resnet18", weights=None, num_classes=7).state_dict()

    def loaded(self, path, name="resnet18", cut=None):
        backbone = build_backbone(name, cut)
        load_weights(backbone, str(path))
        return backbone.features.state_dict()

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
            lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("fc.")},
            lambda state: {name: tensor for name, tensor in state.items() if "num_batches" not in name},
            lambda state: {"epoch": 3, "model": below("net.backbone.", state), "args": argparse.Namespace(lr=0.1)},
            lambda state: below("_orig_mod.", state) | {"queue": torch.rand(3, 4)},
            lambda state: {"model_state_dict": below("model.features.", state)},
            lambda state: {"state_dict": below("module.encoder_q.", state) | below("module.fc.", noise(state))},
            lambda state: {"model": noise(state), "model_ema": state},
            lambda state: {"student": below("backbone.", noise(state)), "teacher": below("backbone.", state)},
        ],
    )
    def test_pth_files_are_loaded_with_and_without_wrapping(self, whole, tmp_path, wrap):
        torch.save(wrap(whole), tmp_path / "w.pth")
        state = self.loaded(tmp_path / "w.pth")
        assert torch.equal(state["layer4.1.conv2.weight"], whole["layer4.1.conv2.weight"])

    def test_float16_safetensors_become_float32(self, whole, tmp_path):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in whole.items()}, tmp_path / "w.safetensors")
        weight = self.loaded(tmp_path / "w.safetensors")["conv1.weight"]
        assert weight.dtype == torch.float32
        assert torch.equal(weight, whole["conv1.weight"].half().float())

    def test_layers_beyond_the_cut_are_ignored(self, whole, tmp_path):
        torch.save(whole, tmp_path / "w.pth")
        assert torch.equal(self.loaded(tmp_path / "w.pth", cut="layer2.0")["conv1.weight"], whole["conv1.weight"])

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("resnet50", "layer1.0.conv1.weight has shape 64x64x3x3"),
            ("resnet34", "layer1.2.conv1.weight is missing"),
            ("densenet121", "features.conv0.weight is missing"),
        ],
    )
    def test_weights_of_another_architecture_are_refused(self, whole, tmp_path, name, reason):
        torch.save(whole, tmp_path / "w.pth")
        with pytest.raises(UserError, match=rf"model\.weights .*model\.backbone {name}: {reason}"):
            self.loaded(tmp_path / "w.pth", name)

    def test_a_deeper_network_of_the_same_shapes_is_refused_too(self, tmp_path):
        torch.save(get_model("resnet34", weights=None).state_dict(), tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"layer1\.2\..* is not part of it"):
            self.loaded(tmp_path / "w.pth")

    def test_the_inaturalist_network_of_bbn_loads(self, tmp_path):
        state = get_model("resnet50", weights=None).state_dict()
        theirs = {name.replace("layer4.2.", "cb_block."): tensor for name, tensor in state.items() if "fc" not in name}
        theirs |= {f"rb_block.{n[9:]}": t.clone() for n, t in theirs.items() if n.startswith("cb_block.")}
        classifier = {"module.classifier.weight": torch.rand(8142, 4096)}
        torch.save({"state_dict": below("module.backbone.", theirs) | classifier}, tmp_path / "w.pth")
        found = self.loaded(tmp_path / "w.pth", "resnet50")
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())

    def test_numbers_that_are_not_finite_are_refused(self, whole, tmp_path):
        broken = whole | {"layer2.0.bn1.bias": torch.full_like(whole["layer2.0.bn1.bias"], float("nan"))}
        torch.save(broken, tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"layer2\.0\.bn1\.bias holds numbers that aren't finite"):
            self.loaded(tmp_path / "w.pth")

    def test_a_file_that_does_not_fit_says_how_well_it_does(self, whole, tmp_path):
        torch.save({"state_dict": below("module.net.", whole)}, tmp_path / "w.pth")
        with pytest.raises(
            UserError, match=r"\(\d+ of its 265 tensors fit below 'state_dict\.module\.net\.'\)"
        ) as error:
            self.loaded(tmp_path / "w.pth", "resnet50")
        assert "\n" not in str(error.value)

    def test_weights_are_downloaded_under_the_name_of_whose_they_are(self):
        with pytest.raises(
            UserError, match="expected `pretrained` for timm's networks and `imagenet` for torchvision's"
        ):
            load_weights(build_backbone("resnet18"), "pretrained")

    @pytest.mark.parametrize("size", [96, 64])
    def test_a_transformer_takes_weights_of_another_size_of_image(self, tmp_path, size):
        whole = timm.create_model("test_vit", img_size=96)
        torch.save({"model": whole.state_dict()}, tmp_path / "w.pth")
        backbone = build_backbone("timm/test_vit", None, size)
        load_weights(backbone, str(tmp_path / "w.pth"))
        found = backbone.features.state_dict()
        assert torch.equal(found["blocks.5.mlp.fc1.weight"], whole.blocks[5].mlp.fc1.weight)
        assert (found["pos_embed"].shape == whole.pos_embed.shape) == (size == 96)

    def test_a_files_own_names_are_turned_into_timms(self, tmp_path):
        """Those of ConvNeXt's authors."""
        backbone = build_backbone("timm/test_convnext", None, 64)
        state = {k: torch.rand_like(t) for k, t in timm.create_model("test_convnext").state_dict().items()}
        theirs = {
            "downsample_layers.0.0.weight": state["stem.0.weight"],
            "downsample_layers.0.0.bias": state["stem.0.bias"],
        }
        theirs |= {
            "downsample_layers.0.1.weight": state["stem.1.weight"],
            "downsample_layers.0.1.bias": state["stem.1.bias"],
        }
        for name, tensor in state.items():
            for ours, other in (("blocks.", ""), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv"), ("stages.", "stages.")):
                name = name.replace(ours, other)
            name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
            if not name.startswith(("stem", "head")):
                theirs[name] = tensor
        torch.save({"model": theirs}, tmp_path / "w.pth")
        load_weights(backbone, str(tmp_path / "w.pth"))
        own = backbone.features.state_dict()
        assert all(torch.equal(own[name], state[name]) for name in own)

    def test_densenet_files_of_old_versions_are_understood(self, tmp_path):
        state = get_model("densenet121", weights=None).state_dict()
        old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): t for name, t in state.items()}
        assert old.keys() != state.keys()
        torch.save(old, tmp_path / "w.pth")
        key = "features.denseblock1.denselayer1.conv2.weight"
        assert torch.equal(self.loaded(tmp_path / "w.pth", "densenet121")[key], state[key])

    def test_pickled_models_are_refused_not_run(self, tmp_path):
        torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
        with pytest.raises(UserError, match="pickled models are not loaded"):
            self.loaded(tmp_path / "w.pth")

    @pytest.mark.parametrize("content", [b"", b"not tensors"])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_damaged_files_are_refused(self, tmp_path, content, suffix):
        (tmp_path / f"w.{suffix}").write_bytes(content)
        with pytest.raises(UserError, match=r"model\.weights: .*no file of tensors"):
            self.loaded(tmp_path / f"w.{suffix}")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"model\.weights: can't read .*nowhere\.pth"):
            self.loaded(tmp_path / "nowhere.pth")

    @pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0"])
    def test_given_weights_load(self, name, test_data):
        path = test_data / "weights" / f"{name}.pth"
        backbone = build_backbone(name)
        before = {key: tensor.clone() for key, tensor in backbone.features.state_dict().items()}
        load_weights(backbone, str(path))
        after = backbone.features.state_dict()
        assert all(tensor.dtype == before[key].dtype for key, tensor in after.items())
        assert not any(torch.equal(after[k], before[k]) for k in after if k.endswith("weight") and after[k].ndim == 4)

    @pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
    def test_given_weights_of_timm_load(self, name, test_data):
        path = test_data / "weights" / f"{name}.safetensors"
        backbone = build_backbone(f"timm/{name}")
        load_weights(backbone, str(path))
        given = load_file(path)
        assert all(torch.equal(t, given[n].float()) for n, t in backbone.features.state_dict().items() if n in given)
