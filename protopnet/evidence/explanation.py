"""Why a class got its points: the evidence for an image.

Knows no Ray and no pixels: an `Explainer` turns what the members of an ensemble saw of a batch into explanations
(`protopnet.evidence.records`), with what their bundles record of each prototype.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from protopnet.errors import UserError
from protopnet.evidence.ranking import Head, Order, Ranking, View, rank
from protopnet.evidence.records import ClassEvidence, Contrast, Difference, Evidence, Explanation, Remainder
from protopnet.evidence.sources import Box, Shown, Source, Sources
from protopnet.evidence.sums import contrast_sums_of, sums_of
from protopnet.model.boxes import receptive_field_boxes, scale_boxes
from protopnet.model.bundle import Bundle, BundleInfo
from protopnet.model.calibration import Trust
from protopnet.model.network import ProtoPNet
from protopnet.model.prototype_table import PrototypeTable
from protopnet.model.receptive_field import ReceptiveField, receptive_field


class Explainer:
    """The heads of an ensemble's members, and where their prototypes come from."""

    def __init__(self, heads: Sequence[Head], infos: Sequence[BundleInfo], sources: Sequence[Sources]):
        self.heads, self.sources = list(heads), list(sources)
        self.classes = list(infos[0].classes)
        self.sizes = [info.preprocessing.size for info in infos]
        self.trust = Trust.of([info.calibration for info in infos])
        self._networks: list[ProtoPNet] = []

    @classmethod
    def of(cls, bundles: Sequence[Bundle], shown: Shown) -> "Explainer":
        """Of loaded bundles. `UserError` for a black-box baseline, which has no prototypes to explain with."""
        heads = [Head.of(explaining(bundle)) for bundle in bundles]
        tables = [None if bundle.prototypes is None else PrototypeTable.of(bundle.prototypes) for bundle in bundles]
        infos = [bundle.info for bundle in bundles]
        found = cls(heads, infos, [Sources(t, info.provenance, shown) for t, info in zip(tables, infos, strict=True)])
        found._networks = [explaining(bundle) for bundle in bundles]
        return found

    @cached_property
    def fields(self) -> list[ReceptiveField]:
        """What the members' patches can see; none where their networks are elsewhere, and nobody has said it."""
        return [receptive_field(n.backbone, n.preprocessing.size, n.pool) for n in self._networks]

    def rank(
        self,
        views: Sequence[View],
        sizes_B2: np.ndarray,
        image_R: np.ndarray,
        class_R: np.ndarray,
        *,
        prototypes: int,
        by: Order = "points",
        rival_R: np.ndarray | None = None,
    ) -> Ranking:
        """Evidence as arrays, for bulk work: see `protopnet.evidence.ranking.rank`."""
        return rank(
            views,
            self.heads,
            image_R,
            class_R,
            sizes_B2,
            listed=prototypes,
            image_sizes=self.sizes,
            by=by,
            rival_R=rival_R,
        )

    def explain(
        self,
        views: Sequence[View],
        sizes: Sequence[tuple[int, int]],
        *,
        top_classes: int = 3,
        top_prototypes: int = 5,
        asked: Sequence[Sequence[int]] | None = None,
        most_similar: int = 0,
        contrast: bool = False,
        maps: bool = False,
        thumbnails: bool = False,
    ) -> list[Explanation]:
        """One explanation an image.

        sizes: width and height of each image as uploaded. asked: for each image the labels of classes to explain
        beside the top ones ("why not a cardinal?"). most_similar: how many prototypes to list by similarity alone.
        contrast: set the answer beside each class asked about, else beside the second most probable, prototype by
        prototype: as many that speak for the one as for the other. maps, thumbnails: add activation maps, and the
        training images as JPEG.
        """
        logits_BK = sum(view.logits_BK for view in views)
        assert isinstance(logits_BK, Tensor)
        wanted = wanted_classes(logits_BK, top_classes, asked)
        image_R = np.repeat(np.arange(len(wanted)), [len(labels) for labels in wanted])
        class_R = np.concatenate([np.asarray(labels, dtype=np.int64) for labels in wanted])
        sizes_B2 = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        ranking = self.rank(views, sizes_B2, image_R, class_R, prototypes=top_prototypes)
        classes_R = self._classes(ranking, logits_BK, sizes_B2, maps, thumbnails)
        similar_B: list[list[Evidence]] = [[] for _ in wanted]
        if most_similar:
            first_B = np.array([labels[0] for labels in wanted])
            by_image = np.arange(len(wanted))
            seen = self.rank(views, sizes_B2, by_image, first_B, prototypes=most_similar, by="similarity")
            similar_B = [self._listed(seen, b, sizes_B2, maps, thumbnails) for b in range(len(wanted))]
        contrasts_B: list[list[Contrast]] = [[] for _ in wanted]
        if contrast:
            contrasts_B = self._contrasts(views, logits_BK, asked, sizes_B2, top_prototypes, maps, thumbnails)
        unknown_B = self.trust.unknown(torch.stack([view.best_B.cpu() for view in views]))
        edges = np.searchsorted(image_R, np.arange(len(wanted) + 1))
        return [
            Explanation(
                width=width,
                height=height,
                members=len(views),
                unknown=unknown,
                classes=classes_R[start:end],
                most_similar=similar,
                contrasts=contrasts,
            )
            for (width, height), start, end, similar, contrasts, unknown in zip(
                sizes_B2.tolist(),
                edges[:-1],
                edges[1:],
                similar_B,
                contrasts_B,
                [None] * len(wanted) if unknown_B is None else unknown_B.tolist(),
                strict=True,
            )
        ]

    def source(self, member: int, prototype: int, *, thumbnail: bool = False) -> Source | None:
        """Where a prototype comes from; None where its bundle doesn't record it."""
        found = self.sources[member].of(prototype)
        if found is None or not thumbnail:
            return found
        return found.model_copy(update={"thumbnail": self.thumbnail(member, prototype)})

    def thumbnail(self, member: int, prototype: int) -> bytes | None:
        """JPEG of the training image a prototype comes from; None where its bundle has none."""
        return self.sources[member].thumbnail(prototype)

    def called(self, member: int, prototype: int) -> dict[str, str | None]:
        """`name` and `group` that people gave a prototype."""
        return self.sources[member].called(prototype)

    def _classes(
        self, ranking: Ranking, logits_BK: Tensor, sizes_B2: np.ndarray, maps: bool, thumbnails: bool
    ) -> list[ClassEvidence]:
        probabilities_BK = self.trust.probabilities(logits_BK).cpu().numpy()
        logits = logits_BK.cpu().numpy()
        count = sum(len(head.prototype_class_P) for head in self.heads)
        entries = []
        for r, (image, label) in enumerate(zip(ranking.image_R, ranking.class_R.tolist(), strict=True)):
            listed = self._listed(ranking, r, sizes_B2, maps, thumbnails)
            remaining = count - len(listed)
            rest = ranking.total_R[r] - ranking.points_RN[r].astype(np.float64).sum()
            logit, probability = float(logits[image, label]), float(probabilities_BK[image, label])
            entries.append(
                ClassEvidence(
                    class_=label,
                    class_name=self.classes[label],
                    probability=probability,
                    logit=logit,
                    own_points=float(ranking.own_R[r]),
                    evidence=listed,
                    remainder=Remainder(prototypes=remaining, points=float(rest)),
                    shown=sums_of(
                        ((e.similarity, e.connection) for e in listed), logit, probability, remaining=remaining
                    ),
                )
            )
        return entries

    def _contrasts(
        self,
        views: Sequence[View],
        logits_BK: Tensor,
        asked: Sequence[Sequence[int]] | None,
        sizes_B2: np.ndarray,
        prototypes: int,
        maps: bool,
        thumbnails: bool,
    ) -> list[list[Contrast]]:
        """Of each image: the answer and each class asked about, else the second most probable."""
        first_two = wanted_classes(logits_BK, 2, None)
        pairs = [
            (b, answer, rival)
            for b, ((answer, *second), classes) in enumerate(
                zip(first_two, asked or [()] * len(first_two), strict=True)
            )
            for rival in dict.fromkeys(classes or second)
            if rival != answer
        ]
        found: list[list[Contrast]] = [[] for _ in first_two]
        if not pairs:
            return found
        image_R, class_R, rival_R = np.array(pairs, dtype=np.int64).T
        ranking = self.rank(views, sizes_B2, image_R, class_R, prototypes=prototypes, rival_R=rival_R)
        assert ranking.rival_connection_RN is not None
        count = sum(len(head.prototype_class_P) for head in self.heads)
        for r, (b, answer, rival) in enumerate(pairs):
            rows = [
                _difference(evidence, connection)
                for evidence, connection in zip(
                    self._listed(ranking, r, sizes_B2, maps, thumbnails),
                    ranking.rival_connection_RN[r].tolist(),
                    strict=True,
                )
            ]
            logit, rival_logit = logits_BK[b, answer].item(), logits_BK[b, rival].item()
            remaining, rest = count - len(rows), logit - rival_logit - sum(row.difference for row in rows)
            found[b].append(
                Contrast(
                    class_=answer,
                    class_name=self.classes[answer],
                    rival=rival,
                    rival_name=self.classes[rival],
                    difference=logit - rival_logit,
                    rows=rows,
                    remainder=Remainder(prototypes=remaining, points=rest),
                    shown=contrast_sums_of(
                        ((row.similarity, row.connection, row.rival_connection) for row in rows),
                        logit,
                        rival_logit,
                        remaining=remaining,
                    ),
                )
            )
        return found

    def _listed(self, ranking: Ranking, r: int, sizes_B2: np.ndarray, maps: bool, thumbnails: bool) -> list[Evidence]:
        """The prototypes of row r of a ranking, with what their bundles record of them."""
        members, prototypes = ranking.member_RN[r].tolist(), ranking.prototype_RN[r].tolist()
        labels = [int(self.heads[m].prototype_class_P[p]) for m, p in zip(members, prototypes, strict=True)]
        return [
            Evidence(
                member=member,
                prototype=prototype,
                class_=label,
                class_name=self.classes[label],
                **self.called(member, prototype),
                similarity=similarity,
                connection=connection,
                points=points,
                box=tuple(box),
                row=row,
                column=column,
                activation_map=ranking.maps[pair].tolist() if maps else None,
                receptive_field=self._seen(member, row, column, *sizes_B2[ranking.image_R[r]].tolist()),
                source=self.source(member, prototype, thumbnail=thumbnails),
            )
            for member, prototype, label, similarity, connection, points, box, row, column, pair in zip(
                members,
                prototypes,
                labels,
                ranking.similarity_RN[r].tolist(),
                ranking.connection_RN[r].tolist(),
                ranking.points_RN[r].tolist(),
                ranking.box_RN4[r].tolist(),
                ranking.row_RN[r].tolist(),
                ranking.column_RN[r].tolist(),
                ranking.pair_RN[r].tolist(),
                strict=True,
            )
        ]

    def _seen(self, member: int, row: int, column: int, width: int, height: int) -> Box | None:
        """What a patch can see of an image of this size; None where that is all of it."""
        if not self.fields:
            return None
        size, shape = self.sizes[member], self.heads[member].prototypes_PDhw.shape[2:]
        boxes_14 = receptive_field_boxes([(row, column)], self.fields[member], size, (shape[0], shape[1]))
        top, left, bottom, right = scale_boxes(boxes_14, size, width, height)[0].tolist()
        whole = (top, left, bottom, right) == (0, 0, height, width)
        return None if whole else (top, left, bottom, right)


def _difference(evidence: Evidence, rival_connection: float) -> Difference:
    rival_points = evidence.similarity * rival_connection
    return Difference.model_construct(
        **dict(evidence),
        rival_connection=rival_connection,
        rival_points=rival_points,
        difference=evidence.points - rival_points,
    )


def explaining(bundle: Bundle) -> ProtoPNet:
    """The network of a bundle that has prototypes; `UserError` for a black-box baseline."""
    if not isinstance(bundle.network, ProtoPNet):
        raise UserError(
            "a black-box baseline can't explain: give a bundle with prototypes (trained with model.kind protopnet)"
        )
    return bundle.network


def wanted_classes(logits_BK: Tensor, top_classes: int, asked: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Labels to explain for each image: the top ones, then those asked for that aren't among them."""
    # Stable: of equal logits the first class is the prediction, as with argmax.
    top_BC = logits_BK.sort(dim=1, descending=True, stable=True).indices[:, :top_classes].cpu().tolist()
    asked = asked or [()] * len(top_BC)
    return [list(dict.fromkeys([*top, *more])) for top, more in zip(top_BC, asked, strict=True)]
