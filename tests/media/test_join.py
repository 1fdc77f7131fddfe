"""join: the parts' very frames, one after the other, with the sound of the whole; ffmpeg is the oracle."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import frames_of, lag_s, make_clip, sound_of

from t2vz.clip import AudioReference
from t2vz.errors import EncodeError
from t2vz.media.decode import decode
from t2vz.media.encode import Encoding, encode
from t2vz.media.join import join
from t2vz.media.probe import probe
from t2vz.spec import JobSpec

RATE = Fraction(24)
LENGTHS = (30, 1, 2, 40, 23)  # parts too short to have B-frames beside such that have


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("source") / "clip.mp4", 4, "24", "128x96")


def encoded_parts(source: Path, folder: Path, encoding: Encoding, lengths: tuple[int, ...] = LENGTHS) -> list[Path]:
    frames, parts, at = decode(source).frames, [], 0
    for number, count in enumerate(lengths):
        path = folder / f"{number}{'' if encoding.format == 'png' else '.' + encoding.format}"
        sound = AudioReference(str(source), at / 24, (at + count) / 24)
        encode([frames[at : at + count]], path, width=128, height=96, rate_fps=RATE, encoding=encoding, audio=sound)
        parts.append(path)
        at += count
    return parts


FORMATS = [("mp4", "h264"), ("mp4", "hevc"), ("webm", "vp9"), ("mkv", "ffv1"), ("gif", None), ("png", None)]


@pytest.mark.parametrize(("format", "codec"), FORMATS)
def test_joined_frames_are_the_parts_frames(source: Path, tmp_path: Path, format: str, codec: str | None) -> None:
    encoding = Encoding.of(JobSpec(prompt="-", format=format, codec=codec))
    parts = encoded_parts(source, tmp_path, encoding)
    whole = AudioReference(str(source), 0, 4)
    made = join(parts, tmp_path / "joined", frames=LENGTHS, rate_fps=RATE, encoding=encoding, audio=whole)
    assert made.frames == sum(LENGTHS) == 96
    if format == "png":
        images = [image.read_bytes() for part in parts for image in sorted(part.glob("*.png"))]
        assert [image.read_bytes() for image in sorted(made.path.glob("*.png"))] == images
        return
    expected = np.concatenate([frames_of(part, 128, 96) for part in parts])
    found = frames_of(made.path, 128, 96)
    assert found.shape == expected.shape
    if format == "gif":  # has a palette a frame: made once more, and told
        assert np.abs(found.astype(int) - expected).mean() < 3
        assert any("once more" in warning for warning in made.warnings)
        return
    assert np.array_equal(found, expected)
    assert made.warnings == ()
    assert made.audio_kept
    seen = probe(made.path)
    assert (seen.frames, seen.rate_fps, seen.first_pts_s, seen.constant_rate) == (96, 24, 0.0, True)
    assert np.allclose(seen.timestamps_s, np.arange(96) / 24, atol=seen.tick_s)
    sound, original = sound_of(made.path), sound_of(source)
    assert abs(lag_s(sound, original)) <= 0.001
    assert abs(len(sound) - len(original)) / 8000 < 0.05
    if codec == "h264":
        assert seen.decord_reason == ""  # as plain as what one row gives


def test_sound_of_a_range_begins_with_its_first_frame(source: Path, tmp_path: Path) -> None:
    encoding = Encoding()
    parts = encoded_parts(source, tmp_path, encoding, (10, 20))
    audio = AudioReference(str(source), 1.5, 1.5 + 30 / 24)
    made = join(parts, tmp_path / "joined", frames=(10, 20), rate_fps=RATE, encoding=encoding, audio=audio)
    assert abs(lag_s(sound_of(made.path), sound_of(source)) + 1.5) < 0.025  # a copied packet of sound has 23 ms


def test_equal_parts_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    parts = encoded_parts(source, tmp_path, Encoding(), (5, 6))
    made = [
        join(parts, tmp_path / name, frames=(5, 6), rate_fps=RATE, encoding=Encoding(), metadata={"id": "x"})
        for name in ("one", "two")
    ]
    assert made[0].sha256 == made[1].sha256


def test_parts_that_differ_are_encoded_once_more_and_it_is_told(source: Path, tmp_path: Path) -> None:
    frames = decode(source).frames
    parts = []
    for number, preset in enumerate(("medium", "ultrafast")):  # with CABAC and without
        parts.append(tmp_path / f"{number}.mp4")
        encode([frames[:7]], parts[-1], width=128, height=96, rate_fps=RATE, encoding=Encoding(preset=preset))
    made = join(parts, tmp_path / "joined", frames=(7, 7), rate_fps=RATE, encoding=Encoding())
    assert made.warnings == ("encoded once more: the parts were encoded differently",)
    expected = np.concatenate([frames_of(part, 128, 96) for part in parts])
    found = frames_of(made.path, 128, 96)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("format", ["mp4", "png", "gif"])
def test_a_part_without_all_its_frames_is_refused_and_leaves_nothing(source: Path, tmp_path: Path, format: str) -> None:
    encoding = Encoding.of(JobSpec(prompt="-", format=format))
    parts = encoded_parts(source, tmp_path, encoding, (4, 5))
    with pytest.raises(EncodeError, match="5 frames where 6 are needed"):
        join(parts, tmp_path / "joined", frames=(4, 6), rate_fps=RATE, encoding=encoding)
    assert not (tmp_path / "joined").exists()
