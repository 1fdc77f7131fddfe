"""A real run with secrets around it: of what it writes, logs, shows and tells, nothing has one in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from s3 import S3

from t2vz import storage
from t2vz.results import read

CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"
SECRETS = {
    "HF_TOKEN": "hf_secretSecretSecret",
    "AWS_ACCESS_KEY_ID": "AKIASECRETSECRET",
    "AWS_SECRET_ACCESS_KEY": "secret/Key+of/Storage",
    "AWS_SESSION_TOKEN": "secretSessionToken",
    "POSTGRES_PASSWORD": "secretOfTheDatabase",
    "SOME_API_KEY": "secretOfAnybody",
}
IN_ADDRESSES = ("hunter2", "s1gnature")


def test_no_secret_leaves_the_process(
    prefect_api: str, s3: S3, write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    sources, out = s3.bucket(), tmp_path / "out"
    storage.upload(CLIP, sources, "ball.mp4")
    control = {"mode": "control", "condition": "edge"}
    key = SECRETS["AWS_SECRET_ACCESS_KEY"]
    manifest = write_manifest(
        tmp_path / "m.csv",
        {"id": "text"},
        {"id": "remote", **control, "source": f"{sources}/ball.mp4"},
        {"id": "gone", **control, "source": f"{sources}/gone.mp4"},
        {"id": "closed", **control, "source": "s3://no-such-bucket/x.mp4"},
        {"id": "user", **control, "source": "https://me:hunter2@host.invalid/x.mp4"},
        {"id": "signed", **control, "source": "https://host.invalid/x.mp4?X-Amz-Signature=s1gnature&a=b"},
        {"id": "s3-user", **control, "source": "s3://me:hunter2@bucket/x.mp4"},
        {"id": "hub", "model": "some/model"},
        {"id": "told", "model": f"https://me:hunter2@host.invalid/{key}"},  # as a row that knows it would have it told
    )
    ran = subprocess.run(
        [sys.executable, "-m", "t2vz.cli", "run", str(manifest), "--out", str(out), "--device", "cpu",
         "--metrics-folder", str(tmp_path / "metrics")],
        capture_output=True,
        text=True,
        env={**os.environ, **SECRETS, "PREFECT_API_URL": prefect_api},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stderr
    rows = {row.id: row for row in read(out)}
    assert {id for id, row in rows.items() if row.status == "ok"} == {"text", "remote"}
    for id in ("user", "s3-user", "told"):
        assert "***" in (rows[id].error_message or ""), rows[id]

    seen = 0
    for where, text in [
        ("terminal", ran.stdout + ran.stderr),
        ("results", str(list(read(out)))),
        *((str(path), path.read_bytes().decode("latin-1")) for path in files(out, tmp_path / "metrics", s3_cache())),
        *((f"Prefect's {kind}", text) for kind, text in of_prefect(rows["text"].run_id)),
    ]:
        seen += len(text) > 0
        for secret in (*SECRETS.values(), *IN_ADDRESSES):
            assert secret not in text, where
    assert seen >= 15


def s3_cache() -> Path:
    return Path(os.environ["T2VZ_CACHE_DIR"])


def files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        found = [path for path in folder.rglob("*") if path.is_file()]
        assert found, folder
        yield from found


def of_prefect(run_id: str) -> Iterator[tuple[str, str]]:
    """What the server has of the run: kind, and all of it as JSON."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        yield "flow runs", "".join(run.model_dump_json() for run in client.read_flow_runs(flow_run_filter=of_run))
        yield "task runs", "".join(run.model_dump_json() for run in client.read_task_runs(flow_run_filter=of_run))
        which = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        yield "artifacts", "".join(one.model_dump_json() for one in client.read_artifacts(artifact_filter=which))
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])))
        yield "logs", "".join(log.model_dump_json() for log in logs)
