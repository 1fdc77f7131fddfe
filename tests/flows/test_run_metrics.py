"""The figures that `t2vz run` leaves, held against the results table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from t2vz.cli import main
from t2vz.results import read


@pytest.mark.usefixtures("prefect_api")
def test_a_runs_figures_are_those_of_its_rows(manifest: Callable[..., Path], tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "metrics"
    rows = manifest({"id": "good", "seed": "1"}, {"id": "bad", "mode": "edit", "source": "nowhere.mp4"})
    command = ["run", str(rows), "--out", str(out), "--device", "cpu", "--quiet", "--metrics-folder", str(folder)]
    assert main(command) == 1

    table = {row.id: row for row in read(out)}
    (file,) = folder.iterdir()
    assert file.name == f"t2vz-{table['good'].run_id}.prom"
    samples = [sample for family in text_string_to_metric_families(file.read_text()) for sample in family.samples]
    value = {
        (sample.name, sample.labels.get("stage") or sample.labels.get("error_class") or sample.labels.get("status")): (
            sample.value
        )
        for sample in samples
        if "le" not in sample.labels
    }
    assert value["t2vz_rows_planned", None] == 2
    assert value["t2vz_rows_total", "ok"] == 1
    assert value["t2vz_rows_total", "SourceMissing"] == 1
    assert value["t2vz_frames_total", None] == table["good"].frames
    assert value["t2vz_unet_evaluations_total", None] == table["good"].unet_evaluations
    assert value["t2vz_output_bytes_total", None] == (out / table["good"].output_uri).stat().st_size
    assert math.isclose(value["t2vz_stage_seconds_sum", "generate"], table["good"].generate_s)
    assert value["t2vz_run_ended_timestamp_seconds", None] > 0
    assert value["t2vz_run_failed", None] == 0
    (info,) = (sample.labels for sample in samples if sample.name == "t2vz_run_info")
    assert info["manifest"] == str(rows)
