"""The network."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from protopnet.config.section import Section


class ModelSettings(Section):
    """The network."""

    kind: Literal["protopnet", "baseline"] = Field(
        "protopnet", description="protopnet, or its black-box counterpart: the same backbone with a linear head"
    )
    backbone: str = Field(
        "resnet18",
        description="a torchvision classification network by name (vgg16, densenet121, …), or one of timm's: "
        "timm/convnext_tiny, timm/vit_small_patch14_dinov2.lvd142m, …",
    )
    cut: str | None = Field(
        None,
        description="name of the module whose output is the feature map, e.g. layer2 (torchvision) or one of timm's own "
        "feature maps, e.g. blocks.7 or stages.2; the authors' place, or the last map, when left out",
    )
    weights: str | None = Field(
        None,
        description="weights the backbone starts with: a .pth or .safetensors file (local or s3://), "
        "`imagenet` to download torchvision's, `pretrained` to download timm's, or nothing: from scratch; with model.start "
        "bundle the folder of a bundle",
    )
    image_size: int = Field(
        224,
        ge=32,
        le=2048,
        description="images are resized to this many pixels on each side; "
        "for timm's networks the size their weights were trained for when left out",
    )
    pool: int = Field(
        1, ge=1, le=15, description="each cell of the backbone's map becomes the mean of a square of so many; odd"
    )
    add_on: Literal["regular", "bottleneck", "linear"] = Field(
        "regular",
        description="layers between backbone and prototypes: regular and bottleneck as published; linear: one "
        "convolution, and no sigmoid",
    )
    prototype_depth: int = Field(128, ge=2, le=4096, description="channels of the latent map and of each prototype")
    prototypes: int | None = Field(
        None, ge=1, description="number of prototypes over all classes; 10 a class when left out"
    )
    prototype_shape: tuple[int, int] = Field((1, 1), description="height and width of a prototype in latent cells")
    similarity: Literal["log", "linear", "cosine"] = Field(
        "cosine",
        description="the cosine, or of the squared distance d log((d+1)/(d+epsilon)), as published, or -d",
    )
    epsilon: float = Field(1e-4, gt=0, description="epsilon of the log similarity")
    connection_scale: float | None = Field(
        None,
        gt=0,
        description="class connections start at +scale for the own class and -scale/2 for others; "
        "1 for log and linear, 10 for cosine when left out",
    )
    start: Literal["data", "parts", "random", "bundle"] = Field(
        "data",
        description="data: add-on layers from the principal directions of the backbone's patches, prototypes from "
        "k-means of each class's patches; parts: prototype g of every class is part g, found over all classes on the "
        "foreground; random: as published; bundle: go on with all of the bundle that model.weights names, classes matched "
        "by name",
    )

    @model_validator(mode="before")
    @classmethod
    def _size_as_trained(cls, given: Any) -> Any:
        """timm knows the size of image that each of its networks was trained for."""
        backbone = given.get("backbone") if isinstance(given, dict) else None
        if not isinstance(backbone, str) or not backbone.startswith("timm/") or "image_size" in given:
            return given
        import timm  # only where it is asked for: importing it takes seconds

        trained: Any = timm.get_pretrained_cfg(backbone.removeprefix("timm/"), allow_unregistered=True)
        return given if trained is None else {**given, "image_size": max(trained.input_size[1:])}

    @field_validator("pool")
    @classmethod
    def _has_a_middle(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"model.pool: {value} is not valid; expected an odd number: 1, 3, 5, …")
        return value

    @model_validator(mode="after")
    def _start_fits(self) -> "ModelSettings":
        fits = (self.add_on, self.similarity, self.prototype_shape) == ("linear", "cosine", (1, 1))
        if self.start == "parts" and not fits:
            raise ValueError(
                "model.start parts needs model.add_on linear, model.similarity cosine and model.prototype_shape 1,1"
            )
        if self.start == "data" and self.add_on == "linear":
            raise ValueError("model.start data has nothing to set in model.add_on linear: set model.start to parts")
        if self.start == "bundle" and (self.weights is None or self.kind == "baseline"):
            raise ValueError("model.start bundle needs model.weights, the folder of a bundle, and model.kind protopnet")
        return self

    @property
    def own_connection(self) -> float:
        """Class connection of a prototype to its own class before the last layer is optimised."""
        if self.connection_scale is not None:
            return self.connection_scale
        return 10.0 if self.similarity == "cosine" else 1.0
