"""Dashboard and alerts, held against the metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from t2vz import errors
from t2vz.events import Event
from t2vz.metrics import Metrics
from t2vz.results import ResultRow


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Name of every series that a run on a GPU shows → its labels, with those that a scrape adds."""
    module = types.ModuleType("pynvml")
    vars(module).update(
        NVMLError=Exception,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda gpu: gpu,
        nvmlDeviceGetName=lambda gpu: "H100",
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=1, total=2),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    metrics = Metrics("run", "manifest.csv")
    now = datetime.now(UTC)
    row = ResultRow(job_id="j", run_id="r", id="a", status="failed", started_at=now, finished_at=now, device="cuda:0",
                    peak_memory_bytes=1)  # fmt: skip
    metrics(Event("row_finished", "a", status="failed", row=row))
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels, {"instance", "job"})
    return found


def dashboard(infra: Path) -> dict[str, Any]:
    return json.loads((infra / "grafana" / "dashboards" / "t2vz.json").read_text())


def rules(infra: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((infra / "prometheus" / "alerts.yml").read_text())["groups"]
    return group["rules"]


def queries(infra: Path) -> list[str]:
    panels = [target["expr"] for panel in dashboard(infra)["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for rule in rules(infra)]


def test_queries_ask_for_series_and_labels_that_exist(infra: Path, samples: dict[str, set[str]]) -> None:
    recorded = {rule["record"]: {"run"} for rule in rules(infra) if "record" in rule}
    for query in queries(infra):
        text = query.replace("$__rate_interval", "5m").replace("$run", ".*")
        parsed = str(promql_parser.parse(text))  # raises for what is not PromQL
        named = re.findall(r"((?:t2vz_|run:)[\w:]+)(?:\{([^}]*)\})?", parsed)
        assert named, query
        known: set[str] = set()
        for name, matchers in named:
            labels = (samples | recorded)[name]
            known |= labels
            assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers)) <= labels, query
        for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", parsed):
            assert set(re.split(r",\s*", grouped)) <= known, query


def test_every_metric_is_shown_or_alerts(infra: Path, samples: dict[str, set[str]]) -> None:
    asked = " ".join(queries(infra))
    unseen = {name for name in samples if not re.search(rf"\b{re.sub('_(bucket|count|sum)$', '', name)}", asked)}
    assert not unseen


def test_alerts_name_errors_that_exist_and_chapters_of_the_runbook(infra: Path) -> None:
    chapters = re.findall(r"^## (.+)$", (infra / "RUNBOOK.md").read_text(), re.M)
    for rule in rules(infra):
        for values in re.findall(r'error_class=~?"([^"]+)"', rule["expr"]):
            for name in values.split("|"):
                assert issubclass(getattr(errors, name), errors.T2VZError)
        if "alert" in rule:
            document, chapter = rule["annotations"]["runbook"].split(", ", 1)
            assert document == "RUNBOOK.md"
            assert chapter in chapters
            assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_alert_has_a_case_that_fires_and_one_that_does_not(infra: Path) -> None:
    cases = yaml.safe_load((infra / "prometheus" / "alerts_test.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules(infra) if "alert" in rule}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == alerts
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} >= alerts - {"T2vzOutOfDeviceMemory"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian's package `prometheus` has it)")
@pytest.mark.parametrize("arguments", [("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")])
def test_promtool_agrees(infra: Path, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=infra / "prometheus")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one_that_grafana_can_lay_out(infra: Path) -> None:
    board = dashboard(infra)
    assert board["uid"]
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in board["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= {*variables, "__rate_interval"}


def test_grafana_finds_the_dashboard_and_prometheus(infra: Path) -> None:
    compose = yaml.safe_load((infra / "compose.yaml").read_text())["services"]
    (source,) = yaml.safe_load((infra / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    (provider,) = yaml.safe_load((infra / "grafana/provisioning/dashboards/t2vz.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
    (scrape,) = yaml.safe_load((infra / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["node-exporter:9100"]}]
    # What a run writes is what node-exporter reads.
    assert compose["worker"]["environment"]["T2VZ_METRICS_FOLDER"] == "/metrics"
    assert "metrics:/metrics" in compose["worker"]["volumes"]
    assert "metrics:/metrics:ro" in compose["node-exporter"]["volumes"]
    assert "--collector.textfile.directory=/metrics" in compose["node-exporter"]["command"]
