"""Encoding: colours, rates, sound and metadata survive; a file is there whole or not at all."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from clicks import CLICK, CLICK_EVERY_S, FLASH, click_times_s, flash_times_s

from t2vz.clip import AudioReference
from t2vz.errors import DeviceLost, EncodeError, OutputError, SourceError, SourceMissing
from t2vz.media import encode as encode_module
from t2vz.media.decode import decode
from t2vz.media.encode import METADATA_FILE, Encoding, checksum, encode, publish
from t2vz.media.fingerprint import WHOLE_UP_TO_BYTES, fingerprint
from t2vz.media.probe import probe
from t2vz.spec import JobSpec

WIDTH, HEIGHT, COUNT, RATE_FPS = 128, 96, 12, Fraction(8)
METADATA = {"prompt": "ein Bär, “größer”", "seed": 2**62, "t0": None}
ALL = [("mp4", "h264"), ("mp4", "hevc"), ("webm", "vp9"), ("mkv", "ffv1"), ("gif", None), ("png", None)]


def encoding(format: str, codec: str | None = None, **columns) -> Encoding:
    return Encoding.of(JobSpec(mode="text", prompt="x", format=format, codec=codec, **columns))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Smooth shades with a little texture that drift, as in a natural picture."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / WIDTH
    grain = np.random.default_rng(0).normal(0, 1.5, (HEIGHT, WIDTH, 1))
    out = []
    for k in range(COUNT):
        red = 40 + 170 * x + 25 * np.sin(9 * y + k / 5)
        green = 60 + 150 * y + 25 * np.sin(7 * x - k / 6)
        blue = 128 + 90 * np.sin(4 * (x + y) + k / 8)
        out.append(np.clip(np.stack([red, green, blue], axis=-1) + grain, 0, 255))
    return np.array(out).astype(np.uint8)


def written(frames: np.ndarray, path: Path, how: Encoding, **kwargs):
    batches = (frames[i : i + 7] for i in range(0, len(frames), 7))
    height, width = frames.shape[1:3]
    return encode(batches, path, width=width, height=height, encoding=how, **{"rate_fps": RATE_FPS, **kwargs})


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize(("format", "codec"), ALL)
def test_equal_frames_give_equal_bytes(frames, tmp_path, format, codec):
    first = written(frames, tmp_path / "a", encoding(format, codec), metadata=METADATA)
    again = written(frames, tmp_path / "b", encoding(format, codec), metadata=METADATA)
    assert first.sha256 == again.sha256
    assert (first.sha256, first.size_bytes) == checksum(tmp_path / "a")
    assert (first.frames, first.audio_kept, first.warnings) == (COUNT, False, ())
    other = written(frames[::-1], tmp_path / "c", encoding(format, codec), metadata=METADATA)
    assert other.sha256 != first.sha256


@pytest.mark.parametrize(("format", "codec"), [("mp4", "h264"), ("mp4", "hevc"), ("webm", "vp9")])
def test_colours_survive(frames, tmp_path, ffmpeg_frames, format, codec):
    written(frames, tmp_path / "v", encoding(format, codec))
    seen = ffmpeg_frames(tmp_path / "v", WIDTH, HEIGHT)
    assert psnr_db(frames, seen) >= 40
    with av.open(str(tmp_path / "v")) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_range, context.colorspace) == (1, 1)  # limited, BT.709


@pytest.mark.parametrize("format", ["mkv", "png"])
def test_lossless_formats_are_bit_exact(frames, tmp_path, format, ffmpeg_frames):
    noise = np.random.default_rng(1).integers(0, 256, frames.shape, dtype=np.uint8)
    written(noise, tmp_path / "v", encoding(format))
    np.testing.assert_array_equal(decode(tmp_path / "v", fps=RATE_FPS).frames, noise)
    if format == "mkv":
        np.testing.assert_array_equal(ffmpeg_frames(tmp_path / "v", WIDTH, HEIGHT), noise)


def test_a_gif_keeps_frames_and_colours(frames, tmp_path):
    written(frames, tmp_path / "v", encoding("gif"), rate_fps=Fraction(12))  # 8.33 hundredths: rounded, no drift
    with av.open(str(tmp_path / "v")) as container:
        seen = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert len(seen) == COUNT
    np.testing.assert_allclose([time for time, _ in seen], np.arange(COUNT) / 12, atol=0.0051)
    assert psnr_db(frames, np.array([frame for _, frame in seen])) > 33


@pytest.mark.parametrize("rate_fps", [Fraction(30000, 1001), Fraction(32, 15), Fraction(24), Fraction(1150, 99)])
@pytest.mark.parametrize("count", [1, 5])
def test_the_rate_is_exact(frames, tmp_path, rate_fps, count):
    written(frames[:count], tmp_path / "v.mp4", encoding("mp4"), rate_fps=rate_fps)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate_fps
        assert stream.duration * stream.time_base == count / rate_fps


@pytest.mark.parametrize("rate_fps", [Fraction(24), Fraction(30), Fraction(50)])
def test_a_gif_has_the_rate_on_average(frames, tmp_path, ffmpeg, rate_fps):
    written(np.tile(frames, (5, 1, 1, 1)), tmp_path / "v", encoding("gif"), rate_fps=rate_fps)
    shown = ffmpeg("-i", tmp_path / "v", "-f", "null", "-progress", "-", "-").decode()
    lasts_s = int(shown.split("out_time_us=")[-1].split()[0]) / 1e6
    assert lasts_s == pytest.approx(5 * COUNT / rate_fps, abs=0.006)


def test_a_gif_above_its_rate_is_refused(frames, tmp_path):
    with pytest.raises(EncodeError, match="set fps to 50 or lower"):
        written(frames, tmp_path / "v", encoding("gif"), rate_fps=Fraction(60))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_hevc_videos(frames, tmp_path, ffmpeg_frames, count):
    how = encoding("mp4", "hevc", preset="veryslow", pix_fmt="yuv444p")
    for attempt in range(3):  # x265's unset timestamps were what the memory held
        made = written(frames[:count], tmp_path / f"{attempt}", how)
        assert len(ffmpeg_frames(made.path, WIDTH, HEIGHT)) == count
        with av.open(str(made.path)) as container:
            assert [frame.time for frame in container.decode(video=0)] == [k / RATE_FPS for k in range(count)]


def test_what_the_encoder_refuses_is_told_in_the_users_words(frames, tmp_path):
    how = Encoding("mp4", "h264", 18, "no-such-preset", "yuv420p")
    with pytest.raises(
        EncodeError, match=r"h264 \(yuv420p, preset no-such-preset\) of 128x96: .*another preset"
    ) as caught:
        written(frames, tmp_path / "v", how)
    assert str(tmp_path) not in caught.value.message
    assert "Errno" not in caught.value.message


def test_the_parameters_are_in_the_file(frames, tmp_path):
    from PIL import Image

    for format in ("mp4", "webm", "mkv"):
        written(frames, tmp_path / format, encoding(format), metadata=METADATA)
        with av.open(str(tmp_path / format)) as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
        assert json.loads(tags["comment"]) == METADATA
    assert (tmp_path / "mp4").read_bytes().index(b"moov") < (tmp_path / "mp4").read_bytes().index(b"mdat")

    written(frames, tmp_path / "png", encoding("png"), metadata=METADATA)
    assert json.loads((tmp_path / "png" / METADATA_FILE).read_text(encoding="utf-8")) == METADATA

    long = {**METADATA, "negative_prompt": "blurry, " * 100}  # over 255 bytes: several blocks
    written(frames, tmp_path / "gif", encoding("gif"), metadata=long)
    assert json.dumps(long, sort_keys=True, ensure_ascii=False).encode()[:200] in (tmp_path / "gif").read_bytes()
    with Image.open(tmp_path / "gif") as image:
        assert image.n_frames == COUNT


@pytest.fixture(scope="module")
def clicks(ffmpeg, tmp_path_factory):
    """A source that flashes white and clicks every half second; suffix → path."""
    folder = tmp_path_factory.mktemp("clicks")
    for suffix, codec in ((".mp4", "aac"), (".mkv", "libopus"), (".avi", "pcm_s16le"), (".ts", "mp2")):
        ffmpeg(
            *("-f", "lavfi", "-i", "color=black:s=64x64:r=16:d=5"),
            *("-f", "lavfi", "-i", f"{CLICK}:d=5"),
            *("-vf", FLASH),
            *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", codec, folder / f"clicks{suffix}"),
        )
    return lambda suffix: folder / f"clicks{suffix}"


@pytest.mark.parametrize("format", ["mp4", "webm", "mkv"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_sound_stays_with_the_frames(clicks, tmp_path, format, suffix):
    clip = decode(clicks(suffix), start_s=0.75, end_s=3.75)
    made = written(clip.frames, tmp_path / "v", encoding(format), rate_fps=clip.rate_fps, audio=clip.audio)
    assert (made.audio_kept, made.warnings) == (True, ())
    out = decode(tmp_path / "v")
    flashes_s = flash_times_s(out)
    assert len(flashes_s) == 6
    heard_s = click_times_s(tmp_path / "v")
    assert len(heard_s) == 6
    np.testing.assert_allclose(heard_s, flashes_s, atol=1 / 16)
    np.testing.assert_allclose(heard_s, 0.25 + CLICK_EVERY_S * np.arange(6), atol=0.012)


@pytest.mark.parametrize("format", ["gif", "png"])
def test_no_sound_where_none_fits(frames, clicks, tmp_path, format):
    audio = AudioReference(str(clicks(".mp4")), 0, 3)
    assert not written(frames, tmp_path / "v", encoding(format), audio=audio).audio_kept


def test_sound_that_can_not_be_read_is_a_warning(frames, tmp_path, clip_path, clicks):
    for source in (tmp_path / "gone.mp4", clip_path("closed.mp4")):
        made = written(frames, tmp_path / source.stem, encoding("mp4"), audio=AudioReference(str(source), 0, 3))
        assert not made.audio_kept
        assert "audio" in made.warnings[0]
        assert len(decode(made.path)) == COUNT
    late = AudioReference(str(clicks(".mp4")), 100, 103)
    assert written(frames, tmp_path / "late", encoding("mp4"), audio=late).frames == COUNT


@pytest.mark.parametrize("format", ["mp4", "gif", "png"])
def test_nothing_is_left_of_what_failed(frames, tmp_path, format):
    def lost():
        yield frames[:9]
        raise DeviceLost("cuda:0: device lost")

    def interrupted():
        yield frames[:9]
        raise KeyboardInterrupt

    sizes = {"width": WIDTH, "height": HEIGHT, "rate_fps": RATE_FPS, "encoding": encoding(format)}
    for batches, error in (
        (lost(), DeviceLost),  # the engine's own error arrives as it is
        (interrupted(), KeyboardInterrupt),
        (iter([]), EncodeError),
        (iter([frames, frames[:, ::2]]), EncodeError),
        (iter([frames.astype(np.float32)]), EncodeError),
    ):
        with pytest.raises(error):
            encode(batches, tmp_path / "v", **sizes)
        assert list(tmp_path.iterdir()) == []


def test_what_the_output_refuses_is_an_output_error(frames, tmp_path):
    with pytest.raises(OutputError, match="folder"):
        written(frames, tmp_path / "none" / "v.mp4", encoding("mp4"))
    (tmp_path / "there").touch()
    with pytest.raises(OutputError, match="exists"):
        written(frames, tmp_path / "there", encoding("mp4"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, Linux's always full device")
def test_a_full_disk_is_an_output_error(frames, tmp_path, monkeypatch):
    (tmp_path / "v").symlink_to("/dev/full")
    monkeypatch.setattr(encode_module, "_check", lambda *arguments: None)  # which minds that it is there
    with pytest.raises(OutputError, match="no space"):
        written(np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8), tmp_path / "v", encoding("mkv"))
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_are_refused_before_a_frame_is_made(tmp_path):
    def never():
        raise AssertionError("a frame was asked for")
        yield

    with pytest.raises(EncodeError, match="odd"):
        encode(never(), tmp_path / "v", width=65, height=64, rate_fps=RATE_FPS, encoding=encoding("mp4"))


@pytest.mark.parametrize(("format", "name"), [("mp4", "v.mp4"), ("png", "v")])
def test_publish_keeps_the_same_and_replaces_what_is_damaged(frames, tmp_path, format, name):
    final = tmp_path / "deep" / name
    first = publish(written(frames, tmp_path / "w1", encoding(format)), tmp_path, f"deep/{name}")
    assert (first.path, first.mtime_ns) == (final, final.stat().st_mtime_ns)
    assert checksum(final)[0] == first.sha256
    same = publish(written(frames, tmp_path / "w2", encoding(format)), tmp_path, f"deep/{name}")
    assert "there already" in same.warnings[0]
    damaged = next(final.iterdir()) if final.is_dir() else final
    damaged.write_bytes(damaged.read_bytes()[:-10])
    mended = publish(written(frames, tmp_path / "w3", encoding(format)), tmp_path, f"deep/{name}")
    assert "damaged" in mended.warnings[0]
    assert checksum(final)[0] == first.sha256
    assert not (tmp_path / "w3").exists()


def test_defaults_are_those_the_columns_promise():
    assert encoding("mp4") == Encoding("mp4", "h264", 17, "medium", "yuv420p")
    assert encoding("mp4", "hevc", crf=30, preset="fast", pix_fmt="yuv444p") == Encoding(
        "mp4", "hevc", 30, "fast", "yuv444p"
    )
    assert encoding("webm") == Encoding("webm", "vp9", 14, None, "yuv420p")
    assert encoding("mkv").codec == "ffv1"


def test_fingerprint_is_of_the_content(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"one")
    (tmp_path / "b.mp4").write_bytes(b"one")
    assert fingerprint(tmp_path / "a.mp4") == fingerprint(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").write_bytes(b"two")
    os.utime(tmp_path / "b.mp4", ns=(1, 1))
    assert fingerprint(tmp_path / "a.mp4") != fingerprint(tmp_path / "b.mp4")

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"one")
    before = fingerprint(folder)
    (folder / "notes.txt").write_bytes(b"no image")
    assert fingerprint(folder) == before
    (folder / "1.png").rename(folder / "2.png")
    assert fingerprint(folder) != before


def test_what_is_no_regular_file_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("/dev/zero")
    for ask in (fingerprint, probe):
        for path, error, said in (
            (tmp_path / "pipe.mp4", SourceError, "neither a file nor a folder"),
            (tmp_path / "link.mp4", SourceError, "neither a file nor a folder"),
            ("http://host/clip.mp4", SourceError, "^http://host/clip.mp4: only local files"),
            (tmp_path / "none.mp4", SourceMissing, "no such file"),
            (tmp_path / "none.mp4" / "below", SourceMissing, "no such file"),
            (f"/{'x' * 3000}", SourceError, "can't be read"),
        ):
            with pytest.raises(error, match=said) as caught:
                ask(path)
            assert type(caught.value) is error
            assert len(caught.value.message) < 400
            assert "OSError" not in caught.value.message


def test_links_in_circles_among_images_are_passed_over(tmp_path):
    (tmp_path / "1.png").write_bytes(b"one")
    before = fingerprint(tmp_path)
    (tmp_path / "2.png").symlink_to("2.png")
    assert fingerprint(tmp_path) == before


def test_fingerprint_of_a_huge_file_is_sampled(tmp_path):
    size = WHOLE_UP_TO_BYTES * 4
    found = []
    for position in (None, 0, size - 1):
        path = tmp_path / f"{position}.mp4"
        with path.open("wb") as file:
            file.truncate(size)  # sparse
            if position is not None:
                file.seek(position)
                file.write(b"x")
        found.append(fingerprint(path))
    assert len(set(found)) == 3
    assert all(value.startswith("sha256-sampled:") for value in found)


def test_narrow_noise_gives_the_same_file_every_time(tmp_path):
    """x264's AVX-512 code does not (see `encode._codec_options`): three different files in a hundred."""
    blocks = np.random.default_rng(3).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    frames = blocks.repeat(4, 1).repeat(4, 2)
    frames = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in frames])
    made = set()
    for i in range(30):
        encoded = encode(
            iter([frames]),
            tmp_path / str(i),
            width=64,
            height=64,
            rate_fps=Fraction(8),
            encoding=Encoding(),
            audio=None,
            metadata={},
        )
        made.add(encoded.sha256)
    assert len(made) == 1
