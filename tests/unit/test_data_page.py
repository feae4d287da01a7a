"""The page of what a dataset is."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from protopnet.commands.prepare import prepare


def png(seed: int, width: int = 64, height: int = 48) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def flat() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 90, 90)).save(sink, "PNG")
    return sink.getvalue()


def lay(folder: Path, images: dict[str, bytes]) -> None:
    for path, data in images.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def page(tmp_path: Path, images: dict[str, bytes]) -> str:
    lay(tmp_path / "in", images)
    report = tmp_path / "data.html"
    prepare(
        {
            "data": {"source": "folder", "path": str(tmp_path / "in"), "validation": 0, "test": 0, "max_bad": 1},
            "output": str(tmp_path / "out"),
            "report": str(report),
        }
    )
    return report.read_text()


def test_what_is_usually_a_mistake_is_on_the_page(tmp_path: Path) -> None:
    images = {f"train/<crow>/{n}.png": png(n) for n in range(11)}
    images |= {f"train/wren/{n}.png": png(100 + n) for n in range(3)}
    images |= {
        "test/<crow>/copy.png": png(0),
        "train/wren/crow.png": png(1),
        "train/wren/again.png": png(100),
        "train/wren/tiny.png": png(500, 20, 20),
        "train/wren/0-grey.png": flat(),
        "train/wren/long.png": png(501, 400, 40),
        "train/wren/broken.png": b"no picture",
    }
    text = page(tmp_path, images)
    assert "&lt;crow&gt;" in text
    assert "<crow>" not in text
    assert "1 image in more than one class" in text
    assert "2 images more than once in the same split" in text
    assert "1 image with a side below 32 pixels" in text
    assert "1 image more than 4 times as long as wide" in text
    assert "1 sample picture without contrast" in text
    assert "classes (1 of 2) with fewer than 10 training images: wren 8" in text
    assert "without test images: wren" in text
    assert "Held out and in training" in text
    assert "copy.png" in text
    assert "not an image of a known kind" in text
    assert text.count("<img ") == 8
    assert "http" not in text  # it needs nothing else


def test_data_without_mistakes_say_so(tmp_path: Path) -> None:
    text = page(tmp_path, {f"{name}/{n}.png": png(n + 50 * (name == "b")) for name in "ab" for n in range(10)})
    assert "Nothing was found" in text
    assert "Not used" not in text
