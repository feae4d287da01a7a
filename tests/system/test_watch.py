"""A served model in use: what its replicas have counted, over the API and on the page."""

from typing import Any

from ray_processes import wait_for
from serving import Client, LocalServe, photo, pixels

from protopnet.predictor import Predictor


def test_images_in_use_stand_beside_the_usual(service: Client, browser: Any) -> None:
    for n in range(4):
        assert service.post("/v1/predict", photo(n)).status == 200
    watch = wait_for(lambda: (seen := service.get("/v1/watch").json)["images"] >= 4 and seen, 30)
    assert sum(counts["images"] for counts in watch["classes"].values()) == watch["images"] >= watch["abstained"]
    seen = {each["measure"]: sum(each["seen"]) for each in watch["measures"]}
    assert seen == {"margin": watch["images"], "similarity 0": watch["images"]}

    context = browser.new_context(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(service.url + "/#watch")
    page.locator("#watch-measures .card").nth(1).wait_for()
    assert "images since this model was deployed" in page.inner_text("#watch-count")
    assert "by chance alone" in page.locator("#watch-measures .card").first.inner_text()
    assert page.locator(".tenths .usual").count() == 20
    assert page.locator("#watch-classes tr").count() == len(watch["classes"])
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert not page.locator("#photo-view").is_visible()
    context.close()


def test_a_shadow_is_counted_and_answers_nobody(local_serve: LocalServe, bundles: list[str]) -> None:
    client = local_serve.deploy("shadowed", bundles[:1], shadow=bundles[1:2])
    alone = [Predictor.load([bundles[n]]).scores(pixels(*(photo(i) for i in range(6)))).logits_BK for n in range(2)]
    for n in range(6):
        answer = client.post("/v1/predict?top_classes=1", photo(n)).json["images"][0]["classes"][0]
        assert answer["class"] == int(alone[0][n].argmax())
    shadow = wait_for(
        lambda: (seen := client.get("/v1/watch").json["shadow"])["same"] + seen["other"] == 6 and seen, 40
    )
    assert shadow["same"] == int((alone[0].argmax(1) == alone[1].argmax(1)).sum())
    assert sum(each["other"] for each in shadow["classes"].values()) == shadow["other"]
    local_serve.delete("shadowed")
