"""The service without Serve: its settings, its errors, its metrics."""

import io
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from ray.serve.schema import ServeDeploySchema
from serving import SIZE, photo

from protopnet.errors import UserError
from protopnet.serving.app import build
from protopnet.serving.metrics import merged
from protopnet.serving.refusals import CODES, Refusal
from protopnet.serving.settings import AppSettings
from protopnet.serving.uploads import Upload, decode

ROOT = Path(__file__).parents[2]


def test_the_config_file_is_one_and_serves_the_quickstart_on_this_machine_alone():
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve/config.yaml").read_text()))
    assert config.http_options.host == "127.0.0.1"
    [application] = config.applications
    assert application.import_path == "serve.app:build"
    assert AppSettings.model_validate(application.args) == AppSettings()


def test_the_examples_in_the_config_file_are_settings():
    lines = (ROOT / "serve/config.yaml").read_text().splitlines()
    shown = [line.replace("# ", "", 1).strip() for line in lines if line.startswith("      # ")]
    assert len(shown) == 3
    for line in shown:
        AppSettings.model_validate(yaml.safe_load(line))


def test_texts_of_the_command_line_are_lists():
    assert AppSettings.model_validate({"bundles": "a, b"}).bundles == ["a", "b"]


@pytest.mark.parametrize(
    "wrong", [{"bundles": []}, {"max_byte": 1}, {"member": {"min_replicas": 3, "max_replicas": 2}}, {"timeout_s": 0}]
)
def test_wrong_settings(wrong):
    with pytest.raises(ValueError):
        AppSettings.model_validate(wrong)


def test_an_application_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no complete bundle"):
        build(AppSettings(bundles=[str(tmp_path)]))


def test_only_the_service_itself_is_to_blame_for_a_500():
    assert [code for code, (status, _) in CODES.items() if status == 500] == ["internal"]
    assert all(400 <= status < 600 for status, _ in CODES.values())


def refused(data):
    with pytest.raises(Refusal) as refusal:
        decode(Upload("a.jpg", data), [SIZE], AppSettings(max_pixels=10_000))
    assert refusal.value.message.startswith("a.jpg: ")
    return refusal.value.code, refusal.value.status


def test_why_an_image_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert refused(b"text") == ("not_an_image", 415)
    assert refused(b"\0\0\0\x18ftypheic" + bytes(50)) == ("not_an_image", 415)
    assert refused(photo(0)[:-200]) == ("bad_image", 400)
    assert refused(b"\x89PNG\r\n\x1a\n") == ("bad_image", 400)
    assert refused(photo(0, 101, 100)) == ("too_many_pixels", 413)
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    assert refused(bomb.getvalue()) == ("too_many_pixels", 413)


def test_a_picture_knows_its_size_as_uploaded():
    picture = decode(Upload(None, photo(0, 90, 60)), [SIZE], AppSettings())
    assert (picture.width, picture.height, picture.pixels[SIZE].shape) == (90, 60, (SIZE, SIZE, 3))


def test_metrics_of_several_nodes_become_one_text():
    head = "# HELP ray_protopnet_images_total Images\n# TYPE ray_protopnet_images_total counter\n"
    other = "# HELP ray_node_cpu CPU\n# TYPE ray_node_cpu gauge\nray_node_cpu 3\n"
    one = other + head + 'ray_protopnet_images_total{replica="a"} 1\n'
    two = head + 'ray_protopnet_images_total{replica="b"} 2\n' + other
    assert merged([one, "", two]) == (
        head + 'ray_protopnet_images_total{replica="a"} 1\nray_protopnet_images_total{replica="b"} 2\n'
    )
