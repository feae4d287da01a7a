"""The kinds of bird: which variant of each part a class has, and what it is called.

Each part has one *common* variant (a bare crown, a plain wing, …) and three *marks*. A kind carries a mark on
three of its parts and the common variant on the others. No mark belongs to one class, so no single part gives
the class away; any two kinds differ in at least two parts. The parts that carry a mark are those worth
looking at: see `distinguishing_parts`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np

MARKS_PER_KIND = 3
DISTINCT_SHARE = 2 / 3


@dataclass(frozen=True)
class Mark:
    """A conspicuous variant of a part, with its two ways into a name."""

    variant: str
    adjective: str
    noun: str


# Per part: the common variant, then its marks.
COMMON: dict[str, str] = {
    "beak": "cone",
    "crest": "bare",
    "face": "plain",
    "breast": "plain",
    "wing": "plain",
    "tail": "square",
    "legs": "short",
}
MARKS: dict[str, tuple[Mark, ...]] = {
    "beak": (
        Mark("spoon", "Spoon-billed", "Spoonbill"),
        Mark("needle", "Needle-billed", "Needlebill"),
        Mark("hook", "Hook-billed", "Hookbill"),
    ),
    "crest": (
        Mark("fan", "Fan-crested", "Fancrest"),
        Mark("spike", "Spike-crested", "Lancehead"),
        Mark("puff", "Puff-crowned", "Puffhead"),
    ),
    "face": (
        Mark("mask", "Masked", "Bandit"),
        Mark("ring", "Spectacled", "White-eye"),
        Mark("cheek", "Rosy-cheeked", "Rosycheek"),
    ),
    "breast": (
        Mark("band", "Collared", "Ringbreast"),
        Mark("bib", "Red-breasted", "Redbreast"),
        Mark("speckled", "Speckled", "Thrush"),
    ),
    "wing": (
        Mark("barred", "Bar-winged", "Barwing"),
        Mark("spotted", "Spot-winged", "Spotwing"),
        Mark("patch", "Blue-winged", "Bluewing"),
    ),
    "tail": (
        Mark("forked", "Fork-tailed", "Forktail"),
        Mark("fan", "Fan-tailed", "Fantail"),
        Mark("long", "Long-tailed", "Streamertail"),
    ),
    "legs": (
        Mark("stilts", "Red-legged", "Stilt"),
        Mark("webbed", "Web-footed", "Paddler"),
        Mark("booted", "Booted", "Whitesock"),
    ),
}
PARTS: tuple[str, ...] = tuple(COMMON)

# The parts best suited to be the noun of a name come first.
_NOUN_ORDER = ("tail", "beak", "legs", "wing", "crest", "breast", "face")

Choice = tuple[tuple[str, Mark], ...]  # the marked parts of a kind


@dataclass(frozen=True)
class Kind:
    """A class of birds: its name and the variant of each part."""

    name: str
    variants: dict[str, str]

    def differs(self, other: "Kind") -> set[str]:
        """Parts of which this kind and the other have different variants."""
        return {part for part in PARTS if self.variants[part] != other.variants[part]}


def draw_kinds(classes: int, seed: int) -> list[Kind]:
    """The kinds of a dataset, in order of their names; another seed gives others."""
    rng = np.random.default_rng([seed, classes])
    choices = _choose(_candidates(classes, rng), classes)
    names = _names(choices)
    kinds = [
        Kind(name, COMMON | {part: mark.variant for part, mark in choice})
        for name, choice in zip(names, choices, strict=True)
    ]
    return sorted(kinds, key=lambda kind: kind.name)


def distinguishing_parts(kinds: Sequence[Kind], label: int) -> set[str]:
    """Parts whose variant differs from that of at least two thirds of the other kinds.

    Ground truth for explanations: evidence for a class should lie on one of these. A common variant (a plain
    wing) is shared with about half of the other kinds and never qualifies, except among very few kinds.
    """
    others = [kind for index, kind in enumerate(kinds) if index != label]
    differing = Counter(part for other in others for part in kinds[label].differs(other))
    return {part for part in PARTS if differing[part] >= DISTINCT_SHARE * len(others)}


def _candidates(classes: int, rng: np.random.Generator) -> list[Choice]:
    """All ways to mark three parts, shuffled; few classes get few marks, so that classes share them."""
    per_part = 1 if classes < 5 else 2 if classes < 15 else 3
    marked_parts = [PARTS[i] for i in sorted(rng.permutation(len(PARTS))[: 5 if classes < 5 else None])]
    pool = {part: [marks[i] for i in rng.permutation(len(marks))[:per_part]] for part, marks in MARKS.items()}
    everything: list[Choice] = [
        tuple(zip(parts, marks, strict=True))
        for parts in combinations(marked_parts, MARKS_PER_KIND)
        for marks in product(*(pool[part] for part in parts))
    ]
    return [everything[i] for i in rng.permutation(len(everything))]


def _choose(candidates: list[Choice], classes: int) -> list[Choice]:
    """Greedy choice: kinds as different as possible first, and each mark used equally often."""
    for apart in (3, 2):
        chosen: list[Choice] = []
        used: Counter[tuple[str, str]] = Counter()
        marked: Counter[str] = Counter()
        fitting = candidates
        while len(chosen) < classes:
            best = min(fitting, key=lambda c: _usage(c, used, marked), default=None)
            if best is None:
                break
            chosen.append(best)
            fitting = [c for c in fitting if _distance(c, best) >= apart]
            used.update((part, mark.variant) for part, mark in best)
            marked.update(part for part, _ in best)
        if len(chosen) == classes:
            return chosen
    raise ValueError(f"no {classes} kinds of bird that differ in two parts")


def _usage(choice: Choice, used: Counter[tuple[str, str]], marked: Counter[str]) -> tuple[int, int]:
    return (
        sum(used[part, mark.variant] ** 2 for part, mark in choice),
        sum(marked[part] ** 2 for part, _ in choice),
    )


def _distance(a: Choice, b: Choice) -> int:
    """Number of parts in which two kinds differ."""
    marks_a, marks_b = dict(a), dict(b)
    return sum(marks_a.get(part) != marks_b.get(part) for part in marks_a.keys() | marks_b.keys())


def _names(choices: Sequence[Choice]) -> list[str]:
    """A unique name for each kind, of two marks where possible; all three are always unique."""
    names: list[str] = []
    nouns: Counter[str] = Counter()
    for choice in choices:
        free = [name for name in _possible_names(choice) if name not in names]
        short = [name for name in free if name.count(" ") == 1]
        # Nouns are spread over the kinds: a guide full of Forktails is dull.
        names.append(min(short or free, key=lambda name: nouns[name.split()[-1]]))
        nouns[names[-1].split()[-1]] += 1
    return names


def _possible_names(choice: Choice) -> Iterator[str]:
    """Two-part names first, then those that mention every mark."""
    ordered = sorted(choice, key=lambda item: _NOUN_ORDER.index(item[0]))
    for (_, noun), (_, adjective) in permutations(ordered, 2):
        yield f"{adjective.adjective} {noun.noun}"
    for first, second, third in permutations(ordered):
        yield f"{third[1].adjective} {second[1].adjective} {first[1].noun}"
