"""Every endpoint of the service over real HTTP: right answers. What is refused: test_serve_refusals.py."""

import base64
import io
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray_processes import wait_for
from serving import CLASSES, Client, LocalServe, make_bundle, photo, pixels

from protopnet.predictor import Predictor

ABSTAIN_BELOW = 0.9


@pytest.fixture(scope="module")
def trio(local_serve: LocalServe, bundles: list[str]) -> Client:
    return local_serve.deploy("trio", bundles, abstain_below=ABSTAIN_BELOW)


def logits(answer, place=0):
    return {entry["class"]: entry["logit"] for entry in answer.json["images"][place]["classes"]}


# ---------------------------------------------------------------------------------------- right answers


def test_one_image_gets_exactly_the_scores_of_the_predictor(service, bundles):
    for seed in range(5):
        data = photo(seed)
        scores = Predictor.load(bundles[:1]).scores(pixels(data))
        answer = service.post("/v1/predict?top_classes=4", data)
        assert answer.status == 200, answer
        assert logits(answer) == dict(enumerate(scores.logits_BK[0].tolist()))
        for entry in answer.json["images"][0]["classes"]:
            assert entry["probability"] == scores.probabilities_BK[0, entry["class"]].item()
            assert entry["class_name"] == CLASSES[entry["class"]]


def test_three_members_give_exactly_the_sum(trio, bundles):
    data = photo(3)
    single = [Predictor.load([uri]).scores(pixels(data)).logits_BK for uri in bundles]
    together = Predictor.load(bundles).scores(pixels(data)).logits_BK
    assert torch.equal(together, single[0] + single[1] + single[2])
    for route in ("predict", "explain"):
        assert logits(trio.post(f"/v1/{route}?top_classes=4", data)) == dict(enumerate(together[0].tolist())), route


def test_an_explanation_is_that_of_the_predictor_and_adds_up(trio, bundles):
    data = photo(5, 300, 200)
    options = {"top_classes": 2, "top_prototypes": 6, "contrast": True, "maps": True, "perturb": True}
    [expected] = Predictor.load(bundles).explain(pixels(data), [(300, 200)], **options)
    query = "top_classes=2&top_prototypes=6&contrast=true&maps=values&map=gradient&perturb=true"
    answer = trio.post(f"/v1/explain?{query}", data)
    assert answer.status == 200, answer
    [image] = answer.json["images"]
    assert image == expected.model_dump(mode="json") | {"file": None, "abstained": image["abstained"], "heat_maps": {}}
    for entry in image["classes"]:
        points = sum(evidence["points"] for evidence in entry["evidence"]) + entry["remainder"]["points"]
        assert points == pytest.approx(entry["logit"], abs=1e-4)


def test_several_images_in_a_form_are_answered_in_their_order(service):
    files = [(f"{n}.jpg", photo(n)) for n in range(6)]
    answer = service.form("/v1/predict?top_classes=4", files)
    assert [image["file"] for image in answer.json["images"]] == [name for name, _ in files]
    for place, (_, data) in enumerate(files):
        # In a batch sums come out differently in the last bits.
        assert logits(answer, place) == pytest.approx(logits(service.post("/v1/predict?top_classes=4", data)), rel=1e-4)


def test_boxes_are_on_the_image_as_it_is_seen(service):
    """A photo that its EXIF turns is explained in its turned pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    [image] = service.post("/v1/explain", photo(1, 120, 40, exif=exif)).json["images"]
    assert (image["width"], image["height"]) == (40, 120)
    for entry in image["classes"]:
        for evidence in entry["evidence"]:
            top, left, bottom, right = evidence["box"]
            assert 0 <= top < bottom <= 120
            assert 0 <= left < right <= 40


def test_heat_maps_are_pictures_of_the_prototypes_listed(service):
    [image] = service.post("/v1/explain?maps=png&top_classes=2&top_prototypes=3", photo(2)).json["images"]
    listed = {f"{e['member']}/{e['prototype']}" for entry in image["classes"] for e in entry["evidence"]}
    assert set(image["heat_maps"]) == listed
    for data in image["heat_maps"].values():
        assert Image.open(io.BytesIO(base64.b64decode(data))).mode == "RGBA"
    assert all(e["activation_map"] is None for entry in image["classes"] for e in entry["evidence"])


@pytest.mark.parametrize("text", ["002.Northern_Cardinal", "Northern%20Cardinal", "northern+cardinal", "1"])
@pytest.mark.parametrize("route", ["predict", "explain"])
def test_why_not_another_class(service, text, route):
    top = service.post(f"/v1/{route}?top_classes=1", photo(4)).json["images"][0]["classes"]
    asked = service.post(f"/v1/{route}?top_classes=1&class={text}", photo(4)).json["images"][0]["classes"]
    assert [entry["class"] for entry in asked] == list(dict.fromkeys([top[0]["class"], 1]))


def test_the_name_of_a_class_counts_before_its_number(service):
    """There is a class called 7, and none with the number 7."""
    classes = service.post("/v1/predict?top_classes=1&class=7", photo(4)).json["images"][0]["classes"]
    assert 3 in [entry["class"] for entry in classes]


def test_abstaining(trio, service):
    """Below a probability: the request's own, else the server's."""
    most = service.post("/v1/predict", photo(0)).json["images"][0]["classes"][0]["probability"]
    for route in ("predict", "explain"):
        for below, abstained in ((most, False), (most + 1e-6, True)):
            [image] = service.post(f"/v1/{route}?abstain_below={below}", photo(0)).json["images"]
            assert image["abstained"] is abstained
        assert service.post(f"/v1/{route}", photo(0)).json["images"][0]["abstained"] is False
        of_trio = [trio.post(f"/v1/{route}", photo(n)).json["images"][0] for n in range(8)]
        assert [i["abstained"] for i in of_trio] == [i["classes"][0]["probability"] < ABSTAIN_BELOW for i in of_trio]
    assert {i["abstained"] for i in of_trio} == {True, False}


def test_the_model_says_what_it_is(trio, bundles):
    model = trio.get("/v1/model").json
    predictor = Predictor.load(bundles)
    assert [entry["class_name"] for entry in model["classes"]] == CLASSES
    assert [entry["readable_name"] for entry in model["classes"]] == [
        "Blue Jay",
        "Northern Cardinal",
        "Winter Wren",
        "7",
    ]
    assert [entry["prototypes"] for entry in model["classes"]] == [9, 9, 9, 9]
    assert [member["name"] for member in model["members"]] == ["first", "second", "third"]
    assert [member["bundle_hash"] for member in model["members"]] == [b.hash for b in predictor.bundles]
    assert model["model"] == trio.post("/v1/predict", photo(0)).json["model"]
    assert model["abstain_below"] == ABSTAIN_BELOW


def test_paging_meets_every_prototype_once(trio, bundles):
    found, offset = [], 0
    while offset is not None:
        page = trio.get(f"/v1/prototypes?limit=7&offset={offset}").json
        found += page["prototypes"]
        offset = page["next"]
    assert len(found) == page["total"] == 36
    places = [(p["class"], p["member"], p["prototype"]) for p in found]
    assert places == sorted(set(places))
    of_class = trio.get("/v1/prototypes?class=Winter+Wren&member=1").json
    assert {(p["class"], p["member"]) for p in of_class["prototypes"]} == {(2, 1)}
    assert of_class["total"] == 3


def test_a_prototype_in_detail(service, bundles):
    explainer = Predictor.load(bundles[:1]).explainer
    detail = service.get("/v1/prototypes/0/4").json
    assert detail["class_name"] == CLASSES[1]
    assert detail["connection"] == explainer.heads[0].weights_KP[1, 4].item()
    assert {c["class"]: c["connection"] for c in detail["connections"]} == dict(
        enumerate(explainer.heads[0].weights_KP[:, 4].tolist())
    )
    assert detail["activation_map"] == explainer.sources[0].self_activation(4)
    assert detail["source"]["box"] == [30, 60, 60, 120]


def test_pictures_of_a_prototype(service):
    detail = service.get("/v1/prototypes/0/4").json
    thumbnail = service.get("/" + detail["thumbnail"])
    assert thumbnail.headers["Content-Type"] == "image/jpeg"
    assert thumbnail.body == photo(4)
    # The box (30, 60, 60, 120) of 180 x 120 pixels, on the thumbnail of 90 x 60.
    assert Image.open(io.BytesIO(service.get("/" + detail["crop"]).body)).size == (30, 15)
    etag = thumbnail.headers["ETag"]
    assert service.get("/" + detail["thumbnail"], **{"If-None-Match": etag}).status == 304
    assert service.get("/" + detail["crop"], **{"If-None-Match": etag}).status == 200
    model = service.get("/v1/model").json["model"]
    assert "immutable" in service.get(f"/{detail['thumbnail']}?v={model}").headers["Cache-Control"]
    assert "immutable" not in service.get(f"/{detail['thumbnail']}?v=older").headers["Cache-Control"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/model", "/", "/v1/prototypes/0/1/crop", "/metrics"])
def test_head_answers_as_get_without_a_body(service, path):
    head, whole = service.send("HEAD", path, None), service.get(path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]


def test_the_request_id_is_the_clients_or_a_new_one(service):
    assert service.get("/v1/model", **{"X-Request-ID": "mine-1"}).headers["X-Request-ID"] == "mine-1"
    answer = service.post("/v1/predict", photo(0), **{"X-Request-ID": "mine-2"})
    assert answer.json["request_id"] == answer.headers["X-Request-ID"] == "mine-2"
    new = service.get("/v1/model").headers["X-Request-ID"]
    assert new
    assert new != service.get("/v1/model").headers["X-Request-ID"]


def test_the_log_is_json_with_the_request_id_in_each_line(service):
    import ray

    assert service.post("/v1/predict", photo(0), **{"X-Request-ID": "to-be-found"}).status == 200
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"

    def lines(pattern):
        found = [line for log in logs.glob(pattern) for line in log.read_text().splitlines() if "to-be-found" in line]
        return [json.loads(line) for line in found]

    for pattern in ("replica_plain_ingress*", "replica_plain_member-0*"):
        [line] = wait_for(lambda pattern=pattern: lines(pattern), 10)
        assert line["request_id"] == "to-be-found"


def test_metrics_are_those_of_all_processes(service):
    before = time.monotonic()
    assert service.post("/v1/predict?abstain_below=1", photo(0)).status == 200
    assert service.get("/v1/nothing").status == 404
    wanted = [
        'ray_protopnet_requests_total{.*route="/v1/predict",.*status="200"',
        'ray_protopnet_requests_total{.*status="404"',
        'ray_protopnet_request_seconds_bucket{.*route="/v1/predict"',
        'ray_protopnet_predictions_total{.*class_name="',
        "ray_protopnet_abstentions_total{",
        'ray_protopnet_batch_images_bucket{.*deployment="member-0"',  # counted in another process
    ]

    def seen():
        import re

        text = service.get("/metrics").body.decode()
        return text if all(re.search(pattern, text) for pattern in wanted) else None

    text = wait_for(seen, 30)
    assert text.count("# TYPE ray_protopnet_requests_total counter") == 1, time.monotonic() - before


def test_the_page_and_the_documentation_need_nothing_from_elsewhere(service):
    page = service.get("/")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert service.get("/page/nothing.js").error == "not_found"
    docs = service.get("/docs").body.decode()
    assert "http://" not in docs
    assert "https://" not in docs
    assert service.get("/docs/static/swagger-ui-bundle.js").status == 200
    score = service.get("/openapi.json").json["components"]["schemas"]["ClassScore"]
    assert score["properties"]["class_name"]["examples"]


def test_a_baseline_predicts_and_does_not_explain(local_serve, bundles, tmp_path):
    uri = make_bundle(tmp_path / "baseline", 9, kind="baseline")
    client = local_serve.deploy("mixed", [bundles[0], uri])
    data = photo(1)
    try:
        expected = Predictor.load([bundles[0], uri]).scores(pixels(data)).logits_BK[0]
        assert logits(client.post("/v1/predict?top_classes=4", data)) == dict(enumerate(expected.tolist()))
        answer = client.post("/v1/explain", data)
        assert (answer.status, answer.error) == (409, "cannot_explain")
        assert client.get("/v1/model").json["explains"] is False
        assert client.get("/v1/prototypes").json["total"] == 0
        assert client.get("/v1/prototypes/0/1").error == "unknown_prototype"
    finally:
        local_serve.delete("mixed")
