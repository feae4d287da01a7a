"""Why the model decides as it does, for one image or a few: pictures, a page, and the evidence as JSON.

    python jobs/explain.py runs/quickstart/bundle bird.jpg
    python jobs/explain.py runs/a/bundle runs/b/bundle *.jpg --class Cardinal --output why

Several bundles make an ensemble. `--class` asks about a class that isn't among the top ones ("why not a cardinal?").
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from protopnet import imaging, storage
from protopnet.cli import Positional, Repeated, parse
from protopnet.config import Section
from protopnet.errors import UserError, exit_with_a_sentence
from protopnet.evidence.explanation import Explanation
from protopnet.evidence.figures import Album, class_figure, page
from protopnet.model.bundle import INFO
from protopnet.pages import pictures
from protopnet.predictor import Predictor
from protopnet.words import find_class, percent, readable_names

BATCH = 16


class ExplainSettings(Section):
    """Settings of `jobs/explain.py`."""

    given: Positional[list[str]] = Field(description="folders of bundles and files of images: local paths or s3://…")
    classes: Annotated[list[str], Repeated("NAME")] = Field(
        [], alias="class", description="a class to explain beside the top ones; may be given again"
    )
    output: str = Field("explanations", description="folder for what is written")
    pictures: Literal["all", "page", "none"] = Field(
        "all", description="all: a PNG for each image and class, and the page; page: that alone; none: JSON only"
    )
    top_classes: int = Field(2, ge=1, description="classes to explain, highest logit first")
    top_prototypes: int = Field(5, ge=1, description="prototypes to list a class, most points first")
    most_similar: int = Field(
        10, ge=0, description="prototypes to list by similarity alone, of whatever class (in the JSON)"
    )
    max_pixels: int = Field(imaging.MAX_PIXELS, ge=1, description="images with more pixels than this are refused")


@exit_with_a_sentence
def main() -> None:
    settings = parse(ExplainSettings, description=__doc__)
    bundles, uris = _bundles_and_images(settings.given)
    storage.check_writable(settings.output, "output")
    predictor = Predictor.load(bundles)
    asked = [find_class(name, predictor.classes) for name in settings.classes]
    photos = [_photo(uri, settings.max_pixels) for uri in uris]
    explanations = explain(predictor, photos, asked, settings)
    names = _file_names(uris)
    if settings.pictures != "none":
        album = Album(predictor.explainer)
        document = page(list(zip(names, photos, explanations, strict=True)), album, "Why?")
        storage.write_bytes(storage.join(settings.output, "explanation.html"), document.encode())
        if settings.pictures == "all":
            _write_figures(settings.output, names, photos, explanations, album)
    written = [{"uri": uri} | e.model_dump(mode="json") for uri, e in zip(uris, explanations, strict=True)]
    storage.write_json(storage.join(settings.output, "explanations.json"), written)
    for name, explanation in zip(names, explanations, strict=True):
        print(f"{name}: {_verdict(explanation, predictor.classes)}")
    print(f"\nexplanations: {storage.located(settings.output)}")


def explain(
    predictor: Predictor, photos: Sequence[Image.Image], asked: Sequence[int], settings: ExplainSettings
) -> list[Explanation]:
    """Explanations of upright RGB images, with activation maps and thumbnails."""
    found: list[Explanation] = []
    for start in range(0, len(photos), BATCH):
        batch = photos[start : start + BATCH]
        found += predictor.explain(
            predictor.look_at(batch),
            [photo.size for photo in batch],
            top_classes=settings.top_classes,
            top_prototypes=settings.top_prototypes,
            asked=[asked] * len(batch),
            most_similar=settings.most_similar,
            maps=True,
            thumbnails=True,
        )
    return found


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


def _photo(uri: str, max_pixels: int) -> Image.Image:
    try:
        return imaging.decode(storage.read_bytes(uri), max_pixels=max_pixels)
    except imaging.BadImage as bad:
        raise UserError(f"{uri} can't be used: {bad.reason}") from bad


def _file_names(uris: Sequence[str]) -> list[str]:
    """A name for each image that no other has, in any case: that of its file, all numbered where two have the same."""
    return _told_apart([uri.rstrip("/").rsplit("/", 1)[-1] for uri in uris])


def _told_apart(names: Sequence[str]) -> list[str]:
    if len({name.casefold() for name in names}) == len(names):
        return list(names)
    return [f"{number}-{name}" for number, name in enumerate(names, 1)]


def _write_figures(
    output: str, names: Sequence[str], photos: Sequence[Image.Image], found: Sequence[Explanation], album: Album
) -> None:
    readable = readable_names(album.explainer.classes)
    drawn = [
        (photo, entry, f"{name}-{place}-{entry.class_name.replace('/', '_').replace(' ', '_')}.png")
        for name, photo, explanation in zip(names, photos, found, strict=True)
        for place, entry in enumerate(explanation.classes, 1)
    ]
    for (photo, entry, _), file in zip(drawn, _told_apart([file for *_, file in drawn]), strict=True):
        figure = class_figure(photo, entry, album, readable)
        storage.write_bytes(storage.join(output, file), pictures.encoded(figure, "PNG"))


def _verdict(explanation: Explanation, classes: Sequence[str]) -> str:
    names = readable_names(classes)
    top = explanation.top
    verdict = f"{names[top.class_]} ({percent(top.probability)}), {top.logit:z.2f} points"
    if top.evidence:
        first = top.evidence[0]
        verdict += f"; most, {first.points:z.2f}, from prototype {first.prototype} of {names[first.class_]}"
    return verdict
