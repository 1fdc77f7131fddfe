"""Contact sheets: the strips of a run's rows in one picture, each with its prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2vz import storage
from t2vz.errors import OutputError
from t2vz.media.strip import FRAMES, thumbnail_size
from t2vz.results import ResultRow, read
from t2vz.storage import Place

STRIPS, THUMBNAILS = "strips", "thumbnails"  # folders beside `videos`
_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_MARGIN_PX = 6
_TEXT_PX = 13


def strip_key(output_uri: str) -> str:
    """Where the strip of a video lies in the output folder: `output_uri` as in the results table."""
    return f"{STRIPS}/{Path(output_uri).name}.webp"


def thumbnails_key(output_uri: str) -> str:
    """Where its thumbnails lie, which a gallery plays."""
    return f"{THUMBNAILS}/{Path(output_uri).name}.webp"


def write_sheet(
    out: Place,
    path: str | Path,
    *,
    mode: str | None = None,
    limit: int = 100,
    columns: int = 1,
    scale: float = 1.0,
) -> int:
    """Write a contact sheet of the output folder's finished rows, in the manifest's order; how many it shows.

    mode: only rows of it. columns: strips side by side. scale: of the strips, 1 for frames 128 px high.
    path: its suffix says the format (.png, .webp, .jpg). Raises OutputError, ResultsError.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path}: name a file that ends in .png, .webp or .jpg")
    if not scale > 0:  # nor NaN
        raise OutputError(f"scale must be a number above 0 (it is {scale})")
    rows = [row for row in read(out).where(status="ok", mode=mode) if row.output_uri]
    rows.sort(key=lambda row: (row.manifest or "", row.row_number or 0))
    tiles: list[Any] = []
    for row in rows:
        if len(tiles) == limit:
            break
        strip = strip_key(row.output_uri or "")
        data = storage.get(out, strip)
        if data is not None:  # rows of an older version have none
            try:
                with Image.open(io.BytesIO(data)) as opened:
                    picture = opened.convert("RGB")
            except OSError as error:
                where = storage.joined(out, strip)
                raise OutputError(f"{where}: can't be read ({error}); remove it to leave it out") from error
            tiles.append(_tile(row, picture, scale))
    if not tiles:
        raise OutputError(f"{out}: no finished row with a strip to show")
    try:
        _laid_out(tiles, min(columns, len(tiles))).save(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: can't be written ({getattr(error, 'strerror', None) or error})") from error
    return len(tiles)


def moving_thumbnail(out: Place, row: ResultRow, fps: float = 4.0) -> bytes | None:
    """The result in a finished row's strip as an animated WebP of at most 128 px in height, some 10 kB; None if there
    is no strip.
    """
    from PIL import Image

    strip = storage.get(out, strip_key(row.output_uri or ""))
    if row.width is None or row.height is None or row.frames is None or strip is None:
        return None
    width, height = thumbnail_size(row.width, row.height)
    with Image.open(io.BytesIO(strip)) as opened:
        picture = opened.convert("RGB")
    top = picture.height - height
    lefts = [i * width for i in range(min(row.frames, FRAMES)) if (i + 1) * width <= picture.width]
    if top < 0 or not lefts:
        return None
    first, *others = [picture.crop((left, top, left + width, picture.height)) for left in lefts]
    into = io.BytesIO()
    first.save(into, "webp", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=60)
    return into.getvalue()


def _tile(row: ResultRow, strip: Any, scale: float) -> Any:
    """The strip under what was asked for."""
    from PIL import Image, ImageDraw

    size = (max(1, round(strip.width * scale)), max(1, round(strip.height * scale)))
    tile = Image.new("RGB", (size[0], size[1] + _TEXT_PX + 6), "white")
    draw, font = ImageDraw.Draw(tile), _font()
    text = " ".join(f"{row.id} ({row.mode}) “{row.prompt}”".split())[: size[0]]  # a letter is a pixel wide at least
    while draw.textlength(text, font) > size[0] and len(text) > 1:
        text = f"{text[:-2]}…"
    draw.text((0, 1), text, "black", font)
    tile.paste(strip if scale == 1 else strip.resize(size, Image.Resampling.LANCZOS), (0, _TEXT_PX + 6))
    return tile


def _font() -> Any:
    """DejaVu, which matplotlib carries: it has far more scripts than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _TEXT_PX)


def _laid_out(tiles: Sequence[Any], columns: int) -> Any:
    from PIL import Image

    # Each tile into the column that is shortest so far, so that strips of one line leave no holes.
    width = max(tile.width for tile in tiles)
    heights, places = [_MARGIN_PX] * columns, []
    for tile in tiles:
        column = heights.index(min(heights))
        places.append((_MARGIN_PX + column * (width + _MARGIN_PX), heights[column]))
        heights[column] += tile.height + _MARGIN_PX
    sheet = Image.new("RGB", (_MARGIN_PX + columns * (width + _MARGIN_PX), max(heights)), "white")
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    return sheet
