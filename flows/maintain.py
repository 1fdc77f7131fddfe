"""The flow `maintain`: an output place tidied, on a schedule or by hand. What that is, is in `t2vz.maintain`."""

from datetime import timedelta
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task
from pydantic import BaseModel, Field

from t2vz.errors import T2VZError
from t2vz.maintain import Report, maintain
from t2vz_flows.lifecycle import hide_tracebacks
from t2vz_flows.shown import taken

_TOLD_ITEMS = 200  # in the artifact


class MaintainParameters(BaseModel):
    """Which output place, and how far to go."""

    out: str = Field(title="Output folder", description="Folder or s3://bucket/prefix that runs write to")
    dry_run: bool = Field(default=False, title="Dry run", description="Only list what would be removed")
    older_than_days: float | None = Field(
        default=None,
        title="Older than (days)",
        description="Also remove results and videos that finished longer ago; empty: none",
        ge=0,
    )


@flow(
    name="maintain",
    flow_run_name="{parameters.out}",
    description="Compact the results table and remove what no run needs any more; safe while runs are under way.",
    persist_result=False,
)
def maintain_out(parameters: MaintainParameters) -> dict[str, Any]:
    """Tidy `parameters.out`; returns what was removed as number and bytes by kind, and `freed_bytes`.

    Raises ResultsError (no results there), OutputError, StorageTimeout.
    """
    hide_tracebacks()
    report = tidy(parameters.out, str(runtime.flow_run.id), parameters.dry_run, parameters.older_than_days)
    _publish(parameters, report)
    return {
        "dry_run": report.dry_run,
        "removed": report.counts(),
        "freed_bytes": report.freed_bytes,
        "rows_forgotten": report.rows_forgotten,
        "corrupt": list(report.corrupt),
    }


def can_mend(task: "Task[Any, Any]", run: TaskRun, state: State[Any]) -> bool:
    """Prefect's question before it tries again: is the error one that may be gone next time?"""
    return isinstance(state.data, T2VZError) and state.data.retryable


@task(
    name="tidy",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=3,
    retry_delay_seconds=[2, 10, 60],
    retry_condition_fn=can_mend,
)
def tidy(out: str, run_id: str, dry_run: bool, older_than_days: float | None) -> Report:
    """All of it; done again from the start if storage was away or writers too many."""
    age = None if older_than_days is None else timedelta(days=older_than_days)
    return maintain(out, run_id, dry_run=dry_run, older_than=age)


def _publish(parameters: MaintainParameters, report: Report) -> None:
    lines = [f"**{report.lines()[0]}**", "", f"Output folder: `{parameters.out}`", "", *report.lines()[1:]]
    if report.items:
        lines += ["", "| kind | name | bytes |", "| --- | --- | --- |"]
        lines += [f"| {item.kind} | `{item.key}` | {item.size_bytes:,} |" for item in report.items[:_TOLD_ITEMS]]
    if len(report.items) > _TOLD_ITEMS:
        lines += ["", f"… and {len(report.items) - _TOLD_ITEMS} more."]
    taken(
        lambda: create_markdown_artifact("\n".join(lines), key="maintain", description="What was removed, or would be")
    )
