"""The pages of an audit: `index.html` with the findings and the classes, and a page a class with its prototypes.

Each page needs nothing else: an image is inlined once and shown as often as it is needed through SVG, whole or cut to
a patch, below a heat map of a few hundred bytes. What goes in are the tables of `audit` and thumbnails.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from protopnet.auditing.findings import KINDS, SEVERITIES, Finding
from protopnet.auditing.judgement import Audit
from protopnet.auditing.remedies import remedies
from protopnet.pages.pictures import Inlined, Picture, data_uri, encoded, heat_png, opened, shrunk
from protopnet.pages.templates import render
from protopnet.words import readable_names

MAX_FINDINGS = 500  # on the first page; all are in findings.parquet
_HEAT_SIDE = 32  # pixels of a heat map; the browser enlarges it
_SMALL_SIDE = 112  # of images on the first page
_PICTURES = 3  # of a finding on the first page
_KIND_NOTES = {
    "confused": "Prototypes of two classes look much the same to the network, so that one may be taken for the other.",
    "other-classes": "Few of the training images most like the prototype are of its class.",
    "background": "What the prototype sees lies beside the object: off its mask, or outside the outline of its key points.",
    "same-place": "The images most like it are so at one place by the edge: a label, a watermark or a frame.",
    "borrowed": "Most points for the class on its own images come from prototypes of other classes.",
    "repeated": "Two prototypes of a class are the same patch or nearly the same.",
    "unused": "Never among the top evidence of an image.",
}


@dataclass
class AuditPages:
    """Everything that the pages say.

    prototypes: of the bundle (PROTOTYPE_SCHEMA). thumbnails: JPEG by image_id. facts: label and value of each figure in the
    headline. settings: name and value. images: how many were looked at, by split; use_split: on which of them use was
    counted. command: that corrects the bundle, without its options.
    """

    title: str
    audit: Audit
    prototypes: pa.Table
    thumbnails: Mapping[int, bytes]
    facts: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, Any]]
    use_split: str
    command: str

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Path and content of each page, the first page last."""
        for label in range(len(self._names)):
            yield class_path(label), self._class_page(label)
        yield "index.html", self._index()

    # The first page.

    def _index(self) -> str:
        findings = self.audit.findings[:MAX_FINDINGS]
        shown = sorted({p for found in findings for p in found.prototypes[:_PICTURES]})
        small = {p: encoded(shrunk(opened(self._source(p)["thumbnail"]), _SMALL_SIDE)) for p in shown}
        counts = self.audit.counts()
        flagged: dict[int, int] = defaultdict(int)
        for found in self.audit.findings:
            flagged[found.label] += 1
        return self._render(
            "auditing/index.html.j2",
            findings=[{"finding": found, "pictures": self._small_pictures(found)} for found in findings],
            remedies=remedies(self.audit.findings, self.prototypes),
            command=self.command,
            left_out=len(self.audit.findings) - len(findings),
            sheet={f"p{p}": _inlined(self._source(p), data) for p, data in small.items()},
            counts=counts,
            kinds={kind: (title, _KIND_NOTES[kind]) for kind, title in KINDS.items() if counts["by_kind"][kind]},
            top=dict(self.settings)["top"],
            classes=[
                row | {"name": self._names[row["class"]], "findings": flagged[row["class"]]} for row in self._classes
            ],
        )

    def _small_pictures(self, found: Finding) -> list[tuple[int, int, Picture]]:
        """Prototype, its class and its picture, for the first that a finding is about."""
        pictures = []
        for p in found.prototypes[:_PICTURES]:
            source = self._source(p)
            label = f"prototype {p} of {self._names[source['class']]}"
            picture = Picture(f"p{p}", source["width"], source["height"], tuple(source["box"]), label)
            pictures.append((p, source["class"], picture))
        return pictures

    # A page a class.

    def _class_page(self, label: int) -> str:
        members = np.flatnonzero(self.prototypes["class"].to_numpy() == label).tolist()
        sheet: dict[str, Inlined] = {}
        cards = [self._card(p, sheet) for p in members]
        return self._render(
            "auditing/class.html.j2",
            label=label,
            name=self._names[label],
            row=self._classes[label],
            findings=[found for found in self.audit.findings if found.label == label and not found.prototypes],
            cards=cards,
            sheet=sheet,
            neighbours=[other for other in (label - 1, label + 1) if 0 <= other < len(self._names)],
        )

    def _card(self, p: int, sheet: dict[str, Inlined]) -> dict[str, Any]:
        """A prototype: its source, its nearest patches by split, its figures and its findings."""
        source = self._source(p)
        own_name = self._names[source["class"]]
        rows = self._nearest(p)
        by_split: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
        for row in rows:
            symbol = self._symbol(row["image_id"], row, sheet)
            name = self._names[row["class"]]
            label = f"{row['split']} image of {name}, similarity {row['similarity']:.2f}"
            by_split[row["split"]].append(row | {"name": name, "picture": _picture(symbol, row, label)})
        of_source = next((row["image_id"] for row in rows if row["is_source"]), None)
        if of_source is None:
            symbol = f"s{source['image_id']}"
            sheet[symbol] = _inlined(source, source["thumbnail"])
        else:
            symbol = self._symbol(of_source, source, sheet)
        return {
            "p": p,
            "source": source,
            "picture": _picture(symbol, source, f"prototype {p} of {own_name} on the training image it comes from"),
            "nearest": by_split,
            "numbers": self.audit.prototypes.slice(p, 1).to_pylist()[0],
            "findings": self._findings_of[p],
        }

    def _symbol(self, image_id: int, row: Mapping[str, Any], sheet: dict[str, Inlined]) -> str:
        symbol = f"i{image_id}"
        if symbol not in sheet:
            sheet[symbol] = _inlined(row, self.thumbnails[image_id])
        return symbol

    # What both need.

    def _render(self, template: str, **values: Any) -> str:
        return render(
            template,
            title=self.title,
            facts=self.facts,
            settings=self.settings,
            use_split=self.use_split,
            names=self._names,
            kind_titles=KINDS,
            severity_words=SEVERITIES,
            class_path=class_path,
            **values,
        )

    def _nearest(self, p: int) -> list[dict[str, Any]]:
        first, last = self._edges[p], self._edges[p + 1]
        rows: list[dict[str, Any]] = self.audit.nearest.slice(first, last - first).to_pylist()
        return rows

    @cached_property
    def _edges(self) -> list[int]:
        prototype = self.audit.nearest["prototype"].to_numpy()
        edges: list[int] = np.searchsorted(prototype, np.arange(len(self.prototypes) + 1)).tolist()
        return edges

    @cached_property
    def _names(self) -> list[str]:
        return readable_names(self.audit.class_names)

    def _source(self, p: int) -> dict[str, Any]:
        row: dict[str, Any] = self.prototypes.slice(p, 1).to_pylist()[0]
        return row

    @cached_property
    def _classes(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.audit.classes.to_pylist()
        return rows

    @cached_property
    def _findings_of(self) -> list[list[Finding]]:
        of: list[list[Finding]] = [[] for _ in range(len(self.prototypes))]
        for found in self.audit.findings:
            for p in found.prototypes:
                of[p].append(found)
        return of


def class_path(label: int) -> str:
    """Path of a class's page, from the first page."""
    return f"classes/{label:04d}.html"


def _inlined(row: Mapping[str, Any], jpeg: bytes) -> Inlined:
    return Inlined(row["width"], row["height"], data_uri(jpeg))


def _picture(symbol: str, row: Mapping[str, Any], label: str) -> Picture:
    heat = data_uri(heat_png(row["activation_map"], _HEAT_SIDE))
    return Picture(symbol, row["width"], row["height"], tuple(row["box"]), label, heat)
