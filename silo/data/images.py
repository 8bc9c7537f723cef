"""Turns any image file that a hospital may hold into upright 8-bit RGB, by fixed rules.

* Greyscale of 16 bits: the full range 0..65535 goes linearly to 0..255, whatever the image holds. Stretching each image
  by its own contents would make the same tissue look different from scan to scan. TIFF files that say so use 12 bits,
  and those with zero for white are inverted.
* Transparency: over white, as paper, slides and dermatoscopes have it.
* CMYK: as Pillow converts it, with Adobe's inverted JPEG files understood.
* EXIF orientation is applied; of several frames or pages the first counts.
* Unreadable: truncated or damaged files, more than `MAX_PIXELS` pixels, floating-point pixels and 32-bit values beyond
  16 bits: these have no range that one could agree on. Also a long side of more than `MAX_RATIO` times the short one:
  the short side is scaled to the model's input before the crop, so that a line of 60000 x 1 pixels would take
  gigabytes. At this ratio an input of 378 pixels takes 21 MiB.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own bound: a quarter of a GiB as RGB
MAX_RATIO = 50  # of the long to the short side
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

# What Pillow's decoders are known to raise on damaged files. Without `MemoryError`: that is not the file's fault.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(Exception):
    """A file is no image that this module reads; the message says why and never which file."""


def read_image(source: Path | BinaryIO) -> Image.Image:
    """The image in mode RGB, see the rules above. Raises `UnreadableImage`."""
    try:
        with Image.open(source) as image:
            _check_size(image)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except _DECODE_ERRORS as error:
        raise UnreadableImage(_why(error)) from error


def check_header(path: Path) -> None:
    """Raise `UnreadableImage` if the file is missing, of no known type, too large or too narrow; decodes no pixels."""
    try:
        with Image.open(path) as image:
            _check_size(image)
    except _DECODE_ERRORS as error:
        raise UnreadableImage(_why(error)) from error


def _check_size(image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise UnreadableImage(f"{pixels} pixels; allowed are {MAX_PIXELS}")
    short, long = sorted(image.size)
    if long > MAX_RATIO * short:
        raise UnreadableImage(
            f"{image.width} x {image.height} pixels; one side is more than {MAX_RATIO} times the other"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image), *_tiff_range(image))
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("32-bit or signed values beyond 0..65535; convert the file to 16 bits")
        return _from_16_bits(values, 65535, False)
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels; convert the file to 16 bits")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        return Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def _tiff_range(image: Image.Image) -> tuple[int, bool]:
    """The largest value, and whether it means black. Pillow leaves both to its caller for 16-bit TIFF."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 65535, False
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))
    return 4095 if tuple(bits) == (12,) else 65535, image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _from_16_bits(values: npt.NDArray[np.generic], largest: int, inverted: bool) -> Image.Image:
    scaled = (values.astype(np.uint32) * 255 + largest // 2) // largest
    grey = np.minimum(scaled, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the file name, which str(error) would hold
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return f"damaged ({type(error).__name__})"
