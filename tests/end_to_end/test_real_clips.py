"""Real clips through all modes. Generated ones take the same way in test_demo.py and test_frames.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ffmpeg_reader import Video

FRAMES = 4
# id → (row, frames expected)
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    **{
        f"{name}-{condition}": ({"source": f"clip-{name}.mp4", "condition": condition}, FRAMES)
        for name in ("deer", "girl_dancing")
        for condition in ("edge", "depth")
    },
    **{
        f"{condition}-{name}": ({"condition_video": f"{condition}-{name}.mp4", "condition": condition}, FRAMES)
        for name in ("deer", "girl_dancing")
        for condition in ("edge", "depth")
    },
    "dance": ({"condition_video": "pose-dance1.mp4", "condition": "pose"}, FRAMES),
    "dance-gif": ({"condition_video": "pose-dance1.gif", "condition": "pose"}, FRAMES),
    "camel": ({"mode": "edit", "source": "edit-camel.mp4"}, FRAMES),
    "boat": ({"mode": "edit", "source": "edit-boat.mp4", "fps": 8, "start_s": 5.5}, 4),
    # Eight frames of 0.47 s, the last of them held twice by an edit list.
    "woman": ({"mode": "edit", "source": "portrait-woman1.mp4", "start_s": 0.7, "end_s": 1.9, "fps": 2}, 3),
}


@pytest.fixture(scope="module")
def rendered(
    real_clips: Path, t2vz: Callable[..., Any], manifest: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("real")
    rows = []
    for id, (row, _) in ROWS.items():
        paths = {column: real_clips / row[column] for column in ("source", "condition_video") if column in row}
        rows.append({"id": id, "mode": "control", "width": "", "height": "", "video_length": FRAMES, **row, **paths})
    return t2vz("run", manifest(folder / "m.csv", *rows), folder / "out")


@pytest.mark.parametrize("id", ROWS)
def test_real_clip(id: str, rendered: Any, real_clips: Path) -> None:
    row, frames = ROWS[id]
    result = rendered.rows[id]
    assert result.status == "ok", result.error_message
    source, video = (
        Video(real_clips / row.get("source", row.get("condition_video"))),
        Video(rendered.out / result.output_uri),
    )
    assert video.frames().shape[0] == frames
    width, height = source.size
    longest = 128 / max(width, height)
    assert video.size == tuple(round(side * longest / 8) * 8 for side in (width, height))
    told = re.search(r"([\d.]+) fps", source.streams)
    assert told
    assert float(video.rate_fps) == pytest.approx(row.get("fps", float(told[1])), abs=0.01)
