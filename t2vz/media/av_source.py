"""How sources are opened and read with PyAV: safely, and past damaged packets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from t2vz.errors import SourceCorrupt, SourceEmpty

# PyAV raises more than FFmpegError on damaged files (its decoding errors are ValueErrors, too).
AV_ERRORS = (av.FFmpegError, IndexError, MemoryError, UnicodeDecodeError, ValueError)

# Demuxers that take in no other file or address: a playlist named .mp4 must not make a worker read those.
_FORMATS = (
    "aac,aiff,amr,apng,asf,avi,dv,flac,flv,gif,h264,hevc,ivf,m4v,matroska,webm,mjpeg,mov,mp4,mp3,mpeg,mpegts,"
    "mpegvideo,mxf,nut,ogg,wav,yuv4mpegpipe"
)

_SOME_FRAMES = 6  # bytes a pixel: of four frames of 4:2:0
_MOST_BYTES = 2**29


def open_source(path: str | Path) -> Any:
    """The source as a PyAV input container. Errors: SourceCorrupt; the operating system's own pass."""
    try:
        return av.open(f"file:{path}", options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
    except AV_ERRORS as error:
        if isinstance(error, OSError) and not isinstance(error, av.error.InvalidDataError):
            raise
        raise SourceCorrupt(f"{path}: not a video in a known container, or damaged or cut off") from error


def video_stream(container: Any, path: str | Path) -> Any:
    """The best video stream, cover pictures of music apart. Errors: SourceEmpty, SourceCorrupt."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise SourceEmpty(f"{path}: no video stream in it{', only audio' if container.streams.audio else ''}")
    if stream.codec_context is None:
        raise SourceCorrupt(f"{path}: its video codec is unknown")
    return stream


def origin_s(container: Any) -> float:
    """Where the source's time begins: MPEG-TS starts anywhere, other containers at 0."""
    return max(container.start_time or 0, 0) / av.time_base


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """The stream's frames as they arrive. Damaged packets are passed over; a damaged container ends it.

    Errors: MemoryError.
    """
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except AV_ERRORS:
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except AV_ERRORS as error:
            if isinstance(error, MemoryError):
                raise
            if stream.type == "video":
                _check_memory(stream.codec_context)
            continue
        yield from frames


def _check_memory(context: Any) -> None:
    """Raise MemoryError if there is no room for some frames: decoders say that the data are invalid then, and frames
    would be missing without a fault of the file's."""
    bytearray(min(_SOME_FRAMES * context.width * context.height, _MOST_BYTES))
