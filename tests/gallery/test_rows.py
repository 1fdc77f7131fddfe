"""What the page is told: every row, exactly, with the pictures that are there and the cells to render it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished import keep, lines_of, row
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from t2vz.errors import ResultsError
from t2vz.gallery import rows
from t2vz.manifest import Row, cells_of, read
from t2vz.media import strip
from t2vz.sheet import strip_key, thumbnails_key


def test_a_page_is_told_of_every_row_and_its_pictures(tmp_path: Path) -> None:
    keep(tmp_path, [row(number) for number in range(1, 11)])
    told = rows.told(tmp_path)
    assert told["total"] == 10
    by_id = {one["id"]: one for one in told["rows"]}
    assert by_id["row-0001"]["picture"] == "thumbnails/row-0001-000000000001.mp4.webp"
    assert by_id["row-0001"]["labels"] == ["source", "edge", "result"]
    assert by_id["row-0002"]["labels"] == ["source", "result"]
    assert by_id["row-0003"]["labels"] == ["result"]
    assert by_id["row-0003"]["video"] == {"kind": "video", "address": "videos/row-0003-000000000003.mp4"}
    assert by_id["row-0003"]["period_s"] == 2.0  # 16 frames at 8 a second
    assert "picture" not in by_id["row-0010"]
    assert by_id["row-0010"]["error_message"].endswith("ends after 3 of 8 frames")
    with Image.open(tmp_path / by_id["row-0001"]["picture"]) as picture:
        width, height = by_id["row-0001"]["panel_px"]
        assert picture.size == (16 * width, 3 * height)


def test_a_row_whose_thumbnails_were_never_made_shows_its_strip_or_nothing(tmp_path: Path) -> None:
    old, older = row(1), row(2)
    keep(tmp_path, [old, older], pictures=False)
    strip.write(tmp_path, strip_key(old.output_uri or ""), lines_of(old), tmp_path)
    told = {one["id"]: one for one in rows.told(tmp_path)["rows"]}
    assert told["row-0001"]["picture"] == strip_key(old.output_uri or "")
    assert "picture" not in told["row-0002"]
    assert told["row-0002"]["video"]["address"] == older.output_uri


def test_only_the_last_rows_are_told_of_and_how_many_there_are(tmp_path: Path) -> None:
    keep(tmp_path, [row(number) for number in range(1, 6)], pictures=False)
    told = rows.told(tmp_path, limit=2)
    assert [one["id"] for one in told["rows"]] == ["row-0004", "row-0005"]
    assert told["total"] == 5


def test_a_browser_reads_large_numbers_exactly() -> None:
    """JavaScript's numbers have 53 bits; a seed that loses its last ones is another seed."""
    seed = 2**63 - 25
    told = rows.record(row(1, seed=seed, parameters=json.dumps({"seed": seed})), ())
    assert told["seed"] == told["parameters"]["seed"] == str(seed)
    assert "Infinity" not in json.dumps(rows.record(row(1, wall_s=float("inf")), ()), allow_nan=False)


@pytest.mark.parametrize(
    "output", ["../secret.mp4", "videos/../../secret.mp4", "javascript:alert(1)", "//evil/x.mp4", "videos/a/b.mp4"]
)
def test_a_results_table_can_not_lead_the_page_elsewhere(output: str) -> None:
    told = rows.record(row(1, output_uri=output), {thumbnails_key(output), strip_key(output)})
    assert "video" not in told
    assert "picture" not in told


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results"):
        rows.told(tmp_path)


CELLS = [
    {"prompt": "a boat, “quoted”; and\nmore", "seed": "7", "fps": "30000/1001", "motion_dynamics": "false"},
    {
        "mode": "control",
        "prompt": "a deer",
        "source": "clips/a.mp4",
        "condition": "edge+depth",
        "controlnet_conditioning_scale": "0.5+1",
    },
    {"mode": "edit", "prompt": "make it snow", "source": "s3://bucket/a.mp4", "start_s": "0.25", "audio": "false"},
    {"prompt": "x", "camera_path": "0: 0 0 1 0; 2: 0.5 0 1.5 10", "lora": "a.safetensors+org/b", "lora_scale": "0.5"},
]


@pytest.mark.parametrize("cells", CELLS)
def test_a_rows_cells_mean_the_row_wherever_the_manifest_lies(cells: dict[str, str], tmp_path: Path) -> None:
    (first,) = _read(tmp_path, [{"id": "one", **cells}])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (second,) = _read(elsewhere, [cells_of(first.spec)])
    assert second.spec == first.spec
    assert second.spec.model_fields_set == first.spec.model_fields_set


@settings(max_examples=50, deadline=None)
@given(
    number=st.floats(0, 100, allow_subnormal=False), scale=st.floats(0.1, 10), seed=st.integers(0, 2**63 - 1),
    prompt=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(lambda text: text.strip()),
)  # fmt: skip
def test_no_number_and_no_text_changes_on_the_way(number: float, scale: float, seed: int, prompt: str) -> None:
    from t2vz.spec import JobSpec

    given = JobSpec(id="x", prompt=prompt.strip(), guidance_scale=number, zoom_per_s=scale, seed=seed)
    assert JobSpec.model_validate(cells_of(given)) == given


def _read(folder: Path, records: list[dict[str, str]]) -> list[Row]:
    import csv

    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({name for record in records for name in record}))
        writer.writeheader()
        writer.writerows(records)
    found = list(read(folder / "manifest.csv"))
    assert all(isinstance(one, Row) for one in found), found
    return found  # type: ignore[return-value]
