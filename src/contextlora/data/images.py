"""Opening pictures from strangers: every limit is checked from the header, before a pixel is decoded."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from contextlora.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_BYTES = 64 << 20
MAX_SIDE = 20_000
MAX_PIXELS = 50_000_000
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_image(path: str | Path) -> tuple[int, int]:
    """Reads the header only and returns (width, height) in pixels, as stored.

    Raises DataError: E206 no such file, E211 not a picture we open, E212 larger than the limits.
    """
    with _open(Path(path)) as image:
        return image.size


def open_image(path: str | Path) -> Image.Image:
    """Opens a JPEG, PNG, WebP or BMP as an upright 8-bit RGB image; an animation's first frame.

    Transparent pixels are laid on white, 16-bit grey is reduced to 8, palettes and CMYK are converted.

    Raises DataError: as `check_image`, and E213 for a damaged or truncated file.
    """
    path = Path(path)
    with _open(path) as image:
        try:
            image.load()
            return _upright(_rgb(image), image)
        except Exception as e:  # a decoder fed with hostile bytes raises nearly anything, SyntaxError included
            raise DataError("E213", f"is damaged or truncated ({_reason(e)})", where=path) from None


def image_hash(path: str | Path) -> str:
    """sha256 hex of a file's bytes. Raises DataError E206."""
    _size(Path(path))
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise DataError("E206", f"cannot be read: {e.strerror}", where=path) from None


def _size(path: Path) -> int:
    """The size in bytes of a regular file: a pipe or a device would block or never end."""
    try:
        info = path.stat()
    except (OSError, ValueError):
        raise DataError("E206", "no such image", where=path) from None
    if not stat.S_ISREG(info.st_mode):
        raise DataError("E206", "is not a file", where=path)
    return info.st_size


def _open(path: Path) -> Image.Image:
    if (size := _size(path)) > MAX_BYTES:
        raise DataError("E212", f"{size >> 20} MiB; at most {MAX_BYTES >> 20} MiB", where=path)
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError("E212", f"more than {MAX_PIXELS // 10**6} million pixels; scale it down", where=path) from None
    except UnidentifiedImageError:
        raise DataError("E211", f"is not a picture in one of the formats {', '.join(FORMATS)}", where=path) from None
    except Exception as e:  # see open_image
        raise DataError("E213", f"has a damaged header ({_reason(e)})", where=path) from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE or min(width, height) < 1:
        image.close()
        limit = f"at most {MAX_PIXELS // 10**6} million pixels and {MAX_SIDE} a side"
        raise DataError("E212", f"{width} x {height} pixels; {limit}", where=path)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: PIL would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(source.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block spoils no pixels
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
