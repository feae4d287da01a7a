"""A real Chromium, and what the page shows in it."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any
from urllib.parse import urlsplit

import pytest

# Debian's and Fedora's names, and Google's.
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Where this machine's Chromium is; the test is skipped without."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found


@dataclass
class Watch:
    """What a page asked for and complained of, from its first request on."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def listen(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} {message.location['url']}")

    def outside(self, url: str) -> list[str]:
        """Requests to any other server than the one at the URL; blob: and data: never leave the browser."""
        home = urlsplit(url).netloc
        return [asked for asked in self.requests if urlsplit(asked).netloc not in ("", home)]


def watched(page: Any) -> Watch:
    watch = Watch()
    page.on("request", lambda request: watch.requests.append(request.url))
    page.on("pageerror", lambda error: watch.complaints.append(f"exception: {error}"))
    page.on("console", watch.listen)
    return watch


def number(text: str) -> Decimal:
    """A figure as the page writes it, with a true minus sign."""
    return Decimal(text.split()[0].replace("−", "-"))


def rows(card: Any) -> Iterator[tuple[Decimal, Decimal, Decimal]]:
    """Similarity, connection and points of each line of evidence, as shown."""
    for line in card.locator("tbody tr").all():
        similarity, connection, points = (
            number(line.locator(f".{name}").inner_text()) for name in ("similarity", "connection", "points")
        )
        yield similarity, connection, points


def assert_adds_up(card: Any) -> Decimal:
    """A reader with a calculator finds every product and the sum right; gives the total."""
    card.locator("tr.total").wait_for()
    listed = list(rows(card))
    assert listed
    for similarity, connection, points in listed:
        product = (similarity * connection).quantize(Decimal("0.01"), ROUND_HALF_UP)
        assert product == points, f"{similarity} x {connection} is shown as {points}"
    rest = [number(line.inner_text()) for line in card.locator("tr.rest .points").all()]
    total = number(card.locator("tr.total .points").inner_text())
    assert sum(points for _, _, points in listed) + sum(rest) == total
    assert number(card.locator("summary .total").inner_text()) == total
    return total


def assert_contrast_adds_up(card: Any) -> None:
    """Points for the one minus points for the other is the difference, and the differences add up to the total."""
    differences = []
    for line in card.locator("tbody tr").all():
        own, rival, difference = (line.locator(f".{name}").inner_text() for name in ("own", "rival", "points"))
        assert number(own) - number(rival.strip("()")) == number(difference)
        differences.append(number(difference))
    *rest, total = (number(text) for text in card.locator("tfoot .points").all_inner_texts())
    assert differences
    assert sum(differences) + sum(rest) == total


def as_file(data: bytes) -> dict[str, Any]:
    return {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": data}


def open_card(page: Any, place: int) -> Any:
    card = page.locator("#classes details:not(.contrast)").nth(place)
    if card.get_attribute("open") is None:
        card.locator("summary").click()
    return card


def wide(page: Any) -> int:
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
