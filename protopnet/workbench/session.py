"""Decisions one after another, and what each changes. Knows no Ray and no HTTP: rows in memory, a log on the disk.

A decision is written down first; then what all decisions come to is worked out as `jobs/prune.py` would, from the cached
latent maps, and the class connections are solved again: the own-class ones of the classes concerned at once, all of them,
to a certified optimum, beside. The log is replayed when a session is opened.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from protopnet.auditing.decisions import Decision
from protopnet.auditing.draft import Draft, Place
from protopnet.auditing.prune import Corrections, Corrector
from protopnet.auditing.settling import Settled
from protopnet.errors import UserError
from protopnet.passes.image_pass import PassOptions
from protopnet.progress import LineReporter, Stopwatch
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.training.solver import Progress
from protopnet.workbench.cache import Cache
from protopnet.workbench.fit import Fit, Rows, Worth, worth
from protopnet.workbench.log import DecisionLog

Shown = Literal["validation", "train"]


@dataclass(frozen=True)
class Flip:
    """An image whose predicted class a decision has changed."""

    image_id: int
    label: int
    before: int
    after: int


@dataclass(frozen=True)
class Effect:
    """What the last decision, undo or redo changed on the images shown.

    state: solving, while only the own-class connections of the classes concerned are solved; then whether all of them are
    optimal. residual: of the KKT conditions. moved: prototypes that are on other patches now, and where.
    """

    number: int
    says: str
    state: Literal["solving", "optimal", "not optimal"]
    accuracy_before: float
    accuracy_after: float
    flips: list[Flip]
    residual: float
    seconds: float
    moved: dict[int, Place] = field(default_factory=dict)

    def flips_by_class(self) -> dict[int, int]:
        return dict(Counter(flip.label for flip in self.flips))


class _OvertakenError(Exception):
    """A newer decision makes a solution useless."""


class _Quiet(LineReporter):
    def note(self, text: str) -> None: ...
    def end(self, stage: str, seconds: float, text: str) -> None: ...


class Session:
    """One bundle, its data, and the decisions about it. corrector: without corrections. `effect` is what there is to say.

    Its methods may be called from any thread, one at a time; solving goes on beside them.
    """

    def __init__(self, corrector: Corrector, cache: Cache, log: DecisionLog, options: PassOptions) -> None:
        self.log, self.cache, self.known = log, cache, corrector.known
        self._given, self._options = corrector, options
        self.shown: Shown = "validation" if len(cache.split("validation", plain=True)) else "train"
        self.train_at, self.shown_at = cache.split("train", plain=False), cache.split(self.shown, plain=True)
        self.class_P = corrector.start.prototype_class_P
        self.fit = self._first_fit()
        self._places: dict[int, Place] = dict(enumerate(corrector.start.places))  # of prototypes that are there
        self._columns: dict[tuple[int, Place], np.ndarray] = {}
        self._lock, self._overtaken, self._solving = threading.RLock(), threading.Event(), threading.Thread()
        self._strongest: tuple[np.ndarray, np.ndarray] | None = None  # of the connections when it was worked out
        self.settled = Settled()
        accuracy = self.accuracy_at_first = self._accuracy(self.fit.predictions())
        residual = self.fit.residual()
        optimal = residual <= corrector.trained.last_layer.tolerance
        self.effect = Effect(0, "", "optimal" if optimal else "not optimal", accuracy, accuracy, [], residual, 0.0)
        if log.done:
            self._work_out(f"{len(log.done)} decisions from before")

    def _first_fit(self) -> Fit:
        """With the connections of the bundle."""
        labels, images = (self.cache.rows[name].to_numpy() for name in ("label", "image_id"))
        rows, shown = (
            Rows(self.cache.similarities_nP[at], labels[at].astype(np.int64), images[at])
            for at in (self.train_at, self.shown_at)
        )
        off_KP = off_class_KP(self.class_P, len(self._given.dataset.classes))
        anchors_KP = anchor_KP(off_KP, self._given.model.own_connection)
        connections_KP = self._given.start.connections_KP.numpy()
        return Fit(rows, shown, connections_KP, anchors_KP, off_KP, self._given.trained.last_layer)

    # What people do.

    def decide(self, decision: Decision) -> Effect:
        """Take a decision; `UserError` where it can't be carried out, and it is not taken."""
        with self._lock:
            self._check(decision)
            self.log.decide(decision)
            try:
                return self._work_out(decision.decide)
            except Exception:  # whatever it was: a decision that can't be worked out would be one at every start
                self.log.undo(decision.who)
                raise

    def undo(self, who: str) -> Effect:
        with self._lock:
            return self._work_out(f"undone: {self.log.undo(who).decide}")

    def redo(self, who: str) -> Effect:
        with self._lock:
            return self._work_out(f"done again: {self.log.redo(who).decide}")

    def decisions(self) -> list[Decision]:
        """Those that count."""
        return list(self.log.done)

    def lapsed(self) -> list[tuple[Decision, str]]:
        """Those of them that don't apply to this bundle, and why."""
        return [(self.log.done[each.decision - 1], each.reason) for each in self.settled.lapsed]

    def corrector(self) -> Corrector:
        """What carries the decisions out as `jobs/prune.py` does, with passes over the images."""
        return self._with(self.log.done)

    def place(self, p: int) -> Place | None:
        """The patch that a prototype is on, or None where it is gone."""
        return self._places.get(p)

    def first_place(self, p: int) -> Place:
        """The patch that it was on in the bundle."""
        return self._given.start.places[p]

    def worth(self) -> Worth:
        """What each prototype that is there is worth by itself."""
        with self._lock:
            gone = set(range(len(self.class_P))) - set(self._places)
            return worth(self.fit, self.class_P, gone)

    def deciding(self, p: int) -> np.ndarray:
        """image_id of each image shown for whose predicted class this prototype gives the most points."""
        with self._lock:
            if self._strongest is None or self._strongest[0] is not self.fit.weights_KP:
                self._strongest = (self.fit.weights_KP, self.fit.strongest())
            return self.fit.shown.image_ids_n[self._strongest[1] == p]

    def wait(self) -> Effect:
        """The effect when everything has been solved."""
        if self._solving.ident:
            self._solving.join()
        return self.effect

    def close(self) -> None:
        self._stop_solving()
        self.log.close()

    # What comes of it.

    def _with(self, decisions: Sequence[Decision]) -> Corrector:
        return replace(
            self._given, corrections=Corrections(decisions=list(decisions), made_for=self._given.known.bundle)
        )

    def _check(self, decision: Decision) -> None:
        corrector = self._with([*self.log.done, decision])
        lapsed = [each for each in corrector.settled.lapsed if each.decision > len(self.log.done)]
        if lapsed:
            raise UserError(lapsed[0].reason)
        corrector.check()

    def _work_out(self, says: str) -> Effect:
        watch = Stopwatch()
        self._stop_solving()
        self._strongest = None
        before_m = self.fit.predictions()
        corrector = replace(self._with(self.log.done), push=self.cache.push)
        self.settled = corrector.settled
        draft = corrector.run(self._options, _Quiet()).draft
        moved = self._bring_up_to_date(draft)
        effect = self._effect_of(says, before_m, watch, moved)
        self.effect = quick = replace(effect, residual=self.fit.residual(), seconds=watch.seconds)
        self._solving = threading.Thread(target=self._solve, args=(before_m, watch), daemon=True)
        self._solving.start()
        return quick

    def _bring_up_to_date(self, draft: Draft) -> dict[int, Place]:
        """The rows for these prototypes, with the quick solution; what has moved or come back."""
        numbers = draft.numbers_P.tolist()
        places = dict(zip(numbers, draft.places, strict=True))
        changed = [p for p in range(len(self.class_P)) if self._places.get(p) != places.get(p)]
        self._look_for({p: places[p] for p in changed if p in places}, draft)
        for p in changed:
            if p in places:
                column_n = self._column(p, places[p])
                self.fit.set_column(p, column_n[self.train_at], column_n[self.shown_at])
            else:
                self.fit.drop_column(p)
        self._places = places
        floored = self.fit.set_floors(
            {(int(self.class_P[p]), p): f for p, f in self.settled.floors.items() if p in places}
        )
        self.fit.quick(sorted({int(self.class_P[p]) for p in [*changed, *floored]}))
        return {p: places[p] for p in changed if p in places}

    def _look_for(self, places: Mapping[int, Place], draft: Draft) -> None:
        """Similarities of every cached row to the prototypes on these patches, where they aren't known yet."""
        unknown = [
            (p, place)
            for p, place in places.items()
            if place != self.first_place(p) and (p, place) not in self._columns
        ]
        if unknown:
            prototypes_QDhw = draft.prototypes_PDhw[draft.at(p for p, _ in unknown)]
            columns_nQ = self.cache.similarities_to(self._given.network, prototypes_QDhw)
            self._columns |= {key: columns_nQ[:, q] for q, key in enumerate(unknown)}

    def _column(self, p: int, place: Place) -> np.ndarray:
        """Similarity of every cached row to a prototype on this patch."""
        return self.cache.similarities_nP[:, p] if place == self.first_place(p) else self._columns[p, place]

    def _effect_of(self, says: str, before_m: np.ndarray, watch: Stopwatch, moved: dict[int, Place]) -> Effect:
        after_m, rows = self.fit.predictions(), self.fit.shown
        flips = [
            Flip(*(int(values[m]) for values in (rows.image_ids_n, rows.labels_n, before_m, after_m)))
            for m in np.flatnonzero(before_m != after_m)
        ]
        accuracies = (self._accuracy(before_m), self._accuracy(after_m))
        return Effect(self.effect.number + 1, says, "solving", *accuracies, flips, np.inf, watch.seconds, moved)

    def _solve(self, before_m: np.ndarray, watch: Stopwatch) -> None:
        """Beside: the certified optimum, unless a decision overtakes it."""
        shown = self.effect

        def go_on(progress: Progress) -> None:
            if self._overtaken.is_set():
                raise _OvertakenError

        try:
            solution = self.fit.solve(go_on)
        except _OvertakenError:
            return
        except FloatingPointError:
            self.effect = replace(shown, state="not optimal")
            return
        self.effect = replace(
            self._effect_of(shown.says, before_m, watch, shown.moved),
            number=shown.number,
            state="optimal" if solution.converged else "not optimal",
            residual=solution.residual,
            seconds=watch.seconds,
        )

    def _stop_solving(self) -> None:
        self._overtaken.set()
        if self._solving.ident:
            self._solving.join()
        self._overtaken.clear()

    def _accuracy(self, predicted_m: np.ndarray) -> float:
        return float((predicted_m == self.fit.shown.labels_n).mean())
