"""The networks: ProtoPNet and its black-box counterpart. Architecture only, no training.

Shapes: B images, P prototypes, K classes, D channels, H W rows and columns of the latent map, h w
of a prototype.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protopnet.config import ModelSettings
from protopnet.errors import UserError
from protopnet.imaging import Preprocessing
from protopnet.model.backbones import Backbone, build_backbone
from protopnet.model.prototypes import min_distances, similarity, true_float32
from protopnet.model.weights import load_weights

PROTOTYPES_PER_CLASS = 10

Phase = Literal["warm", "joint", "eval"]
AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


class Output(NamedTuple):
    """What a forward pass finds. The baseline has logits only."""

    logits_BK: Tensor
    distances_BP: Tensor | None = None
    similarities_BP: Tensor | None = None
    index_BP: Tensor | None = None  # the nearest patch of each prototype, row-major

    @property
    def best_B(self) -> Tensor:
        """Similarity of each image to the prototype it is most like; NaN for the baseline."""
        if self.similarities_BP is None:
            return torch.full_like(self.logits_BK[:, 0], torch.nan)
        return self.similarities_BP.amax(1)


class ProtoPNet(nn.Module):
    """Backbone, add-on layers, prototypes, and a last layer of class connections.

    Logits are sums of points: similarity of each prototype times its connection to the class.
    Prototypes lie class by class unless `prototype_class` says otherwise (after pruning).
    """

    prototype_class: Tensor

    def __init__(
        self,
        backbone: Backbone,
        settings: ModelSettings,
        num_classes: int,
        prototype_class: Tensor | None = None,
    ) -> None:
        super().__init__()
        if prototype_class is None:
            prototype_class = _class_by_class(settings, num_classes)
        P, D = len(prototype_class), settings.prototype_depth
        self.kind = settings.similarity
        self.epsilon = settings.epsilon
        self.backbone = backbone
        self.pool = _mean_of_neighbours(settings.pool)
        self.add_on = add_on_layers(settings.add_on, backbone.channels, D)
        self.prototypes = nn.Parameter(torch.rand(P, D, *settings.prototype_shape))
        self.register_buffer("prototype_class", prototype_class)
        self.last_layer = nn.Linear(P, num_classes, bias=False)
        self.connect_classes(settings.own_connection)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input."""
        return self.backbone.preprocessing

    def connect_classes(self, scale: float) -> None:
        """Start the class connections: +scale to a prototype's own class, -scale/2 to the others."""
        own_KP = F.one_hot(self.prototype_class, self.last_layer.out_features).t().bool()
        with torch.no_grad():
            self.last_layer.weight.copy_(torch.where(own_KP, scale, -scale / 2))

    def latent(self, x_B3HW: Tensor) -> Tensor:
        """The latent map z_BDHW, float32; in (0, 1) where the add-on layers end in a sigmoid.

        Backbone and hidden add-on layers run under the caller's autocast; the last convolution and
        the sigmoid don't, since bfloat16 would round the map to steps of 1/256.
        """
        with self._precision(x_B3HW.device.type):
            hidden = self.add_on[:-2](self.features(x_B3HW))
            with torch.autocast(x_B3HW.device.type, enabled=False):
                return self.add_on[-2:](hidden.float())

    def features(self, x_B3HW: Tensor) -> Tensor:
        """What the add-on layers see: the backbone's map, each cell averaged with its neighbours if so set."""
        f_BCHW: Tensor = self.pool(self.backbone(x_B3HW))
        return f_BCHW

    def _precision(self, device: str) -> AbstractContextManager[None]:
        """Outside training a map must come out the same everywhere: no TF32 unless autocast was asked for."""
        if self.training or torch.is_autocast_enabled(device):
            return nullcontext()
        return true_float32()

    def forward(self, x_B3HW: Tensor) -> Output:
        return self.classify(self.latent(x_B3HW))

    def classify(self, z_BDHW: Tensor) -> Output:
        """Everything after the latent map, in true float32."""
        with true_float32():
            distances_BP, index_BP = min_distances(z_BDHW, self.prototypes, self.kind)
            similarities_BP = similarity(distances_BP, self.kind, self.epsilon)
            logits_BK = self.last_layer(similarities_BP)
        return Output(logits_BK, distances_BP, similarities_BP, index_BP)

    def points(self, similarities_BP: Tensor, classes_B: Tensor) -> Tensor:
        """Points of each prototype for one class an image: they add up to its logit. `points_BP`."""
        return similarities_BP * self.last_layer.weight[classes_B]


class Baseline(nn.Module):
    """The black-box counterpart: the same backbone, its map averaged, and a linear head."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.channels, num_classes)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input."""
        return self.backbone.preprocessing

    def forward(self, x_B3HW: Tensor) -> Output:
        pooled_BC = self.backbone(x_B3HW).mean(dim=(2, 3))
        with torch.autocast(x_B3HW.device.type, enabled=False):
            return Output(self.head(pooled_BC.float()))


def build_network(model: ModelSettings, num_classes: int, *, start_weights: bool = True) -> ProtoPNet | Baseline:
    """The network of the settings, its backbone with `model.weights` unless `start_weights` is false or these are a bundle.

    Raises UserError for settings that don't go together.
    """
    if model.kind == "protopnet":
        _class_by_class(model, num_classes)  # before anything that takes time
    backbone = build_backbone(model.backbone, model.cut, model.image_size)
    _check_map(backbone, model)
    if start_weights and model.start != "bundle":
        load_weights(backbone, model.weights)
    if model.kind == "baseline":
        return Baseline(backbone, num_classes)
    return ProtoPNet(backbone, model, num_classes)


def add_on_layers(kind: Literal["regular", "bottleneck", "linear"], in_channels: int, depth: int) -> nn.Sequential:
    """1x1 convolutions from the backbone's channels to the prototypes' depth, the last one and what follows it as the
    last two layers.

    regular: two, and a sigmoid. bottleneck: pairs that halve the channels until they reach the depth, and a sigmoid.
    linear: one, and nothing.
    """
    if kind == "linear":
        return nn.Sequential(nn.Conv2d(in_channels, depth, 1), nn.Identity())
    widths = [(in_channels, depth)]
    if kind == "bottleneck":
        widths = [(in_channels, max(depth, in_channels // 2))]
        while (width := widths[-1][0] // 2) > depth:
            widths.append((width, max(depth, width // 2)))
    layers: list[nn.Module] = []
    for before, after in widths:
        layers += [nn.Conv2d(before, after, 1), nn.ReLU(), nn.Conv2d(after, after, 1), nn.ReLU()]
    layers[-1] = nn.Sigmoid()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def _mean_of_neighbours(cells: int) -> nn.Module:
    """The mean over a square of cells around each; at the border of those there are."""
    if cells == 1:
        return nn.Identity()
    return nn.AvgPool2d(cells, stride=1, padding=cells // 2, count_include_pad=False)


def set_phase(network: ProtoPNet | Baseline, phase: Phase) -> None:
    """Say what learns. warm: all but the backbone; joint: all; eval: nothing.

    The last layer of a ProtoPNet never learns by gradient descent beside the rest. What is frozen
    is in eval mode, so that its BatchNorm statistics stay too.
    """
    network.requires_grad_(phase != "eval")
    network.train(phase != "eval")
    if isinstance(network, ProtoPNet):
        network.last_layer.requires_grad_(False)
    if phase == "warm":
        network.backbone.requires_grad_(False)
        network.backbone.eval()


def placed(network: AnyNetwork, device: torch.device) -> AnyNetwork:
    """The network on a device for passes without gradients: eval mode, in the memory order convolutions like."""
    return network.to(device).to(memory_format=torch.channels_last).eval()


def _class_by_class(model: ModelSettings, num_classes: int) -> Tensor:
    """Class of each prototype, equally many a class: `classes_P`."""
    count = model.prototypes or PROTOTYPES_PER_CLASS * num_classes
    if count % num_classes:
        lower = count - count % num_classes
        choice = f"{lower} or {lower + num_classes}" if lower else str(num_classes)
        raise UserError(f"model.prototypes {count} can't be shared equally among {num_classes} classes: take {choice}")
    return torch.arange(num_classes).repeat_interleave(count // num_classes)


def whole_image_text(network: "ProtoPNet | Baseline") -> str | None:
    """A line for people where a prototype covers the whole map: its patch is the whole image, and explains nothing."""
    if not isinstance(network, ProtoPNet):
        return None
    _, rows, columns = network.backbone.map_shape(network.preprocessing.size)
    if (rows, columns) != tuple(network.prototypes.shape[2:]):
        return None
    return (
        f"each prototype covers the whole {rows} x {columns} map, so its patch is the whole image: "
        "set model.image_size higher or model.cut earlier"
    )


def _check_map(backbone: Backbone, model: ModelSettings) -> None:
    """Refuse images so small that no prototype fits on their map."""
    _, rows, columns = backbone.map_shape(model.image_size)
    height, width = model.prototype_shape
    if model.kind == "protopnet" and not (1 <= height <= rows and 1 <= width <= columns):
        raise UserError(
            f"prototypes of {height} x {width} cells don't fit on the {rows} x {columns} map of "
            f"{model.backbone} at {model.image_size} pixels: change model.prototype_shape or model.image_size"
        )
