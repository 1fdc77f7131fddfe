"""The watermark: not seen, read back from every file that can carry it, and never where there is none."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from t2vz.media.encode import Encoding, encode
from t2vz.media.watermark import marking, read
from t2vz.spec import JobSpec, job_id, seed_of

TEXT = "t2vz/26"


def clip(frames: int, height: int, width: int, kind: str = "scene") -> np.ndarray:
    """uint8 (F, H, W, 3): a moving scene of surfaces, edges and grain; or one flat colour."""
    if kind == "flat":
        return np.full((frames, height, width, 3), (90, 120, 60), np.uint8)
    if kind == "dark":
        return np.zeros((frames, height, width, 3), np.uint8)
    random = np.random.default_rng(3)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    grain = cv2.GaussianBlur(random.normal(0, 25, (height, width, 3)).astype(np.float32), (0, 0), 1.5)
    out = []
    for t in range(frames):
        picture = np.stack([128 + 90 * np.sin((x + 3 * t) / 37 + c) * np.cos(y / 29 - c) for c in range(3)], -1) + grain
        cv2.circle(picture, (width // 4 + 4 * t, height // 2), min(height, width) // 5, (230, 40, 60), -1)
        out.append(picture.clip(0, 255).astype(np.uint8))
    return np.stack(out)


def marked(frames: np.ndarray, text: str = TEXT) -> np.ndarray:
    return np.concatenate(list(marking(filter(len, (frames[:2], frames[2:])), text)))


def stored(frames: np.ndarray, path: Path, **encoding: object) -> np.ndarray:
    """The frames as they come out of a file."""
    format = str(encoding.setdefault("format", "mp4"))
    spec = JobSpec(prompt="x", **encoding)
    encode(
        [frames], path, width=frames.shape[2], height=frames.shape[1], rate_fps=Fraction(8), encoding=Encoding.of(spec)
    )
    if format == "png":
        return np.stack([cv2.imread(str(file))[..., ::-1] for file in sorted(path.glob("*.png"))])
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("kind", ["scene", "flat"])
@pytest.mark.parametrize("size", [(4, 64, 64), (3, 256, 384)])
@pytest.mark.parametrize(
    "encoding",
    [
        {},
        {"codec": "hevc"},
        {"format": "webm"},
        {"format": "mkv"},
        {"format": "png"},
        {"format": "gif"},
        {"preset": "ultrafast"},
    ],
    ids=lambda encoding: "-".join(map(str, encoding.values())) or "default",
)
def test_it_outlives_the_encoding(encoding: dict[str, object], size: tuple[int, int, int], kind: str, tmp_path: Path):
    frames = stored(marked(clip(*size, kind)), tmp_path / "video", **encoding)
    assert read([frames]) == TEXT


@pytest.mark.parametrize("kind", ["scene", "flat"])
def test_it_outlives_a_coarser_encoding_of_larger_frames(kind: str, tmp_path: Path):
    assert read([stored(marked(clip(4, 128, 128, kind)), tmp_path / "video", crf=24)]) == TEXT


def test_one_frame_of_a_larger_video_is_enough(tmp_path: Path):
    frames = stored(marked(clip(4, 256, 256)), tmp_path / "video")
    assert [read([frame[None]]) for frame in frames] == [TEXT] * 4


def test_it_is_not_seen():
    plain = clip(3, 256, 384)
    change = marked(plain).astype(int) - plain
    assert 10 * np.log10(255**2 / (change**2).mean()) > 43
    assert np.abs(change).max() <= 8
    assert change.any()


@pytest.mark.parametrize("kind", ["scene", "flat", "dark"])
def test_where_there_is_none_none_is_read(kind: str, tmp_path: Path):
    assert read([clip(8, 64, 64, kind)]) is None
    assert read([stored(clip(3, 256, 256, kind), tmp_path / "video")]) is None
    assert read([clip(2, 8, 8, kind)]) is None
    assert read([]) is None


@pytest.mark.parametrize("text", ["a", "12345678", "für uns", "日本"])
def test_any_text_of_up_to_8_bytes(text: str):
    assert read([marked(clip(2, 128, 128), text)]) == text


def test_batches_and_reruns_change_nothing():
    frames = clip(5, 72, 100)
    whole = np.concatenate(list(marking([frames], TEXT)))
    assert np.array_equal(whole, marked(frames))
    assert whole.shape == frames.shape


@pytest.mark.parametrize("text", ["123456789", "日本語", "a\0b"])
def test_what_can_not_be_a_mark_is_told_before(text: str, explained: Callable[..., str]):
    assert explained(watermark=text).startswith("watermark must be 1 to 8 letters")


@pytest.fixture
def explained() -> Callable[..., str]:
    from pydantic import ValidationError

    from t2vz.manifest import explained

    def tell(**columns: object) -> str:
        with pytest.raises(ValidationError) as caught:
            JobSpec(prompt="x", **columns)
        ((column, _, reason, *_),) = explained(caught.value)
        return f"{column} {reason}"

    return tell


def test_it_is_in_the_identity_of_the_row_and_not_in_its_noise():
    plain, one, other = (JobSpec(id="a", prompt="x", watermark=text) for text in (None, "one", "other"))
    assert len({job_id(spec, "m", None) for spec in (plain, one, other)}) == 3
    assert len({seed_of(spec, "m", None) for spec in (plain, one, other)}) == 1
