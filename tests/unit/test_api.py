"""`import protopnet`: what a notebook uses. Images of any kind in, results that show themselves out."""

import ast
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import ExifTags, Image
from serving import CLASSES, make_bundle, photo

import protopnet
from protopnet import storage
from protopnet.cli import checked
from protopnet.config import PrepareSettings, RunSettings
from protopnet.errors import UserError
from protopnet.model.bundle import load_bundle, save_bundle


def bundle_with_pictures(folder: Path, seed: int = 0) -> str:
    """That of the service's tests, whose first prototype has no picture, with one."""
    bundle = load_bundle(make_bundle(folder / "bare", seed))
    assert bundle.prototypes is not None
    pictures = pa.array([photo(n) for n in range(len(bundle.prototypes))], pa.binary())
    place = bundle.prototypes.column_names.index("thumbnail")
    table = bundle.prototypes.set_column(place, "thumbnail", pictures)
    uri = str(folder / "bundle")
    save_bundle(uri, bundle.network, bundle.info.architecture, bundle.classes, {}, table)
    return uri


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [bundle_with_pictures(tmp_path_factory.mktemp("bundle"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def model(bundles: list[str]) -> protopnet.Model:
    return protopnet.load(bundles[0], device="cpu")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def turned() -> bytes:
    turn = Image.Exif()
    turn[ExifTags.Base.Orientation] = 6
    return photo(3, exif=turn)


def see_through() -> bytes:
    image = Image.open(io.BytesIO(photo(4))).quantize(64)
    image.info["transparency"] = 0
    return encoded(image, "PNG")


def sixteen_bits(kind: str = "PNG") -> bytes:
    pixels = np.asarray(Image.open(io.BytesIO(photo(5))).convert("L")).astype(np.uint16) * 200
    return encoded(Image.fromarray(pixels), kind)


def cut_off() -> Image.Image:
    return Image.open(io.BytesIO(photo(1, width=400, height=300)[:3000]))


KINDS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: photo(1),
    "turned jpeg": turned,
    "cmyk": lambda: encoded(Image.open(io.BytesIO(photo(2))).convert("CMYK"), "JPEG"),
    "palette with a see-through colour": see_through,
    "see-through": lambda: encoded(Image.open(io.BytesIO(photo(6))).convert("RGBA"), "PNG"),
    "one bit": lambda: encoded(Image.open(io.BytesIO(photo(7))).convert("1"), "PNG"),
    "16 bits": sixteen_bits,
    "16 bits in a TIFF": lambda: sixteen_bits("TIFF"),
}


class TestImages:
    @pytest.mark.parametrize("kind", KINDS)
    def test_an_image_is_the_same_as_a_file_as_bytes_and_in_memory(
        self, model: protopnet.Model, tmp_path: Path, kind: str
    ) -> None:
        data = KINDS[kind]()
        file = tmp_path / "image"
        file.write_bytes(data)
        found = model.predict([file, str(file), data, Image.open(file)])
        assert [each.name for each in found] == [str(file), str(file), "image 3", "image 4"]
        assert len({(each.width, each.height, each.logits_K.tobytes()) for each in found}) == 1

    def test_an_array_is_its_pixels(self, model: protopnet.Model) -> None:
        colour = Image.open(io.BytesIO(photo(1))).convert("RGB")
        grey, deep = colour.convert("L"), Image.open(io.BytesIO(sixteen_bits()))
        for image in (colour, grey, deep, colour.convert("RGBA")):
            pixels = np.asarray(image)
            assert np.array_equal(model.predict(pixels).logits_K, model.predict(image).logits_K)
            turned = model.predict(np.ascontiguousarray(pixels[:, ::-1])).logits_K
            assert np.array_equal(model.predict(pixels[:, ::-1]).logits_K, turned)

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ("nowhere.jpg", "there is no file nowhere.jpg"),
            (".", ". is a folder: expected the file of an image"),
            (b"no image", "image 1 can't be used: not an image of a known kind"),
            (np.zeros((2, 60, 80, 3), np.uint8), "image 1 is an array of uint8, (2, 60, 80, 3): expected a path"),
            (np.zeros((60, 80, 3)), "image 1 is an array of float64"),
            (np.zeros((0, 80), np.uint8), "(0, 80)"),
            ([b"", 3], "image 1 can't be used: the file is empty"),
            ([photo(1), cut_off()], "image 2 can't be used: image file is truncated"),
            (Image.new("HSV", (9, 9)), "image 1 can't be used: cannot write mode HSV"),
            ([photo(1), 3], "image 2 is a int: expected a path, the bytes of a file"),
            (3, "image 1 is a int"),
        ],
    )
    def test_what_is_no_image_is_said_in_a_line(self, model: protopnet.Model, given: Any, sentence: str) -> None:
        with pytest.raises(UserError, match=r"^[^\n]+$") as refused:
            model.predict(given)
        assert sentence in str(refused.value)


class TestResults:
    def test_one_image_has_one_result_and_a_list_has_as_many(self, model: protopnet.Model) -> None:
        images = [photo(n) for n in range(37)]
        found = model.predict(iter(images))
        assert isinstance(found, protopnet.Results)
        assert len(found) == 37
        for place in (0, 16, 36):
            alone = model.predict(images[place])
            assert isinstance(alone, protopnet.Prediction)
            assert found[place].logits_K == pytest.approx(alone.logits_K, abs=1e-5)
        assert model.predict([]) == ()

    def test_a_prediction_says_what_the_predictor_says(self, model: protopnet.Model, bundles: list[str]) -> None:
        image, predictor = Image.open(io.BytesIO(photo(1))), protopnet.Predictor.load(bundles[:1])
        scores = predictor.scores(predictor.look_at([image]))
        found = model.predict(image)
        assert found.logits_K == pytest.approx(scores.logits_BK[0].numpy(), abs=1e-6)
        assert found.probabilities_K == pytest.approx(scores.probabilities_BK[0].numpy(), abs=1e-6)
        assert (found.label, found.class_name) == (int(scores.logits_BK[0].argmax()), CLASSES[found.label])
        assert [score.label for score in found.top()] == scores.logits_BK[0].argsort(descending=True).tolist()

    def test_several_bundles_add_up(self, bundles: list[str]) -> None:
        together, listed = protopnet.load(*bundles, device="cpu"), protopnet.load(bundles, device="cpu")
        alone = [protopnet.load(Path(uri), device="cpu").predict(photo(1)).logits_K for uri in bundles]
        assert together.predict(photo(1)).logits_K == pytest.approx(sum(alone), abs=1e-5)
        assert np.array_equal(together.predict(photo(1)).logits_K, listed.predict(photo(1)).logits_K)

    def test_why_and_why_not(self, model: protopnet.Model) -> None:
        prediction = model.predict(photo(1))
        likely, unlikely = prediction.top()[0], prediction.top()[-1]
        why = model.explain(photo(1), why_not=unlikely.class_name)
        assert isinstance(why, protopnet.Why)
        assert [entry.class_name for entry in why.classes] == [likely.class_name, unlikely.class_name]
        assert why.class_name == likely.class_name
        for entry, score in zip(why.classes, (likely, unlikely), strict=True):
            assert entry.logit == pytest.approx(score.logit, abs=1e-5)
            assert sum(e.points for e in entry.evidence) + entry.remainder.points == pytest.approx(
                score.logit, abs=1e-4
            )
        [contrast] = why.contrasts
        assert (contrast.class_name, contrast.rival_name) == (likely.class_name, unlikely.class_name)
        assert contrast.difference == pytest.approx(likely.logit - unlikely.logit, abs=1e-4)
        assert why.to_dict()["contrasts"][0]["rival_name"] == unlikely.class_name
        assert why.figure_of(contrast).width == why.figure(likely.class_name).width
        assert not model.explain(photo(1), contrast=False).contrasts
        several = model.explain([photo(1), photo(2)], why_not=["Blue Jay", "winter wren"], top_prototypes=2)
        assert [{"001.Blue_Jay", "003.Winter_Wren"} <= {e.class_name for e in each.classes} for each in several] == [
            True,
            True,
        ]
        assert {len(entry.evidence) for each in several for entry in each.classes} == {2}

    def test_figures(self, model: protopnet.Model) -> None:
        why = model.explain(photo(1, width=1500, height=1000), why_not=CLASSES, top_prototypes=1)
        one, all_four = why.figure(CLASSES[2]), why.figure()
        assert one.width == all_four.width > 1200
        assert all_four.height == 4 * one.height
        likely = model.predict([photo(1), photo(2)])
        assert likely.figure().height == likely[0].figure().height + likely[1].figure().height
        with pytest.raises(UserError, match="isn't among the classes explained: ask for it with why_not="):
            model.explain(photo(1)).figure(model.predict(photo(1)).top()[-1].class_name)

    def test_the_box_on_a_photo_kept_small_is_where_it_is_on_the_photo(self, model: protopnet.Model) -> None:
        large, small = (model.explain(photo(1, width=w, height=h)) for w, h in ((1500, 1000), (150, 100)))
        assert max(large.photo.size) == 640
        assert small.photo.size == (150, 100)
        boxes = np.array([w.classes[0].evidence[0].box for w in (large, small)])
        assert boxes[0] == pytest.approx(10 * boxes[1], abs=60)
        assert np.asarray(large.figure()).shape == np.asarray(small.figure()).shape

    def test_as_data(self, model: protopnet.Model) -> None:
        found, why = model.predict([photo(1), photo(2)]), model.explain([photo(1), photo(2)])
        assert json.loads(json.dumps(found.to_dict()))[0]["class_name"] == found[0].class_name
        assert json.loads(json.dumps(why.to_dict()))[1]["classes"][0]["class_name"] == why[1].class_name
        table = found.to_pandas()
        assert table.columns.tolist() == ["image", "rank", "class", "class_name", "probability", "logit"]
        assert table[table["rank"] == 1]["class_name"].tolist() == [each.class_name for each in found]
        reasons = why.to_pandas()
        assert len(reasons) == 10
        assert (reasons["similarity"] * reasons["connection"]).to_numpy() == pytest.approx(reasons["points"], rel=1e-4)

    def test_without_pandas(self, model: protopnet.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(UserError, match=r"pandas, which isn't installed: pip install pandas$"):
            model.predict(photo(1)).to_pandas()

    def test_in_a_notebook(self, model: protopnet.Model, tmp_path: Path) -> None:
        file = tmp_path / "<b>ird.jpg"
        file.write_bytes(photo(1))
        predicted, why = model.predict(file), model.explain(file)
        assert "&lt;b&gt;ird.jpg" in predicted._repr_html_()
        assert predicted._repr_html_().count("<tr>") == 4
        assert why._repr_html_().startswith('<iframe srcdoc="')
        assert why._repr_html_().count("<") == 2  # the page within is an attribute
        assert "Why " in why._repr_html_()
        file.rename(priced := tmp_path / "$1 and $x_{.jpg")
        assert model.predict(priced).figure().width > 1000  # no formula
        many = model.predict([photo(n) for n in range(14)])
        assert many._repr_html_().count("<figure") == 12
        assert many._repr_html_().endswith("<p>and 2 more</p>")
        assert repr(why).startswith(f"<Why of {file}: ")

    def test_a_bundle_without_pictures_still_says_why(self, tmp_path: Path) -> None:
        bundle = load_bundle(make_bundle(tmp_path, 0))
        save_bundle(str(tmp_path), bundle.network, bundle.info.architecture, CLASSES, {})
        why = protopnet.load(tmp_path).explain(photo(1))
        assert "has no picture of prototype" in why._repr_html_()
        with pytest.raises(UserError, match="has no picture of prototype"):
            why.figure()

    def test_a_baseline_predicts_and_cannot_explain(self, tmp_path: Path) -> None:
        model = protopnet.load(make_bundle(tmp_path, 0, "baseline"))
        assert model.predict(photo(1)).class_name in CLASSES
        with pytest.raises(UserError, match="a black-box baseline can't explain"):
            model.explain(photo(1))


class TestNames:
    def test_importing_takes_no_time(self) -> None:
        code = (
            "import sys, time; start = time.perf_counter(); import protopnet; seconds = time.perf_counter() - start; "
            "print(seconds, sorted({'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, heavy = done.stdout.split(maxsplit=1)
        assert float(seconds) < 0.3
        assert heavy.strip() == "[]"

    def test_each_is_there_and_nothing_else(self) -> None:
        for name in protopnet.__all__:
            assert getattr(protopnet, name) is not None
        assert dir(protopnet) == protopnet.__all__
        with pytest.raises(AttributeError, match="has no attribute 'laod'"):
            protopnet.laod  # noqa: B018

    def test_type_checkers_are_told_the_same(self) -> None:
        tree = ast.parse(Path(protopnet.__file__).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
        told = {name.name: str(node.module).removeprefix("protopnet.") for node in imports for name in node.names}
        assert told == protopnet._MODULES
        assert {*told, "__version__"} == set(protopnet.__all__)

    def test_no_module_takes_the_name_of_a_job(self) -> None:
        for job in ("audit", "evaluate", "explain", "export", "prepare", "prune", "score", "train"):
            assert importlib.util.find_spec(f"protopnet.{job}") is None
            assert callable(getattr(protopnet, job))


class TestJobs:
    def test_settings_are_an_object_or_a_mapping(self) -> None:
        given = RunSettings.model_validate({"name": "a", "model": {"backbone": "vgg16"}})
        assert checked(RunSettings, given) is given
        assert checked(RunSettings, {"name": "a", "model": {"backbone": "vgg16"}}) == given
        assert checked(RunSettings, {"name": "a", "model.backbone": "vgg16"}) == given

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"model": {"backbon": "vgg16"}}, "unknown setting model.backbon; did you mean model.backbone?"),
            ({"train.batch_size": 0}, "train.batch_size: 0 is not valid; expected a whole number, at least 1"),
            ("configs/quickstart.yaml", "settings can't be a str: expected RunSettings or a mapping"),
            ({"data.source": "folder"}, "data.path is missing"),
        ],
    )
    def test_a_job_raises_what_its_command_says(self, given: Any, sentence: str) -> None:
        with pytest.raises(UserError) as refused:
            protopnet.train(given)
        assert sentence in str(refused.value)

    def test_prepare(self, tmp_path: Path) -> None:
        for name in ("jay", "wren"):
            (tmp_path / "images" / name).mkdir(parents=True)
            for n in range(4):
                (tmp_path / "images" / name / f"{n}.jpg").write_bytes(photo(n))
        output = str(tmp_path / "shards")
        dataset = protopnet.prepare({"data": {"source": "folder", "path": str(tmp_path / "images")}, "output": output})
        assert dataset.classes == ["jay", "wren"]
        assert storage.exists(storage.join(output, "dataset.json"))
        with pytest.raises(UserError, match="overwrite"):
            protopnet.prepare(
                PrepareSettings.model_validate(
                    {"data": {"source": "folder", "path": str(tmp_path / "images")}, "output": output}
                )
            )

    def test_explain(self, bundles: list[str], tmp_path: Path) -> None:
        (tmp_path / "bird.jpg").write_bytes(photo(1))
        given = {"given": [bundles[0], str(tmp_path / "bird.jpg")], "output": str(tmp_path / "out"), "class": ["wren"]}
        with pytest.raises(UserError, match="there is no class 'wren'"):
            protopnet.explain(given)
        (why,) = protopnet.explain(given | {"class": ["Winter Wren"]})
        assert "003.Winter_Wren" in [entry.class_name for entry in why.classes]
        assert (tmp_path / "out/explanation.html").exists()
