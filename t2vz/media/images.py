"""Still images, animated ones and folders of them, through Pillow. The rest is PyAV's and decord's."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from t2vz.errors import SourceCorrupt, SourceEmpty, SourceTooLarge

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset((".apng", ".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
# By content: of others that Pillow reads, some start programs (EPS) or are read by code that hardly anyone tests.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
_FRAME_S = 0.1  # of an animation that gives no duration, as browsers and FFmpeg have it
_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order: `img2` before `img10`. Hidden and other files are left out.

    Errors: SourceEmpty if there is none.
    """
    files = [
        Path(entry.path)
        for entry in os.scandir(folder)
        if os.path.splitext(entry.name)[1].lower() in SUFFIXES
        and not entry.name.startswith(".")
        and os.path.isfile(entry.path)  # False, not an error as entry.is_file() is, for a link that leads in circles
    ]
    if not files:
        raise SourceEmpty(f"{folder}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
    return sorted(files, key=lambda file: _natural(file.name))


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    parts = re.split(r"(\d+)", name.lower())
    # Text and digits alternate, text first; the name itself orders img1 and img01.
    numbers = [*map(int, parts[1::2]), -1]
    return list(zip(parts[0::2], numbers, strict=True)), name


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as displayed (EXIF orientation applied), from the header only."""
    with _opened(path) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED
        return (image.height, image.width) if turned else image.size


def read_image(path: Path) -> NDArray[np.uint8]:
    """The image as uint8 (H, W, 3), RGB; alpha is dropped, EXIF orientation applied, 16 bits made 8."""
    with _opened(path) as image:
        return _rgb(image)


def animation_durations_s(path: Path) -> list[float]:
    """How long each frame of an image file is shown, in seconds; one value for a still image."""
    durations = []
    with _opened(path) as image:
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()  # WebP gives the duration only then
            durations.append(image.info.get("duration", 0) / 1000 or _FRAME_S)
    return durations


def read_animation(path: Path, wanted: Iterable[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(index, uint8 (H, W, 3) RGB) of the wanted frames, which must ascend."""
    with _opened(path) as image:
        for i in wanted:
            image.seek(i)
            yield i, _rgb(image)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert("RGB") would clip it
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with path.open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise SourceTooLarge(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise SourceCorrupt(f"{path}: not an image of a known format, or damaged") from error
    except (ValueError, SyntaxError, EOFError, IndexError, RuntimeError, struct.error, zlib.error) as error:
        raise SourceCorrupt(f"{path}: the image is damaged ({error})") from error
    except OSError as error:
        if error.errno is not None:  # the operating system's, not Pillow's own
            raise
        raise SourceCorrupt(f"{path}: the image is damaged ({error})") from error
