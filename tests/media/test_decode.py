"""Decoding: the frames are ffmpeg's, bit for bit; times, sizes and damage are handled as promised."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest

from t2vz.errors import SourceCorrupt, SourceEmpty, SourceError, SourceMissing, SourceTooLarge
from t2vz.media.decode import contain, cover, decode, output_size
from t2vz.media.encode import Encoding, encode
from t2vz.media.limits import Limits
from t2vz.media.probe import probe

REAL_CLIPS = (
    "clip-deer.mp4",
    "clip-girl_dancing.mp4",
    "depth-deer.mp4",
    "depth-girl_dancing.mp4",
    "edge-deer.mp4",
    "edge-girl_dancing.mp4",
    "edit-boat.mp4",
    "edit-camel.mp4",
    "pose-dance1.gif",
    "pose-dance1.mp4",
    "portrait-woman1.mp4",
)
LOSSLESS = Encoding(format="mkv", codec="ffv1", crf=None, preset=None, pix_fmt="bgr0")

# clip → (decoder or reason, frames, (width, height)), as ffmpeg's own decode must agree with
KINDS = {
    "closed.mp4": ("decord", 100, (160, 120)),
    "closed.mkv": ("decord", 100, (160, 120)),
    "hevc.mp4": ("decord", 100, (160, 120)),
    "bt709.mp4": ("decord", 100, (160, 120)),
    "full_range.mp4": ("decord", 100, (160, 120)),
    "closed.ts": ("pyav: neither MP4 nor Matroska", 100, (160, 120)),
    "closed.avi": ("pyav: neither MP4 nor Matroska", 100, (160, 120)),
    "open.mp4": ("pyav: open GOP", 100, (160, 120)),
    "open_hevc.mp4": ("pyav: open GOP", 100, (160, 120)),
    "edit_list.mp4": ("pyav: edit list", 67, (160, 120)),
    "rotated.mp4": ("pyav: rotation", 100, (120, 160)),
    "vp9.webm": ("pyav: not H.264/HEVC", 100, (160, 120)),
    "animation.gif": ("pyav: not H.264/HEVC", 20, (160, 120)),
}


def expected_decoder(decoder: str) -> str:
    try:
        import decord  # noqa: F401
    except ImportError:
        return decoder if decoder.startswith("pyav") and "rotation" not in decoder else "pyav"
    return decoder


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_ffmpegs_bit_for_bit(name, clip_path, ffmpeg_frames):
    decoder, count, (width, height) = KINDS[name]
    clip = decode(clip_path(name))
    oracle = ffmpeg_frames(clip_path(name), width, height)
    assert clip.decoder.startswith(expected_decoder(decoder))
    assert clip.frames.shape == oracle.shape == (count, height, width, 3)
    np.testing.assert_array_equal(clip.frames, oracle)
    assert clip.rate_fps == (10 if name.endswith("gif") else 25)
    assert not clip.warnings


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name][1] == 100])
def test_a_late_range_is_the_same_frames(name, clip_path):
    whole = decode(clip_path(name))
    for start in (48, 49, 61, 71, 72, 73):  # around the keyframes of the open GOPs, where seeking goes wrong
        part = decode(clip_path(name), start_s=start / 25, video_length=5)
        np.testing.assert_array_equal(part.frames, whole.frames[start : start + 5])
        np.testing.assert_allclose(part.timestamps_s, np.arange(start, start + 5) / 25, atol=0.0011)


def test_real_clips_are_ffmpegs_bit_for_bit(real_clips, ffmpeg_frames):
    for name in REAL_CLIPS:
        clip = decode(real_clips / name)
        # The one that is HD has no colour tags: BT.709 by convention, which ffmpeg has to be told.
        options = ["-vf", "scale=in_color_matrix=bt709"] if clip.height >= 720 else []
        oracle = ffmpeg_frames(real_clips / name, clip.width, clip.height, *options)
        np.testing.assert_array_equal(clip.frames, oracle, err_msg=name)


def test_timestamps_out_of_order_mean_order_of_arrival(real_clips):
    clip = decode(real_clips / "portrait-woman1.mp4", longest_px=256)
    assert len(clip) == 7
    assert (clip.rate_fps, clip.decoder) == (2, "pyav: non-monotonic PTS")
    assert any("as they arrive" in warning for warning in clip.warnings)
    np.testing.assert_allclose(np.diff(clip.timestamps_s), 0.5)


def test_untagged_hd_is_read_as_bt709(clip_path, ffmpeg_frames):
    clip = decode(clip_path("hd.mp4"))
    oracle = ffmpeg_frames(clip_path("hd.mp4"), 1280, 720, "-vf", "scale=in_color_matrix=bt709")
    np.testing.assert_array_equal(clip.frames, oracle)
    assert (clip.frames != ffmpeg_frames(clip_path("hd.mp4"), 1280, 720)).any()


def numbered(path, numbers, *, rate_fps=Fraction(25), encoding=LOSSLESS, width=64, height=64):
    """A clip whose frame i has the brightness numbers[i]."""
    frames = np.broadcast_to(np.array(numbers, np.uint8)[:, None, None, None], (len(numbers), height, width, 3))
    encode(iter([frames]), path, width=width, height=height, rate_fps=rate_fps, encoding=encoding)
    return path


def shown(clip) -> list[int]:
    return clip.frames[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("fps", [Fraction(8), Fraction(24), Fraction(25), Fraction(60), Fraction(24000, 1001)])
@pytest.mark.parametrize(("start_s", "end_s"), [(0, None), (1, 3), (0.5, 2.02)])
def test_each_frame_is_the_one_shown_at_its_time(tmp_path, fps, start_s, end_s):
    path = numbered(tmp_path / "n.mkv", range(100))  # Matroska rounds times to milliseconds
    clip = decode(path, fps=fps, start_s=start_s, end_s=end_s)
    start, stop = Fraction(start_s), Fraction(4 if end_s is None else str(end_s))
    expected, k = [], 0
    while start + k / fps < stop:
        expected.append(int((start + k / fps) * 25))
        k += 1
    assert shown(clip) == expected
    assert clip.rate_fps == fps


def test_a_rate_that_milliseconds_can_not_hold_loses_and_doubles_no_frame(tmp_path):
    path = numbered(tmp_path / "n.mkv", range(200), rate_fps=Fraction(30000, 1001))
    clip = decode(path)
    assert shown(clip) == list(range(200))
    assert clip.rate_fps == Fraction(30000, 1001)
    assert not clip.warnings


def test_a_variable_rate_keeps_the_time_of_its_frames(clip_path):
    source = probe(clip_path("variable.mp4"))
    clip = decode(clip_path("variable.mp4"))
    assert not source.constant_rate
    assert source.frames == 47  # frames 0 … 19, then every third to 99
    assert clip.rate_fps == Fraction(46 * 25, 99)
    assert any("variable frame rate" in warning for warning in clip.warnings)
    grid_s = np.arange(len(clip)) / float(clip.rate_fps)
    behind_s = grid_s - clip.timestamps_s
    assert behind_s.min() > -0.01
    assert behind_s.max() < 3 / 25


def test_a_frame_is_scaled_to_cover_and_cropped_not_stretched(tmp_path):
    # A circle stays a circle: of the same width and height, to the antialiased pixel.
    y, x = np.mgrid[:200, :400]
    disc = (((x - 200) ** 2 + (y - 100) ** 2 < 60**2) * 255).astype(np.uint8)
    frames = np.repeat(disc[None, :, :, None], 3, axis=3).repeat(2, axis=0)
    encode([frames], tmp_path / "d.mkv", width=400, height=200, rate_fps=Fraction(4), encoding=LOSSLESS)
    for kwargs, size, diameter in (
        ({"width": 128, "height": 128}, (128, 128), 120 * 128 / 200),
        ({"width": 256, "height": 64}, (256, 64), 120 * 256 / 400),
        ({"longest_px": 512}, (512, 256), 120 * 512 / 400),
    ):
        clip = decode(tmp_path / "d.mkv", **kwargs)
        assert (clip.width, clip.height) == size
        grey = clip.frames[0, :, :, 0].astype(float) / 255
        assert grey[size[1] // 2].sum() == pytest.approx(diameter, abs=1.5)
        assert grey[:, size[0] // 2].sum() == pytest.approx(min(diameter, size[1]), abs=1.5)


def test_padding_keeps_the_whole_picture_in_its_aspect(tmp_path):
    y, x = np.mgrid[:200, :400]
    disc = np.where((x - 200) ** 2 + (y - 100) ** 2 < 60**2, 255, 60).astype(np.uint8)
    frames = np.repeat(disc[None, :, :, None], 3, axis=3).repeat(2, axis=0)
    encode([frames], tmp_path / "d.mkv", width=400, height=200, rate_fps=Fraction(4), encoding=LOSSLESS)
    for width, height, across, bars in ((128, 128, 38.4, (0, 32)), (256, 64, 38.4, (64, 0)), (512, 256, 153.6, (0, 0))):
        picture = decode(tmp_path / "d.mkv", width=width, height=height, fit="pad").frames[0, :, :, 0]
        assert picture.shape == (height, width)
        inside = picture[bars[1] : height - bars[1], bars[0] : width - bars[0]]
        assert inside.min() > 0, "all of it is the picture"
        assert picture.sum(dtype=int) == inside.sum(dtype=int), "the bars are black"
        disc_of = (picture.astype(float) - 60) / 195
        assert disc_of[height // 2].clip(0).sum() == pytest.approx(across, abs=1.5)
        assert disc_of[:, width // 2].clip(0).sum() == pytest.approx(across, abs=1.5)
    assert contain(np.full((10, 1000, 3), 9, np.uint8), 64, 64).any(), "a line at least of the most extreme"


def test_sample_aspect_is_applied(clip_path, ffmpeg_frames):
    clip = decode(clip_path("anamorphic.mp4"))
    assert (clip.width, clip.height) == (320, 120)
    oracle = ffmpeg_frames(clip_path("anamorphic.mp4"), 320, 120, "-vf", "format=rgb24,scale=320:120:flags=bicubic")
    assert np.abs(clip.frames.astype(int) - oracle).mean() < 2


def test_downscaling_does_not_alias():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(cover(stripes, 64, 64).astype(int) - 127.5).max() <= 1


@pytest.mark.parametrize(
    ("source", "asked", "size"),
    [
        ((1920, 1080), (None, None, None), (1920, 1080)),
        ((1920, 1080), (None, None, 512), (512, 288)),
        ((1080, 1920), (None, None, 512), (288, 512)),
        ((854, 480), (None, None, None), (856, 480)),
        ((1920, 1080), (640, None, 512), (640, 360)),
        ((1920, 1080), (None, 256, None), (456, 256)),
        ((1920, 1080), (512, 512, 999), (512, 512)),
        ((48, 32), (None, None, None), (96, 64)),
        ((128, 128), (None, None, 512), (512, 512)),
    ],
)
def test_output_size(source, asked, size):
    assert output_size(*source, *asked) == size


def test_an_extreme_aspect_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(SourceError, match="set both width and height"):
        output_size(2000, 100, None, None, 512)
    path = numbered(tmp_path / "n.mkv", range(3), width=800, height=40)
    with pytest.raises(SourceError, match=r"n\.mkv"):
        decode(path, longest_px=512)
    assert decode(path, width=128, height=64).frames.shape == (3, 64, 128, 3)


def test_a_size_that_changes_in_mid_stream_is_brought_to_one(tmp_path, ffmpeg):
    raw = b""
    for size in ("320x240", "160x160"):
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r=25:d=1", "-c:v", "libx264", tmp_path / "part.h264")
        raw += (tmp_path / "part.h264").read_bytes()
    (tmp_path / "both.h264").write_bytes(raw)
    clip = decode(tmp_path / "both.h264")
    assert clip.frames.shape[1:] == (240, 320, 3)
    assert len(clip) >= 48
    assert any("160x160 and 320x240" in warning for warning in clip.warnings)


def test_a_folder_is_sorted_naturally_and_takes_the_rate_asked_for(tmp_path):
    from PIL import Image

    for i in (1, 2, 10):
        Image.fromarray(np.full((64, 80, 3), i, np.uint8)).save(tmp_path / f"img{i}.png")
    Image.fromarray(np.full((64, 80), 11 << 8, np.uint16)).save(tmp_path / "img11.png")
    (tmp_path / "notes.txt").write_text("not an image")
    clip = decode(tmp_path, fps=Fraction(6))
    assert shown(clip) == [1, 2, 10, 11]
    assert (clip.rate_fps, clip.decoder, clip.audio) == (6, "pillow", None)
    assert any("no rate" in warning for warning in decode(tmp_path).warnings)
    (tmp_path / "img3.png").write_bytes((tmp_path / "img2.png").read_bytes()[:60])
    with pytest.raises(SourceCorrupt, match=r"img3\.png"):
        decode(tmp_path, fps=Fraction(6))


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    shown_as = {  # what EXIF says the stored rows and columns are
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.swapaxes(0, 1),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).swapaxes(0, 1),
        8: np.rot90(picture),
    }
    for orientation, expected in shown_as.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        folder = tmp_path / str(orientation)
        folder.mkdir()
        Image.fromarray(picture).save(folder / "1.png", exif=exif)
        np.testing.assert_array_equal(decode(folder).frames[0], expected, err_msg=str(orientation))


def test_an_animated_webp_keeps_its_times(tmp_path):
    from PIL import Image

    frames = [Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)) for i in range(5)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=[100, 100, 300, 100, 100], lossless=True
    )
    clip = decode(tmp_path / "a.webp", fps=Fraction(10))
    assert shown(clip) == [0, 40, 80, 80, 80, 120, 160]


def test_a_long_clip_is_a_memory_map_that_leaves_no_file(tmp_path, clip_path, monkeypatch):
    monkeypatch.setattr("t2vz.clip.MAX_IN_MEMORY_BYTES", 10**6)
    clip = decode(clip_path("closed.mp4"), workspace=tmp_path)
    assert isinstance(clip.frames, np.memmap)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    in_memory = decode(clip_path("closed.mp4"))
    assert not isinstance(in_memory.frames, np.memmap)
    np.testing.assert_array_equal(clip.frames, in_memory.frames)


def test_audio_is_that_of_the_range_delivered(tmp_path, ffmpeg):
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=10:d=3", "-f", "lavfi", "-i", "sine=d=3", path)
    audio = decode(path, start_s=1, fps=Fraction(5), video_length=4).audio
    assert (audio.path, audio.start_s, audio.end_s) == (str(path), 1.0, pytest.approx(1.8))


def test_ranges_outside_the_source(clip_path):
    path = clip_path("closed.mp4")
    with pytest.raises(SourceEmpty, match="lasts 4 s"):
        decode(path, start_s=4)
    clip = decode(path, start_s=3.8, end_s=9)
    assert len(clip) == 5
    assert any("before end_s" in warning for warning in clip.warnings)
    assert any("video_length" in warning for warning in decode(path, video_length=101).warnings)


def test_limits(clip_path):
    path = clip_path("closed.mp4")
    with pytest.raises(SourceTooLarge, match="video_length"):
        decode(path, limits=Limits(max_frames=99))
    assert len(decode(path, limits=Limits(max_frames=99), video_length=99)) == 99
    with pytest.raises(SourceTooLarge, match="160x120"):
        probe(path, Limits(max_pixels=160 * 120 - 1))
    with pytest.raises(SourceTooLarge, match="cut it first"):
        probe(path, Limits(max_source_bytes=1000))


def test_missing_frames_are_reported_and_the_rest_delivered(tmp_path, clip_path):
    data = clip_path("closed.mkv").read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    clip = decode(cut)
    assert 10 < len(clip) < 100
    np.testing.assert_array_equal(clip.frames[:10], decode(clip_path("closed.mkv")).frames[:10])

    damaged = bytearray(clip_path("closed.mp4").read_bytes())
    source = clip_path("closed.mp4")
    with av.open(str(source)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for position, size in spans[40:60]:
        damaged[position : position + size] = bytes(size)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    clip = decode(tmp_path / "damaged.mp4")
    assert any("missing" in warning for warning in clip.warnings)
    np.testing.assert_array_equal(clip.frames[:30], decode(source).frames[:30])
    assert clip.frames.reshape(len(clip), -1).mean(axis=1).min() > 50  # the frame before is shown on, not black


def test_bad_sources_have_typed_errors(tmp_path, clip_path, ffmpeg):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 1000)
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:4,\n" + str(clip_path("closed.ts")) + "\n#EXT-X-ENDLIST")
    (tmp_path / "no_index.mp4").write_bytes(clip_path("closed.mp4").read_bytes()[:5000])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4")
    for name, error in {
        "absent.mp4": SourceMissing,
        "empty.mp4": SourceEmpty,
        "folder": SourceEmpty,
        "sound.mp4": SourceEmpty,
        "text.mp4": SourceCorrupt,
        "playlist.mp4": SourceCorrupt,
        "no_index.mp4": SourceCorrupt,
        "broken.png": SourceCorrupt,
    }.items():
        with pytest.raises(SourceError, match=name) as caught:
            decode(tmp_path / name)
        assert type(caught.value) is error, name
    with pytest.raises(SourceError, match="only local files"):
        probe("gs://bucket/clip.mp4")


def test_mutated_files_give_frames_or_a_source_error(tmp_path, clip_path):
    rng = np.random.default_rng(0)
    for name in ("closed.mp4", "vp9.webm", "animation.gif"):
        data = np.frombuffer(clip_path(name).read_bytes(), np.uint8)
        for i in range(6):
            mutant = data.copy()
            mutant[rng.integers(0, len(data), 40)] = rng.integers(0, 256, 40)
            path = tmp_path / f"{i}_{name}"
            path.write_bytes(mutant.tobytes())
            with suppress(SourceError):
                assert 1 <= len(decode(path, video_length=20)) <= 20


@pytest.mark.parametrize(("start_s", "end_s", "fps", "expected"), [(0, 1, 4, [0, 0, 1, 1]), (0.3, 0.9, 2, [0, 1])])
def test_a_range_of_disordered_timestamps_is_the_same_range_of_the_whole(real_clips, start_s, end_s, fps, expected):
    path = real_clips / "portrait-woman1.mp4"
    whole = decode(path, width=64)
    part = decode(path, start_s=start_s, end_s=end_s, fps=Fraction(fps), width=64)
    assert np.array_equal(part.frames, whole.frames[expected])


def test_a_condition_video_is_not_cut_in_silence(clip_path):
    cut, whole = (
        decode(clip_path("closed.mp4"), video_length=length, condition_video=True).warnings for length in (30, 100)
    )
    assert cut == ("condition video cut from 100 to 30 frames",)
    assert whole == ()


@pytest.mark.parametrize(
    ("source", "asked", "said"),
    [
        ((65, 33), (64, None), "would become 64x32"),
        ((4000, 2), (64, None), "would become 64x1"),
        ((33, 65), (4096, None), "would become 4096x8068"),
    ],
)
def test_a_size_out_of_bounds_is_told_as_it_would_be(source, asked, said):
    with pytest.raises(SourceError, match=said):
        output_size(*source, *asked, None)
