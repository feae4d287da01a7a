"""The workbench in a real Chromium: people find what a model has learned by mistake, bar it, and see what that costs."""

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browsing import watched
from confounded import paint_mark, write_confounded
from PIL import Image
from running_jobs import ROOT, Jobs

import protopnet
from protopnet.config import BirdSettings
from protopnet.model.bundle import load_bundle
from protopnet.words import readable_names

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
expect = playwright.expect

BIRDS = BirdSettings(classes=6, train_per_class=40, test_per_class=20, size=96)


@dataclass
class Confounded:
    """A model that has learned a mark in the corner of the pictures of one kind of bird."""

    images: Path
    bundle: Path
    marked: str

    def accuracy(self, bundle: Path) -> float:
        """Of the clean test pictures."""
        paths = sorted((self.images / "test").glob("*/*.png"))
        return float(
            np.mean([found == path.parent.name for path, found in zip(paths, self._found(bundle, paths), strict=True)])
        )

    def fooled(self, bundle: Path) -> float:
        """Share of the other kinds' test pictures that the mark makes pictures of the marked kind."""
        paths = [path for path in sorted((self.images / "test").glob("*/*.png")) if path.parent.name != self.marked]
        found = self._found(bundle, [paint_mark(Image.open(path)) for path in paths])
        return float(np.mean([name == self.marked for name in found]))

    def _found(self, bundle: Path, photos: Sequence[Any]) -> list[str]:
        return [prediction.class_name for prediction in protopnet.load(bundle).predict(photos)]


@pytest.fixture(scope="module")
def confounded(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Confounded:
    folder = tmp_path_factory.mktemp("confounded")
    marked = write_confounded(folder / "images", BIRDS)
    settings = {"data.source": "folder", "data.path": folder / "images", "train.joint_epochs": 24}
    settings |= {"train.precision": "float32", "model.prototypes": 6, "compute.threads": 1}
    options = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    quickstart = str(ROOT / "configs/quickstart.yaml")
    job = jobs.run("train", "--config", quickstart, "--storage", str(folder), "--name", "run", *options)
    assert job.code == 0, job
    made = Confounded(folder / "images", folder / "run/bundle", marked)
    assert made.fooled(made.bundle) > 0.5, "the model hasn't learned the mark: there is nothing to find"
    return made


@dataclass
class Running:
    """jobs/workbench.py with a folder of its own, started again after it was killed."""

    jobs: Jobs
    confounded: Confounded
    folder: Path
    url: str = ""
    said: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = [str(self.confounded.bundle), str(self.confounded.images), "--folder", str(self.folder)]
        self.process = self.jobs.start("workbench", *given, "--port", str(port), "--compute.threads", "1")
        assert self.process.stdout is not None
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("workbench  http"):
                self.url = line.split()[1]
                return
        raise AssertionError(self.jobs.finish(self.process))

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.jobs.finish(self.process, timeout=60).code == 0


@pytest.fixture(scope="module")
def start(
    jobs: Jobs, confounded: Confounded, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Running]]:
    started: list[Running] = []

    def start(name: str) -> Running:
        started.append(Running(jobs, confounded, tmp_path_factory.mktemp(name) / "session"))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture(scope="module")
def running(start: Callable[[str], Running]) -> Running:
    return start("running")


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody new; afterwards nothing went elsewhere, and no script has failed."""
    opened: list[tuple[Any, Any, str]] = []

    def visit(url: str, **options: Any) -> Any:
        page = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)).new_page()
        page.set_default_timeout(30_000)
        opened.append((page, watched(page), url))
        page.goto(url)
        expect(page.locator("#list button").first).to_be_visible(timeout=30_000)
        return page

    yield visit
    for page, watch, url in opened:
        page.context.close()
        assert not watch.outside(url)
        assert not [text for text in watch.complaints if text.startswith("exception")]


def sit(page: Any, who: str) -> None:
    page.locator("#who").fill(who)
    page.locator("#sit").click()
    expect(page.locator("#holder")).to_contain_text(f"You are deciding as {who}")


def solved(page: Any, number: int) -> None:
    """Wait until so many decisions, undos and redos are solved to the optimum."""
    expect(page.locator(f'#accuracy[data-number="{number}"][data-state="optimal"]')).to_be_visible(timeout=60_000)


def test_a_confounder_is_found_among_the_first_and_barred_in_three_clicks(
    running: Running, confounded: Confounded, visit: Callable[..., Any]
) -> None:
    page = visit(running.url)
    sit(page, "anna")
    name = readable_names([confounded.marked])[0]
    firsts = page.locator("#list li:nth-child(-n+5) button")
    firsts.filter(has_text="Always at one place by the edge").filter(has_text=name).first.click()
    page.get_by_role("button", name="Not in this region").click()
    page.get_by_role("button", name=f"On every image of {name}").click()
    solved(page, 1)
    page.locator("#save").click()
    expect(page.locator("#saved")).to_contain_text("Saved:", timeout=120_000)
    page.locator("#leave").click()
    expect(page.locator("#holder")).to_contain_text("Nobody is deciding.")

    corrected = running.folder / "bundle"
    assert confounded.fooled(corrected) < confounded.fooled(confounded.bundle) / 2
    assert confounded.accuracy(corrected) > confounded.accuracy(confounded.bundle)
    (decision,) = yaml.safe_load((running.folder / "corrections.yaml").read_text())["decisions"]
    assert (decision["decide"], decision["who"], decision["class"]) == ("not-in-region", "anna", confounded.marked)

    elsewhere = running.folder / "elsewhere"
    arguments = [str(confounded.bundle), str(confounded.images), "--config", str(running.folder / "corrections.yaml")]
    job = running.jobs.run("prune", *arguments, "--output", str(elsewhere))
    assert job.code == 0, job
    first, second = (load_bundle(str(each)) for each in (corrected, elsewhere))
    assert first.prototypes is not None
    assert second.prototypes is not None
    for column in ("sha256", "row", "column"):
        assert first.prototypes[column].to_pylist() == second.prototypes[column].to_pylist()
    connections = [each.network.last_layer.weight.detach().numpy() for each in (first, second)]
    np.testing.assert_allclose(*connections, atol=1e-5)


def test_with_the_keyboard_alone(start: Callable[[str], Running], visit: Callable[..., Any]) -> None:
    running = start("keyboard")
    page = visit(running.url)
    page.locator("#who").focus()
    page.keyboard.type("cleo")
    page.keyboard.press("Enter")
    expect(page.locator("#holder")).to_contain_text("You are deciding as cleo")
    page.locator("#card").focus()
    heading = page.locator("#card h2")
    expect(heading).to_be_visible()
    first = heading.inner_text()
    page.keyboard.press("j")
    expect(heading).not_to_have_text(first)
    page.keyboard.press("r")
    expect(page.locator(".asked")).to_be_visible()
    page.keyboard.press("2")
    solved(page, 1)
    page.keyboard.press("u")
    solved(page, 2)
    expect(page.locator("#redo")).to_be_enabled()


def test_a_second_browser_sees_who_decides_and_may_only_look(running: Running, visit: Callable[..., Any]) -> None:
    first = visit(running.url)
    sit(first, "dora")
    second = visit(running.url)
    expect(second.locator("#holder")).to_contain_text("dora is deciding; you can look.")
    expect(second.locator("#sit")).to_be_disabled()
    second.locator("#list button").first.click()
    expect(second.locator("#card h2")).to_be_visible()
    expect(second.locator("#card .actions")).to_have_count(0)


def test_killed_in_the_middle_it_goes_on_with_every_decision_that_was_taken(
    start: Callable[[str], Running], visit: Callable[..., Any]
) -> None:
    running = start("killed")
    page = visit(running.url)
    sit(page, "bo")
    page.locator("#list button").first.click()
    page.get_by_role("button", name="Name it").click()
    page.locator(".asked input").fill("coloured mark")
    page.get_by_role("button", name="Decide").click()
    expect(page.locator("#accuracy")).to_have_attribute("data-number", "1", timeout=30_000)
    running.kill()
    log = running.folder / "decisions.jsonl"
    with log.open("ab") as file:  # as a second decision leaves it that is cut off while it is written
        file.write(b'{"decide": "drop", "proto')

    running.start()
    assert any("goes on with 1 decision" in line for line in running.said), running.said
    page = visit(running.url)
    expect(page.locator("#torn")).to_be_visible()
    page.locator("#list button").first.click()
    expect(page.locator("#card h2")).to_contain_text("coloured mark")


def test_it_reads_on_a_phone(running: Running, visit: Callable[..., Any]) -> None:
    page = visit(running.url, viewport={"width": 390, "height": 800})
    page.locator("#list button").first.click()
    expect(page.locator("#card .near .picture").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
