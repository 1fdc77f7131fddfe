"""encode: frames from a generator to a video, GIF or folder of images. publish: to its place, whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from t2vz import storage
from t2vz.clip import AudioReference
from t2vz.errors import EncodeError, OutputError, T2VZError, translate
from t2vz.files import remove, sync
from t2vz.media import sandbox
from t2vz.media.av_source import AV_ERRORS
from t2vz.media.limits import Limits
from t2vz.media.soundtrack import Track
from t2vz.spec import FORMAT_CODECS, JobSpec
from t2vz.storage import Place

METADATA_FILE = "t2vz.json"  # beside the images of a png folder

_CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".gif": "image/gif",
    ".png": "image/png",
    ".json": "application/json",
}

_ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "ffv1": "ffv1"}
# At which real clips of 512 px keep 40 dB and more; the chroma's halved resolution alone leaves them 43 to 45.
_CRF = {"h264": 17, "hevc": 17, "vp9": 14}
_BT709 = 1  # AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709 alike
_MAX_GIF_FPS = 50  # GIF counts in hundredths of a second, and players slow down what has less than two
_X265_DELAY = 2  # packets by which decoding begins before showing: B-frames that refer to B-frames


@dataclass(frozen=True)
class Encoding:
    """How frames are written.

    format: mp4, webm, mkv, gif or png (a folder of images).
    codec: h264, hevc, vp9 or ffv1; "gif" or "png".
    crf, preset: of h264, hevc and vp9 (crf only), None elsewhere.
    pix_fmt: as stored.
    threads: pinned, for the same bytes on every machine.
    """

    format: str = "mp4"
    codec: str = "h264"
    crf: int | None = 17
    preset: str | None = "medium"
    pix_fmt: str = "yuv420p"
    threads: int = 2

    @classmethod
    def of(cls, spec: JobSpec) -> Encoding:
        """The row's encoding with the defaults filled in."""
        codec = spec.codec or (FORMAT_CODECS[spec.format] or (spec.format,))[0]
        stored = {"ffv1": "bgr0", "gif": "pal8", "png": "rgb24"}
        return cls(
            format=spec.format,
            codec=codec,
            crf=_CRF.get(codec) if spec.crf is None else spec.crf,
            preset=(spec.preset or "medium") if codec in ("h264", "hevc") else None,
            pix_fmt=stored.get(codec) or spec.pix_fmt or "yuv420p",
        )


@dataclass(frozen=True)
class Encoded:
    """A finished output; sha256 as `checksum` has it."""

    path: Path
    sha256: str
    size_bytes: int
    mtime_ns: int
    width: int
    height: int
    frames: int
    rate_fps: Fraction
    codec: str
    audio_kept: bool
    warnings: tuple[str, ...] = ()


def encode(
    frames: Iterable[NDArray[np.uint8]],
    path: Path,
    *,
    width: int,
    height: int,
    rate_fps: Fraction,
    encoding: Encoding = Encoding(),
    audio: AudioReference | None = None,
    metadata: Mapping[str, Any] | None = None,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> Encoded:
    """Write the frames to `path`, a name in the workspace that does not exist yet; `publish` moves it on.

    frames: batches of uint8 (f, height, width, 3) RGB, written as they come.
    audio: sound to carry over; copied where the container takes its codec, else transcoded. What can't be
        read of it is a warning. None goes into gif and png.
    limits: of reading the sound.
    metadata: JSON-ready; in the file's comment, for a png folder in `t2vz.json`.

    The file is complete and on the disk when this returns; after any exception, one of `frames` included,
    nothing is left. Equal frames and settings give equal bytes. Colours are BT.709 in limited range, tagged.
    Errors: EncodeError (sizes, no frames, an encoder that is missing or refuses); OutputError (no space, no
    permission, no such folder).
    """
    _check(path, width, height, rate_fps, encoding)
    what = _described(encoding, width, height)
    info = json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False)
    track = None
    warnings: list[str] = []
    with _removed_on_error(path):
        if encoding.format == "png":
            writer: _PngFolder | _VideoFile = _PngFolder(path, info)
        else:
            if audio is not None and encoding.format != "gif":
                track = sandbox.soundtrack(audio, encoding.format, warnings, path.parent, limits)
            with _encoding(path, what):
                writer = _VideoFile(path, width, height, rate_fps, encoding, info, track)
        count = 0
        try:
            for batch in frames:
                if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[1:] != (height, width, 3):
                    raise EncodeError(
                        f"frames must be uint8 (f, {height}, {width}, 3), not {batch.dtype} {batch.shape}"
                    )
                with _encoding(path, what):
                    for frame in batch:
                        writer.write(np.ascontiguousarray(frame), count)
                        count += 1
            if count == 0:
                raise EncodeError("there are no frames to write")
            with _encoding(path, what):
                writer.finish(count)
        finally:
            writer.close()
        with _encoding(path):
            _sync(path)
            sha256, size_bytes = checksum(path)
            mtime_ns = path.stat().st_mtime_ns
    return Encoded(
        path=path,
        sha256=sha256,
        size_bytes=size_bytes,
        mtime_ns=mtime_ns,
        width=width,
        height=height,
        frames=count,
        rate_fps=rate_fps,
        codec=encoding.codec,
        audio_kept=track is not None and track.written,
        warnings=tuple(warnings),
    )


def check_rate(format: str, rate_fps: Fraction) -> None:
    """Raise EncodeError if files of the format can't have the frame rate."""
    if format == "gif" and rate_fps > _MAX_GIF_FPS:
        raise EncodeError(f"a GIF shows at most {_MAX_GIF_FPS} frames/s: set fps to {_MAX_GIF_FPS} or lower")


def publish(encoded: Encoded, out: Place, key: str) -> Encoded:
    """Bring a finished output to its final place, whole: by a rename, or by one put on S3.

    out: a folder on the workspace's file system, or s3://bucket/prefix. key: a name in it that carries the content's
    checksum. If the same content is there already, that stays, ours is removed, and a warning says so; another
    content there is damage, and is replaced. A folder of images goes to S3 file by file; it counts as there once
    all of it is.
    Errors: OutputError (another file system; no permission; no such bucket), StorageTimeout.
    """
    if not storage.is_remote(out):
        return _publish_locally(encoded, Path(out, key))
    is_folder = encoded.path.is_dir()
    for path in sorted(encoded.path.iterdir()) if is_folder else [encoded.path]:
        type_of = _CONTENT_TYPES.get(path.suffix or Path(key).suffix, "application/octet-stream")
        attributes = {"Content-Type": type_of} | ({} if is_folder else {"sha256": encoded.sha256})
        storage.upload(path, out, f"{key}/{path.name}" if is_folder else key, attributes)
    remove(encoded.path)
    return replace(encoded, path=Path(key), mtime_ns=0)  # of objects the checksum in their name is proof enough


def _publish_locally(encoded: Encoded, final_path: Path) -> Encoded:
    with _encoding(final_path):
        final_path.parent.mkdir(parents=True, exist_ok=True)
        warnings = encoded.warnings
        try:
            if final_path.exists():
                if checksum(final_path)[0] == encoded.sha256:
                    for file in (final_path, *(final_path.iterdir() if final_path.is_dir() else ())):
                        os.utime(file)  # or it may be swept as an old file that no result names
                    remove(encoded.path)
                    warnings = (*warnings, "the same output was there already")
                else:
                    _replace(encoded.path, final_path)
                    warnings = (*warnings, "a damaged output was there and has been replaced")
            else:
                encoded.path.rename(final_path)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise OutputError(
                    f"{final_path}: the workspace {encoded.path.parent} is on another file system; put it "
                    f"beside the output"
                ) from error
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another run published it in this moment
                return _publish_locally(encoded, final_path)
            raise
        sync(final_path.parent)
        return replace(encoded, path=final_path, mtime_ns=final_path.stat().st_mtime_ns, warnings=warnings)


def _replace(source: Path, target: Path) -> None:
    if target.is_dir() or source.is_dir():  # a folder can't be renamed over another
        target.rename(source.with_name(f"{source.name}-damaged"))
    source.replace(target)


def checksum(path: Path) -> tuple[str, int]:
    """(sha256 in hex, size in bytes) of an output.

    Of a folder the hash is over its regular files sorted by name: of each the name, NUL, its own sha256 in hex, NUL.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
    digest, total_bytes = hashlib.sha256(), 0
    for file_path in sorted(file for file in path.iterdir() if file.is_file()):  # a pipe would never end
        sha256, size_bytes = checksum(file_path)
        digest.update(f"{file_path.name}\0{sha256}\0".encode())
        total_bytes += size_bytes
    return digest.hexdigest(), total_bytes


def remote_checksum(out: Place, key: str) -> str:
    """`checksum`'s sha256 of an output on S3, read whole."""
    files = [entry.key for entry in storage.entries(out, key, deep=True)]  # of a folder of images; of a file none
    if not files:
        return _hashed(storage.stream(out, key))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.rpartition('/')[2]}\0{_hashed(storage.stream(out, file))}\0".encode())
    return digest.hexdigest()


def _hashed(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class _PngFolder:
    def __init__(self, folder: Path, info: str) -> None:
        with _encoding(folder):
            folder.mkdir()
            (folder / METADATA_FILE).write_text(info + "\n", encoding="utf-8")
        self._folder = folder

    def write(self, frame: NDArray[np.uint8], index: int) -> None:
        import cv2

        ok, data = cv2.imencode(".png", frame[..., ::-1])
        if not ok:
            raise EncodeError(f"frame {index} could not be made a PNG")
        (self._folder / f"{index:06d}.png").write_bytes(data.tobytes())

    def finish(self, count: int) -> None:
        pass

    def close(self) -> None:
        pass


class _VideoFile:
    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        rate_fps: Fraction,
        encoding: Encoding,
        info: str,
        track: Track | None,
    ) -> None:
        # bitexact: no random ids, so that equal frames give equal bytes.
        options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if encoding.format == "mp4" else {})
        muxer = {"mkv": "matroska"}.get(encoding.format, encoding.format)
        self._path, self._rate_fps, self._track, self._info = path, rate_fps, track, info
        self._container = av.open(f"file:{path}", "w", format=muxer, container_options=options)
        self._container.metadata["comment"] = info
        self._is_gif = encoding.format == "gif"
        self._is_hevc = encoding.codec == "hevc"
        self._packets = 0
        self._rgb = encoding.codec == "ffv1"
        self._pix_fmt = encoding.pix_fmt
        self._reformatter = VideoReformatter()
        self._palette = _palette_graph(width, height, rate_fps) if self._is_gif else None
        try:
            stream = self._container.add_stream(_ENCODERS.get(encoding.codec, encoding.codec), rate=rate_fps)
            context = stream.codec_context
            context.width, context.height, context.pix_fmt = width, height, encoding.pix_fmt
            context.thread_count = encoding.threads
            context.options = _codec_options(encoding)
            if self._is_hevc:
                context.codec_tag = "hvc1"  # Apple's players refuse hev1
            if not self._is_gif and not self._rgb:
                context.color_range = int(ColorRange.MPEG)
                context.colorspace = context.color_primaries = context.color_trc = _BT709
            self._stream = stream
            if track is not None:
                track.add_to(self._container)
        except BaseException:
            self.close()
            raise

    def write(self, frame: NDArray[np.uint8], index: int) -> None:
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = index, 1 / self._rate_fps
        if self._palette is not None:
            self._palette.push(picture)
            picture = self._palette.pull()
        elif self._rgb:
            picture = self._reformatter.reformat(picture, format=self._pix_fmt)
        else:
            picture = self._reformatter.reformat(
                picture,
                format=self._pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            )
        picture.pts, picture.time_base = index, 1 / self._rate_fps
        self._mux(self._stream.encode(picture))
        if self._track is not None:
            self._track.write_until(float((index + 1) / self._rate_fps))

    def finish(self, count: int) -> None:
        self._mux(self._stream.encode())
        self._container.close()
        if self._is_gif:
            _append_gif_comment(self._path, self._info)

    def close(self) -> None:
        if self._track is not None:
            self._track.close()
        with suppress(*AV_ERRORS, OSError):  # closed by `finish`, or after an error that is under way
            self._container.close()

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if not packet.duration:
                packet.duration = round(1 / (self._rate_fps * packet.time_base))
            if self._is_hevc:  # x265 leaves them unset, whatever the memory holds, in videos of one or two frames
                packet.dts = round((self._packets - _X265_DELAY) / (self._rate_fps * packet.time_base))
            self._packets += 1
            self._container.mux(packet)


def _codec_options(encoding: Encoding) -> dict[str, str]:
    crf = {} if encoding.crf is None else {"crf": str(encoding.crf)}
    preset = {} if encoding.preset is None else {"preset": encoding.preset}
    if encoding.codec == "hevc":
        # x265 has its own threads; one frame at a time, as more change the bytes.
        return {**crf, **preset, "x265-params": f"log-level=error:pools={encoding.threads}:frame-threads=1"}
    if encoding.codec == "vp9":
        return {**crf, "b": "0", "cpu-used": "2", "row-mt": "1"}
    if encoding.codec == "h264" and _has_avx512():
        # x264's AVX-512 code reads memory that it never wrote where frames are narrow: at 64 px the same frames gave
        # three different files in 100. Without it the files are also the same as on CPUs that end at AVX2.
        return {**crf, **preset, "x264-params": "asm=avx2"}
    return {**crf, **preset}


_CV_CPU_AVX_512F = 13  # OpenCV's number, for which its Python has no name


def _has_avx512() -> bool:
    import cv2

    return bool(cv2.checkHardwareSupport(_CV_CPU_AVX_512F))


def _palette_graph(width: int, height: int, rate_fps: Fraction) -> Any:
    """RGB → 256 colours of each frame's own, so that no pass over all frames is needed before."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate_fps)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def _append_gif_comment(path: Path, info: str) -> None:
    """A comment extension before the trailer; FFmpeg's muxer writes none."""
    data = info.encode()
    blocks = b"".join(bytes([len(data[i : i + 255])]) + data[i : i + 255] for i in range(0, len(data), 255))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x21\xfe" + blocks + b"\x00" + b"\x3b")


def _described(encoding: Encoding, width: int, height: int) -> str:
    preset = f", preset {encoding.preset}" if encoding.preset else ""
    return f"{encoding.codec} ({encoding.pix_fmt}{preset}) of {width}x{height}"


def _check(path: Path, width: int, height: int, rate_fps: Fraction, encoding: Encoding) -> None:
    if path.exists():
        raise OutputError(f"{path}: exists already; a name in the workspace must be new")
    if width < 1 or height < 1:
        raise EncodeError(f"frames of {width}x{height} can't be written")
    check_rate(encoding.format, rate_fps)
    if encoding.pix_fmt == "yuv420p" and (width % 2 or height % 2):
        raise EncodeError(f"{width}x{height} has an odd side, which yuv420p can't hold; make both even")
    if encoding.codec in _ENCODERS and _ENCODERS[encoding.codec] not in av.codecs_available:
        raise EncodeError(f"this PyAV has no encoder {_ENCODERS[encoding.codec]}; choose another codec")


@contextmanager
def _encoding(path: Path, what: str = "") -> Iterator[None]:
    """Foreign errors of writing, by their kind: of the operating system, of FFmpeg, ours.

    what: is encoded, in the words that the user chose it with; the path is of the workspace.
    """
    try:
        yield
    except T2VZError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise OutputError(f"{path}: the folder to write to is not there; make it first") from error
        if isinstance(error, av.FFmpegError) and type(translate(error, "encode")) is not OutputError:
            raise _refused(what, error.strerror or "no reason given") from error
        raise translate(error, "encode", str(path)) from error
    except AV_ERRORS as error:
        raise _refused(what, getattr(error, "strerror", None) or str(error)) from error
    except Exception as error:
        raise translate(error, "encode", str(path)) from error


def _refused(what: str, reason: str) -> EncodeError:
    return EncodeError(f"FFmpeg can't write {what}: {reason}; try another preset, codec or size")


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove(path)
        raise


def _sync(path: Path) -> None:
    """Bring a file, or a folder and its files, to the disk."""
    for file in path.iterdir() if path.is_dir() else ():
        _sync(file)
    sync(path)
