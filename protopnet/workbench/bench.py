"""What the page asks for and does: the session, what is known of the prototypes, who sits at the desk, and saving."""

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from protopnet import storage
from protopnet.auditing.decisions import corrections_yaml, parse_decision, record_of, referred
from protopnet.errors import UserError
from protopnet.workbench.catalogue import Catalogue
from protopnet.workbench.desk import Desk
from protopnet.workbench.session import Effect, Session

_FLIPS = 50  # images whose class has changed that are sent at a time
CORRECTIONS = "corrections.yaml"


class Workbench:
    """One session with its page. make_bundle: carries the session's decisions out and gives where the new bundle is."""

    def __init__(
        self, session: Session, catalogue: Catalogue, desk: Desk, folder: Path, make_bundle: Callable[[], str]
    ) -> None:
        self.session, self.catalogue, self.desk = session, catalogue, desk
        self._corrections, self._make_bundle = folder / CORRECTIONS, make_bundle
        self._saving = threading.Lock()
        self._saved: dict[str, Any] = {"state": "nothing saved yet"}

    def state(self, seat: str) -> dict[str, Any]:
        """How things are. Asking with a seat holds on to it."""
        yours, log = self.desk.seen(seat), self.session.log
        return {
            "yours": yours,
            "holder": self.desk.holder(),
            "torn": log.torn,
            "lapsed": [
                {"decide": decision.decide, "who": decision.who, "why": reason}
                for decision, reason in self.session.lapsed()
            ],
            "decisions": len(log.done),
            "undo": log.done[-1].decide if log.done else None,
            "redo": log.undone[-1].decide if log.undone else None,
            "effect": self._effect(self.session.effect),
            "at_first": self.session.accuracy_at_first,
            "shown": self.session.shown,
            "saved": self._saved,
        }

    def decide(self, seat: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """A decision as a file has it, but for who and when; prototypes may be given as numbers."""
        who = self.desk.person(seat)
        record = {key: self._placed(key, value) for key, value in given.items()}
        try:
            decision = parse_decision(record | {"who": who, "when": datetime.now(UTC)})
        except ValueError as error:
            raise UserError(f"no such decision: {error}") from None
        self.session.decide(decision)
        return self.state(seat)

    def undo(self, seat: str) -> dict[str, Any]:
        self.session.undo(self.desk.person(seat))
        return self.state(seat)

    def redo(self, seat: str) -> dict[str, Any]:
        self.session.redo(self.desk.person(seat))
        return self.state(seat)

    def prototype(self, p: int) -> dict[str, Any]:
        """All there is to say of a prototype, as it is now."""
        known, settled = self.catalogue.prototype(p), self.session.settled
        place, source = self.session.place(p), self.session.known.ref(p)
        now = self.catalogue.patch(place or self.session.first_place(p))
        if place == self.session.first_place(p):
            now["box"] = known["box"]
        about = [each for each in self.session.decisions() if source in referred(each)]
        deciding = self.session.deciding(p)
        return known | {
            "source": now,
            "gone": place is None,
            "moved": place is not None and place != self.session.first_place(p),
            "merged": settled.merged.get(p),
            "name": settled.names.get(p),
            "group": settled.groups.get(p),
            "decided": [record_of(each) for each in about],
            "deciding": {
                "total": len(deciding),
                "images": [self.catalogue.image(image) for image in deciding[:8].tolist()],
            },
        }

    def worth(self, offset: int, limit: int) -> dict[str, Any]:
        """What would be free to drop, and what the model can't do without: by the images that it would cost."""
        found = self.session.worth()
        there = [p for p in range(len(found.lost_P)) if self.session.place(p)]
        order = sorted(there, key=lambda p: (-int(found.lost_P[p]), p))
        needed = [p for p in order if found.lost_P[p]][offset : offset + limit]
        free = sorted((p for p in there if not found.lost_P[p]), key=lambda p: (-int(found.gained_P[p]), p))

        def listed(p: int) -> dict[str, Any]:
            return self.catalogue.short(p) | {"lost": int(found.lost_P[p]), "gained": int(found.gained_P[p])}

        return {
            "needed": [listed(p) for p in needed],
            "needed_total": sum(bool(found.lost_P[p]) for p in there),
            "free": [listed(p) for p in free[offset : offset + limit]],
            "free_total": len(free),
        }

    def save(self, seat: str) -> dict[str, Any]:
        """Write corrections.yaml now, and make the new bundle beside."""
        self.desk.person(seat)
        if not self.session.decisions():
            raise UserError("there is nothing to save: no decision has been taken")
        if not self._saving.acquire(blocking=False):
            raise UserError("the bundle is being made: wait until it is there")
        text = corrections_yaml(self.session.decisions(), self.session.known.bundle)
        storage.write_bytes(str(self._corrections), text.encode())
        self._saved = {"state": "working", "corrections": str(self._corrections)}
        threading.Thread(target=self._make, daemon=True).start()
        return self.state(seat)

    def _make(self) -> None:
        try:
            self._saved = self._saved | {"state": "done", "bundle": self._make_bundle()}
        except Exception as error:  # whatever it was, the page has to say that there is no bundle
            self._saved = self._saved | {"state": "failed", "message": str(error)}
        finally:
            self._saving.release()

    def _placed(self, key: str, value: Any) -> Any:
        """Numbers of prototypes as the patches they are."""
        if key in ("prototype", "into") and isinstance(value, int):
            self.catalogue.check(value)
            return self.session.known.ref(value)
        if key == "prototypes" and isinstance(value, list):
            return [self._placed("prototype", each) for each in value]
        return value

    def _effect(self, effect: Effect) -> dict[str, Any]:
        names = self.catalogue.names
        flips = [
            self.catalogue.image(flip.image_id) | {"before": names[flip.before], "after": names[flip.after]}
            for flip in effect.flips[:_FLIPS]
        ]
        by_class = sorted(effect.flips_by_class().items(), key=lambda pair: (-pair[1], pair[0]))
        return {
            "number": effect.number,
            "says": effect.says,
            "state": effect.state,
            "before": effect.accuracy_before,
            "after": effect.accuracy_after,
            "residual": effect.residual,
            "seconds": effect.seconds,
            "flips": flips,
            "flips_total": len(effect.flips),
            "flips_by_class": [{"class_name": names[label], "images": count} for label, count in by_class[:10]],
        }
