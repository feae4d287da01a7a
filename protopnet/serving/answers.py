"""From what the members saw to what the client is told."""

from collections.abc import Callable, Sequence

from protopnet.evidence.explanation import wanted_classes
from protopnet.evidence.records import Explanation
from protopnet.pages.pictures import heat_png
from protopnet.predictor import Scores
from protopnet.serving.ensemble import Ensemble
from protopnet.serving.members import Seen
from protopnet.serving.schemas import ClassScore, ExplainedImage, ExplainOptions, PredictedImage, PredictOptions
from protopnet.serving.uploads import Picture


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
    check_wanted: Callable[[], None],
) -> list[Explanation]:
    """The evidence of each image. Takes milliseconds of one core and more: not for the event loop.

    check_wanted: is called between pieces of work; raises where the answer isn't wanted any more.
    """
    assert ensemble.explainer is not None
    found = []
    for number, picture in enumerate(pictures):
        check_wanted()
        found += ensemble.explainer.explain(
            ensemble.views([[seen_B[number]] for seen_B in seen_MB]),
            [(picture.width, picture.height)],
            top_classes=options.top_classes,
            top_prototypes=options.top_prototypes,
            asked=[asked],
            contrast=options.contrast,
            maps=options.maps != "none",
        )
    return found


def pictured(
    explanations: Sequence[Explanation],
    pictures: Sequence[Picture],
    options: ExplainOptions,
    abstain_below: float | None,
    check_wanted: Callable[[], None],
) -> list[ExplainedImage]:
    """The same as it is sent, with heat maps if wanted. As slow."""
    found = []
    for explanation, picture in zip(explanations, pictures, strict=True):
        heat_maps = _heat_maps(explanation, check_wanted) if options.maps == "png" else {}
        if options.maps == "png":
            explanation = explanation.with_rows(lambda row: {"activation_map": None, "saliency_map": None})
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
    drawn: dict[str, bytes] = {}
    for row in explanation.rows():
        name = f"{row.member}/{row.prototype}"
        if name not in drawn:
            check_wanted()
            drawn[name] = heat_png(row.shown_map)
    return drawn
