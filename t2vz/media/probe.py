"""probe: what a source is and which decoder reads it exactly. All packets are read, one frame is decoded."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from t2vz.errors import SourceCorrupt, SourceEmpty, SourceTooLarge
from t2vz.media import images
from t2vz.media.av_source import AV_ERRORS, decoded, open_source, origin_s, video_stream
from t2vz.media.limits import Limits
from t2vz.media.local import check_bytes, local_source, reading
from t2vz.media.picture import check_colours, is_untagged_hd, orientation

FOLDER_RATE_FPS = Fraction(25)
_MAX_RATE_FPS = 1000
# Formats without presentation times: what FFmpeg makes up for B-frames in them is off.
_TIMELESS = ("avi", "h264", "hevc", "m4v", "mpegvideo")


@dataclass(frozen=True)
class Probe:
    """A source as found. Times are in seconds from the start of the source's presentation.

    path: local path.
    kind: video; animation (GIF, WebP, a still image too); folder (of images).
    container, codec, pix_fmt: FFmpeg's names; Pillow's where `container` is "image" or "folder".
    width, height: in pixels as displayed, rotation and sample aspect applied.
    rotation: degrees counter-clockwise by which stored frames are turned for display: 0, 90, 180 or 270.
    mirrored: True if they are mirrored left to right before.
    interlaced: True if the first frame is two fields; decoding deinterlaces.
    hdr: PQ or HLG, which decoding maps to SDR; "" for SDR.
    rate_fps: average rate.
    frames: expected count.
    first_pts_s: when the first frame is shown; duration_s: from there to the end of the last frame.
    has_audio: True if there is an audio stream.
    decord_reason: "" where decord is exact, else why not.
    warnings: oddities that the user should know of.
    constant_rate: False if some frame is more than half a frame off a constant grid.
    pixel_aspect: width / height of a pixel after rotation.
    timestamps_s: float64 (frames,), ascending: when each frame is shown.
    tick_s: resolution of the timestamps.
    arrival_order: True if the timestamps do not say which frame is which: frames are numbered as they come.
    """

    path: str
    kind: Literal["video", "animation", "folder"]
    container: str
    codec: str
    pix_fmt: str
    width: int
    height: int
    rotation: int
    mirrored: bool
    interlaced: bool
    hdr: str
    rate_fps: Fraction
    frames: int
    first_pts_s: float
    duration_s: float
    has_audio: bool
    decord_reason: str
    warnings: tuple[str, ...]
    constant_rate: bool
    pixel_aspect: Fraction
    timestamps_s: NDArray[np.float64] = field(repr=False, compare=False)
    tick_s: float
    arrival_order: bool

    @property
    def end_s(self) -> float:
        return self.first_pts_s + self.duration_s


def probe(path: str | os.PathLike[str], limits: Limits = Limits()) -> Probe:  # noqa: B008 (frozen)
    """What the source at `path` is: a video, a GIF or other animated image, or a folder of images.

    Errors: SourceMissing; SourceEmpty (an empty file or folder, no video stream, no frame); SourceCorrupt
    (not a video, or nothing in it decodes); SourceTooLarge (over `limits`); SourceError (no permission, not
    local).
    """
    text = os.fspath(path)
    with reading(text):
        path = local_source(text, limits)
        if path.is_dir():
            return _probe_folder(path, limits)
        with path.open("rb"):  # the operating system's own error, before FFmpeg words it
            size_bytes = path.stat().st_size
        if size_bytes == 0:
            raise SourceEmpty(f"{text}: the file is empty")
        check_bytes(text, size_bytes, limits)
        if path.suffix.lower() in images.SUFFIXES:
            return _check_duration(_probe_image(path, limits), limits)
        return _check_duration(_probe_av(path, limits), limits)


def _check_pixels(path: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise SourceTooLarge(
            f"{path}: frames of {width}x{height}, the limit is {limits.max_pixels / 1e6:.1f} million pixels; "
            f"scale it down first"
        )


def _check_duration(probed: Probe, limits: Limits) -> Probe:
    if probed.duration_s > limits.max_duration_s:
        raise SourceTooLarge(
            f"{probed.path}: lasts {probed.duration_s:,.4g} s, the limit is {limits.max_duration_s:,.4g} s; "
            "cut it first"
        )
    return probed


def _probe_folder(path: Path, limits: Limits) -> Probe:
    files = images.image_files(path)
    check_bytes(str(path), sum(file.stat().st_size for file in files), limits)
    sizes = [images.image_size(file) for file in files]
    for width, height in set(sizes):
        _check_pixels(str(path), width, height, limits)
    return _probe_of_images(path, "folder", sizes[0], [1 / float(FOLDER_RATE_FPS)] * len(files), FOLDER_RATE_FPS)


def check_picture(path: Path, limits: Limits) -> tuple[int, int]:
    """(width, height) of an image file, which is not decoded. Errors: SourceTooLarge, and `images.image_size`'s."""
    check_bytes(str(path), path.stat().st_size, limits)
    size = images.image_size(path)
    _check_pixels(str(path), *size, limits)
    return size


def _probe_image(path: Path, limits: Limits) -> Probe:
    size = check_picture(path, limits)
    return _probe_of_images(path, "animation", size, images.animation_durations_s(path))


def _probe_of_images(
    path: Path,
    kind: Literal["animation", "folder"],
    size: tuple[int, int],
    durations_s: list[float],
    rate_fps: Fraction | None = None,
) -> Probe:
    ends_s = np.cumsum(durations_s)
    rate = rate_fps or Fraction(len(durations_s) / float(ends_s[-1])).limit_denominator(1001)
    return Probe(
        path=str(path),
        kind=kind,
        container="folder" if kind == "folder" else "image",
        codec=path.suffix.lower().lstrip("."),
        pix_fmt="rgb24",
        width=size[0],
        height=size[1],
        rotation=0,
        mirrored=False,
        interlaced=False,
        hdr="",
        rate_fps=rate,
        frames=len(durations_s),
        first_pts_s=0.0,
        duration_s=float(ends_s[-1]),
        has_audio=False,
        decord_reason="images",
        warnings=(),
        constant_rate=bool(np.ptp(durations_s) < 1e-9),
        pixel_aspect=Fraction(1),
        timestamps_s=ends_s - durations_s,
        tick_s=0.001,
        arrival_order=True,
    )


def _probe_av(path: Path, limits: Limits) -> Probe:
    with open_source(path) as container:
        stream = video_stream(container, path)
        _check_pixels(str(path), stream.codec_context.width, stream.codec_context.height, limits)
        packets = _scan(container, stream)
        first = _first_frame(path)
        if not packets.pts:
            raise SourceEmpty(f"{path}: the video stream has no frames")
        tick = Fraction(stream.time_base)
        timeless = None in packets.pts or container.format.name in _TIMELESS
        arrival_order = timeless or len(set(packets.pts)) < len(packets.pts)
        stamps = packets.dts if timeless else packets.pts
        if None in stamps:
            rate, constant = _sane(stream.average_rate) or Fraction(25), True
            times_s = np.arange(len(packets.pts), dtype=np.float64) / float(rate)
        else:
            ticks = np.sort(np.array(stamps, dtype=np.int64))
            rate, constant = _rate(ticks, tick, [stream.average_rate, stream.guessed_rate])
            times_s = np.asarray(ticks * float(tick) - origin_s(container), np.float64)
        hdr, told = check_colours(str(path), first, stream.codec_context)
        warnings = list(told)
        turn = orientation(first)
        if turn is None:
            warnings.append("its rotation by an angle that is no multiple of 90 degrees is not applied")
        rotation, mirrored = turn or (0, False)
        interlaced = bool(first.interlaced_frame)
        if interlaced:
            warnings.append("interlaced: deinterlaced (bwdif), one frame for each")
        width, height = first.width, first.height
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        if rotation % 180:
            width, height, aspect = height, width, 1 / aspect
        last_s = 1 / float(rate) if constant else packets.last_duration * float(tick) or 1 / float(rate)
        is_gif = "gif" in container.format.name or "apng" in container.format.name
        return Probe(
            path=str(path),
            kind="animation" if is_gif else "video",
            container=container.format.name,
            codec=stream.codec_context.name,
            pix_fmt=first.format.name,
            width=max(1, round(width * aspect)),
            height=height,
            rotation=rotation,
            mirrored=mirrored,
            interlaced=interlaced,
            hdr=hdr,
            rate_fps=rate,
            frames=len(times_s),
            first_pts_s=float(times_s[0]),
            duration_s=float(times_s[-1] - times_s[0]) + last_s,
            has_audio=bool(container.streams.audio),
            decord_reason=_decord_reason(container, stream, first, packets, turn, hdr),
            warnings=tuple(warnings),
            constant_rate=constant,
            pixel_aspect=aspect,
            timestamps_s=times_s,
            tick_s=float(tick),
            arrival_order=arrival_order,
        )


@dataclass
class _Packets:
    pts: list[int | None] = field(default_factory=list)  # in decoding order, without those an edit list drops
    dts: list[int | None] = field(default_factory=list)
    last_duration: int = 0  # of the packet shown last
    edited: bool = False
    headless: bool = False  # begins with another frame than a keyframe
    open_gop: bool = False
    reordered: bool = False
    negative: bool = False
    changes: bool = False  # parameters, in mid-stream


def _scan(container: Any, stream: Any) -> _Packets:
    seen = _Packets()
    key_pts = last_pts = None
    demuxer = container.demux(stream)
    while True:
        try:
            packet = next(demuxer, None)
        except AV_ERRORS:
            break  # what comes after damage can't be counted; decoding reports what is missing
        if packet is None:
            break
        if not packet.size:
            continue
        if packet.is_discard:
            seen.edited = True
            continue
        pts = packet.pts
        seen.headless |= not seen.pts and not packet.is_keyframe
        seen.pts.append(pts)
        seen.dts.append(packet.dts)
        if pts is None:
            continue
        if packet.is_keyframe:
            key_pts = pts
        elif key_pts is not None and pts < key_pts:
            seen.open_gop = True
        seen.reordered |= pts != packet.dts
        seen.negative |= pts < 0
        seen.changes |= len(seen.pts) > 1 and packet.has_sidedata("new_extradata")
        if last_pts is None or pts > last_pts:
            last_pts, seen.last_duration = pts, packet.duration or 0
    return seen


def _decord_reason(
    container: Any, stream: Any, first: Any, packets: _Packets, turn: tuple[int, bool] | None, hdr: str
) -> str:
    """Why decord 0.6 (FFmpeg 4 inside) can't be trusted here; it is wrong without an exception."""
    context = stream.codec_context
    checks = (
        (importlib.util.find_spec("decord") is None, "decord is not installed"),
        (context.name not in ("h264", "hevc"), "not H.264/HEVC"),
        (not {"mp4", "matroska"} & set(container.format.name.split(",")), "neither MP4 nor Matroska"),
        (first.format.components[0].bits > 8, "more than 8 bits a channel"),
        (is_untagged_hd(first, context.name), "untagged HD, which decord reads as BT.601"),
        (turn != (0, False), "rotation"),
        (first.interlaced_frame, "interlaced"),
        (hdr != "", "HDR"),
        (packets.edited, "edit list"),
        (None in packets.pts, "no PTS"),
        (packets.negative, "first PTS below 0"),
        (len(set(packets.pts)) < len(packets.pts), "non-monotonic PTS"),
        # B-frames whose PTS equal their DTS: a muxer lost the order of presentation.
        (context.has_b_frames and not packets.reordered and len(packets.pts) > 1, "non-monotonic PTS"),
        (packets.headless, "no keyframe at its beginning"),
        (packets.open_gop, "open GOP"),
        (packets.changes, "parameters change in mid-stream"),
    )
    return next((reason for applies, reason in checks if applies), "")


def _rate(ticks: NDArray[np.int64], tick: Fraction, declared: list[Fraction | None]) -> tuple[Fraction, bool]:
    """The average rate, and whether it is constant. A declared rate is taken if it fits, as it is exact."""
    declared_sane = [rate for rate in map(_sane, declared) if rate is not None]
    n = len(ticks)
    if n == 1 or ticks[-1] == ticks[0]:
        return (declared_sane or [Fraction(25)])[0], True

    def off_grid_s(rate: Fraction) -> float:
        times_s = (ticks - ticks[0]) * float(tick)
        return float(np.abs(times_s - np.arange(n) / float(rate)).max())

    for rate in declared_sane:
        if off_grid_s(rate) <= min(2 * float(tick), 0.25 / float(rate)):
            return rate, True
    measured = ((n - 1) / (int(ticks[-1] - ticks[0]) * tick)).limit_denominator(1001)
    measured = min(max(measured, Fraction(1, 1001)), Fraction(_MAX_RATE_FPS))
    return measured, off_grid_s(measured) < 0.5 / float(measured)


def _sane(rate: Fraction | None) -> Fraction | None:
    return Fraction(rate) if rate and 0 < rate <= _MAX_RATE_FPS else None


def _first_frame(path: Path) -> Any:
    with open_source(path) as container:
        for frame in decoded(container, video_stream(container, path)):
            return frame
    raise SourceCorrupt(f"{path}: no frame of it can be decoded; it is damaged or of an unknown codec")
