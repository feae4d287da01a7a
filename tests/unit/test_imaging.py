"""Every kind of file a folder may hold decodes to the right pixels, or is refused with a reason."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, TiffImagePlugin
from profiles import display_p3

from protopnet.imaging import BYTES_A_PIXEL, BadImage, Preprocessing, decode, load, measure, normalise, resize, verify

WIDTH, HEIGHT = 48, 32


def picture() -> Image.Image:
    """Left half red, right half blue, the top eighth green: every turn and flip is told apart."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2] = (220, 30, 20)
    pixels[:, WIDTH // 2 :] = (20, 40, 210)
    pixels[: HEIGHT // 8] = (10, 200, 30)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def error_of(image: Image.Image, expected: Image.Image) -> float:
    assert image.mode == "RGB"
    assert image.size == expected.size
    return float(np.abs(np.asarray(image, np.int16) - np.asarray(expected.convert("RGB"), np.int16)).mean())


def reason_of(data: bytes, **options: Any) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    assert "\n" not in caught.value.reason
    assert len(caught.value.reason) < 160
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_kinds_come_back_exactly(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert error_of(decode(encoded(picture(), kind, **options)), picture()) == 0


def test_jpeg_comes_back_nearly() -> None:
    assert error_of(decode(encoded(picture(), "JPEG", quality=95, subsampling=0)), picture()) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_exif_orientation_is_applied_to_pixels_and_size(kind: str, orientation: int) -> None:
    upright = picture()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    assert error_of(decode(data), upright) < 6
    assert measure(data) == verify(data) == upright.size


def test_orientation_behind_the_pixels_of_a_png_is_found() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    plain = encoded(picture(), "PNG")
    end = plain.index(b"IEND") - 4
    data = plain[:end] + chunk + plain[end:]
    assert measure(data) == decode(data).size == (HEIGHT, WIDTH)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_passed_over() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert decode(data).size == (WIDTH, HEIGHT)


def test_grey_and_black_and_white() -> None:
    grey = picture().convert("L")
    assert error_of(decode(encoded(grey, "PNG")), grey) == 0
    assert error_of(decode(encoded(grey, "JPEG", quality=95)), grey) < 2
    assert error_of(decode(encoded(grey.convert("1"), "PNG")), grey.convert("1")) == 0


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0] :]


def test_cmyk_has_its_colours_inverted_where_jpeg_stores_them_so() -> None:
    cmyk = picture().convert("CMYK")
    jpeg = encoded(cmyk, "JPEG", quality=95)
    assert b"Adobe" in jpeg
    assert error_of(decode(jpeg), picture()) < 3
    assert error_of(decode(without_adobe_marker(jpeg)), picture()) < 3
    assert error_of(decode(encoded(cmyk, "TIFF")), picture()) == 0


def test_palette_with_and_without_see_through_entries() -> None:
    palette = picture().quantize(8)
    assert error_of(decode(encoded(palette, "PNG")), palette) == 0
    top = palette.getpixel((0, 0))
    seen = decode(encoded(palette, "PNG", transparency=top))
    assert seen.getpixel((0, 0)) == (255, 255, 255)
    assert seen.getpixel((0, HEIGHT - 1)) == palette.convert("RGB").getpixel((0, HEIGHT - 1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(kind: str) -> None:
    image = picture().convert("RGBA")
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    seen = decode(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert seen.getpixel((5, 20)) == (255, 255, 255)
    half = np.asarray(seen)[20, 15]
    assert np.allclose(half, [(220 + 255) / 2, (30 + 255) / 2, (20 + 255) / 2], atol=2)
    assert seen.getpixel((30, 20)) == (20, 40, 210)


def test_grey_with_alpha_and_colour_key_lie_on_white() -> None:
    grey = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)])
    assert decode(encoded(grey, "PNG")).getpixel((1, 1)) == (255, 255, 255)
    keyed = encoded(picture(), "PNG", transparency=(220, 30, 20))
    assert decode(keyed).getpixel((2, 20)) == (255, 255, 255)
    assert decode(keyed).getpixel((40, 20)) == (20, 40, 210)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_cut_off(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (4, 1)))
    seen = np.asarray(decode(encoded(image, kind)))
    assert np.array_equal(seen[0, :, 0], np.arange(256))
    assert np.array_equal(seen[..., 0], seen[..., 2])


def test_16_bit_grey_of_other_kinds() -> None:
    big_endian = b"P5 4 1 65535\n" + struct.pack(">4H", 0, 200, 32896, 65535)
    assert [decode(big_endian).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]  # type: ignore[index]
    inverted = TiffImagePlugin.ImageFileDirectory_v2()
    inverted[262] = 0
    data = encoded(Image.fromarray(np.array([[0, 65535]], np.uint16)), "TIFF", tiffinfo=inverted)
    assert [decode(data).getpixel((x, 0))[0] for x in range(2)] == [255, 0]  # type: ignore[index]


def test_16_bit_colour_keeps_its_high_bits() -> None:
    row = b"\0" + b"".join(struct.pack(">3H", 65535, 0x8000, v * 257) for v in range(256))
    header = struct.pack(">IIBBBBB", 256, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    seen = np.asarray(decode(data))
    assert np.array_equal(seen[0, :, 2], np.arange(256))
    assert tuple(seen[0, 0, :2]) == (255, 128)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [picture(), Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert error_of(decode(data), picture()) < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_refused(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    cut = data[: int(len(data) * share)]
    assert reason_of(cut).startswith(("damaged or cut off", "not an image"))
    with pytest.raises(BadImage):
        verify(cut)


@pytest.mark.parametrize("length", [3, 10, 100])
def test_a_file_cut_off_in_its_header_is_called_damaged(length: int) -> None:
    assert reason_of(encoded(picture(), "JPEG")[:length]).startswith("damaged or cut off")


def test_what_never_was_an_image_is_refused() -> None:
    assert reason_of(b"") == "the file is empty"
    assert reason_of(b"\0" * 4096).startswith("not an image")
    assert reason_of(b"<html>404 not found</html>").startswith("not an image")
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").startswith("not an image")


def test_random_damage_decodes_or_is_refused_but_never_escapes() -> None:
    rng = np.random.default_rng(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"):
            whole = np.frombuffer(encoded(picture(), kind), np.uint8)
            for _ in range(60):
                data = whole.copy()
                data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
                try:
                    image = decode(data.tobytes(), max_pixels=1_000_000)
                except BadImage:
                    continue
                assert image.mode == "RGB"


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size; its pixels aren't there, so only the header can be judged."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", body), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (40_000, 40_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("decoded before the size was judged")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    for judge in (decode, measure, verify):
        with pytest.raises(BadImage, match=r"max_pixels"):
            judge(bomb(width, height))


def test_the_limit_of_pixels_is_exact() -> None:
    data = encoded(picture(), "PNG")
    assert decode(data, max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)
    assert "48 x 32 pixels" in reason_of(data, max_pixels=WIDTH * HEIGHT - 1)


def test_no_other_limit_of_pixels_holds_than_the_one_asked_for(recwarn: pytest.WarningsRecorder) -> None:
    """PIL has one of its own, of 179 megapixels, and warns from the half of it on."""
    for side in (9_500, 14_000, 30_000):
        assert measure(bomb(side, side), max_pixels=side * side) == (side, side)
        assert "more than" in reason_of(bomb(side, side), max_pixels=side * side - 1)
    assert not recwarn.list


@pytest.mark.parametrize("at_least", [1, 20, 60, 75, 149, 150, 151, 400])
def test_a_fast_decode_keeps_twice_the_pixels_asked_for(at_least: int) -> None:
    big = picture().resize((1201, 301), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    fast = decode(encoded(big, "JPEG", exif=exif), at_least=at_least)
    assert min(fast.size) >= min(2 * at_least, 301)
    assert fast.width < fast.height
    if at_least == 20:
        assert fast.size == (76, 301)  # an eighth would have 38


def test_load_is_decode_then_resize() -> None:
    data = encoded(picture(), "PNG")
    pixels = load(data, 16)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, resize(decode(data), 16))
    assert pixels.flags.writeable


def test_normalise_gives_channels_last_float_with_imagenet_statistics() -> None:
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    before = pixels.clone()
    x = normalise(pixels, Preprocessing(size=4))
    assert x.shape == (2, 3, 5, 7)
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((before.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert torch.allclose(x.double(), expected, atol=1e-5)
    assert torch.equal(pixels, before)


def test_threads_agree_with_one_another() -> None:
    files = [encoded(picture(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")] * 20
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda data: load(data, 24), files))
    assert all(np.array_equal(images[i], images[i % 5]) for i in range(len(images)))


# Decodes what it is given on its standard input; prints by how many bytes that made the process larger, at its largest.
_PEAK = """
import sys
from protopnet import imaging

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

data = sys.stdin.buffer.read()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
imaging.load(data, 224)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured by /proc")
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0, "exif": 6}),
        ("CMYK", "JPEG", {}),
        ("RGBA", "PNG", {"exif": 6}),
        ("LA", "PNG", {}),
        ("I;16", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "JPEG2000", {}),
        ("RGB", "AVIF", {"speed": 10}),
        ("P", "GIF", {}),
        ("I;16", "TIFF", {}),
        ("F", "TIFF", {}),
        ("I", "TIFF", {}),
        ("RGB", "JPEG", {"icc_profile": display_p3()}),
    ],
)
def test_decoding_takes_no_more_memory_a_pixel_than_is_counted_on(
    mode: str, kind: str, options: dict[str, Any]
) -> None:
    width, height = 1600, 1500
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = options | {"exif": exif}
    data = encoded(Image.new(mode, (width, height)), kind, **options)
    done = subprocess.run([sys.executable, "-c", _PEAK], input=data, capture_output=True, check=True)
    assert int(done.stdout) < BYTES_A_PIXEL * width * height, int(done.stdout) / (width * height)
