"""join: the videos of a source's parts as one, without another generation of loss where that can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from t2vz.clip import AudioReference
from t2vz.errors import EncodeError, translating
from t2vz.files import remove, sync
from t2vz.media import sandbox
from t2vz.media.av_source import decoded, open_source, video_stream
from t2vz.media.decode import cover, decode
from t2vz.media.encode import METADATA_FILE, Encoded, Encoding, checksum, encode
from t2vz.media.images import image_size

_MUXERS = {"mkv": "matroska"}


def join(
    parts: Sequence[Path],
    path: Path,
    *,
    frames: Sequence[int],
    rate_fps: Fraction,
    encoding: Encoding,
    audio: AudioReference | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Encoded:
    """Write the frames of all parts, one after the other, to `path`: a new name in the workspace.

    parts: outputs of `encode` at one rate. frames: how many each of them has, which is checked.
    audio: the sound of all of it; the parts' own is left out, as it is cut where no sound should be.
    The packets are copied as they are if the parts were encoded alike; else all is encoded anew by `encoding`, and a
    warning says why. The file is on the disk when this returns; after an exception nothing is left.
    Errors: EncodeError (a part has other frames than it should; FFmpeg refuses), OutputError, SourceError.
    """
    try:
        with translating("encode", str(path)):
            if encoding.format == "png":
                return _join_folders(parts, path, frames, rate_fps, metadata or {})
            if encoding.format == "gif":
                return _encoded_anew(parts, path, frames, rate_fps, encoding, audio, metadata or {}, "it is a GIF")
            orders = [_order(part, count, rate_fps) for part, count in zip(parts, frames, strict=True)]
            reason = _difference(orders)
            if reason:
                return _encoded_anew(parts, path, frames, rate_fps, encoding, audio, metadata or {}, reason)
            return _copied(parts, path, orders, rate_fps, encoding, audio, metadata or {})
    except BaseException:
        remove(path)
        raise


@dataclass(frozen=True)
class _Order:
    """A part's packets. coded: what the decoder must know of them. numbers: of their frames, as they are stored."""

    coded: tuple[Any, ...]
    numbers: tuple[int, ...]


def _order(part: Path, frames: int, rate_fps: Fraction) -> _Order:
    """Raises EncodeError if frames are missing."""
    with open_source(part) as container:
        stream = video_stream(container, part)
        context = stream.codec_context
        coded = (context.name, context.width, context.height, context.pix_fmt, bytes(context.extradata or b""))
        numbers = tuple(_number(packet, rate_fps) for packet in container.demux(stream) if packet.size)
    if len(numbers) != frames:
        raise _incomplete(part, len(numbers), frames)
    return _Order(coded, numbers)


def _incomplete(part: Path, found: int, needed: int) -> EncodeError:
    return EncodeError(
        f"{part}: has {found} frames where {needed} are needed, so what follows would not be in step with the sound; "
        f"it, or its source, is damaged"
    )


def _difference(orders: Sequence[_Order]) -> str:
    """Why the parts' packets can't follow each other; empty if they can."""
    if any(sorted(order.numbers) != list(range(len(order.numbers))) for order in orders):
        return "a part's times are not those of its rate"
    if any(order.coded != orders[0].coded for order in orders):
        return "the parts were encoded differently"
    return ""


def _number(packet: Any, rate_fps: Fraction) -> int:
    return -1 if packet.pts is None else round(packet.pts * packet.time_base * rate_fps)


def _copied(
    parts: Sequence[Path],
    path: Path,
    orders: Sequence[_Order],
    rate_fps: Fraction,
    encoding: Encoding,
    audio: AudioReference | None,
    metadata: Mapping[str, Any],
) -> Encoded:
    warnings: list[str] = []
    # As `encode` writes them: no random ids, so that equal parts give equal bytes.
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if encoding.format == "mp4" else {})
    with ExitStack() as stack:
        track = None if audio is None else sandbox.soundtrack(audio, encoding.format, warnings, path.parent)
        if track is not None:
            stack.callback(track.close)
        muxer = _MUXERS.get(encoding.format, encoding.format)
        output = stack.enter_context(av.open(f"file:{path}", "w", format=muxer, container_options=options))
        output.metadata["comment"] = json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False)
        with open_source(parts[0]) as container:
            template = video_stream(container, parts[0])
            context = template.codec_context
            size = context.width, context.height
            stream = output.add_stream_from_template(template)
            if encoding.codec == "hevc":
                stream.codec_context.codec_tag = "hvc1"  # Apple's players refuse hev1
        if track is not None:
            track.add_to(output)
        offset = written = 0
        tick = 1 / rate_fps
        # Decoding times go up by one a packet over all parts. Those of the parts themselves would go back where a
        # part of few frames, which has none to reorder, is followed by one that has.
        delay = max(place - number for order in orders for place, number in enumerate(order.numbers))
        for part, order in zip(parts, orders, strict=True):
            with open_source(part) as container:
                for packet in container.demux(video_stream(container, part)):
                    if not packet.size:
                        continue
                    number = _number(packet, rate_fps)
                    packet.time_base = tick
                    packet.pts, packet.dts, packet.duration = offset + number, written - delay, 1
                    packet.stream = stream
                    output.mux(packet)
                    written += 1
                    if track is not None:
                        track.write_until(float(written * tick))
            offset += len(order.numbers)
    sync(path)
    return _described(
        path, size, offset, rate_fps, encoding.codec, track is not None and track.written, tuple(warnings)
    )


def _encoded_anew(
    parts: Sequence[Path],
    path: Path,
    frames: Sequence[int],
    rate_fps: Fraction,
    encoding: Encoding,
    audio: AudioReference | None,
    metadata: Mapping[str, Any],
    reason: str,
) -> Encoded:
    first = next(_pictures(parts[0], path.parent))
    height, width = first.shape[1:3]

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for part, count in zip(parts, frames, strict=True):
            seen = 0
            for batch in _pictures(part, path.parent):
                seen += len(batch)
                yield np.stack([cover(picture, width, height) for picture in batch])
            if seen != count:
                raise _incomplete(part, seen, count)

    made = encode(
        pictures(),
        path,
        width=width,
        height=height,
        rate_fps=rate_fps,
        encoding=encoding,
        audio=audio,
        metadata=metadata,
    )
    return replace(made, warnings=(*made.warnings, f"encoded once more: {reason}"))


def _pictures(part: Path, workspace: Path) -> Iterator[NDArray[np.uint8]]:
    """The frames of a part, each once whatever its time: batches of uint8 (f, h, w, 3), RGB."""
    if part.suffix == ".gif":  # counts in hundredths of a second: its rate is not ours
        with open_source(part) as container:
            for frame in decoded(container, video_stream(container, part)):
                yield frame.to_ndarray(format="rgb24")[None]
    else:
        yield decode(part, workspace=workspace).frames


def _join_folders(
    parts: Sequence[Path], path: Path, frames: Sequence[int], rate_fps: Fraction, metadata: Mapping[str, Any]
) -> Encoded:
    path.mkdir()
    (path / METADATA_FILE).write_text(json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
    number, size = 0, (0, 0)
    for part, count in zip(parts, frames, strict=True):
        images = sorted(part.glob("*.png"))
        if len(images) != count:
            raise _incomplete(part, len(images), count)
        for image in images:
            target = path / f"{number:06d}.png"
            shutil.copyfile(image, target)
            sync(target)
            number += 1
    size = image_size(path / "000000.png")
    return _described(path, size, number, rate_fps, "png", False, ())


def _described(
    path: Path,
    size: tuple[int, int],
    frames: int,
    rate_fps: Fraction,
    codec: str,
    audio_kept: bool,
    warnings: tuple[str, ...],
) -> Encoded:
    sha256, size_bytes = checksum(path)
    return Encoded(
        path=path,
        sha256=sha256,
        size_bytes=size_bytes,
        mtime_ns=path.stat().st_mtime_ns,
        width=size[0],
        height=size[1],
        frames=frames,
        rate_fps=rate_fps,
        codec=codec,
        audio_kept=audio_kept,
        warnings=warnings,
    )
