"""HEIC of phones and DICOM of scanners: read with their extras, and without them a line says which is missing."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protopnet.config import DataSettings, IntensitySettings
from protopnet.datasets import files
from protopnet.datasets.folders import scan_folder
from protopnet.errors import UserError
from protopnet.imaging import BadImage, decode, measure, verify
from protopnet.scoring.inputs import open_input


def heic(**options: Any) -> bytes:
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (96, 64), (20, 40, 210))
    image.paste((220, 30, 20), (0, 0, 48, 64))
    sink = io.BytesIO()
    heif.from_pillow(image).save(sink, quality=95, **options)
    return sink.getvalue()


def dicom(values: Any, dtype: Any = np.uint16, **given: Any) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    pixels = np.array(values, dtype)
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    bits = pixels.dtype.itemsize * 8
    dataset.update(
        {
            "SOPClassUID": meta.MediaStorageSOPClassUID,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "SamplesPerPixel": 3 if pixels.ndim == 3 else 1,
            "PhotometricInterpretation": "RGB" if pixels.ndim == 3 else "MONOCHROME2",
            "BitsAllocated": bits,
            "BitsStored": bits,
            "HighBit": bits - 1,
            "PixelRepresentation": int(pixels.dtype.kind == "i"),
        }
    )
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    for name, value in given.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    sink = io.BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def greys(data: bytes, **given: Any) -> list[int]:
    seen = decode(data, intensity=IntensitySettings(**given))
    assert seen.mode == "RGB"
    return np.asarray(seen)[0, :, 0].tolist()  # type: ignore[no-any-return]


def test_heic_is_read() -> None:
    data = heic()
    assert measure(data) == verify(data) == (96, 64)
    seen = decode(data)
    assert np.abs(np.array(seen.getpixel((10, 30))) - (220, 30, 20)).max() <= 6
    assert np.abs(np.array(seen.getpixel((80, 30))) - (20, 40, 210)).max() <= 6
    with pytest.raises(BadImage, match="more than data.max_pixels"):
        decode(data, max_pixels=96 * 64 - 1)
    with pytest.raises(BadImage, match="damaged or cut off"):
        decode(data[: len(data) // 2])


def test_dicom_in_its_own_bits_and_units() -> None:
    assert greys(dicom([[0, 2048, 4095]], BitsStored=12, HighBit=11)) == [0, 128, 255]
    assert greys(dicom([[0, 2048, 4095]], BitsStored=12, HighBit=11, PhotometricInterpretation="MONOCHROME1")) == [
        255,
        127,
        0,
    ]
    assert greys(dicom([[-1000, 0, 3000]], np.int16)) == [0, 64, 255]
    scanner = {"RescaleSlope": 2, "RescaleIntercept": -1024}  # to Hounsfield units: -1024, 0, 1024
    assert greys(dicom([[0, 512, 1024]], **scanner), window=(0, 1024)) == [0, 0, 255]
    assert greys(dicom([[0, 512, 1024]], **scanner), window=(-1024, 1024)) == [0, 128, 255]


def test_a_dicoms_window_counts_where_no_other_is_asked_for() -> None:
    windowed = dicom([[0, 100, 150, 200, 4095]], WindowCenter=[150.5, 7], WindowWidth=[101, 7])
    assert greys(windowed) == [0, 0, 128, 255, 255]  # black at 100, white at 200
    assert greys(windowed, window=(0, 200)) == [0, 128, 191, 255, 255]
    exact = dicom([[0, 100, 150, 200, 4095]], WindowCenter=150, WindowWidth=100, VOILUTFunction="LINEAR_EXACT")
    assert greys(exact) == [0, 0, 128, 255, 255]


def test_dicom_in_colour_and_its_first_frame() -> None:
    colours = np.array([[[220, 30, 20], [20, 40, 210]]], np.uint8)
    assert np.array_equal(np.asarray(decode(dicom(colours, np.uint8))), colours)
    frames = dicom([[0, 255], [255, 0]], np.uint8, Rows=1, NumberOfFrames=2)
    assert greys(frames) == [0, 255]
    assert measure(frames) == (2, 1)


def test_a_broken_dicom_and_one_that_is_too_large_are_refused() -> None:
    data = dicom(np.zeros((40, 40)))
    with pytest.raises(BadImage, match="40 x 40 pixels are more than data.max_pixels"):
        decode(data, max_pixels=1599)
    for cut in (133, 300, len(data) - 100):
        with pytest.raises(BadImage):
            verify(data[:cut])
    with pytest.raises(BadImage, match="PALETTE COLOR"):
        decode(dicom([[1]], np.uint8, PhotometricInterpretation="PALETTE COLOR"))


@pytest.mark.parametrize(
    ("module", "data", "says"),
    [
        ("pillow_heif", b"\0\0\0\x18ftypheic" + bytes(50), r"HEIC.*pip install 'protopnet\[heic\]'"),
        ("pydicom", bytes(128) + b"DICM" + bytes(50), r"DICOM.*pip install 'protopnet\[dicom\]'"),
    ],
)
def test_without_the_extra_a_line_says_which(
    monkeypatch: pytest.MonkeyPatch, module: str, data: bytes, says: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for work in (decode, measure):
        with pytest.raises(BadImage, match=says) as caught:
            work(data)
        assert caught.value.kind == "unknown"


def test_a_folder_of_dicom_is_one_of_images_where_they_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ill", "well"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.dcm").write_bytes(dicom([[number, 4095]]))
    settings = DataSettings(source="folder", path=str(tmp_path), validation=0, test=0)
    dataset = scan_folder(str(tmp_path), settings, 0)
    assert dataset.classes == ["ill", "well"]
    assert (len(dataset.table), len(dataset.errors)) == (4, 0)
    assert sum(len(table) for table in open_input(str(tmp_path)).tables()) == 4
    monkeypatch.setattr(files, "SUFFIXES", files.SUFFIXES - {".dcm"})
    with pytest.raises(UserError, match=r"\(\.dcm 4\).*pip install 'protopnet\[dicom\]'"):
        scan_folder(str(tmp_path), settings, 0)
