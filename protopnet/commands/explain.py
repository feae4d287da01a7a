"""Why the model decides as it does, for one image or a few: pictures, a page, and the evidence as JSON.

    python jobs/explain.py runs/quickstart/bundle bird.jpg
    python jobs/explain.py runs/a/bundle runs/b/bundle *.jpg --class Cardinal --output why

Several bundles make an ensemble. `--class` asks about a class that isn't among the top ones ("why not a cardinal?"): it
is explained like them, and set beside the answer prototype by prototype.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from protopnet import imaging, storage
from protopnet.api.model import Model
from protopnet.api.results import Results, Why
from protopnet.cli import Positional, Repeated, checked, parse
from protopnet.config import Section
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.evidence.figures import page
from protopnet.evidence.records import ClassEvidence, Contrast, MapKind
from protopnet.evidence.sources import Named, Shown
from protopnet.model.bundle import INFO
from protopnet.pages import pictures
from protopnet.predictor import Predictor


class ExplainSettings(Section):
    """Settings of `jobs/explain.py`."""

    given: Positional[list[str]] = Field(description="folders of bundles and files of images: local paths or s3://…")
    classes: Annotated[list[str], Repeated("NAME")] = Field(
        [], alias="class", description="a class to explain beside the top ones; may be given again"
    )
    output: str = Field("explanations", description="folder for what is written")
    pictures: Literal["all", "page", "none"] = Field(
        "all", description="all: a PNG for each table, and the page; page: that alone; none: JSON only"
    )
    top_classes: int = Field(2, ge=1, description="classes to explain, highest logit first")
    top_prototypes: int = Field(5, ge=1, description="prototypes to list a class, most points first")
    most_similar: int = Field(
        10, ge=0, description="prototypes to list by similarity alone, of whatever class (in the JSON)"
    )
    contrast: bool = Field(
        True,
        description="also show what tells the answer from each --class, else from the second most probable class: as many "
        "prototypes that speak for the one as for the other",
    )
    map: MapKind = Field(
        "gradient",
        description="where the image is like a prototype. gradient: the pixels that the similarity rests on, from a pass "
        "forwards and back for each prototype listed; similarity: that of every patch, enlarged",
    )
    perturb: bool = Field(
        False,
        description="also show what each similarity rests on: how far it falls when hue, contrast, sharpness and shape of "
        "what the patch sees are changed (six passes for each prototype listed)",
    )
    sources: Named = Field(
        "names",
        description="what is said of training images: full: their locations; names: relative to the data's root; none: "
        "nothing, and of their pictures the prototypes alone",
    )
    crops_only: bool = Field(False, description="of the pictures of training images the prototypes alone")
    max_pixels: int = Field(imaging.MAX_PIXELS, ge=1, description="images with more pixels than this are refused")


def explain(settings: ExplainSettings | Mapping[str, Any]) -> Results[Why]:
    """Explain images, and write pictures, the page and JSON into `output`. `UserError` for what is wrong."""
    settings = checked(ExplainSettings, settings)
    bundles, uris = _bundles_and_images(settings.given)
    storage.check_writable(settings.output, "output")
    predictor = Predictor.load(bundles, Shown(settings.sources, settings.crops_only))
    found = Model(predictor, settings.max_pixels).explain(
        uris,
        why_not=settings.classes,
        top_classes=settings.top_classes,
        top_prototypes=settings.top_prototypes,
        most_similar=settings.most_similar,
        contrast=settings.contrast,
        map=settings.map,
        perturb=settings.perturb,
        thumbnails=True,
    )
    if settings.pictures != "none":
        explained = [(name, why.photo, why.explanation) for name, why in zip(_file_names(uris), found, strict=True)]
        document = page(explained, found[0].album, "Why?")
        storage.write_bytes(storage.join(settings.output, "explanation.html"), document.encode())
    if settings.pictures == "all":
        _write_figures(settings.output, found)
    written = [{"uri": why.name} | why.explanation.model_dump(mode="json") for why in found]
    storage.write_json(storage.join(settings.output, "explanations.json"), written)
    return found


@exit_with_a_sentence
def main() -> None:
    settings = parse(ExplainSettings, description=__doc__)
    found = explain(settings)
    for name, why in zip(_file_names([why.name for why in found]), found, strict=True):
        print(f"{name}: {why.verdict}")
    print(f"\nexplanations: {storage.located(settings.output)}")


def _bundles_and_images(given: Sequence[str]) -> tuple[list[str], list[str]]:
    bundles = [uri for uri in given if storage.exists(storage.join(uri, INFO))]
    images = [uri for uri in given if uri not in bundles]
    for uri in images:
        if not storage.exists(uri):
            raise UserError(f"there is no file or folder {uri}; expected bundles and images")
        if storage.is_folder(uri):
            raise UserError(
                f"{uri} is a folder without {INFO}: expected the folder of a bundle, or the file of an image"
            )
    if not bundles:
        raise UserError(f"no bundle among what was given: expected at least one folder with {INFO}, then images")
    if not images:
        raise UserError("no image among what was given: expected the file of at least one after the bundle")
    return bundles, images


def _file_names(uris: Sequence[str]) -> list[str]:
    """A name for each image that no other has, in any case: that of its file, all numbered where two have the same."""
    return _told_apart([uri.rstrip("/").rsplit("/", 1)[-1] for uri in uris])


def _told_apart(names: Sequence[str]) -> list[str]:
    if len({name.casefold() for name in names}) == len(names):
        return list(names)
    return [f"{number}-{name}" for number, name in enumerate(names, 1)]


def _write_figures(output: str, found: Results[Why]) -> None:
    names = _file_names([why.name for why in found])
    drawn: list[tuple[Why, ClassEvidence | Contrast, str]] = []
    for name, why in zip(names, found, strict=True):
        drawn += [(why, e, f"{name}-{place}-{_in_a_file(e.class_name)}.png") for place, e in enumerate(why.classes, 1)]
        drawn += [(why, c, f"{name}-not-{_in_a_file(c.rival_name)}.png") for c in why.contrasts]
    for (why, entry, _), file in zip(drawn, _told_apart([file for *_, file in drawn]), strict=True):
        storage.write_bytes(storage.join(output, file), pictures.encoded(why.figure_of(entry), "PNG"))


def _in_a_file(name: str) -> str:
    return name.replace("/", "_").replace(" ", "_")
