"""The workbench as people use it, in a real Chromium.

A mark that the model has learned is found, barred in three clicks, and the model is better for it; a decision in whose
middle the process is killed is either done or not.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium, watched
from marked_birds import CORNER, MARKED, write_marked_birds
from running_jobs import Jobs

from protopnet.config import BirdSettings
from protopnet.model.bundle import load_bundle
from protopnet.tables import read_table

pytestmark = pytest.mark.slow

BIRDS = BirdSettings(classes=4, train_per_class=24, test_per_class=12, size=96)


@dataclass
class Bench:
    """A workbench process on one folder, started again as often as one likes."""

    jobs: Jobs
    bundle: str
    data: str
    folder: Path
    port: int
    process: subprocess.Popen[str] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        options = ["--folder", str(self.folder), "--port", str(self.port), "--compute.threads", "1"]
        self.process = self.jobs.start("workbench", self.bundle, self.data, *options)
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if line.startswith("workbench "):
                self._wait_until_it_listens()
                return
        raise AssertionError(said + (self.process.stderr.read() if self.process.stderr else ""))

    def _wait_until_it_listens(self) -> None:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("it doesn't listen")

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def ask(self, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def settled(self) -> Any:
        """How things are when all is solved."""
        deadline = time.monotonic() + 120
        while (state := self.ask("v1/state"))["effect"]["state"] == "solving" and time.monotonic() < deadline:
            time.sleep(0.2)
        return state


@pytest.fixture(scope="module")
def bench(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A model that has learned the mark, and a workbench for it."""
    storage = tmp_path_factory.mktemp("marked")
    write_marked_birds(storage / "shards", BIRDS)
    changes = {"data__source": "shards", "data__path": storage / "shards", "birds__classes": None}
    changes |= {"birds__train_per_class": None, "birds__test_per_class": None, "birds__size": None}
    changes |= {
        "model__cut": "layer1",
        "model__image_size": 96,
        "model__prototypes": 20,
        "train__joint_epochs": 10,
        "train__batch_size": 24,
        "augment__copies": 3,
    }
    job = jobs.train(storage, name="marked", **changes)
    assert job.code == 0, job
    run = storage / "marked"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Bench(jobs, str(run / "bundle"), str(run / "stages/00-data"), storage / "workbench", port)
    found.start()
    yield found
    if found.process is not None and found.process.poll() is None:
        found.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
    path = chromium()
    with playwright.sync_playwright() as starter:
        started = starter.chromium.launch(executable_path=path)
        yield started
        started.close()


def screenshot(page: Any, name: str) -> None:
    """Where PROTOPNET_SCREENSHOTS says, to be looked at."""
    if folder := os.environ.get("PROTOPNET_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def sit_down(page: Any, who: str) -> None:
    page.fill("#who", who)
    page.click("#sit")
    page.locator("body.deciding").wait_for()


def on_mark(bundle: Any) -> list[int]:
    """Prototypes whose box meets the mark."""
    _, left, bottom, _ = (share * BIRDS.size for share in CORNER)
    rows = bundle.prototypes.to_pylist()
    return [
        row["prototype"] for row in rows if row["class"] == MARKED and row["box"][0] < bottom and row["box"][3] > left
    ]


def test_a_mark_is_found_among_the_first_five_barred_in_three_clicks_and_the_model_is_better(
    bench: Bench, browser: Any
) -> None:
    before = load_bundle(bench.bundle)
    marked = on_mark(before)
    assert marked, "the model hasn't learned the mark"
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    watch = watched(page)
    page.goto(bench.url)
    page.locator("#list button").first.wait_for()
    first = bench.ask("v1/findings?limit=5")["items"]
    place = next(n for n, finding in enumerate(first) if set(finding["prototypes"]) & set(marked))
    sit_down(page, "Anna")
    page.locator("#card .picture").first.wait_for()
    screenshot(page, "workbench-first")

    page.locator("#list button").nth(place).click()
    page.locator('#card [data-action="region"]').wait_for()
    page.locator('#card [data-action="region"]').click()
    page.locator("#card .answer", has_text="Nowhere on the background").click()

    page.locator('#accuracy[data-number="1"]').wait_for()
    page.locator('#accuracy[data-state="optimal"]').wait_for(timeout=120_000)
    screenshot(page, "workbench-decided")
    assert "%" in page.inner_text("#after")
    here = {p: bench.ask(f"v1/prototypes/{p}") for p in marked}
    assert any(each["moved"] for each in here.values())
    page.click("#save")
    page.locator("#saved", has_text="Saved").wait_for(timeout=200_000)
    assert watch.complaints == []
    assert watch.outside(bench.url) == []

    new = load_bundle(str(bench.folder / "bundle"))
    (entry,) = new.info.provenance["history"]
    assert entry["accuracy"]["test"]["after"] > entry["accuracy"]["test"]["before"]
    assert read_table(str(bench.folder / "bundle/decisions.parquet"))["who"].to_pylist() == ["Anna"]
    data, output = bench.data, str(bench.folder / "again")
    job = bench.jobs.run_here(
        "prune", bench.bundle, data, "--config", str(bench.folder / "corrections.yaml"), "--output", output
    )
    assert job.code == 0, job
    again = load_bundle(output)
    assert again.prototypes is not None
    assert new.prototypes is not None
    assert again.prototypes.select(["uri", "row", "column"]).equals(new.prototypes.select(["uri", "row", "column"]))
    page.click("#leave")
    page.close()


def test_by_keyboard_and_undone(bench: Bench, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(bench.url)
    page.locator("#list button").first.wait_for()
    sit_down(page, "Bo")
    page.locator("#card .actions").wait_for()
    page.keyboard.press("j")
    number = bench.ask("v1/state")["effect"]["number"]
    title = page.inner_text("#card h2")
    page.keyboard.press("i")
    page.keyboard.type("striped wing")
    page.keyboard.press("Enter")
    page.locator(f'#accuracy[data-number="{number + 1}"]').wait_for()
    page.locator("#card h2", has_text="striped wing, prototype").wait_for()
    page.keyboard.press("u")
    page.locator(f'#accuracy[data-number="{number + 2}"]').wait_for()
    page.locator("#card h2", has_text=title).wait_for()
    page.keyboard.press("y")
    page.locator("#card h2", has_text="striped wing").wait_for()
    page.keyboard.press("u")
    page.locator(f'#accuracy[data-number="{number + 4}"]').wait_for()
    page.click("#leave")
    page.close()


def test_the_second_sees_who_is_deciding(bench: Bench, browser: Any) -> None:
    first, second = (browser.new_context().new_page() for _ in range(2))
    first.goto(bench.url)
    sit_down(first, "Anna")
    second.goto(bench.url)
    second.locator("#holder", has_text="Anna is deciding; you can look.").wait_for()
    assert second.locator("#sit").is_disabled()
    second.locator("#card h2").wait_for()
    assert second.locator("#card .actions").count() == 0
    screenshot(second, "workbench-second")
    first.click("#leave")
    second.locator("#holder", has_text="Nobody is deciding").wait_for(timeout=15_000)
    sit_down(second, "Bo")
    second.click("#leave")
    for page in (first, second):
        page.context.close()
    job = bench.jobs.run(
        "workbench", bench.bundle, bench.data, "--folder", str(bench.folder), "--port", str(bench.port + 1)
    )
    assert "another job works in" in job.error


def test_on_a_phone_it_can_be_read(bench: Bench, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(bench.url)
    page.locator("#card .near .picture").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    for view in ("all", "worth"):
        page.click(f"#view-{view}")
        page.locator("#list button").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    screenshot(page, "workbench-phone")
    page.close()


def test_killed_in_the_middle_of_a_decision_it_is_done_or_not_and_that_is_said(bench: Bench, browser: Any) -> None:
    seat = bench.ask("v1/desk", {"who": "Anna"})["seat"]
    counts = bench.settled()["decisions"]
    target = next(p for p in range(20) if not bench.ask(f"v1/prototypes/{p}")["gone"])
    decision = {"seat": seat, "decision": {"decide": "name", "prototype": target, "name": "killed"}}

    def post() -> None:
        with contextlib.suppress(OSError):  # killed before it could answer
            bench.ask("v1/decisions", decision)

    asking = threading.Thread(target=post)
    asking.start()
    time.sleep(0.02)
    bench.end(signal.SIGKILL)
    asking.join()

    bench.start()
    after = bench.settled()
    assert after["decisions"] in (counts, counts + 1)
    is_named = bench.ask(f"v1/prototypes/{target}")["name"] == "killed"
    assert is_named == (after["decisions"] == counts + 1)
    assert not after["torn"]

    bench.end(signal.SIGKILL)
    log = bench.folder / "decisions.jsonl"
    log.write_bytes(log.read_bytes() + b'{"act": "decide", "decision": {"decide": "dr')  # as far as a kill let it come
    bench.start()
    assert bench.settled()["decisions"] == after["decisions"]
    page = browser.new_page()
    page.goto(bench.url)
    page.locator("#torn").wait_for()
    assert "It was not taken" in page.inner_text("#torn")
    page.close()
    assert bench.end(signal.SIGTERM) == 0
