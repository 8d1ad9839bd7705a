"""Pictures: formats, orientation, transparency, and limits that hold before decoding."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from contextlora.data import images
from contextlora.data.images import check_image, image_hash, open_image
from contextlora.errors import DataError


def picture(seed: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def code_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.jpg"])
def test_the_four_formats(tmp_path: Path, name: str) -> None:
    original = picture()
    original.save(tmp_path / name, quality=95, lossless=True)
    opened = open_image(tmp_path / name)
    assert (opened.mode, opened.size) == ("RGB", (24, 16))
    assert check_image(tmp_path / name) == (24, 16)
    with Image.open(tmp_path / name) as plain:
        expected = plain.convert("RGB") if name == "a.jpg" else original  # JPEG loses: what Pillow sees is all there is
        assert np.array_equal(opened, expected)


def test_the_name_does_not_decide_the_format(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(open_image(tmp_path / "a.jpg"), picture())
    picture().save(tmp_path / "b.jpg", "GIF")
    picture().save(tmp_path / "c.jpg", "TIFF")
    (tmp_path / "d.jpg").write_text("<svg/>")
    (tmp_path / "e.jpg").write_bytes(b"")
    assert [code_of(tmp_path / f"{n}.jpg") for n in "bcde"] == ["E211"] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")  # Pillow's own as the oracle
    assert np.array_equal(open_image(tmp_path / "a.png"), expected)


def test_broken_exif_spoils_no_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(tmp_path / "a.jpg").size == (24, 16)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True, exact=True)
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (2, 2))
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    palette.save(tmp_path / "opaque.png")
    seen = {p.name: open_image(p).getpixel((0, 0)) for p in tmp_path.iterdir()}
    assert seen["clear.png"] == seen["grey.png"] == seen["palette.png"] == (255, 255, 255)
    assert seen["half.webp"] == (127, 127, 127)
    assert seen["opaque.png"] == (10, 20, 30)


def test_16_bit_grey_1_bit_and_cmyk(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert open_image(tmp_path / "bit.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "print.jpg").getpixel((4, 4))
    assert red > 240
    assert green < 20
    assert blue < 20


def test_damaged_and_truncated_files(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        picture(size=(64, 64)).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        assert code_of(tmp_path / name) in ("E211", "E213")


def test_no_file_no_pipe_no_endless_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert code_of(tmp_path / "pipe.png") == "E206"  # and does not wait for a writer
    assert code_of(tmp_path / "absent.png") == "E206"
    assert code_of(tmp_path) == "E206"
    assert code_of(tmp_path / ("x" * 5000)) == "E206"
    with pytest.raises(DataError, match="E206"):
        image_hash(tmp_path / "pipe.png")


def test_the_largest_allowed_picture_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/attacks shows that the true limits hold before decoding."""
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    monkeypatch.setattr(images, "MAX_SIDE", 30)
    for size, code in [((30, 20), ""), ((20, 30), ""), ((25, 25), "E212"), ((31, 2), "E212"), ((2, 31), "E212")]:
        picture(size=size).save(tmp_path / "a.png")
        assert code_of(tmp_path / "a.png") == code if code else open_image(tmp_path / "a.png").size == size


def test_a_file_of_more_than_64_mib(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate((64 << 20) + 1)
    assert code_of(tmp_path / "a.png") == "E212"


def test_image_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    assert image_hash(tmp_path / "a.png") == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
