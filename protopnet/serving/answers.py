"""From what the members saw to what the client is told."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from protopnet.evidence.explanation import wanted_classes
from protopnet.evidence.records import Evidence, Explanation
from protopnet.pages.pictures import heat_png
from protopnet.predictor import Scores
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.members import Seen
from protopnet.serving.schemas import ClassScore, ExplainedImage, ExplainOptions, PredictedImage, PredictOptions
from protopnet.serving.uploads import Picture

EvidenceOf = TypeVar("EvidenceOf", bound=Evidence)


def predicted(
    classes: Sequence[str],
    pictures: Sequence[Picture],
    scores: Scores,
    options: PredictOptions,
    asked: Sequence[int],
    abstain_below: float | None,
) -> list[PredictedImage]:
    """The top classes of each image, then those asked for."""
    logits_BK, probabilities_BK = scores.logits_BK.tolist(), scores.probabilities_BK.tolist()
    wanted = wanted_classes(scores.logits_BK, options.top_classes, [asked] * len(pictures))
    unknown_B = [None] * len(pictures) if scores.unknown_B is None else scores.unknown_B.tolist()
    return [
        PredictedImage(
            file=picture.file,
            width=picture.width,
            height=picture.height,
            abstained=_abstained(max(probabilities), abstain_below),
            unknown=unknown,
            classes=[
                ClassScore(
                    class_=label,
                    class_name=classes[label],
                    probability=probabilities[label],
                    logit=logits[label],
                )
                for label in labels
            ],
        )
        for picture, logits, probabilities, labels, unknown in zip(
            pictures, logits_BK, probabilities_BK, wanted, unknown_B, strict=True
        )
    ]


def explained(
    ensemble: Ensemble,
    pictures: Sequence[Picture],
    seen_MB: Sequence[Sequence[Seen]],
    options: ExplainOptions,
    asked: Sequence[int],
    abstain_below: float | None,
    check_wanted: Callable[[], None],
) -> list[ExplainedImage]:
    """The same with evidence. Takes milliseconds of one core and more: not for the event loop.

    check_wanted: is called between pieces of work; raises where the answer isn't wanted any more.
    """
    assert ensemble.explainer is not None
    found = []
    for number, picture in enumerate(pictures):
        check_wanted()
        [explanation] = ensemble.explainer.explain(
            ensemble.views([[seen_B[number]] for seen_B in seen_MB]),
            [(picture.width, picture.height)],
            top_classes=options.top_classes,
            top_prototypes=options.top_prototypes,
            asked=[asked],
            contrast=options.contrast,
            maps=options.maps != "none",
        )
        heat_maps = _heat_maps(explanation, check_wanted) if options.maps == "png" else {}
        if options.maps == "png":
            explanation = _without_values(explanation)
        found.append(
            ExplainedImage.model_construct(  # checked already, and the PNGs aren't in base64 yet
                **dict(explanation),
                file=picture.file,
                abstained=_abstained(explanation.top.probability, abstain_below),
                heat_maps=heat_maps,
            )
        )
    return found


def _abstained(probability: float, below: float | None) -> bool:
    return below is not None and probability < below


def _heat_maps(explanation: Explanation, check_wanted: Callable[[], None]) -> dict[str, bytes]:
    """A PNG for each prototype listed: the same one may stand under several classes."""
    listed = [entry.evidence for entry in explanation.classes] + [contrast.rows for contrast in explanation.contrasts]
    maps = {f"{each.member}/{each.prototype}": each.activation_map for rows in listed for each in rows}
    drawn: dict[str, bytes] = {}
    for name, map_HW in maps.items():
        check_wanted()
        if map_HW is not None:
            drawn[name] = heat_png(map_HW)
    return drawn


def _without_values(explanation: Explanation) -> Explanation:
    def bare(rows: list[EvidenceOf]) -> list[EvidenceOf]:
        return [row.model_copy(update={"activation_map": None}) for row in rows]

    classes = [entry.model_copy(update={"evidence": bare(entry.evidence)}) for entry in explanation.classes]
    contrasts = [each.model_copy(update={"rows": bare(each.rows)}) for each in explanation.contrasts]
    return explanation.model_copy(update={"classes": classes, "contrasts": contrasts})
