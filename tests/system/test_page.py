"""The web page in a real Chromium, over the service without Serve around it: what its users see and do."""

import io
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import as_file, assert_adds_up, assert_contrast_adds_up, open_card, rows, watched, wide
from PIL import ExifTags, Image
from serving import CLASSES, Client, local_app, photo

from protopnet.words import readable_names

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")

expect = playwright.expect
TOKEN = "a-token-of-the-page"
NAMES = readable_names(CLASSES)
# What a test provokes, the browser logs by itself: a refusal, a server that is gone, the one picture that isn't there.
_EXPECTED = re.compile(r"Failed to load resource: (the server responded with a status of 4\d\d|net::ERR_FAILED)")


@pytest.fixture(scope="module")
def service(bundles: list[str]) -> Iterator[Client]:
    with local_app(bundles[:1]) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(bundles: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Three members, below a prefix, for those with a token only."""
    tokens = tmp_path_factory.mktemp("page") / "tokens"
    tokens.write_text(TOKEN)
    with local_app(bundles, "/guarded", token_file=str(tokens), max_bytes=50_000) as client:
        yield client


@pytest.fixture
def visit(browser: Any, service: Client) -> Iterator[Callable[..., Any]]:
    """Opens the page as somebody new; afterwards nothing went elsewhere, and nothing was complained of."""
    opened: list[tuple[Any, Any, str]] = []

    def open_page(client: Client = service, path: str = "/", **options: Any) -> Any:
        page = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)).new_page()
        page.set_default_timeout(15_000)
        opened.append((page, watched(page), client.url))
        page.goto(client.url + path)
        return page

    yield open_page
    for page, watch, url in opened:
        page.context.close()
        assert watch.requests
        assert not watch.outside(url)
        assert [text for text in watch.complaints if not _EXPECTED.search(text)] == []


@pytest.fixture(scope="module")
def bird(test_data: Path) -> bytes:
    """A real photo of a bird."""
    return sorted((test_data / "cub100/test").glob("012*/*.jpg"))[0].read_bytes()


def bring(page: Any, data: bytes) -> None:
    """Choose a photo, and wait until its evidence is shown."""
    page.set_input_files("#file", as_file(data))
    expect(page.locator("#answer .evidence .points").first).to_be_visible()
    expect(page.locator("#main")).to_have_attribute("aria-busy", "false")


def explained(client: Client, data: bytes) -> Any:
    """What the service answers to the page's request."""
    return client.post("/v1/explain?top_classes=3&top_prototypes=5", data).json["images"][0]


# --------------------------------------------------------------------------------------------- a photo


def test_a_real_bird_gets_tables_that_add_up(visit, service, bird):
    page = visit()
    bring(page, bird)
    image = explained(service, bird)
    assert page.inner_text("#verdict").startswith(NAMES[image["classes"][0]["class"]])
    assert page.locator("#classes details:not(.contrast)").count() == len(image["classes"]) == 3
    for place, entry in enumerate(image["classes"]):
        card = open_card(page, place)
        assert card.locator(".name").inner_text() == NAMES[entry["class"]]
        total = assert_adds_up(card)
        assert abs(total - Decimal(entry["logit"])) <= Decimal("0.005001")
        assert card.locator("tbody tr").count() == len(entry["evidence"]) == 5
        for (similarity, _, points), item in zip(rows(card), entry["evidence"], strict=True):
            assert abs(similarity - Decimal(item["similarity"])) <= Decimal("0.000501")
            assert abs(points - Decimal(item["points"])) < Decimal("0.02")
    assert NAMES[image["classes"][0]["class"]] in page.inner_text("#status")


def test_prototypes_that_people_have_named_are_said_by_name(visit, service):
    page = visit()
    bring(page, photo(1))
    said = 0
    for place, entry in enumerate(explained(service, photo(1))["classes"]):
        card = open_card(page, place)
        for row, item in enumerate(entry["evidence"]):
            if item["name"] == "red bill" and item["points"] > 0:
                assert (
                    card.locator(".because").inner_text()
                    == f"Because of: red bill, {entry['shown']['rows'][row]['points']} points."
                )
                assert "red bill, prototype 1" in card.locator("tbody tr").nth(row).inner_text()
                said += 1
    assert said


def test_the_parts_shown_are_the_parts_that_count_also_of_a_turned_photo(visit, service):
    """A phone's photo is stored lying and turned by its EXIF: the browser must cut out what the server saw."""
    upright = Image.open(io.BytesIO(photo(3, 400, 300)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sink = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(sink, "JPEG", quality=95, exif=exif)
    page = visit()
    bring(page, sink.getvalue())
    image = explained(service, sink.getvalue())
    assert (image["width"], image["height"]) == (400, 300)
    parts, evidence = page.locator("details[open] .part .picture").all(), image["classes"][0]["evidence"]
    assert len(parts) == len(evidence)
    for part, item in zip(parts, evidence, strict=True):
        shown = Image.open(io.BytesIO(part.screenshot())).convert("RGB")
        top, left, bottom, right = item["box"]
        expected = upright.crop((left, top, right, bottom)).resize((9, 9), Image.Resampling.BOX)
        seen = shown.resize((9, 9), Image.Resampling.BOX)
        # Away from the corners, which are round, and of which one has a number.
        inner, outer = (np.asarray(image)[3:-1, 3:-1].astype(int) for image in (seen, expected))
        np.testing.assert_allclose(inner, outer, atol=40)
        np.testing.assert_allclose(inner.mean((0, 1)), outer.mean((0, 1)), atol=8)


def test_pointing_at_a_row_shows_its_box_and_heat_map_on_the_photo(visit):
    page = visit()
    bring(page, photo(1, 200, 160))
    drawn = "document.querySelector('#picture').innerHTML"
    page.mouse.move(0, 0)
    before = page.evaluate(drawn)
    assert "off" in page.locator("#legend").get_attribute("class")
    second = page.locator("details[open] tbody tr").nth(1)
    second.hover()
    heated = page.evaluate(drawn)
    assert heated != before
    assert "off" not in page.locator("#legend").get_attribute("class")
    assert page.inner_text("#caption").startswith("Part 2 looks like prototype")
    page.mouse.move(0, 0)
    assert page.evaluate(drawn) == before
    second.locator("button").click()  # keeps it
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    assert page.evaluate(drawn) == heated
    assert second.locator("button").get_attribute("aria-pressed") == "true"
    open_card(page, 1)  # lets go of it
    expect(second.locator("button")).to_have_attribute("aria-pressed", "false")
    assert page.evaluate(drawn) not in (before, heated)


def test_why_not_another_class(visit, service):
    page = visit()
    data = photo(5, 200, 160)
    bring(page, data)
    label = next(n for n in (1, 2) if n != explained(service, data)["classes"][0]["class"])
    misspelt = NAMES[label].replace("r", "", 1).upper()
    page.fill("#other-class", misspelt)
    page.press("#other-class", "Enter")
    problem = page.locator("#why-not-problem")
    expect(problem).to_contain_text("There is no class")
    assert f"did you mean {CLASSES[label]}" in problem.inner_text()
    page.fill("#other-class", CLASSES[label])
    page.press("#other-class", "Enter")
    card = page.locator("#asked details:not(.contrast)")
    total = assert_adds_up(card)
    assert_contrast_adds_up(page.locator("#asked details.contrast"))
    answer = service.post(f"/v1/predict?top_classes=1&class={label}", data).json["images"][0]["classes"]
    assert abs(total - Decimal(answer[-1]["logit"])) <= Decimal("0.005001")
    best, asked = (round(entry["logit"], 2) for entry in (answer[0], answer[-1]))
    assert f"{best - asked:.2f} points fewer than {NAMES[answer[0]['class']]}" in card.locator("p").inner_text()
    assert problem.inner_text() == ""
    assert page.evaluate("document.activeElement.textContent") == f"Why not {NAMES[label]}?"


def test_what_the_server_refuses_is_said_in_a_sentence_and_the_next_photo_works(visit):
    page = visit()
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"a jay, I think"})
    problem = page.locator("#problem p")
    problem.wait_for()
    assert "not an image" in problem.inner_text().lower()
    assert not page.locator("#answer").is_visible()
    bring(page, photo(2))
    assert not page.locator("#problem p").count()


def test_a_server_that_is_gone_is_said_so_and_asked_again(visit):
    page = visit()
    page.locator("#examples button").first.wait_for()
    page.route("**/v1/explain*", lambda route: route.abort())
    page.set_input_files("#file", as_file(photo(2)))
    page.locator("#problem p").wait_for()
    assert "The server doesn't answer" in page.inner_text("#problem")
    page.unroute("**/v1/explain*")
    page.locator("#problem button").click()
    assert_adds_up(page.locator("#classes details").first)


def test_dropping_pasting_and_examples_bring_photos_too(visit):
    page = visit()
    transfer = """(bytes) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "a.jpg"));
      return transfer;
    }"""
    given = page.evaluate_handle(transfer, list(photo(7)))
    page.dispatch_event("#drop", "drop", {"dataTransfer": given})
    page.locator("#answer .points").first.wait_for()
    first = page.inner_text("#classes")
    given = page.evaluate_handle(transfer, list(photo(8)))
    page.evaluate("(t) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: t}))", given)
    expect(page.locator("#classes")).not_to_have_text(first, use_inner_text=True)
    page.reload()
    page.locator("#examples button").first.click()
    page.locator("#answer .points").first.wait_for()
    assert "A training image of" in page.inner_text("#verdict-note")
    assert_adds_up(page.locator("#classes details").first)


# ---------------------------------------------------------------------------------- for everybody, anywhere


def test_everything_works_from_the_keyboard(visit):
    page = visit()
    page.locator("#examples button").first.wait_for()
    focused = "document.activeElement"
    order = []

    def tab_to(test: str) -> None:
        """Press Tab until the element in focus passes the test; each one on the way is visibly in focus."""
        for _ in range(40):
            page.keyboard.press("Tab")
            order.append(page.evaluate(f"{focused}.id || {focused}.className || {focused}.tagName"))
            outlined = page.evaluate(
                f"[{focused}, {focused}.nextElementSibling].some((e) => e && getComputedStyle(e).outlineStyle !== 'none')"
            )
            assert outlined, order
            if page.evaluate(f"(() => {{ const e = {focused}; return {test}; }})()"):
                return
        raise AssertionError(f"not reached: {test} by {order}")

    # Long before the key: the browser must know by then that a test wants to choose.
    page.on("filechooser", lambda chooser: chooser.set_files(as_file(photo(4))))
    tab_to("e.id === 'file'")
    page.keyboard.press("Enter")
    page.locator("#answer .points").first.wait_for()
    tab_to("e.matches('#classes summary')")
    tab_to("e.matches('button.part')")
    assert page.inner_text("#caption").startswith("Part 1 looks like prototype")
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.getAttribute('aria-pressed')") == "true"
    tab_to("e.id === 'other-class'")
    label = next(n for n in range(3) if not page.inner_text("#verdict").startswith(NAMES[n]))
    page.keyboard.type(NAMES[label])
    page.keyboard.press("Enter")
    page.locator("#asked .points").first.wait_for()
    assert page.evaluate(f"{focused}.textContent") == f"Why not {NAMES[label]}?"
    assert NAMES[label] in page.inner_text("#status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit, scheme):
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme, is_mobile=True, has_touch=True)
    page.locator("#examples button").first.wait_for()
    assert wide(page) == 0
    bring(page, photo(6, 300, 400))
    for place in range(3):
        open_card(page, place)
    page.locator("#classes details").nth(2).locator("tr.total").wait_for()
    assert wide(page) == 0
    page.fill("#other-class", "nothing of the kind")
    page.press("#other-class", "Enter")
    assert wide(page) == 0
    page.goto(page.url.split("#")[0] + "#prototypes")
    page.locator("#gallery li .picture").first.wait_for()
    assert wide(page) == 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert brightness > 200 if scheme == "light" else brightness < 50


# --------------------------------------------------------------------------------------------- prototypes


def test_the_prototypes_can_be_browsed_by_class(visit):
    page = visit()
    page.get_by_role("link", name="Prototypes").click()
    page.locator("#gallery li").nth(11).wait_for()
    assert page.inner_text("#gallery-count") == "1 to 12 of 12"
    page.fill("#gallery-class", "wint")
    expect(page.locator("#gallery-classes option")).to_have_count(1)
    assert page.locator("#gallery-classes option").get_attribute("value") == NAMES[2]
    page.fill("#gallery-class", "no such class")
    page.press("#gallery-class", "Enter")
    expect(page.locator("#gallery-problem")).to_contain_text("There is no class")
    page.fill("#gallery-class", NAMES[2])
    page.press("#gallery-class", "Enter")
    expect(page.locator("#gallery li")).to_have_count(3)
    assert {text.inner_text() for text in page.locator("#gallery li b").all()} == {NAMES[2]}
    assert page.locator("#gallery li").first.locator(".picture").count() == 2
    page.go_back()
    page.locator("#gallery li").nth(11).wait_for()
    assert page.locator("#gallery li").first.inner_text().startswith("No picture in the bundle.")


def test_a_token_is_asked_for_and_kept_for_the_session(visit, guarded):
    page = visit(guarded)
    form = page.locator("#token")
    form.wait_for()
    page.fill("#token-text", "a-wrong-guess")
    page.keyboard.press("Enter")
    expect(page.locator("#token-wrong")).to_have_text("The server doesn't take that token.")
    page.fill("#token-text", TOKEN)
    page.keyboard.press("Enter")
    page.locator("#examples button").first.wait_for()
    assert not form.is_visible()
    assert page.inner_text("#model") == "4 classes, 36 prototypes in 3 models"
    page.reload()
    bring(page, photo(9))
    card = page.locator("#classes details").first
    assert_adds_up(card)
    assert re.search(r"prototype \d+ of model [012]", card.inner_text())
    page.goto(guarded.url + "/#prototypes")
    page.locator("#gallery li").nth(23).wait_for()
    page.click("#later")
    expect(page.locator("#gallery li")).to_have_count(12)
    assert page.inner_text("#gallery-count") == "25 to 36 of 36"
    assert page.locator("#later").is_disabled()
    page.goto(guarded.url + "/#photo")
    page.set_input_files("#file", as_file(b"\xff" * 60_000))
    page.locator("#problem p").wait_for()
    assert "0.1 MB" in page.inner_text("#problem")
