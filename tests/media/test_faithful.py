"""What goes in comes out: each line of the table "Sources, and what is kept of them" in manifests/README.md.

The sources are made by ffmpeg, whose own decode is the oracle: bit for bit, unless a line here says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from clicks import CLICK, CLICK_EVERY_S, FLASH, click_times_s, flash_times_s

from t2vz.errors import SourceError
from t2vz.media.decode import decode
from t2vz.media.encode import Encoding, encode
from t2vz.media.probe import probe
from t2vz.media.tonemap import to_sdr
from t2vz.spec import JobSpec

README = Path(__file__).parents[2] / "manifests" / "README.md"

# testsrc2 can't do odd sizes, and testsrc has few colours: what is seen of either shows a wrong order or turn.
_X264 = ("-c:v", "libx264", "-preset", "veryfast", "-threads", "1")
_X265 = ("-c:v", "libx265", "-preset", "ultrafast")
_VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
_AV1 = ("-c:v", "libsvtav1", "-preset", "12")
_420 = ("-pix_fmt", "yuv420p")
_FIELDS = "tinterlace=interleave_top,fieldorder=tff"
_INTERLACED = ("-vf", _FIELDS, "-flags", "+ildct+ilme")
_BWDIF = ("-vf", "bwdif=mode=send_frame:deint=interlaced")


@dataclass(frozen=True)
class Source:
    """How a source is made, and what must be told of it.

    options: ffmpeg's, after its input. input: "" for a moving pattern, else the name of another source.
    before: options of the input. size, rate: of the pattern. decord: whether decord may read it.
    oracle: what ffmpeg is told in addition when it decodes. warning: a part of the only one; "" for none.
    """

    options: tuple[str, ...]
    input: str = ""
    before: tuple[str, ...] = ()
    size: str = "160x120"
    rate: str = "25"
    decord: bool = False
    oracle: tuple[str, ...] = ()
    warning: str = ""


def _x265(parameters: str, pix_fmt: str = "yuv420p") -> tuple[str, ...]:
    return (*_X265, "-pix_fmt", pix_fmt, "-x265-params", f"log-level=error:{parameters}")


SOURCES: dict[str, Source] = {
    # containers and codecs
    "h264.mp4": Source((*_X264, *_420, "-bf", "3"), decord=True),
    "h264.mov": Source((*_X264, *_420, "-bf", "3"), decord=True),
    "h264.mkv": Source((*_X264, *_420, "-bf", "3"), decord=True),
    "h264.avi": Source((*_X264, *_420, "-bf", "0")),
    "h264.ts": Source((*_X264, *_420, "-bf", "3")),
    "hevc.mp4": Source(_x265("open-gop=0"), decord=True),
    "hevc.mkv": Source(_x265("open-gop=0"), decord=True),
    "hevc.ts": Source(_x265("open-gop=0")),
    "vp8.webm": Source(("-c:v", "libvpx", "-deadline", "realtime", *_420)),
    "vp9.webm": Source((*_VP9, *_420)),
    "vp9.mp4": Source((*_VP9, *_420)),
    "av1.mp4": Source((*_AV1, *_420)),
    "av1.mkv": Source((*_AV1, *_420)),
    "av1.webm": Source((*_AV1, *_420)),
    "prores.mov": Source(("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le")),
    "prores4444.mov": Source(("-c:v", "prores_ks", "-profile:v", "4", "-pix_fmt", "yuva444p10le")),
    "mjpeg.avi": Source(("-c:v", "mjpeg", "-pix_fmt", "yuvj420p")),
    "mjpeg.mov": Source(("-c:v", "mjpeg", "-pix_fmt", "yuvj422p")),
    "mpeg4.avi": Source(("-c:v", "mpeg4", "-bf", "2", *_420)),
    "mpeg2.ts": Source(("-c:v", "mpeg2video", "-bf", "2", *_420)),
    "animation.gif": Source((), rate="10"),
    # pixels
    "odd.mp4": Source((*_X264, "-pix_fmt", "yuv444p", "-vf", "crop=161:121:exact=1"), size="170x130", decord=True),
    "odd.webm": Source((*_VP9, *_420, "-vf", "crop=161:121:exact=1"), size="170x130"),
    "422.mp4": Source((*_X264, "-pix_fmt", "yuv422p"), decord=True),
    "444.mp4": Source((*_X264, "-pix_fmt", "yuv444p"), decord=True),
    "444.webm": Source((*_VP9, "-pix_fmt", "yuv444p")),
    "rgb.mp4": Source(("-c:v", "libx264rgb", "-pix_fmt", "rgb24"), decord=True),
    "grey.mp4": Source((*_X264, "-pix_fmt", "gray"), decord=True),
    "10bit_h264.mp4": Source((*_X264, "-pix_fmt", "yuv420p10le")),
    "10bit_hevc.mp4": Source(_x265("open-gop=0", "yuv420p10le")),
    "10bit_vp9.webm": Source((*_VP9, "-pix_fmt", "yuv420p10le")),
    "10bit_av1.mp4": Source((*_AV1, "-pix_fmt", "yuv420p10le")),
    # how they are shown
    **{
        f"turned_{turn}{flips.replace('-display_', '_').replace(' ', '')}.mp4": Source(
            ("-c", "copy"),
            "h264.mp4",
            ("-display_rotation", turn, *flips.split()),
            decord=(turn, flips) in {("0", ""), ("180", "-display_hflip -display_vflip")},
        )
        for turn in ("0", "90", "180", "270")
        for flips in ("", "-display_hflip", "-display_vflip", "-display_hflip -display_vflip")
    },
    "turned.mkv": Source(("-c", "copy"), "h264.mp4", ("-display_rotation", "90", "-display_hflip")),
    "turned_vp9.mp4": Source(("-c", "copy"), "vp9.mp4", ("-display_rotation", "270")),
    "turned_prores.mov": Source(("-c", "copy"), "prores.mov", ("-display_rotation", "90")),
    "interlaced_h264.mp4": Source(
        (*_INTERLACED, *_X264, *_420), rate="50", oracle=_BWDIF, warning="interlaced: deinterlaced"
    ),
    "interlaced_mpeg2.ts": Source(
        (*_INTERLACED, "-c:v", "mpeg2video", *_420), rate="50", oracle=_BWDIF, warning="interlaced: deinterlaced"
    ),
    "interlaced_prores.mov": Source(
        (*_INTERLACED, "-c:v", "prores_ks"), rate="50", oracle=_BWDIF, warning="interlaced: deinterlaced"
    ),
    # when they are shown
    "ntsc.mp4": Source((*_X264, *_420), rate="30000/1001", decord=True),
    "ntsc.mkv": Source((*_X264, *_420), rate="30000/1001", decord=True),
    "slow.mp4": Source((*_X264, *_420), rate="32/15", decord=True),
    "edit_list.mp4": Source(("-c", "copy"), "h264.mp4", ("-ss", "0.33")),
    "edit_list.mov": Source(("-c", "copy"), "h264.mov", ("-ss", "0.33")),
    "delayed.mp4": Source(("-c", "copy"), "h264.mp4", ("-itsoffset", "0.7"), decord=True),
    "open_gop.mp4": Source(
        (*_X264, *_420, "-bf", "3", "-x264-params", "open-gop=1:keyint=12:min-keyint=12:scenecut=0")
    ),
    "open_gop_hevc.ts": Source(_x265("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3")),
    "order_lost.mp4": Source(("-c", "copy", "-bsf:v", "setts=pts=DTS"), "h264.mp4", warning="as they arrive"),
    "unreordered.mkv": Source((*_X264, *_420, "-bf", "0"), decord=True),
    "intra_refresh.ts": Source((*_X264, *_420, "-x264-params", "intra-refresh=1:keyint=12")),
    # beside the picture
    "transparent.gif": Source(("-vf", "format=rgba,colorkey=blue:0.3"), rate="10"),
    "cover.mp4": Source(
        ("-i", "cover.png", "-map", "0", "-map", "1", "-c", "copy", "-disposition:v:1", "attached_pic"),
        "h264.mp4",
        oracle=("-map", "0:0"),
        decord=True,
    ),
    "cover.mkv": Source(
        ("-c", "copy", "-disposition:v:0", "0", "-attach", "cover.png", "-metadata:s:t", "mimetype=image/png"),
        "h264.mp4",
        oracle=("-map", "0:0"),
        decord=True,
    ),
}
_SOME = ("-vf", r"select=lt(n\,9)+not(mod(n\,4))", "-fps_mode", "vfr")
VARIABLE: dict[str, Source] = {
    "variable.mp4": Source((*_SOME, *_X264, *_420, "-bf", "3")),
    "variable.mkv": Source((*_SOME, *_VP9, *_420)),
    "variable.gif": Source(_SOME, rate="20"),
    "times_double.mkv": Source(
        ("-c", "copy", "-bsf:v", "setts=pts=PTS-mod(N\\,2)*40:dts=DTS-mod(N\\,2)*40"), "unreordered.mkv"
    ),
}
# What bwdif makes of the lines at the edges, where it knows fewer neighbours, is another in FFmpeg 9 than in 8: by
# less than 3 levels on average.
_EDGE_LINES, _EDGE_LEVELS = 6, 3

READERS = [(name, "as probed") for name in SOURCES] + [(name, "pyav") for name in SOURCES if SOURCES[name].decord]


@pytest.fixture(scope="session")
def source_path(ffmpeg, tmp_path_factory):
    """Path of a source by its name, made at the first call."""
    folder = tmp_path_factory.mktemp("sources")
    cv2.imwrite(str(folder / "cover.png"), np.full((48, 48, 3), 200, np.uint8))

    def path_of(name: str) -> Path:
        path, source = folder / name, (SOURCES | VARIABLE)[name]
        if not path.exists():
            pattern = ("-f", "lavfi", "-i", f"testsrc2=s={source.size}:r={source.rate}:d=1.2")
            origin = (*source.before, "-i", path_of(source.input)) if source.input else pattern
            options = (folder / option if option == "cover.png" else option for option in source.options)
            ffmpeg(*origin, *options, path)
        return path

    return path_of


@pytest.mark.parametrize(("name", "reader"), READERS)
def test_frames(name, reader, source_path, ffmpeg_frames, monkeypatch):
    source = SOURCES[name]
    if reader == "pyav":
        monkeypatch.setattr("t2vz.media.probe._decord_reason", lambda *_: "by order of the test")
    path = source_path(name)
    found = probe(path)
    clip = decode(path, width=found.width, height=found.height)
    oracle = ffmpeg_frames(path, found.width, found.height, *source.oracle)
    assert clip.frames.shape == oracle.shape
    assert found.frames == len(oracle)
    differs = np.abs(clip.frames.astype(int) - oracle)
    if found.interlaced:
        edges = np.concatenate([differs[:, :_EDGE_LINES], differs[:, -_EDGE_LINES:]], axis=1)
        assert edges.mean((1, 2, 3)).max() < _EDGE_LEVELS
        differs[:, :_EDGE_LINES] = differs[:, -_EDGE_LINES:] = 0
    assert not differs.any(), f"up to {differs.max()} levels, in frames {np.flatnonzero(differs.any((1, 2, 3)))}"
    assert clip.decoder.startswith("decord") == (source.decord and reader != "pyav" and _has_decord())
    assert [source.warning in warning for warning in clip.warnings] == [True] * bool(source.warning), clip.warnings


def _has_decord() -> bool:
    try:
        import decord  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("fps", ["25", "10", "30000/1001"])
@pytest.mark.parametrize("name", VARIABLE)
def test_variable_rates(name, fps, source_path, ffmpeg_frames):
    path = source_path(name)
    clip = decode(path, fps=Fraction(fps))
    oracle = ffmpeg_frames(path, 160, 120, "-vf", f"fps={fps}:round=up")  # the frame shown at each time, as ours
    assert abs(len(clip) - len(oracle)) <= 1
    both = min(len(clip), len(oracle))
    np.testing.assert_array_equal(clip.frames[:both], oracle[:both])
    assert clip.warnings == ()

    own = decode(path)
    assert own.rate_fps != 25
    assert ["variable frame rate: made constant" in warning for warning in own.warnings] == [True]
    assert abs(len(own) - probe(path).frames) <= 1
    assert abs(own.duration_s - probe(path).duration_s) <= 1 / float(own.rate_fps)


@pytest.mark.parametrize(
    "name", ["interlaced_h264.mp4", "10bit_hevc.mp4", "turned_90_hflip.mp4", "open_gop_hevc.ts", "intra_refresh.ts"]
)
def test_a_range_is_the_same_frames(name, source_path):
    whole = decode(source_path(name))
    for start in (11, len(whole) - 5):
        part = decode(source_path(name), start_s=start / 25, video_length=5)
        np.testing.assert_array_equal(part.frames, whole.frames[start : start + 5])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_what_comes_before_the_first_keyframe_is_told_and_shifts_nothing(suffix, ffmpeg, ffmpeg_frames, tmp_path):
    path = tmp_path / f"headless.{suffix}"
    pattern = ["-f", "lavfi", "-i", "testsrc2=s=160x120:r=25:d=5"]
    ffmpeg(*pattern, *_X264, *_420, "-g", "50", "-bsf:v", r"noise=drop=eq(n\,0)", path)
    oracle = ffmpeg_frames(path, 160, 120)
    assert len(oracle) == 75  # ffmpeg leaves out what can't be decoded
    clip = decode(path)
    assert ["missing" in warning for warning in clip.warnings] == [True]
    np.testing.assert_array_equal(clip.frames[-75:], oracle)
    for back in (80, 65, 3):  # sought before the first keyframe, behind it, behind the last
        part = decode(path, start_s=float(clip.timestamps_s[-back]), video_length=8)
        np.testing.assert_array_equal(part.frames[-1], clip.frames[len(clip) - back + len(part) - 1])


def test_a_slanted_picture_is_told(source_path, ffmpeg, tmp_path):
    ffmpeg("-display_rotation", "30", "-i", source_path("h264.mp4"), "-c", "copy", tmp_path / "slanted.mp4")
    clip = decode(tmp_path / "slanted.mp4")
    assert ["no multiple of 90 degrees" in warning for warning in clip.warnings] == [True]
    np.testing.assert_array_equal(clip.frames, decode(source_path("h264.mp4")).frames)


@pytest.mark.parametrize(("turn", "size"), [("0", (320, 120)), ("90", (60, 160))])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_sample_aspect(turn, size, fit, source_path, ffmpeg, ffmpeg_frames, tmp_path):
    ffmpeg("-i", source_path("h264.mp4"), "-c", "copy", "-aspect", "8:3", tmp_path / "wide.mp4")
    ffmpeg("-display_rotation", turn, "-i", tmp_path / "wide.mp4", "-c", "copy", tmp_path / "turned.mp4")
    found = probe(tmp_path / "turned.mp4")
    assert (found.width, found.height) == size
    clip = decode(tmp_path / "turned.mp4", width=size[0], height=size[1], fit=fit)
    assert (clip.width, clip.height) == size
    scaled = ffmpeg_frames(
        tmp_path / "turned.mp4", *size, "-vf", f"format=rgb24,scale={size[0]}:{size[1]}:flags=bicubic"
    )
    assert np.abs(clip.frames.astype(int) - scaled).mean() < 2  # another implementation of the bicubic filter


PATCHES = np.array(
    [[255, 255, 255], [0, 0, 0], [200, 40, 40], [40, 180, 60], [40, 60, 200], [210, 200, 50], [90, 90, 90]]
)


@pytest.mark.parametrize("range_", ["tv", "pc"])
@pytest.mark.parametrize(
    ("width", "matrix", "tags"),
    [
        *[(width, matrix, matrix) for width in (224, 1344) for matrix in ("bt709", "smpte170m", "bt470bg", "bt2020nc")],
        (224, "bt470bg", None),  # what untagged video of this size is by convention
        (1344, "bt709", None),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_colours_are_those_that_went_in(suffix, width, matrix, tags, range_, ffmpeg, tmp_path):
    picture = np.repeat(PATCHES[None], 96, axis=0).repeat(width // len(PATCHES), axis=1).astype(np.uint8)
    (tmp_path / "raw").write_bytes(picture.tobytes() * 3)
    scale = f"scale=out_color_matrix={matrix}:out_range={range_}:flags=accurate_rnd,format=yuv420p"
    told = ["-color_range", range_, *(["-colorspace", tags] if tags else [])]
    if not tags:  # ffmpeg notes what it made
        scale += ",setparams=colorspace=unknown"
    codec = {"mp4": [*_X264, "-crf", "1"], "webm": [*_VP9, "-crf", "4", "-b:v", "0"]}[suffix]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x96", "-i", tmp_path / "raw"]
    ffmpeg(*raw, "-vf", scale, *codec, *told, tmp_path / f"patches.{suffix}")
    with av.open(str(tmp_path / f"patches.{suffix}")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace == 2) == (tags is None)
        assert frame.color_range in {"tv": (0, 1), "pc": (2,)}[range_]
    clip = decode(tmp_path / f"patches.{suffix}")
    middles = clip.frames[:, 48, width // 14 :: width // len(PATCHES)].astype(int)
    assert np.abs(middles - PATCHES).max() <= 4


@pytest.fixture(scope="module")
def hdr_path(ffmpeg, tmp_path_factory):
    """A pattern of up to 600 cd/m² in a transfer, with primaries; 4:4:4, as each library halves chroma in its way."""
    folder = tmp_path_factory.mktemp("hdr")

    def path_of(transfer: str, primaries: str, pix_fmt: str = "yuv444p10le") -> Path:
        light = "zscale=t=linear:npl=600:agamma=0,format=gbrpf32le,zscale=p=2020:agamma=0"
        coded = f"zscale=t={transfer}:m=2020_ncl:r=tv:npl=203:agamma=0,format={pix_fmt}"
        plain = "format=gbrp,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
        codec = _x265(f"colorprim={primaries}:transfer={transfer}:colormatrix=bt2020nc", pix_fmt)
        path = folder / f"{transfer}-{primaries}-{pix_fmt}.mp4"
        pattern = ("-f", "lavfi", "-i", "testsrc2=s=160x120:r=5:d=1")
        ffmpeg(*pattern, "-vf", f"{plain},{light},{coded}", *codec, "-crf", "4", path)
        return path

    return path_of


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_mapped_to_sdr(transfer, name, hdr_path, ffmpeg_frames):
    path = hdr_path(transfer, "bt2020")
    clip = decode(path)
    assert [f"HDR ({name}): tones are mapped" in warning for warning in clip.warnings] == [True]
    light = "zscale=t=linear:npl=203:agamma=0,format=gbrpf32le,zscale=p=bt709:agamma=0"
    mapped = f"{light},tonemap=mobius:desat=0:peak={1000 / 203},zscale=t=bt709:m=gbr:r=full,format=gbrp"
    differs = np.abs(clip.frames.astype(int) - ffmpeg_frames(path, 160, 120, "-vf", mapped))
    assert differs.mean() < 3  # of 255; without the mapping it is 50 and more
    assert np.percentile(differs, 99) <= 12
    assert np.abs(clip.frames.astype(int) - ffmpeg_frames(path, 160, 120)).mean() > 30


def test_white_of_hdr_is_as_bt_2408_has_it():
    """203 cd/m² is PQ's 0.58 and HLG's 0.75; it and the peak of 1000 through tonemap's formula, by hand."""
    for transfer, white, peak in (("PQ", 0.5807, 0.7518), ("HLG", 0.75, 1.0)):
        codes = np.array([0.0, white, peak])[None, :, None].repeat(3, axis=2)
        grey = to_sdr(np.rint(codes * 65535).astype(np.uint16), transfer)[0]
        assert (grey == grey[:, :1]).all(), "grey stays grey"
        assert grey[:, 0].tolist() == pytest.approx([0, 217, 255], abs=1)


def test_hdr_of_other_primaries_is_refused_with_a_command_that_helps(hdr_path, ffmpeg, tmp_path):
    path = hdr_path("smpte2084", "smpte432", "yuv420p10le")
    with pytest.raises(SourceError, match=r"is HDR \(PQ\) of other primaries") as refused:
        probe(path)
    words = refused.value.message.partition("ffmpeg ")[2].split()
    ffmpeg(*({"IN": path, "OUT": tmp_path / "sdr.mp4"}.get(word, word) for word in words))
    assert decode(tmp_path / "sdr.mp4").warnings == ()


def test_wide_gamut_is_told_and_strange_matrices_are_refused(source_path, ffmpeg, tmp_path):
    for path, metadata in (("wide.mp4", "colour_primaries=9"), ("strange.mp4", "matrix_coefficients=8")):
        ffmpeg("-i", source_path("h264.mp4"), "-c", "copy", "-bsf:v", f"h264_metadata={metadata}", tmp_path / path)
    assert ["wide gamut (BT.2020)" in warning for warning in decode(tmp_path / "wide.mp4").warnings] == [True]
    with pytest.raises(SourceError, match=r"strange\.mp4: its colours are YCgCo"):
        decode(tmp_path / "strange.mp4")


# name → what ffmpeg makes of a clip that flashes and clicks (input 0 its picture, 1 its sound)
OFFSETS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "together.mp4": ([], [], ["-c", "copy"]),
    "late_sound.mp4": ([], ["-itsoffset", "1"], ["-c", "copy"]),
    "late_sound.ts": ([], ["-itsoffset", "1"], ["-c", "copy"]),
    "late_sound.mkv": ([], ["-itsoffset", "1"], ["-c", "copy"]),
    "late_picture.mp4": (["-itsoffset", "1"], [], ["-c", "copy"]),
    "late_picture.mkv": (["-itsoffset", "1"], [], ["-c", "copy"]),
    "edit_list.mp4": (["-ss", "1.2"], ["-ss", "1.2"], ["-c", "copy"]),
    "ntsc.mp4": ([], [], ["-r", "30000/1001", *_X264, "-c:a", "copy"]),
    "variable.mkv": ([], [], ["-vf", r"select=lt(mod(t\,2)\,1)+not(mod(n\,2))", "-fps_mode", "vfr", "-c:a", "copy"]),
    "surround.mov": ([], [], ["-c:v", "copy", "-c:a", "pcm_s16le", "-ac", "6"]),
}


@pytest.fixture(scope="module")
def clicking(ffmpeg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offsets")
    picture = ["-f", "lavfi", "-i", "color=black:s=64x64:r=16:d=5", "-f", "lavfi", "-i", f"{CLICK}:d=5"]
    ffmpeg(*picture, "-vf", FLASH, *_X264, *_420, "-g", "80", "-bf", "2", folder / "clicks.mp4")

    def path_of(name: str) -> Path:
        video, audio, options = OFFSETS[name]
        given = folder / "clicks.mp4"
        maps = ["-map", "0:v", "-map", "1:a"]
        ffmpeg(*video, "-i", given, *audio, "-i", given, *maps, *options, folder / name)
        return folder / name

    return path_of


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize("name", OFFSETS)
def test_sound_keeps_its_offset_and_the_clip_its_duration(name, format, clicking, tmp_path):
    path = clicking(name)
    clip = decode(path)
    written = encode(
        [clip.frames],
        tmp_path / "out",
        width=64,
        height=64,
        rate_fps=clip.rate_fps,
        encoding=Encoding.of(JobSpec(prompt="x", format=format)),
        audio=clip.audio,
    )
    assert written.audio_kept
    mixed = name.startswith("surround")
    assert ["mixed down to stereo" in warning for warning in written.warnings] == [True] * mixed
    out = decode(tmp_path / "out")
    frame_s = 1 / float(out.rate_fps)
    assert len(out) == len(clip)
    assert abs(probe(tmp_path / "out").duration_s - probe(path).duration_s) <= frame_s
    flashes_s, heard_s = flash_times_s(out), click_times_s(tmp_path / "out")
    # The first flash is hidden in the beginning, and sound may end within its last packet beyond the picture.
    heard_s = heard_s[(heard_s > frame_s) & (heard_s < out.duration_s - frame_s)]
    begins_s = 1.0 if name.startswith("late_sound") else 0.0
    ends_s = heard_s[-1] + frame_s if name.startswith("late_picture") else out.duration_s
    flashes_s = flashes_s[(flashes_s > begins_s - frame_s) & (flashes_s < ends_s)]
    assert len(flashes_s) == len(heard_s) >= 6
    np.testing.assert_allclose(heard_s, flashes_s, atol=frame_s)
    np.testing.assert_allclose(np.diff(heard_s), CLICK_EVERY_S, atol=0.002)


def written_again(path: Path, folder: Path, **columns: str) -> tuple[Path, tuple[str, ...]]:
    """A source decoded and encoded, as an edit that changes nothing."""
    clip = decode(path)
    out = folder / "again"
    how = Encoding.of(JobSpec(prompt="x", **columns))
    made = encode(
        [clip.frames], out, width=clip.width, height=clip.height, rate_fps=clip.rate_fps, encoding=how, audio=clip.audio
    )
    return out, made.warnings


@pytest.mark.parametrize(("suffix", "default"), [("mp4", 0), ("mkv", 1), ("mkv", 0), ("ts", 0)])
def test_of_several_audio_tracks_the_default_one_is_kept(suffix, default, source_path, ffmpeg, tmp_path):
    tones = [part for hz in (400, 1000) for part in ("-f", "lavfi", "-i", f"sine={hz}:d=1.2")]
    maps = ["-map", "0", "-map", "1", "-map", "2", "-c:v", "copy", "-c:a", "aac"]
    flags = [part for k in (0, 1) for part in (f"-disposition:a:{k}", "default" if k == default else "0")]
    ffmpeg("-i", source_path("h264.mp4"), *tones, *maps, *flags, tmp_path / f"tracks.{suffix}")
    out, warnings = written_again(tmp_path / f"tracks.{suffix}", tmp_path)
    assert warnings == (f"2 audio tracks: number {default + 1} is kept",)
    with av.open(str(out)) as container:
        assert len(container.streams.audio) == 1
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        heard_hz = np.abs(np.fft.rfft(samples)).argmax() * container.streams.audio[0].rate / len(samples)
    assert heard_hz == pytest.approx((400, 1000)[default], abs=3)


def test_without_sound_there_is_none(source_path, tmp_path):
    out, warnings = written_again(source_path("h264.mp4"), tmp_path)
    assert warnings == ()
    assert not probe(out).has_audio


REAL = ("clip-deer", "clip-girl_dancing", "edit-camel", "edit-boat", "portrait-woman1", "pose-dance1", "depth-deer")


@pytest.mark.parametrize(
    "columns",
    [{"format": "mp4"}, {"format": "mp4", "codec": "hevc"}, {"format": "webm"}],
    ids=lambda columns: columns.get("codec", columns["format"]),
)
@pytest.mark.parametrize("name", REAL)
def test_an_edit_that_changes_nothing_keeps_40_db(name, columns, real_clips, ffmpeg_frames, tmp_path):
    clip = decode(real_clips / f"{name}.mp4", longest_px=512, video_length=6)
    how = Encoding.of(JobSpec(prompt="x", **columns))
    encode([clip.frames], tmp_path / "out", width=clip.width, height=clip.height, rate_fps=clip.rate_fps, encoding=how)
    out = ffmpeg_frames(tmp_path / "out", clip.width, clip.height)
    assert 10 * np.log10(255**2 / np.mean((clip.frames.astype(float) - out) ** 2)) >= 40


def test_the_table_in_the_readme_names_what_is_tested():
    section = README.read_text("utf-8").partition("## Sources, and what is kept of them")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    patterns = []
    for row in rows:
        names = re.findall("`([^`]+)`", row.split(" | ")[-1])
        assert names, row
        for name in names:
            if name.startswith("test_"):
                assert f"def {name}(" in tests, name
            else:
                patterns.append(name)
    made = SOURCES | VARIABLE
    for pattern in patterns:
        assert any(fnmatch(name, pattern) for name in made), pattern
    assert not [name for name in made if not any(fnmatch(name, pattern) for pattern in patterns)]
