"""The workbench without its page: the log on the disk, the quick and the certified answer, and a whole session."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_session import OPTIONS, made_corrector
from scipy.optimize import minimize

from protopnet.auditing.decisions import Decision, parse_decision
from protopnet.auditing.draft import Draft
from protopnet.auditing.prune import Corrector
from protopnet.config import LastLayerSettings
from protopnet.errors import UserError
from protopnet.progress import LineReporter
from protopnet.training.connections import anchor_KP, off_class_KP
from protopnet.workbench.cache import Cache, write_cache
from protopnet.workbench.fit import Fit, Rows, resolve, worth
from protopnet.workbench.log import DecisionLog
from protopnet.workbench.session import Session

ABOUT = {"who": "anna", "when": "2026-11-25T22:00:00Z", "why": "seen"}


def decision(decide: str, prototype: Any = 0, **more: Any) -> Decision:
    return parse_decision(ABOUT | {"decide": decide, "prototype": prototype} | more)


class TestTheLog:
    def test_it_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        log = DecisionLog(tmp_path / "log")
        given = [decision("drop", p, why="röd") for p in range(4)]
        for each in given:
            log.decide(each)
        assert log.undo("bo") == given[3]
        assert log.undo("bo") == given[2]
        assert log.redo("anna") == given[2]
        again = DecisionLog(tmp_path / "log")
        assert (again.done, again.undone, again.torn) == (given[:3], [given[3]], False)
        again.decide(given[0])
        assert DecisionLog(tmp_path / "log").undone == []

    def test_there_is_nothing_to_undo_or_redo(self, tmp_path: Path) -> None:
        log = DecisionLog(tmp_path / "log")
        with pytest.raises(UserError, match="nothing to undo"):
            log.undo("anna")
        with pytest.raises(UserError, match="nothing to redo"):
            log.redo("anna")

    def test_killed_anywhere_in_a_line_the_decision_is_whole_or_not_there(self, tmp_path: Path) -> None:
        log = DecisionLog(tmp_path / "log")
        log.decide(decision("drop", 1))
        before = (tmp_path / "log").read_bytes()
        log.decide(decision("drop", 2))
        whole = (tmp_path / "log").read_bytes()
        for end in range(len(before), len(whole) + 1):
            (tmp_path / "log").write_bytes(whole[:end])
            again = DecisionLog(tmp_path / "log")
            assert len(again.done) == (2 if end == len(whole) else 1)
            assert again.torn == (len(before) < end < len(whole))
            again.decide(decision("drop", 3))
            assert [each.prototype.number for each in DecisionLog(tmp_path / "log").done][-1] == 3
            again.close()

    def test_a_damaged_line_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_bytes(b'{"act": "undo", "who": "x"}\n')
        with pytest.raises(UserError, match="line 1 is damaged"):
            DecisionLog(tmp_path / "log")


K, P, N = 4, 12, 160
SETTINGS = LastLayerSettings(l1=1e-3, ridge=1e-3, tolerance=1e-6)


def made_fit(seed: int = 0) -> Fit:
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, N)
    own = (np.arange(P) // 3)[None] == labels[:, None]
    similarities = (random.random((N, P)) + 0.8 * own * random.random((N, P))).astype(np.float32)
    rows, shown = (Rows(similarities[at], labels[at], np.arange(N)[at]) for at in (slice(0, 120), slice(120, None)))
    off = off_class_KP(np.arange(P) // 3, K)
    anchor = anchor_KP(off, 1.0)
    return Fit(rows, shown, anchor.copy(), anchor, off, SETTINGS)


class TestTheFit:
    def test_the_quick_answer_is_the_optimum_of_a_class_s_own_connections(self) -> None:
        fit = made_fit()
        before = fit.weights_KP.copy()
        fit.quick([2])
        own = [6, 7, 8]

        def objective(weights: np.ndarray) -> float:
            tried = before.copy()
            tried[2, own] = weights
            logits = fit.rows.similarities_nP @ tried.T
            loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), fit.rows.labels_n]
            return float(loss.mean() + SETTINGS.ridge / 2 * ((weights - 1) ** 2).sum())

        expected = minimize(objective, np.ones(3), tol=1e-12).x
        np.testing.assert_allclose(fit.weights_KP[2, own], expected, atol=1e-3)
        fit.weights_KP[2, own] = before[2, own]
        assert (fit.weights_KP == before).all()

    def test_from_the_last_solution_to_the_optimum_without_a_prototype(self) -> None:
        fit = made_fit()
        fit.solve()
        first = fit.weights_KP.copy()
        column = fit.rows.similarities_nP[:, 4].copy(), fit.shown.similarities_nP[:, 4].copy()
        fit.drop_column(4)
        fit.quick([1])
        assert fit.residual() > SETTINGS.tolerance
        solution = fit.solve()
        assert solution.converged
        assert fit.residual() <= SETTINGS.tolerance
        assert not fit.weights_KP[:, 4].any()

        left = np.delete(np.arange(P), 4)
        rows = Rows(fit.rows.similarities_nP[:, left], fit.rows.labels_n, fit.rows.image_ids_n)
        anchor, off = fit.whole_anchor_KP[:, left], fit.off_KP[:, left]
        cold = resolve(rows, anchor, anchor, off, SETTINGS)
        np.testing.assert_allclose(fit.weights_KP[:, left], cold.weights, atol=5e-3)

        fit.set_column(4, *column)
        fit.solve()
        np.testing.assert_allclose(fit.weights_KP, first, atol=5e-3)

    def test_what_a_prototype_is_worth_is_what_it_would_cost_to_drop_it(self) -> None:
        fit = made_fit()
        fit.weights_KP[np.arange(P) // 3, np.arange(P)] *= 3
        found, labels = worth(fit, np.arange(P) // 3), fit.shown.labels_n
        before = fit.predictions() == labels
        assert found.lost_P.sum()
        assert found.gained_P.sum()
        for p in range(P):
            weights = fit.weights_KP.copy()
            weights[:, p] = 0
            after = (fit.shown.similarities_nP @ weights.T).argmax(1) == labels
            assert found.lost_P[p] == np.count_nonzero(before & ~after)
            assert found.gained_P[p] == np.count_nonzero(~before & after)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corrector, Path]:
    """A pushed network and its images, and its cache."""
    folder = tmp_path_factory.mktemp("workbench")
    corrector = made_corrector(folder)
    last_layer = corrector.trained.last_layer
    write_cache(folder / "cache", corrector.network, corrector.model, corrector.dataset, "here", last_layer, OPTIONS)
    return corrector, folder / "cache"


Open = Callable[[], Session]


@pytest.fixture
def opened(given: tuple[Corrector, Path], tmp_path: Path) -> Iterator[Open]:
    """Sessions on one log; the one before is as good as killed."""
    corrector, folder = given
    sessions: list[Session] = []

    def open_() -> Session:
        last_layer = corrector.trained.last_layer
        cache = Cache.load(folder, "here", corrector.dataset, last_layer)
        assert cache is not None
        sessions.append(Session(corrector, cache, DecisionLog(tmp_path / "decisions.jsonl"), OPTIONS))
        return sessions[-1]

    yield open_
    for session in sessions:
        session.close()


def ref(session: Session, p: int) -> dict[str, Any]:
    return session.known.ref(p).model_dump(by_alias=True)


def drafted(session: Session) -> Draft:
    """What jobs/prune.py makes of the decisions, with passes over the images."""
    return session.corrector().run(OPTIONS, LineReporter()).draft


class TestASession:
    def test_a_cache_of_something_else_is_none(self, given: tuple[Corrector, Path]) -> None:
        corrector, folder = given
        assert Cache.load(folder, "another", corrector.dataset, corrector.trained.last_layer) is None
        assert Cache.load(folder / "nowhere", "here", corrector.dataset, corrector.trained.last_layer) is None
        more = corrector.trained.last_layer.model_copy(update={"copies": 2})
        assert Cache.load(folder, "here", corrector.dataset, more) is None

    def test_what_it_shows_are_the_validation_images(self, given: tuple[Corrector, Path], opened: Open) -> None:
        corrector, folder = given
        session = opened()
        assert session.shown == "validation"
        cache = Cache.load(folder, "here", corrector.dataset, corrector.trained.last_layer)
        assert cache is not None
        assert set(cache.rows["split"].to_pylist()) == {"train", "validation"}
        train = replace(cache, rows=cache.rows.set_column(3, "split", pa.array(["train"] * len(cache.rows))))
        assert Session(corrector, train, session.log, OPTIONS).shown == "train"

    def test_every_decision_comes_to_what_the_job_makes_of_it(self, opened: Open) -> None:
        session = opened()
        decisions = [
            decision("drop", ref(session, 1)),
            decision("not-this-patch", ref(session, 3)),
            decision("not-this-patch", ref(session, 4), elsewhere=True),
            decision("merge", ref(session, 7), into=ref(session, 6)),
            decision("not-in-region", None, region=[0, 0, 0.5, 0.5], **{"class": "jay"}),
        ]
        for each in decisions:
            effect = session.decide(each)
            assert effect.state == "solving"
            assert effect.seconds < 5
            draft = drafted(session)
            places = dict(zip(draft.numbers_P.tolist(), draft.places, strict=True))
            assert {p: session.place(p) for p in range(9) if session.place(p)} == places
        effect = session.wait()
        assert effect.state == "optimal"
        assert effect.residual <= 1e-5
        assert effect.number == 5

        rows = session.fit.rows
        network = draft.network(session.corrector().network, session.corrector().model)
        for place, p in enumerate(draft.numbers_P.tolist()):
            column = session.cache.similarities_to(network, draft.prototypes_PDhw[place : place + 1])[:, 0]
            np.testing.assert_allclose(rows.similarities_nP[:, p], column[session.train_at], atol=2e-3)
        left = draft.numbers_P
        off = off_class_KP(draft.prototype_class_P, 3)
        anchor = anchor_KP(off, session.corrector().model.own_connection)
        cold = resolve(
            Rows(rows.similarities_nP[:, left], rows.labels_n, rows.image_ids_n),
            anchor,
            anchor,
            off,
            session.corrector().trained.last_layer,
        )
        np.testing.assert_allclose(session.fit.weights_KP[:, left], cold.weights, atol=1e-2)

    def test_undone_and_done_again(self, opened: Open) -> None:
        session = opened()
        first = session.wait()
        session.decide(decision("drop", ref(session, 0)))
        after = session.wait()
        assert session.place(0) is None
        undone = session.undo("bo")
        assert session.place(0) is not None
        assert undone.says == "undone: drop"
        assert session.wait().accuracy_after == pytest.approx(first.accuracy_after, abs=0.2)
        session.redo("bo")
        assert session.wait().accuracy_after == after.accuracy_after

    def test_a_floor_is_kept(self, opened: Open) -> None:
        session = opened()
        least = float(session.fit.weights_KP[1, 4]) + 2
        session.decide(decision("must-be-used", ref(session, 4), floor=least))
        assert session.fit.weights_KP[1, 4] >= least
        effect = session.wait()
        assert effect.state == "optimal"
        assert session.fit.weights_KP[1, 4] == pytest.approx(least)
        session.undo("anna")
        session.wait()
        assert session.fit.weights_KP[1, 4] < least - 0.5

    def test_opened_again_it_is_where_it_was(self, opened: Open) -> None:
        session = opened()
        session.decide(decision("drop", ref(session, 0)))
        session.decide(decision("not-this-patch", ref(session, 4)))
        again = opened()
        assert again.decisions() == session.decisions()
        assert [again.place(p) for p in range(9)] == [session.place(p) for p in range(9)]
        assert again.wait().accuracy_after == session.wait().accuracy_after

    def test_what_can_t_be_done_is_refused_and_not_written_down(self, opened: Open) -> None:
        session = opened()
        session.decide(decision("drop", ref(session, 0)))
        session.decide(decision("drop", ref(session, 1)))
        with pytest.raises(UserError, match="the last one of jay"):
            session.decide(decision("drop", ref(session, 2)))
        with pytest.raises(UserError, match="nowhere to go"):
            session.decide(decision("not-in-region", None, region=[0, 0, 1, 1]))
        assert len(session.decisions()) == 2
        assert len(opened().decisions()) == 2

    def test_a_decision_that_can_t_be_worked_out_is_taken_back(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = opened()
        with monkeypatch.context() as patched:
            patched.setattr(Cache, "push", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.decide(decision("not-this-patch", ref(session, 4)))
        assert session.decisions() == []
        session.decide(decision("drop", ref(session, 4)))
        assert [each.decide for each in opened().decisions()] == ["drop"]

    def test_flips_are_the_images_whose_class_changes(self, opened: Open) -> None:
        session = opened()
        for p in (3, 4):
            session.decide(decision("drop", ref(session, p)))
        effect = session.wait()
        wrong = {flip.image_id: flip for flip in effect.flips}
        gained = sum(flip.after == flip.label for flip in wrong.values()) - sum(
            flip.before == flip.label for flip in wrong.values()
        )
        assert effect.accuracy_after - effect.accuracy_before == pytest.approx(gained / 6)
