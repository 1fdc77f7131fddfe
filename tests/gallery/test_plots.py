"""Plots: well-formed, and what is drawn is what the table says."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from finished import keep, row

from t2vz.gallery import plots
from t2vz.results import Results, read

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("out")
    keep(out, [row(number) for number in range(1, 40)], pictures=False)
    return read(out)


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter(f"{SVG}text")]


def test_the_times_are_the_medians_of_the_stages(results: Results) -> None:
    said = texts(plots.stage_times(results))
    table = results.pandas()
    for stage in ("decode", "model", "generate", "encode"):
        median = statistics.median(table[f"{stage}_s"].dropna())
        assert stage in said
        assert any(text == f"{plots._duration(median)} a row" for text in said), (stage, median, said)
    assert "conditions" not in said  # of which no row tells
    whole = sum(table[f"{stage}_s"].sum() for stage in plots.STAGES)
    assert f"{plots._duration(whole)} in all" in said


def test_longer_stages_lie_further_right(results: Results) -> None:
    medians = [float(line.get("x1", 0)) for line in ET.fromstring(plots.stage_times(results)).iter(f"{SVG}line")
               if line.get("class") == "median"]  # fmt: skip
    decode, model, generate, encode = medians
    assert decode < encode < model < generate


def test_quality_tells_median_range_and_which_way_is_better(results: Results) -> None:
    said = texts(plots.quality(results))
    assert "flicker" in said
    assert "warp error" in said
    assert said.count("lower is better") == 2
    assert any(text.endswith("of 36 rows") for text in said)


def test_one_value_and_equal_values_can_be_drawn(tmp_path: Path) -> None:
    keep(tmp_path, [row(1)], pictures=False)
    for svg in plots.of_run(read(tmp_path)).values():
        ET.fromstring(svg)
        assert "nan" not in svg.lower()


def test_a_measures_name_is_text_and_no_markup(tmp_path: Path) -> None:
    keep(tmp_path, [row(1, quality='{"<script>alert(1)</script>": 1.0, "bad": "x", "odd": NaN}')], pictures=False)
    svg = plots.quality(read(tmp_path))
    assert "<script" not in svg
    assert "<script>alert(1)</script>" in texts(svg)
    assert "bad" not in texts(svg)


def test_without_figures_there_is_no_plot(tmp_path: Path) -> None:
    times = {f"{stage}_s": None for stage in plots.STAGES}
    keep(tmp_path, [row(1, quality=None, **times)], pictures=False)
    assert plots.of_run(read(tmp_path)) == {"times": "", "quality": ""}
