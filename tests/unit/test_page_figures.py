"""What the web page computes by itself, in a real Chromium: figures that add up, and names."""

import random
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium, number

from protopnet.words import readable_names

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")

PAGE = Path(__file__).parents[2] / "protopnet/serving/page"


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """An empty page beside the modules of the real one, which are read from their files."""
    path = chromium()
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(executable_path=path)
        page = browser.new_page()
        page.route("http://page.test/", lambda route: route.fulfill(body="", content_type="text/html"))
        page.route("http://page.test/*.js", lambda route: route.fulfill(path=PAGE / route.request.url.split("/")[-1]))
        page.goto("http://page.test/")
        yield page
        browser.close()


def test_figures_add_up_for_any_model(modules):
    """Whatever a model gives, large, negative or next to nothing: rounded, it still adds up, and is near the truth."""
    draw = random.Random(5)
    entries = [_made_up(draw) for _ in range(500)]
    shown = modules.evaluate(
        """async (entries) => {
             const { account, points, precise } = await import("./sums.js");
             return entries.map(({ entry, own }) => {
               const sums = account(entry, own);
               const rows = sums.rows.map((row) => [precise(row.similarity), precise(row.connection), points(row.points)]);
               return { rows, own: points(sums.own.points), other: points(sums.other.points), total: points(sums.total) };
             });
           }""",
        entries,
    )
    for made, seen in zip(entries, shown, strict=True):
        listed = [[number(text) for text in row] for row in seen["rows"]]
        for similarity, connection, points in listed:
            assert abs(similarity * connection - points) <= Decimal("0.005")
        assert sum(row[2] for row in listed) + number(seen["own"]) + number(seen["other"]) == number(seen["total"])
        assert abs(number(seen["total"]) - Decimal(made["entry"]["logit"])) <= Decimal("0.00501")
        assert abs(number(seen["own"]) - Decimal(made["own_rest"])) <= Decimal("0.00501")
        assert not re.search(r"−0\.0+$", seen["own"])


def _made_up(draw: random.Random) -> dict[str, Any]:
    """Evidence for class 0 with `own` prototypes, some of them listed."""
    scale = 10 ** draw.uniform(-2, 1.3)
    listed = [
        {"class": 0, "similarity": draw.uniform(0, 10), "connection": draw.gauss(0, scale)}
        for _ in range(draw.randint(1, 9))
    ]
    for item in listed[draw.randint(1, 9) :]:
        item["class"] = 1
    for item in listed:
        item["points"] = item["similarity"] * item["connection"]
    own_listed = [item for item in listed if item["class"] == 0]
    own_rest, other_rest = draw.gauss(0, 30), draw.gauss(-200, 100)
    logit = sum(item["points"] for item in listed) + own_rest + other_rest
    own_points = sum(item["points"] for item in own_listed) + own_rest
    remainder = {"prototypes": 25, "points": own_rest + other_rest}
    entry = {"class": 0, "logit": logit, "own_points": own_points, "evidence": listed, "remainder": remainder}
    return {"entry": entry, "own": len(own_listed) + 5, "own_rest": own_rest}


def test_names_are_read_as_in_the_reports_and_found_however_they_are_typed(modules):
    lists = [
        ["001.Black_footed_Albatross", "002.Laysan_Albatross", "017.Cardinal", "rusty-blackbird"],
        ["1.jay", "2.jay"],
        ["001", "002", "3_birds"],
        ["001.Blue_Jay", "7"],
    ]
    readable, found, near = modules.evaluate(
        """async (lists) => {
             const words = await import("./words.js");
             const [raw] = lists, names = words.readableNames(raw);
             return [
               lists.map(words.readableNames),
               ["cardinal", " LAYSAN albatross", "017.Cardinal", "Rusty Blackbird", "gull"]
                 .map((text) => words.find(text, names, raw)),
               ["cardnal", "albatros", "blakfooted", "rusty", "zzzz"]
                 .map((text) => words.nearest(text, names).map((place) => names[place])),
             ];
           }""",
        lists,
    )
    assert readable == [readable_names(names) for names in lists]
    assert found == [2, 1, 2, 3, -1]
    assert near[0][0] == "Cardinal"
    assert set(near[1][:2]) == {"Black footed Albatross", "Laysan Albatross"}
    assert near[2][0] == "Black footed Albatross"
    assert near[3][0] == "rusty-blackbird"
    assert near[4] == []
