"""A trained model in a program or a notebook: `load` a bundle, `predict` and `explain` images.

model = protopnet.load("runs/quickstart/bundle")
model.explain("bird.jpg", why_not="Cardinal").figure().save("why.png")
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, overload

import torch

from protopnet import imaging
from protopnet.api.photos import Opened, Photo, each, is_one, open_photo
from protopnet.api.results import Prediction, Results, Why
from protopnet.evidence.figures import Album
from protopnet.evidence.records import MapKind
from protopnet.pages import pictures
from protopnet.predictor import Predictor
from protopnet.words import find_class

Location = str | os.PathLike[str]
BATCH = 16  # images a forward pass
_PHOTO_SIDE, _THUMBNAIL_SIDE = 640, 256  # longest side of the photo that an explanation and a prediction keep


@dataclass
class Model:
    """One bundle, or several as an ensemble whose logits are added up.

    max_pixels: larger images aren't decoded. device: where the predictor's networks are.
    """

    predictor: Predictor
    max_pixels: int = imaging.MAX_PIXELS
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def classes(self) -> list[str]:
        """Names of the classes by label."""
        return self.predictor.classes

    @overload  # a str is an iterable of str as well: the first that fits is meant
    def predict(self, images: Photo) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Iterable[Photo]) -> Results[Prediction]: ...
    def predict(self, images: Photo | Iterable[Photo]) -> Prediction | Results[Prediction]:
        """How likely each image is of each class: one result for an image, `Results` for several.

        `UserError` for an image that can't be read.
        """
        found = Results(prediction for batch in self._batches(images) for prediction in self._predict(batch))
        return found[0] if is_one(images) else found

    @overload
    def explain(  # type: ignore[overload-overlap]
        self,
        images: Photo,
        *,
        why_not: str | Sequence[str] = (),
        top_classes: int = 1,
        top_prototypes: int = 5,
        most_similar: int = 0,
        contrast: bool = True,
        map: MapKind = "gradient",
        perturb: bool = False,
        thumbnails: bool = False,
    ) -> Why: ...
    @overload
    def explain(
        self,
        images: Iterable[Photo],
        *,
        why_not: str | Sequence[str] = (),
        top_classes: int = 1,
        top_prototypes: int = 5,
        most_similar: int = 0,
        contrast: bool = True,
        map: MapKind = "gradient",
        perturb: bool = False,
        thumbnails: bool = False,
    ) -> Results[Why]: ...
    def explain(
        self,
        images: Photo | Iterable[Photo],
        *,
        why_not: str | Sequence[str] = (),
        top_classes: int = 1,
        top_prototypes: int = 5,
        most_similar: int = 0,
        contrast: bool = True,
        map: MapKind = "gradient",
        perturb: bool = False,
        thumbnails: bool = False,
    ) -> Why | Results[Why]:
        """Why each image gets its points: one result for an image, `Results` for several.

        why_not: classes to explain beside the top ones. top_prototypes: to list a class, most points first.
        most_similar: prototypes to list by similarity alone. contrast: also what tells the answer from each class of
        `why_not`, else from the second most probable, prototype by prototype. map: where the photo is like a prototype:
        `gradient`, the pixels that the similarity rests on, or `similarity`, that of every patch, which takes no further
        passes. perturb: also how far each similarity falls when hue, contrast, sharpness and shape of what the patch sees
        are changed. thumbnails: in the data, pictures of the training images (figures have them anyway). `UserError` for
        an image that can't be read, a class that there isn't, and a black-box baseline.
        """
        asked = [find_class(name, self.classes) for name in ([why_not] if isinstance(why_not, str) else why_not)]
        options = {
            "top_classes": top_classes,
            "top_prototypes": top_prototypes,
            "most_similar": most_similar,
            "contrast": contrast,
            "map": map,
            "perturb": perturb,
            "thumbnails": thumbnails,
        }
        found = Results(why for batch in self._batches(images) for why in self._explain(batch, asked, options))
        return found[0] if is_one(images) else found

    @cached_property
    def _album(self) -> Album:
        return Album(self.predictor.explainer)

    def _batches(self, images: Photo | Iterable[Photo]) -> Iterator[list[Opened]]:
        opened = (
            open_photo(image, place, self.max_pixels, self.predictor.intensity)
            for place, image in enumerate(each(images))
        )
        while batch := list(islice(opened, BATCH)):
            yield batch

    def _predict(self, batch: Sequence[Opened]) -> Iterator[Prediction]:
        scores = self.predictor.scores(self._inputs(batch))
        logits_BK, temperature = scores.logits_BK.cpu().numpy(), scores.trust.temperature
        unknown_B = [None] * len(batch) if scores.unknown_B is None else scores.unknown_B.tolist()
        for opened, logits_K, unknown in zip(batch, logits_BK, unknown_B, strict=True):
            thumbnail = pictures.encoded(pictures.shrunk(opened.image, _THUMBNAIL_SIDE))
            yield Prediction(opened.name, *opened.image.size, self.classes, logits_K, thumbnail, temperature, unknown)

    def _explain(self, batch: Sequence[Opened], asked: Sequence[int], options: dict[str, Any]) -> Iterator[Why]:
        sizes = [opened.image.size for opened in batch]
        found = self.predictor.explain(self._inputs(batch), sizes, asked=[asked] * len(batch), maps=True, **options)
        for opened, explanation in zip(batch, found, strict=True):
            yield Why(opened.name, explanation, pictures.shrunk(opened.image, _PHOTO_SIDE), self._album)

    def _inputs(self, batch: Sequence[Opened]) -> list[torch.Tensor]:
        of_members = self.predictor.look_at([opened.image for opened in batch])
        return [images_B3HW.to(self.device) for images_B3HW in of_members]


def load(*bundles: Location | Iterable[Location], device: str | None = None) -> Model:
    """The model of a bundle; of several (more arguments, or a list), their ensemble.

    bundles: folders, local or `s3://…`. device: as torch names it; a GPU if there is one when left out. `UserError`
    where a bundle is missing or damaged, and for bundles of other classes than the first.
    """
    uris = [os.fspath(uri) for given in bundles for uri in ([given] if isinstance(given, str | os.PathLike) else given)]
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(Predictor.load(uris).to(place), device=place)
