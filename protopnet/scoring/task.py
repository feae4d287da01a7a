"""From decoded images to rows: scores, what comes first, and the evidence for it. Knows no Ray and no files.

Legend: B images of a batch, G of them that could be decoded, K classes, M members, T classes listed, N prototypes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from protopnet import imaging
from protopnet.config import IntensitySettings, Threshold
from protopnet.errors import UserError
from protopnet.evidence.every import Asked, asked_for, everything
from protopnet.evidence.ranking import Ranking
from protopnet.imaging import BadImage
from protopnet.predictor import Images, Precision, Predictor, Scores, sum_up
from protopnet.quality.watch import OfClass, watched
from protopnet.scoring.arrays import Explain, Format, array_columns, array_fields
from protopnet.scoring.output import EVIDENCE, TOP, score_schema
from protopnet.scoring.tally import Agreement, Tally

# With bf16, the first images are scored in float32 as well.
COMPARED_IMAGES = 256


class Picture(NamedTuple):
    """An image as the network takes it, with its width and height after the EXIF turn."""

    pixels: Mapping[int, np.ndarray]
    width: int
    height: int


@dataclass(frozen=True)
class ScoreOptions:
    """What is said of an image, and how it is computed."""

    batch_size: int = 64
    precision: Precision = "float32"
    top: int = 5
    explain: Explain = 0
    explain_classes: Sequence[str] | None = None
    explain_prototypes: Sequence[int] | None = None
    format: Format = "parquet"
    abstain: Threshold | None = None
    abstain_by: Literal["probability", "margin"] = "probability"
    max_pixels: int = imaging.MAX_PIXELS
    carry: Sequence[str] | None = None

    def asked(self, predictor: Predictor) -> Asked | None:
        """What `explain: all` asks for; None where less is asked. `UserError` for what there isn't."""
        if self.explain == "all":
            return asked_for(predictor.bundles, self.explain_classes, self.explain_prototypes)
        if self.explain_classes is not None or self.explain_prototypes is not None:
            raise UserError("--explain_classes and --explain_prototypes are for --explain all: give that, too")
        return None


def look(
    data: bytes | BadImage,
    row: dict[str, Any],
    sizes: Sequence[int],
    max_pixels: int,
    intensity: IntensitySettings = imaging.AS_THE_FILE_SAYS,
) -> Picture | BadImage:
    """The same pixels as `imaging.load` gives, in each size, or why there are none."""
    try:
        if isinstance(data, BadImage):
            raise data
        image = imaging.decode(data, max_pixels=max_pixels, intensity=intensity)
        return Picture({size: imaging.resize(image, size) for size in sizes}, *image.size)
    except BadImage as bad:
        return BadImage(bad.reason.replace("data.max_pixels", "max_pixels"))


class Scorer:
    """Rows of a batch at a time, on the device that its predictor is on."""

    def __init__(self, predictor: Predictor, options: ScoreOptions, device: torch.device):
        self.predictor, self.options, self.device = predictor, options, device
        self.abstain = predictor.trust.threshold(options.abstain, "--abstain")
        self.asked = options.asked(predictor)
        self.arrays = array_fields(self.asked, options.format) if self.asked else []
        self.schema = score_schema(bool(options.explain) and not self.arrays, options.carry or (), self.arrays)
        self.classes = pa.array(predictor.classes, pa.string())
        tables = [bundle.prototypes for bundle in predictor.bundles]
        self.names = [None if table is None else table["name"].combine_chunks() for table in tables]
        self.sources = [of_member.uris() for of_member in predictor.explainer.sources] if options.explain else []

    def __call__(self, rows: pa.Table, pictures: Sequence[Picture | BadImage]) -> tuple[pa.Table, Tally]:
        """The rows to write for rows of a manifest and their images, and counts of them."""
        good = np.flatnonzero([isinstance(picture, Picture) for picture in pictures])
        errors = [picture.reason if isinstance(picture, BadImage) else None for picture in pictures]
        seen = [picture for picture in pictures if isinstance(picture, Picture)]
        columns, agreement, seen_of_classes = self._columns(seen, rows["image_id"].to_numpy()[good], errors, good)
        columns |= {name: rows[name] for name in ("image_id", "uri", "label")}
        columns["label_name"] = self.classes.take(rows["label"].combine_chunks())
        columns["error"] = pa.array(errors, pa.string())
        columns |= {name: pc.list_element(rows["carried"], at) for at, name in enumerate(self.options.carry or ())}
        table = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        return table, Tally.of(table, agreement, seen_of_classes)

    def _columns(
        self, seen: list[Picture], ids_G: np.ndarray, errors: list[str | None], good: np.ndarray
    ) -> tuple[dict[str, Any], Agreement, dict[str, OfClass]]:
        B = len(errors)
        if not seen:
            return {field.name: pa.nulls(B, field.type) for field in self.schema}, Agreement(), {}
        sizes_G2 = np.array([(picture.width, picture.height) for picture in seen])
        pixels = {
            size: torch.from_numpy(np.stack([picture.pixels[size] for picture in seen])).to(self.device)
            for size in self.predictor.sizes
        }
        with torch.inference_mode():
            images = self.predictor.normalised(pixels)
            scores, views = self._forward(images)
            agreement = self._agreement(images, scores, ids_G)
            logits_GK = scores.logits_BK.cpu().numpy()
            members_MGK = scores.members_MBK.cpu().numpy()
            finite_G = np.isfinite(logits_GK).all(1)
            for g in np.flatnonzero(~finite_G):
                errors[good[g]] = "the network's scores aren't finite numbers"
            finite_GK = np.where(finite_G[:, None], logits_GK, 0)
            first = _First.of(finite_GK, self.options.top, self.predictor.trust.temperature)
            class_G, image_G, ranking, every = first.top_GT[:, 0].astype(np.int64), np.arange(len(seen)), None, None
            if self.asked is not None:
                every = everything(self.predictor.explainer, views, self.asked, class_G, sizes_G2)
            elif isinstance(self.options.explain, int) and (N := self.options.explain):
                ranking = self.predictor.explainer.rank(views, sizes_G2, image_G, class_G, prototypes=N)
        place = _Places(B, good[finite_G], finite_G)
        unknown_G = scores.unknown_B
        columns = self._scores(first, members_MGK, place)
        columns |= {
            "width": place.column(sizes_G2[:, 0], pa.int32()),
            "height": place.column(sizes_G2[:, 1], pa.int32()),
            "unknown": pa.nulls(B, pa.bool_())
            if unknown_G is None
            else place.column(unknown_G.cpu().numpy(), pa.bool_()),
        }
        if ranking is not None:
            columns["evidence"] = place.lists(self._evidence(ranking, finite_G), ranking.points_RN.shape[1])
        if every is not None:
            columns |= array_columns(every, self.arrays, B, place.at, finite_G)
        abstained_G = columns["prediction"].is_null().to_numpy(zero_copy_only=False)[place.at]
        return columns, agreement, watched(scores.only(torch.from_numpy(finite_G)), self.predictor.classes, abstained_G)

    def _forward(self, images: Images) -> tuple[Scores, list[Any]]:
        how: dict[str, Any] = {"precision": self.options.precision, "pad_to": self.options.batch_size}
        if not self.options.explain:
            return self.predictor.scores(images, **how), []
        views = self.predictor.views(images, **how)
        members = [view.logits_BK for view in views], [view.best_B for view in views]
        return sum_up(*members, self.predictor.trust), views

    def _agreement(self, images: Images, scores: Scores, ids_G: np.ndarray) -> Agreement:
        if self.options.precision == "float32" or ids_G[0] >= COMPARED_IMAGES:
            return Agreement()
        compared = torch.from_numpy(ids_G < COMPARED_IMAGES)
        exact_GK = self.predictor.scores(images, pad_to=self.options.batch_size).logits_BK.cpu()[compared]
        logits_GK = scores.logits_BK.cpu()[compared]
        return Agreement(
            images=len(exact_GK),
            same_prediction=int((exact_GK.argmax(1) == logits_GK.argmax(1)).sum()),
            largest_logit_difference=float((exact_GK - logits_GK).abs().max()),
        )

    def _scores(self, first: "_First", members_MGK: np.ndarray, place: "_Places") -> dict[str, Any]:
        probability_G, margin_G = first.probability_GT[:, 0], first.margin_G
        class_G = first.top_GT[:, 0]
        agree_G = (members_MGK.argmax(2) == class_G).mean(0)
        prediction = place.column(class_G, pa.int32())
        if self.abstain is not None:
            measure_G = probability_G if self.options.abstain_by == "probability" else margin_G
            sure = place.column(measure_G >= self.abstain, pa.bool_())
            prediction = pc.if_else(sure, prediction, pa.scalar(None, pa.int32()))
        entries = (first.top_GT, self.classes.take(pa.array(first.top_GT[place.finite_G].ravel())))
        top = _struct(
            TOP,
            pa.array(entries[0][place.finite_G].ravel(), pa.int32()),
            entries[1],
            pa.array(first.probability_GT[place.finite_G].ravel(), pa.float32()),
            pa.array(first.logit_GT[place.finite_G].ravel(), pa.float32()),
        )
        return {
            "prediction": prediction,
            "class_name": self.classes.take(prediction),
            "probability": place.column(probability_G, pa.float32()),
            "logit": place.column(first.logit_GT[:, 0], pa.float32()),
            "margin": place.column(margin_G, pa.float32()),
            "members_agree": place.column(agree_G, pa.float32()),
            "top": place.lists(top, first.top_GT.shape[1]),
        }

    def _evidence(self, ranking: Ranking, finite_G: np.ndarray) -> pa.StructArray:
        member_E, prototype_E = ranking.member_RN[finite_G].ravel(), ranking.prototype_RN[finite_G].ravel()
        class_E, source_E, name_E = np.empty(len(member_E), np.int32), *np.empty((2, len(member_E)), object)
        for member, head in enumerate(self.predictor.explainer.heads):
            own = member_E == member
            class_E[own] = head.prototype_class_P[prototype_E[own]]
            for texts_P, text_E in ((self.sources[member], source_E), (self.names[member], name_E)):
                if texts_P is not None:
                    text_E[own] = texts_P.take(pa.array(prototype_E[own])).to_numpy(zero_copy_only=False)
        box_E4 = pa.array(ranking.box_RN4[finite_G].reshape(-1), pa.int32())
        return _struct(
            EVIDENCE,
            pa.array(member_E, pa.int32()),
            pa.array(prototype_E, pa.int32()),
            pa.array(class_E, pa.int32()),
            pa.array(name_E, pa.string()),
            pa.array(ranking.similarity_RN[finite_G].ravel(), pa.float32()),
            pa.array(ranking.connection_RN[finite_G].ravel(), pa.float32()),
            pa.array(ranking.points_RN[finite_G].ravel(), pa.float32()),
            pa.ListArray.from_arrays(pa.array(np.arange(len(member_E) + 1) * 4, pa.int32()), box_E4),
            pa.array(source_E, pa.string()),
        )


@dataclass(frozen=True)
class _First:
    """The classes with the highest logits, and their probabilities as `predictions` of an evaluation has them."""

    top_GT: np.ndarray
    logit_GT: np.ndarray
    probability_GT: np.ndarray
    margin_G: np.ndarray

    @classmethod
    def of(cls, logits_GK: np.ndarray, top: int, temperature: float) -> "_First":
        # Stable: of equal logits the first class is the prediction, as with argmax.
        order_GK = np.argsort(-logits_GK, axis=1, kind="stable")
        sorted_GK = np.take_along_axis(logits_GK, order_GK, axis=1)
        total_G1 = np.exp((logits_GK - logits_GK.max(1, keepdims=True)) / temperature).sum(1, keepdims=True)
        probability_GK = np.exp((sorted_GK - sorted_GK[:, :1]) / temperature) / total_G1
        second_G = probability_GK[:, 1] if logits_GK.shape[1] > 1 else 0
        margin_G = probability_GK[:, 0] - second_G
        return cls(order_GK[:, :top], sorted_GK[:, :top], probability_GK[:, :top], margin_G)


@dataclass(frozen=True)
class _Places:
    """Which rows of a batch of B have values: those at `at`, which are the finite ones of G images."""

    B: int
    at: np.ndarray
    finite_G: np.ndarray

    def column(self, values_G: np.ndarray, kind: pa.DataType) -> pa.Array:
        """The values at their rows, null elsewhere."""
        values_B = np.zeros(self.B, values_G.dtype)
        values_B[self.at] = values_G[self.finite_G]
        return pa.array(values_B, kind, mask=self._missing())

    def lists(self, values: pa.Array, each: int) -> pa.ListArray:
        """Lists of `each` values one after another at their rows, null elsewhere."""
        lengths_B = np.where(self._missing(), 0, each)
        offsets = pa.array(np.concatenate([[0], lengths_B.cumsum()]), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, mask=pa.array(self._missing()))

    def _missing(self) -> np.ndarray:
        missing = np.ones(self.B, bool)
        missing[self.at] = False
        return missing


def _struct(kind: pa.StructType, *columns: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays(list(columns), fields=list(kind))
