"""decode: a range of a source as a Clip: resampled in time, scaled and cropped or padded, never stretched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2vz.clip import AudioReference, Clip, allocate
from t2vz.errors import SourceCorrupt, SourceEmpty, SourceError, SourceTooLarge
from t2vz.media import images
from t2vz.media.av_source import AV_ERRORS, decoded, open_source, origin_s, video_stream
from t2vz.media.limits import Limits
from t2vz.media.local import reading
from t2vz.media.picture import deinterlaced, rgb_converter
from t2vz.media.probe import Probe, probe
from t2vz.spec import Fit

_MULTIPLE_PX = 8  # the VAE's factor
_MIN_SIDE_PX, _MAX_SIDE_PX = 64, 4096  # as for the columns width and height
_SEEK_BEYOND_FRAMES = 32  # nearer than that decoding forward costs less
# No codec here keeps frames back further than this: so many after a seek may be an open GOP's broken ones, and
# after so many a frame that belongs before them no longer comes.
_REORDERED_FRAMES = 16
_DECORD_BATCH_BYTES = 64 * 2**20

# (source index, uint8 (h, w, 3) RGB turned for display) in ascending order; frames that are lost are missing.
_Pictures = Iterator[tuple[int, NDArray[np.uint8]]]


class _Restart(Exception):
    """What a reader delivers is not what the probe promised; another must begin anew."""


def decode(
    path: str | os.PathLike[str],
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    fps: Fraction | None = None,
    video_length: int | None = None,
    width: int | None = None,
    height: int | None = None,
    longest_px: int | None = None,
    fit: Fit = "crop",
    condition_video: bool = False,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    workspace: Path | None = None,
    probed: Probe | None = None,
    room: Callable[[tuple[int, ...], Path | None], NDArray[np.uint8]] = allocate,
) -> Clip:
    """The frames of [start_s, end_s) of a video, an animation or a folder of images.

    fps: rate of the clip. Its frame k is the source frame shown at start_s + k / fps. None: the source's own
        frames; a variable rate becomes its average, with a warning. For a folder: the rate of its images.
    video_length: at most so many frames.
    width, height, longest_px: size of the clip in pixels, see `output_size`.
    fit: "crop": the size is covered and what hangs over is cropped, half on each side; "pad": the whole picture
        is within it, black beside.
    condition_video: True for an already rendered condition: a warning tells if video_length cuts it.
    workspace: folder for the frames of clips above 256 MiB, which are a memory map then, of a file without a
        name that goes with the array. None: the system's temporary folder.
    probed: the source's probe, where the caller has it already.
    room: what makes the array of a shape for the frames.

    Errors: those of `probe`; SourceEmpty (no frame in the range); SourceTooLarge (over `limits`);
    SourceCorrupt; SourceError (an aspect too extreme); OutputError (no room in `workspace`).
    """
    with reading(path):
        source = probed or probe(path, limits)
        if source.kind == "folder":
            source = _at_rate(source, fps)
        warnings = list(source.warnings)
        rate = fps or source.rate_fps
        if not source.constant_rate and fps is None:
            warnings.append(f"variable frame rate: made constant at its average, {float(rate):.5g} frames/s")
        plan = _plan(source, start_s, end_s, rate, own_frames=fps is None, video_length=video_length)
        warnings += plan.warnings
        if condition_video and len(plan.indexes) < plan.available:
            warnings.append(f"condition video cut from {plan.available} to {_frames(len(plan.indexes))}")
        if len(plan.indexes) > limits.max_frames:
            raise SourceTooLarge(
                f"{path}: {_frames(len(plan.indexes))}, the limit is {limits.max_frames}: set end_s or "
                f"video_length, or lower fps"
            )
        size = sized(source, width, height, longest_px)
        limits.check_clip(str(path), len(plan.indexes), *size)
        frames = room((len(plan.indexes), size[1], size[0], 3), workspace)
        decoder, delivered, lost = _read(source, plan.indexes, frames, fit, warnings)
        if delivered == 0:
            raise SourceCorrupt(f"{path}: no frame of the range can be decoded; the file is damaged")
        if delivered < len(plan.indexes) or lost > 1:
            warnings.append(
                f"the file is damaged or cut off, {lost} of its frames in the range missing: "
                f"{delivered} of {_frames(len(plan.indexes))} delivered"
            )
        audio = None
        if source.has_audio:
            audio = AudioReference(source.path, plan.begin_s, plan.begin_s + float(delivered / rate))
        return Clip(
            frames=frames[:delivered],
            rate_fps=rate,
            timestamps_s=source.timestamps_s[plan.indexes[:delivered]],
            audio=audio,
            decoder=decoder,
            warnings=tuple(warnings),
        )


def output_size(
    source_w: int, source_h: int, width: int | None, height: int | None, longest_px: int | None
) -> tuple[int, int]:
    """(width, height) in pixels of a clip made from a source displayed at source_w × source_h.

    Both given: those. One given: the other from the source's aspect. None: the longest side is `longest_px`,
    or the source's own. What is computed is rounded to a multiple of 8. A source whose short side is
    below 64 is enlarged to 64; where width, height or longest_px forbid that, SourceError, as where width or
    height makes the other side longer than 4096.
    """
    if width is not None and height is not None:
        return width, height
    if width is not None:
        scale = Fraction(width, source_w)
    elif height is not None:
        scale = Fraction(height, source_h)
    elif longest_px is not None:
        scale = Fraction(longest_px, max(source_w, source_h))
    else:
        scale = max(Fraction(1), Fraction(_MIN_SIDE_PX, min(source_w, source_h)))
    scaled = source_w * scale, source_h * scale
    size = (
        width or round(scaled[0] / _MULTIPLE_PX) * _MULTIPLE_PX,
        height or round(scaled[1] / _MULTIPLE_PX) * _MULTIPLE_PX,
    )
    if min(size) < _MIN_SIDE_PX or (max(size) > _MAX_SIDE_PX and (width or height)):
        raise SourceError(
            f"{source_w}x{source_h} would become {max(1, round(scaled[0]))}x{max(1, round(scaled[1]))}, and a side "
            f"must have {_MIN_SIDE_PX} to {_MAX_SIDE_PX} px; set both width and height, and it is brought there by fit"
        )
    return size


def sized(source: Probe, width: int | None, height: int | None, longest_px: int | None) -> tuple[int, int]:
    """`output_size` for a source, whose name is in the error then."""
    try:
        return output_size(source.width, source.height, width, height, longest_px)
    except SourceError as error:
        raise SourceError(f"{source.path}: {error.message}") from None


@dataclass(frozen=True)
class Timeline:
    """The frames that a row has of its source: frame k is what the source shows at begin_s + k / rate_fps.

    begin_s: in seconds of the source's presentation time.
    """

    begin_s: float
    rate_fps: Fraction
    frames: int


def timeline(
    source: Probe,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    fps: Fraction | None = None,
    video_length: int | None = None,
) -> Timeline:
    """What `decode` would deliver of an undamaged source with these arguments. Errors: SourceEmpty."""
    if source.kind == "folder":
        source = _at_rate(source, fps)
    rate = fps or source.rate_fps
    plan = _plan(source, start_s, end_s, rate, own_frames=fps is None, video_length=video_length)
    return Timeline(plan.begin_s, rate, len(plan.indexes))


@dataclass(frozen=True)
class _Plan:
    """What to deliver: from when on, which source frame each frame of the clip is, what to tell the user.

    available: frames of the range at the clip's rate, before video_length.
    """

    begin_s: float
    indexes: NDArray[np.int64]
    available: int
    warnings: tuple[str, ...]


def _plan(
    source: Probe,
    start_s: float,
    end_s: float | None,
    rate: Fraction,
    *,
    own_frames: bool,
    video_length: int | None,
) -> _Plan:
    warnings: list[str] = []
    times_s, source_end_s = source.timestamps_s, source.end_s
    # A timestamp that was rounded up, by half a tick at most, must not pass for a late one.
    tolerance_s = min(source.tick_s / 2 + 1e-6, 0.25 / float(rate), 0.25 / float(source.rate_fps))
    grid_s = times_s[0] + np.arange(len(times_s)) / float(source.rate_fps)
    rounded = np.abs(times_s - grid_s).max() <= 2 * source.tick_s
    if rounded or (own_frames and source.constant_rate):
        times_s, source_end_s, tolerance_s = grid_s, grid_s[-1] + 1 / float(source.rate_fps), 1e-5
    begin_s = max(start_s, source.first_pts_s)
    stop_s = source_end_s if end_s is None else min(end_s, source_end_s)
    if stop_s - begin_s <= tolerance_s:
        raise SourceEmpty(
            f"{source.path}: no frame from {start_s:g} s to "
            f"{'its end' if end_s is None else f'{end_s:g} s'}; the source "
            f"lasts {source.duration_s:g} s, from {source.first_pts_s:g} s to {source.end_s:g} s"
        )
    if end_s is not None and end_s > source_end_s + 1 / float(rate):
        warnings.append(f"the source ends at {source_end_s:.3f} s, before end_s")
    available = n = max(1, ceil((stop_s - begin_s - tolerance_s) * float(rate)))
    if video_length is not None:
        if n < video_length:
            warnings.append(f"{_frames(n)} in the range, fewer than video_length ({video_length})")
        n = min(n, video_length)
    shown_s = begin_s + np.arange(n) / float(rate)
    indexes = np.searchsorted(times_s, shown_s + tolerance_s, side="right") - 1
    return _Plan(begin_s, np.clip(indexes, 0, len(times_s) - 1), available, tuple(warnings))


def _frames(count: int) -> str:
    return f"{count} frame{'' if count == 1 else 's'}"


def _at_rate(folder: Probe, fps: Fraction | None) -> Probe:
    if fps is None:
        return replace(
            folder,
            warnings=(*folder.warnings, f"images have no rate: {folder.rate_fps} frames/s taken; set fps"),
        )
    return replace(
        folder,
        rate_fps=fps,
        timestamps_s=np.arange(folder.frames) / float(fps),
        duration_s=float(folder.frames / fps),
    )


def _read(
    source: Probe, indexes: NDArray[np.int64], frames: NDArray[np.uint8], fit: Fit, warnings: list[str]
) -> tuple[str, int, int]:
    """Fill `frames`; (decoder, frames delivered, source frames lost)."""
    wanted = np.unique(indexes).tolist()
    path = Path(source.path)

    def filled(pictures: _Pictures) -> tuple[int, int]:
        return _fill(frames, indexes, pictures, fit, float(source.pixel_aspect), warnings)

    if source.kind == "folder":
        files = images.image_files(path)
        return ("pillow", *filled((i, images.read_image(files[i])) for i in wanted))
    if source.container == "image":
        return ("pillow", *filled(images.read_animation(path, wanted)))
    reason = source.decord_reason
    if not reason:
        try:
            return ("decord", *filled(_decord(source, wanted)))
        except _Restart as restart:
            reason = str(restart)
    try:
        if not source.arrival_order:
            return (f"pyav: {reason}", *filled(_pyav(source, wanted, arrival_order=False)))
    except _Restart as restart:
        reason = str(restart)
        warnings.append("the timestamps are not in the frames' order; frames are taken as they arrive")
    return (f"pyav: {reason}", *filled(_pyav(source, wanted, arrival_order=True)))


def _fill(
    frames: NDArray[np.uint8],
    indexes: NDArray[np.int64],
    pictures: _Pictures,
    fit: Fit,
    pixel_aspect: float,
    warnings: list[str],
) -> tuple[int, int]:
    """Write the pictures where the plan wants them; (frames delivered, source frames lost)."""
    k, n = 0, len(indexes)
    bring = contain if fit == "pad" else cover
    shapes, seen = set(), set()
    for index, picture in pictures:
        shapes.add(picture.shape)
        seen.add(index)
        fitted = bring(picture, frames.shape[2], frames.shape[1], pixel_aspect)
        while k < n and indexes[k] < index:  # lost: the frame before is shown on
            frames[k] = frames[k - 1] if k else fitted
            k += 1
        while k < n and indexes[k] == index:
            frames[k] = fitted
            k += 1
    if len(shapes) > 1:
        sizes = " and ".join(f"{w}x{h}" for h, w, _ in sorted(shapes))
        warnings.append(f"the frame size changes ({sizes}): all frames are brought to one size")
    return k, len(set(indexes.tolist()) - seen)


def cover(picture: NDArray[np.uint8], width: int, height: int, pixel_aspect: float = 1.0) -> NDArray[np.uint8]:
    """`picture`, uint8 (h, w, 3), scaled to cover width × height and cropped at the centre.

    pixel_aspect: width / height of the picture's pixels. Downscaling averages areas, upscaling is bicubic.
    """
    h, w = picture.shape[:2]
    scale = max(width / (w * pixel_aspect), height / h)
    to_w, to_h = max(width, round(w * pixel_aspect * scale)), max(height, round(h * scale))
    x, y = (to_w - width) // 2, (to_h - height) // 2
    return _scaled(picture, to_w, to_h)[y : y + height, x : x + width]


def contain(picture: NDArray[np.uint8], width: int, height: int, pixel_aspect: float = 1.0) -> NDArray[np.uint8]:
    """`picture` as `cover` takes it, whole and in the middle of width × height, with black bars beside."""
    h, w = picture.shape[:2]
    scale = min(width / (w * pixel_aspect), height / h)
    to_w = min(width, max(1, round(w * pixel_aspect * scale)))
    to_h = min(height, max(1, round(h * scale)))
    x, y = (width - to_w) // 2, (height - to_h) // 2
    framed = np.zeros((height, width, 3), np.uint8)
    framed[y : y + to_h, x : x + to_w] = _scaled(picture, to_w, to_h)
    return framed


def _scaled(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    import cv2

    h, w = picture.shape[:2]
    small = min(w, width), min(h, height)  # an axis that shrinks and one that grows want different filters
    if small != (w, h):
        picture = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
    if small != (width, height):
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture


def _decord(source: Probe, wanted: list[int]) -> _Pictures:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise _Restart("decord does not load") from error
    try:
        reader = decord.VideoReader(source.path, num_threads=2)
        if len(reader) != source.frames:
            raise _Restart(f"decord counts {len(reader)} frames, not {source.frames}")
        batch = max(1, _DECORD_BATCH_BYTES // (source.width * source.height * 3))
        for i in range(0, len(wanted), batch):
            part = wanted[i : i + batch]
            yield from zip(part, reader.get_batch(part).asnumpy(), strict=True)
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise _Restart(f"decord failed ({' '.join(str(error).split())[:100]})") from error


def _pyav(source: Probe, wanted: list[int], *, arrival_order: bool, seek: bool = True) -> _Pictures:
    seek = seek and not arrival_order and wanted[0] > _SEEK_BEYOND_FRAMES
    targets = set(wanted)
    previous, passed = -1, 0
    with open_source(source.path) as container:
        stream = video_stream(container, source.path)
        stream.thread_type = "AUTO"
        origin = origin_s(container)
        if seek:
            near_s = float(source.timestamps_s[wanted[0] - _REORDERED_FRAMES]) + origin
            try:
                container.seek(int(near_s / stream.time_base), stream=stream, backward=True)
            except AV_ERRORS:  # no keyframe before, in MP4
                yield from _pyav(source, wanted, arrival_order=False, seek=False)
                return
        to_rgb = rgb_converter(stream.codec_context.name, source.rotation, source.mirrored, source.hdr)
        in_order = True
        for arrived, frame in enumerate(deinterlaced(decoded(container, stream), stream)):
            if arrival_order:
                index = arrived
            elif frame.pts is None:
                raise _Restart("no PTS")
            else:
                shown_s = frame.time - origin + source.tick_s / 2
                index = int(np.searchsorted(source.timestamps_s, shown_s, side="right")) - 1
            if seek and previous < 0 and index > wanted[0]:  # sought too far
                yield from _pyav(source, wanted, arrival_order=False, seek=False)
                return
            if index < previous:
                raise _Restart("non-monotonic PTS")
            if previous < 0 < index and not seek:
                in_order = False  # the first frame is missing, or comes later
            if index in targets and index != previous:
                yield index, to_rgb(frame)
            previous = index
            if index >= wanted[-1]:
                passed += 1
                if in_order or passed > _REORDERED_FRAMES:
                    return
    if seek and previous < 0:  # sought behind the last keyframe: MPEG-TS has no index
        yield from _pyav(source, wanted, arrival_order=False, seek=False)
