"""What the API takes and answers. Evidence is that of `protopnet.evidence.explanation`, as in the files of the jobs."""

from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from protopnet.evidence.records import Explanation, MapKind
from protopnet.evidence.sources import Source
from protopnet.quality.watch import WatchReport

ClassText = Annotated[str, Field(min_length=1, max_length=200)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True)


class _Options(BaseModel):
    """Query parameters; what isn't known is refused rather than ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# --------------------------------------------------------------------------------------------- options


class PredictOptions(_Options):
    top_classes: int = Field(5, ge=1, le=100, description="classes to answer with, most probable first")
    asked: list[ClassText] = Field(
        [], alias="class", max_length=20, description="also answer for this class, a name or a number; may be repeated"
    )
    abstain_below: float | None = Field(
        None, ge=0, le=1, description="abstain where the best probability is lower; the server's own when left out"
    )


class ExplainOptions(PredictOptions):
    top_classes: int = Field(3, ge=1, le=100, description="classes to explain, most probable first")
    top_prototypes: int = Field(5, ge=1, le=100, description="prototypes to list for each class, most points first")
    contrast: bool = Field(
        False,
        description="also answer with what tells the first class from each one asked for, else from the second: as many "
        "prototypes that speak for the one as for the other, `top_prototypes` of each",
    )
    maps: Literal["none", "png", "values"] = Field(
        "none",
        description="where each listed prototype sees itself: `png` adds heat maps to lay over the photo, `values` the "
        "figures",
    )
    map: MapKind = Field(
        "similarity",
        description="what those maps show: `similarity` that of all patches, `gradient` the pixels that the similarity "
        "rests on: more faithful, and the network is asked again for each prototype listed",
    )
    perturb: bool = Field(
        False,
        description="also answer with what each similarity rests on: how far it falls when hue, contrast, sharpness and "
        "shape of what the patch sees are changed",
    )

    @property
    def gradient(self) -> bool:
        """Whether maps are to be found by gradient."""
        return self.map == "gradient" and self.maps != "none"


class ClassOptions(_Options):
    search: str = Field("", max_length=200, description="only those with this in their name, in any case")
    offset: int = Field(0, ge=0, le=10**9, description="how many to leave out")
    limit: int = Field(50, ge=1, le=200, description="how many to answer with")


class PrototypeOptions(_Options):
    of_class: ClassText | None = Field(None, alias="class", description="only those of this class, a name or a number")
    member: int | None = Field(None, ge=0, description="only those of this member of the ensemble")
    offset: int = Field(0, ge=0, le=10**9, description="how many to leave out")
    limit: int = Field(50, ge=1, le=200, description="how many to answer with")


class BatchOptions(_Options):
    input: str = Field(
        min_length=1,
        max_length=2000,
        description="folder, bucket's prefix, list, tar file or shards, as for `jobs/score.py`",
    )
    explain: int = Field(0, ge=0, le=100, description="prototypes to list for the first class of each image")


class PictureOptions(_Options):
    v: str | None = Field(
        None, max_length=64, description="the `model` of /v1/model: with it the picture may be cached for good"
    )


# --------------------------------------------------------------------------------------------- answers


class ClassScore(_Record):
    """What a class got."""

    class_: int = Field(alias="class", examples=[3])
    class_name: str = Field(examples=["Blue Jay"])
    probability: float = Field(examples=[0.91])
    logit: float = Field(description="sum over the members", examples=[7.25])


class PredictedImage(_Record):
    """One image: the most probable classes, then those that were asked for."""

    file: str | None = Field(description="its name, where it was sent as part of a form")
    width: int = Field(description="of the image as uploaded, in pixels, after its EXIF turn")
    height: int
    abstained: bool = Field(description="the best probability is below `abstain_below`")
    unknown: bool | None = Field(
        description="looks like nothing the model knows: it is less similar to any prototype than most images of its "
        "classes; null where the bundles don't say"
    )
    classes: list[ClassScore]


class _Answer(_Record):
    request_id: str = Field(examples=["5f2b8c0e-8a4f-4a53-9d0b-3d7b3f6f1c11"])
    model: str = Field(description="which bundles answered: a short hash of all of them", examples=["9a2b4c6d8e0f"])


class Prediction(_Answer):
    images: list[PredictedImage] = Field(description="in the order sent")


class ExplainedImage(Explanation):
    """One image: the most probable classes, then those that were asked for, each with its evidence."""

    file: str | None = Field(description="its name, where it was sent as part of a form")
    abstained: bool = Field(description="the best probability is below `abstain_below`")
    heat_maps: dict[str, Base64Bytes] = Field(
        {}, description="`maps=png`: by `member/prototype` a transparent PNG to stretch over the whole photo"
    )


class ExplainedImages(_Answer):
    images: list[ExplainedImage] = Field(description="in the order sent")


class ModelClass(_Record):
    class_: int = Field(alias="class")
    class_name: str
    readable_name: str
    prototypes: int = Field(description="of this class, over all members")


class ClassPage(_Record):
    total: int
    offset: int
    limit: int
    next: int | None = Field(description="`offset` of the next page; null on the last")
    classes: list[ModelClass] = Field(description="those first whose name begins with what was searched for")


class ModelMember(_Record):
    member: int
    name: str = Field(description="of the bundle's folder")
    bundle_hash: str
    backbone: str
    similarity: str | None = Field(description="null for a black-box baseline")
    prototypes: int


class Limits(_Record):
    max_bytes: int = Field(description="of a request's body")
    max_pixels: int = Field(description="of an image")
    max_images: int = Field(description="of a request")
    max_total_pixels: int = Field(description="of all images of a request")
    max_evidence: int = Field(description="images x classes x prototypes, those with a map counted four times")
    max_answer_bytes: int
    timeout_s: float
    body_timeout_s: float
    min_rate: int = Field(description="bytes a second")


class Model(_Record):
    """What is served."""

    model: str = Field(description="short hash of all bundles together")
    image_size: int = Field(
        description="images are resized to this many pixels on each side; the largest, where members take different sizes"
    )
    explains: bool = Field(description="false where a member is a black-box baseline")
    classes: list[ModelClass]
    members: list[ModelMember]
    prototypes: int = Field(description="of all members together")
    abstain_below: float | None
    limits: Limits


class Prototype(_Record):
    member: int
    prototype: int = Field(description="its number in that member's bundle")
    class_: int = Field(alias="class", description="class the prototype belongs to")
    class_name: str
    name: str | None = Field(None, description="that people gave the prototype", examples=["red bill"])
    group: str | None = Field(None, description="of prototypes that people say mean the same")
    connection: float = Field(description="class connection to its own class")
    source: Source | None = Field(description="where it comes from; null where the bundle doesn't record it")
    thumbnail: str | None = Field(description="path of the training image as JPEG, relative to the root of the service")
    crop: str | None = Field(description="path of the patch alone")


class PrototypePage(_Record):
    total: int
    offset: int
    limit: int
    next: int | None = Field(description="`offset` of the next page; null on the last")
    prototypes: list[Prototype] = Field(description="in the order (class, member, prototype)")


class Connection(_Record):
    class_: int = Field(alias="class")
    class_name: str
    connection: float


class PrototypeDetail(Prototype):
    activation_map: list[list[float]] | None = Field(
        description="similarity to each patch of its own training image, row by row"
    )
    connections: list[Connection] = Field(description="the ten strongest class connections, of either sign")


class Health(_Record):
    status: Literal["ok"] = "ok"


class Readiness(_Record):
    status: Literal["ready"] = "ready"
    model: str


class ErrorDetail(_Record):
    code: str = Field(description="for programs; see the descriptions of the statuses")
    message: str = Field(description="for people")
    request_id: str


class Error(_Record):
    """The body of every answer that isn't a success."""

    error: ErrorDetail


# ------------------------------------------------------------------------------------------- the model in use


class Answers(_Record):
    """Images by what the shadow would have said of them."""

    same: int = Field(0, description="the same first class")
    other: int = Field(0, description="another one")
    missed: int = Field(0, description="nothing: it was busy, or failed")


class ShadowSeen(Answers):
    model: str = Field(description="hash of the shadow's bundles")
    classes: dict[str, Answers] = Field(description="by the class answered, those that differ most first")


class Watch(WatchReport):
    """Images in use since this model was deployed."""

    shadow: ShadowSeen | None = Field(description="null where there is none")


# -------------------------------------------------------------------------------------------------- batches


class Batch(_Record):
    """A folder or a list that is scored as a whole."""

    id: str = Field(description="of what is asked: asked again, it is the same")
    input: str
    explain: int
    model: str = Field(description="hash of the bundles that score it")
    output: str = Field(description="where `jobs/score.py` writes")
    state: Literal["running", "finished", "failed", "stopped"] = Field(
        description="failed: the job gave up, see `problem`; stopped: it was lost; ask again, and it goes on"
    )
    problem: str | None = None
    images: int | None = Field(None, description="when it is finished, as what follows")
    scored: int | None = None
    bad: int | None = Field(None, description="images that couldn't be scored: rows with an error")
    watch: WatchReport | None = None
    parts: list[str] | None = Field(None, description="Parquet files, to be fetched from /v1/batch/<id>/<part>")
