"""Grey images of more than 8 bits, and colours of other spaces: the right values, wherever they are decoded."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from profiles import display_p3

import protopnet
from protopnet.api.photos import open_photo
from protopnet.budget import PassPlan
from protopnet.config import IntensitySettings, RunSettings
from protopnet.datasets.folders import scan_folder
from protopnet.datasets.loader import TrainLoader
from protopnet.errors import UserError
from protopnet.imaging import BadImage, Preprocessing, decode
from protopnet.model.bundle import load_bundle, save_bundle
from protopnet.model.network import build_network
from protopnet.passes import image_pass
from protopnet.passes.describe import thumbnail
from protopnet.passes.image_pass import PassOptions
from protopnet.predictor import Predictor
from protopnet.progress import LineReporter
from protopnet.scoring.task import Picture, look
from protopnet.serving.settings import AppSettings
from protopnet.serving.uploads import Upload
from protopnet.serving.uploads import decode as decode_upload
from protopnet.training import worker
from protopnet.training.run import Run


def tiff(values: Any, dtype: Any, **tags: int) -> bytes:
    sink, info = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[{"photometric": 262, "most": 281}[name]] = value
    Image.fromarray(np.array([values], dtype)).save(sink, "TIFF", tiffinfo=info)
    return sink.getvalue()


def greys(data: bytes, **given: Any) -> list[int]:
    image = decode(data, intensity=IntensitySettings(**given))
    assert image.mode == "RGB"
    pixels_1W3 = np.asarray(image)
    assert (pixels_1W3 == pixels_1W3[..., :1]).all()
    return pixels_1W3[0, :, 0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_bits_in_a_file_of_16_are_known_by_their_values(bits: int) -> None:
    most = 2**bits - 1
    assert greys(tiff([0, most // 2, most], np.uint16)) == [0, 127, 255]


def test_a_file_says_what_its_largest_value_is() -> None:
    assert greys(tiff([0, 500, 1000], np.uint16, most=4095)) == [0, 31, 62]
    assert greys(tiff([0, 500, 5000], np.uint16, most=4095)) == [0, 8, 78]  # that was a lie: 14 bits
    assert greys(tiff([0, 1000, 4095], np.uint16, photometric=0)) == [255, 193, 0]


def test_floats_and_negative_values_have_their_own_range() -> None:
    assert greys(tiff([-1.5, 0, 0.5, np.nan, np.inf], np.float32)) == [0, 191, 255, 0, 255]
    assert greys(tiff([-1000, 0, 3000], np.int32)) == [0, 64, 255]
    assert greys(tiff([7, 7], np.float32)) == [0, 0]
    with pytest.raises(BadImage, match="none of its pixels has a value"):
        decode(tiff([np.nan, np.nan], np.float32))


def test_a_window_and_percentiles() -> None:
    data = tiff([0, 1000, 2000, 3000, 4000], np.uint16)
    assert greys(data, window=(1000, 3000)) == [0, 0, 128, 255, 255]
    assert greys(data, percentiles=(25, 75)) == [0, 0, 128, 255, 255]
    assert greys(tiff([-1, 0, 1], np.float32), window=(0, 2)) == [0, 0, 128]


def test_images_of_8_bits_are_as_they_are() -> None:
    assert greys(tiff([0, 10, 20], np.uint8), window=(0, 4095)) == [0, 10, 20]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"window": (2, 1)}, "data.intensity.window: 2,1"),
        ({"percentiles": (1, 101)}, "0 to 100"),
        ({"window": (0, 1), "percentiles": (1, 99)}, "expected one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        IntensitySettings(**given)


WINDOW = IntensitySettings(window=(0, 1000))


def bundle(folder: Path, intensity: IntensitySettings) -> str:
    model = RunSettings.model_validate({"model": {"backbone": "resnet18", "image_size": 32, "prototypes": 2}}).model
    network = build_network(model, 2, start_weights=False)
    network.backbone.preprocessing = Preprocessing(size=32, intensity=intensity)
    save_bundle(str(folder), network, model, ["a", "b"], {})
    return str(folder)


def test_a_bundle_knows_how_it_was_trained_and_all_that_use_it_see_the_same(tmp_path: Path) -> None:
    data = tiff([500] * 64, np.uint16)
    plain, windowed = bundle(tmp_path / "plain", IntensitySettings()), bundle(tmp_path / "windowed", WINDOW)
    assert load_bundle(windowed).info.preprocessing.intensity == WINDOW
    predictor = Predictor.load([windowed])
    assert predictor.intensity == WINDOW
    with pytest.raises(UserError, match=r"same data\.intensity"):
        Predictor.load([plain, windowed])
    scored = look(data, {}, [32], 10**6, predictor.intensity)
    assert isinstance(scored, Picture)
    served = decode_upload(Upload(None, data), [32], AppSettings(), predictor.intensity)
    assert set(np.unique(scored.pixels[32])) == set(np.unique(served.pixels[32])) == {128}
    assert open_photo(data, 0, 10**6, predictor.intensity).image.getpixel((0, 0)) == (128, 128, 128)
    small = np.asarray(Image.open(io.BytesIO(thumbnail(data, intensity=predictor.intensity))))
    assert abs(small.astype(int) - 128).max() <= 1
    as_asked = protopnet.load(windowed).predict(data)
    assert (
        as_asked.logits_K.tolist() == protopnet.load(windowed).predict(Image.new("L", (64, 1), 128)).logits_K.tolist()
    )
    assert as_asked.logits_K.tolist() != protopnet.load(plain).predict(data).logits_K.tolist()


def test_training_sees_it_so_with_and_without_augmentation(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.tif").write_bytes(tiff([500] * 64, np.uint16))
    data = {"source": "folder", "path": str(tmp_path), "intensity": {"window": [0, 1000]}, "validation": 0, "test": 0}
    settings = RunSettings.model_validate({"data": data, "model": {"image_size": 32}, "augment": {"recipe": "none"}})
    dataset = scan_folder(str(tmp_path), settings.data, 0)
    ((pixels_BHWC, _),) = TrainLoader(dataset.table, settings, 1).epoch(0)
    assert set(pixels_BHWC.unique().tolist()) == {128}
    row, encoded = dataset.table.to_pylist()[0], tiff([500] * 64, np.uint16)
    for recipe, copy in ((None, -1), (settings.augment, 0)):
        options = PassOptions(PassPlan(1, 1, 1.0, 1), augment=recipe)
        pixels_HWC = image_pass._pixels(
            encoded, row | {"copy": copy}, Preprocessing(size=32, intensity=WINDOW), options
        )
        assert set(np.unique(pixels_HWC)) == {128}
    assert set(np.unique(worker._pixels(encoded, row, settings))) == {128}
    run = Run(RunSettings.model_validate({"name": "mine", "storage": str(tmp_path), "data": data}), LineReporter())
    dataset.save(run.dataset_uri)
    assert run.network().preprocessing.intensity == WINDOW


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_display_p3_becomes_srgb(kind: str) -> None:
    image = Image.new("RGB", (8, 8), (234, 51, 35))  # the red of sRGB
    image.paste((128, 128, 128), (4, 0, 8, 8))
    sink = io.BytesIO()
    image.save(sink, kind, icc_profile=display_p3(), **({"lossless": True} if kind == "WEBP" else {}))
    seen = decode(sink.getvalue())
    assert np.abs(np.array(seen.getpixel((0, 0))) - (255, 0, 0)).max() <= 3
    assert np.abs(np.array(seen.getpixel((7, 0))) - 128).max() <= 1
    assert "icc_profile" not in seen.info
    assert np.array_equal(np.asarray(open_photo(image_with_profile(sink), 0, 10**6, IntensitySettings()).image), seen)


def image_with_profile(sink: io.BytesIO) -> Image.Image:
    return Image.open(io.BytesIO(sink.getvalue()))


def test_srgb_and_broken_profiles_change_nothing() -> None:
    from PIL import ImageCms

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile at all"):
        sink = io.BytesIO()
        image.save(sink, "PNG", icc_profile=profile)
        assert np.array_equal(np.asarray(decode(sink.getvalue())), np.asarray(image))
