"""Figures for Prometheus, read back through Prometheus' own parser."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from t2vz.events import Event, emit
from t2vz.metrics import Metrics, exposing
from t2vz.results import ResultRow

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("T2VZ_METRICS_PORT", "T2VZ_METRICS_FOLDER", "T2VZ_METRICS_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def row(status: str = "ok", **values: Any) -> ResultRow:
    if status == "ok":
        output = {"output_uri": "v.mp4", "output_bytes": 100, "output_mtime_ns": 1, "output_sha256": "0", "frames": 8}
        values = output | values
    return ResultRow(job_id="j", run_id="r", id="a", status=status, started_at=NOW, finished_at=NOW, **values)


def figures(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values but the run's, in their names' order) → value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["run"], sample
            labels = [value for name, value in sorted(sample.labels.items()) if name != "run"]
            key = (sample.name, *labels)
            assert key not in found
            found[key] = sample.value
    return found


def written(folder: Path) -> dict[tuple[str, ...], float]:
    (file,) = folder.glob("t2vz-*")
    assert file.suffix == ".prom"
    return figures(file.read_text())


def served(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return answer.read().decode()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_run_counts_its_rows_and_what_they_took(tmp_path: Path) -> None:
    with exposing("r", folder=tmp_path) as metrics:
        emit(Event("planned", total=3, done=5))
        emit(Event("row_started", "a", total=2))
        emit(Event("stage", "a", "decode"))
        emit(Event("stage", "a", "decode"))  # tried again
        emit(Event("row_started", "b", total=2))
        emit(Event("stage", "b", "decode"))  # another row's first
        emit(Event("row_lost", "b"))
        emit(Event("row_started", "b", total=2))
        emit(Event("stage", "b", "decode"))  # the next worker's first
        assert metrics is not None
        assert metrics.registry.get_sample_value("t2vz_rows_in_flight", {"run": "r"}) == 2
        ok = row(decode_s=0.2, model_s=4.0, generate_s=20.0, wall_s=25.0, unet_evaluations=389, device="cpu",
                 peak_memory_bytes=900)  # fmt: skip
        emit(Event("row_finished", "a", status="ok", row=ok))
        bad = row("failed", error_class="EncodeError", error_stage="encode", unet_evaluations=11, wall_s=1.0,
                  device="cpu", peak_memory_bytes=700)  # fmt: skip
        emit(Event("row_finished", "b", status="failed", row=bad))
        emit(Event("row_finished", "c", status="done"))
    emit(Event("row_finished", "d", status="ok", row=ok))  # not this run's any more

    told = written(tmp_path)
    assert told["t2vz_rows_planned",] == 3
    assert told["t2vz_rows_done_before",] == 5
    ended = {key[1:]: value for key, value in told.items() if key[0] == "t2vz_rows_total"}
    assert ended == {("", "ok"): 1, ("EncodeError", "failed"): 1, ("", "failed"): 0, ("", "done"): 1}
    assert told["t2vz_frames_total",] == 8
    assert told["t2vz_output_bytes_total",] == 100
    assert told["t2vz_unet_evaluations_total",] == 400
    assert told["t2vz_stage_retries_total", "decode"] == 1
    assert told["t2vz_stage_retries_total", "generate"] == 0
    assert told["t2vz_worker_restarts_total",] == 1
    assert told["t2vz_stage_seconds_sum", "generate"] == 20
    assert told["t2vz_stage_seconds_count", "decode"] == 1
    assert told["t2vz_stage_seconds_bucket", "10.0", "model"] == 1
    assert told["t2vz_stage_seconds_bucket", "3.0", "model"] == 0
    assert told["t2vz_stage_seconds_count", "conditions"] == 0
    assert told["t2vz_row_seconds_sum",] == 26
    assert told["t2vz_peak_memory_bytes", "cpu"] == 900
    assert told["t2vz_rows_in_flight",] == 0
    assert not any(name.endswith("_created") for name, *_ in told)


def interrupt(metrics: Metrics | None) -> None:
    emit(Event("row_started", "a"))
    assert metrics is not None
    assert metrics.registry.get_sample_value("t2vz_rows_in_flight", {"run": "bad"}) == 1
    raise KeyboardInterrupt


def test_a_run_tells_how_it_ended(tmp_path: Path) -> None:
    before = time.time()
    with exposing("good", folder=tmp_path / "good"):
        assert written(tmp_path / "good")["t2vz_run_ended_timestamp_seconds",] == 0
    told = written(tmp_path / "good")
    assert before <= told["t2vz_run_started_timestamp_seconds",] <= told["t2vz_run_ended_timestamp_seconds",]
    assert before <= told["t2vz_heartbeat_timestamp_seconds",] <= time.time()
    assert told["t2vz_run_failed",] == 0

    with pytest.raises(KeyboardInterrupt), exposing("bad", folder=tmp_path / "bad") as metrics:
        interrupt(metrics)
    told = written(tmp_path / "bad")
    assert told["t2vz_run_failed",] == 1
    assert told["t2vz_rows_in_flight",] == 0
    assert told["t2vz_run_ended_timestamp_seconds",] >= before


def test_what_goes_on_is_progress_but_a_dying_worker_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    metrics = Metrics("r")
    for kind, expected in (("step", 1001.0), ("row_lost", 1001.0), ("stage", 1003.0)):
        clock[0] += 1
        metrics(Event(kind, "a", "generate"))
        assert metrics.registry.get_sample_value("t2vz_last_progress_timestamp_seconds", {"run": "r"}) == expected


def test_a_row_begun_anew_on_another_worker_is_in_flight_once() -> None:
    metrics = Metrics("r")
    for kind in ("row_started", "row_lost", "row_started"):
        metrics(Event(kind, "a"))
    assert metrics.registry.get_sample_value("t2vz_rows_in_flight", {"run": "r"}) == 1


def test_events_from_many_threads_are_all_counted() -> None:
    metrics = Metrics("r")
    ok = row()

    def work(name: str) -> None:
        for number in range(200):
            metrics(Event("row_started", f"{name}{number}"))
            metrics(Event("row_finished", f"{name}{number}", status="ok", row=ok))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    value = metrics.registry.get_sample_value
    assert value("t2vz_rows_total", {"run": "r", "status": "ok", "error_class": ""}) == 800
    assert value("t2vz_rows_in_flight", {"run": "r"}) == 0


def test_a_port_serves_while_the_run_lasts(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2VZ_METRICS_PORT", str(free_port))
    with exposing("r", 'manifests/"odd"\nname.csv'):
        emit(Event("row_finished", "a", status="ok", row=row()))
        told = figures(served(free_port))
        assert told["t2vz_frames_total",] == 8
        assert [key[1] for key in told if key[0] == "t2vz_run_info"] == ['manifests/"odd"\nname.csv']
    with pytest.raises(urllib.error.URLError):
        served(free_port)
    with exposing("next", port=free_port):  # the port is free again
        assert figures(served(free_port))["t2vz_frames_total",] == 0


def test_any_free_port_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "t2vz"), exposing("r", port=0):
        url = caplog.messages[-1].removeprefix("metrics at ")
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"t2vz_rows_total" in answer.read()


def test_figures_that_cannot_be_shown_stop_no_run(
    free_port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with (
        exposing("one", port=free_port),
        exposing("two", port=free_port, folder=tmp_path / "file" / "folder") as second,
    ):
        emit(Event("row_finished", "a", status="done"))
    assert second is not None
    assert second.registry.get_sample_value("t2vz_rows_total", {"run": "two", "status": "done", "error_class": ""})
    port, folder = caplog.messages  # each told once, though the file is tried again and again
    assert f"127.0.0.1:{free_port}" in port
    assert "another port" in port
    assert str(tmp_path / "file" / "folder") in folder

    monkeypatch.setenv("T2VZ_METRICS_PORT", "94640")
    with exposing("three") as third:
        assert third is None
    assert "T2VZ_METRICS_PORT=94640 is not a port" in caplog.messages[-1]


def test_nothing_is_counted_that_nobody_asked_for() -> None:
    with exposing("r") as metrics:
        assert metrics is None


def test_several_runs_share_a_folder_and_old_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2VZ_METRICS_FOLDER", str(tmp_path))
    old, foreign = tmp_path / "t2vz-old.prom", tmp_path / "apt.prom"
    for file in (old, foreign):
        file.write_text("")
        os.utime(file, (0, 0))
    with exposing("one"), exposing("../two"):
        assert {file.name for file in tmp_path.iterdir()} == {"t2vz-one.prom", "t2vz-___two.prom", "apt.prom"}
    text = "".join(file.read_text() for file in tmp_path.glob("t2vz-*.prom"))
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))  # node-exporter refuses a folder with the same series twice


def fake_pynvml(**functions: Any) -> types.ModuleType:
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    vars(module).update(functions)
    return module


def test_memory_of_each_gpu_is_asked_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(gpu: int) -> types.SimpleNamespace:
        if gpu == 1:
            raise module.NVMLError("GPU is lost")
        return types.SimpleNamespace(used=10 + gpu, total=80)

    closed: list[bool] = []
    module = fake_pynvml(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda gpu: gpu,
        nvmlDeviceGetName=lambda gpu: "H100",
        nvmlDeviceGetMemoryInfo=memory,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with exposing("r", folder=tmp_path):
        pass
    told = {key: value for key, value in written(tmp_path).items() if key[0].startswith("t2vz_device_memory")}
    assert told == {
        ("t2vz_device_memory_used_bytes", "0", "H100"): 10,
        ("t2vz_device_memory_used_bytes", "2", "H100"): 12,
        ("t2vz_device_memory_total_bytes", "0", "H100"): 80,
        ("t2vz_device_memory_total_bytes", "2", "H100"): 80,
    }
    assert closed


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise module.NVMLError("Driver Not Loaded")

    module = fake_pynvml(nvmlInit=no_driver)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with exposing("r", folder=tmp_path):
        pass
    assert not any(key[0].startswith("t2vz_device_memory") for key in written(tmp_path))
