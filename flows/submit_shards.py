"""The flow `submit-shards`: a large manifest in shards, each a run of a deployment, for all machines of a work pool.

What is to do, and what came of it, the results table says; of Prefect's runs only the states are used: which shards
are under way, and which crashed. So this run can be killed and started again, and finds its shards.
"""

import time
from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed
from pydantic import BaseModel, Field

from t2vz import shards, storage
from t2vz.errors import UnexpectedError
from t2vz.manifest import origin
from t2vz.plan import Unready
from t2vz.render import Settings, opening, record_unready
from t2vz_flows.lifecycle import begin
from t2vz_flows.options import RenderOptions
from t2vz_flows.render_manifest import RenderParameters, model_policy, source_limits
from t2vz_flows.shown import cell, taken

_PAGE = 200  # runs in one answer of Prefect's API
_TOLD_SHARDS = 50


class ShardParameters(BaseModel):
    """What to render, where to, and by whom."""

    manifest: str = Field(title="Manifest", description="CSV or Parquet file with a row for each video")
    out: str = Field(title="Output folder", description="Folder that all machines reach, or s3://bucket/prefix")
    defaults: dict[str, str] = Field(
        default={}, title="Defaults", description="Column → value for the cells that the manifest leaves empty"
    )
    deployment: str = Field(
        default="render-manifest/shard", title="Deployment", description="Of render-manifest: is run for every shard"
    )
    shard_rows: int = Field(default=200, title="Rows a shard", ge=1, le=100_000)
    outstanding: int = Field(
        default=100, title="Shards submitted at once", description="More wait here, not in the work pool", ge=1, le=1000
    )
    retries: int = Field(
        default=3, title="Shard retries", description="How often a crashed shard is submitted again", ge=0, le=100
    )
    poll_s: float = Field(default=5.0, title="Poll every (s)", description="How often states are asked for", gt=0)
    render: RenderOptions = Field(
        default=RenderOptions(), title="Rendering", description="As in render-manifest; allowed failures count overall"
    )


class _Run(NamedTuple):
    """A shard under way. attempts: runs of it that this one began."""

    name: str
    path: str
    rows: str  # "1 to 200"
    attempts: int


@flow(
    name="submit-shards",
    flow_run_name="{parameters.manifest}",
    description="Render a large manifest on all machines of a work pool.",
    persist_result=False,
)
def submit_shards(parameters: ShardParameters) -> Any:
    """Submit what is to do of the manifest in shards, wait, submit crashed ones again; returns counts.

    Completed, or Failed if rows could not be rendered for lack of machines that live, or more failed than allowed.
    Raises ManifestError, OutputError, and UnexpectedError if there is no such deployment.
    """
    if (end := begin()) is not None:
        return end
    settings = Settings(
        out=storage.normal(parameters.out),
        manifest=origin(parameters.manifest),
        run_id=str(runtime.flow_run.id),
        limits=source_limits(parameters.render),
        models=model_policy(parameters.render),
    )
    with get_client(sync_client=True) as client, opening(settings):
        fleet = _Fleet(parameters, client)
        held = fleet.adopt()
        for item in shards.split(
            parameters.manifest,
            parameters.out,
            parameters.defaults,
            rows=parameters.shard_rows,
            held=held,
            verify=parameters.render.verify,
            limits=settings.limits,
            models=settings.models,
            content=parameters.render.content,
        ):
            if isinstance(item, Unready):
                record_unready(item, settings)
                continue
            while len(fleet.under_way) >= parameters.outstanding:
                fleet.poll()
            fleet.submit(_Run(item.name, str(item.path), f"{item.first} to {item.last}", 0))
        while fleet.under_way:
            fleet.poll()

    counts = shards.outcome(
        parameters.manifest,
        parameters.out,
        parameters.defaults,
        settings.limits,
        settings.models,
        parameters.render.content,
    )
    if not counts["open"]:
        shards.sweep(parameters.manifest, parameters.out, parameters.defaults)
    summary = {**counts, **{f"shards_{state}": number for state, number in fleet.ended.items()}}
    message = _message(counts, fleet.ended)
    _publish(parameters, message, fleet.troubles)
    most = parameters.render.max_failed
    if counts["open"]:
        return Failed(message=f"{message}; run again: what is done is kept", data=summary)
    if most is not None and counts["failed"] > most:
        return Failed(message=f"{message}; at most {most} may fail", data=summary)
    return Completed(message=message, data=summary)


class _Fleet:
    """The shards under way, as Prefect knows them.

    Every run has the tags `shards:…` (of the manifest) and `shard:…` (of its jobs), by which a submitter that was
    killed finds them again. ended: how many shards ended in which way. troubles: (rows, what happened).
    """

    def __init__(self, parameters: ShardParameters, client: SyncPrefectClient) -> None:
        self.under_way: dict[UUID, _Run] = {}
        self.ended: Counter[str] = Counter()
        self.troubles: list[tuple[str, str]] = []
        self._parameters = parameters
        self._client = client
        self._tag = f"shards:{shards.folder_name(parameters.manifest, parameters.out, parameters.defaults)}"
        self._begun: Counter[str] = Counter()  # runs of each shard that there ever were
        self._polled_at = 0.0

    def adopt(self) -> list[str]:
        """Take on the shards that an earlier run submitted and that have not ended; the ids of their rows."""
        held: list[str] = []
        for run in self._runs(FlowRunFilter(tags=FlowRunFilterTags(all_=[self._tag]))):
            name = next((tag.removeprefix("shard:") for tag in run.tags if tag.startswith("shard:")), "")
            self._begun[name] += 1
            if run.state is not None and not run.state.is_final():
                path = run.parameters.get("parameters", {}).get("manifest", "")
                self.under_way[run.id] = _Run(name, path, run.name, 1)
                held += shards.ids(path)
        if self.under_way:
            get_run_logger().info("%d shards of an earlier run are under way", len(self.under_way))
        return held

    def submit(self, shard: _Run) -> None:
        """Start a run of the shard. Two submitters at once come to the same key, and so to the same run."""
        given = self._parameters
        inner = RenderParameters(
            manifest=shard.path,
            out=str(storage.normal(given.out)),
            defaults=given.defaults,
            **{**dict(given.render), "max_failed": None},
        )
        try:
            run: Any = run_deployment(
                given.deployment,
                parameters={"parameters": inner.model_dump(mode="json")},
                timeout=0,
                idempotency_key=f"{self._tag} {shard.name} {self._begun[shard.name]}",
                flow_run_name=f"rows {shard.rows}",
                tags=[self._tag, f"shard:{shard.name}"],
            )
        except ObjectNotFound as error:
            raise UnexpectedError(
                f"there is no deployment {given.deployment!r}; deploy it (`prefect deploy --all`), or name another",
                stage="prefect",
            ) from error
        self._begun[shard.name] += 1
        self.under_way[run.id] = shard._replace(attempts=shard.attempts + 1)

    def poll(self) -> None:
        """Wait for the next poll, then take leave of shards that ended, and submit those that crashed again."""
        time.sleep(max(0.0, self._polled_at + self._parameters.poll_s - time.monotonic()))
        self._polled_at = time.monotonic()
        states: dict[UUID, State[Any] | None] = {}
        asked = list(self.under_way)
        for at in range(0, len(asked), _PAGE):
            found = self._runs(FlowRunFilter(id=FlowRunFilterId(any_=asked[at : at + _PAGE])))
            states.update((run.id, run.state) for run in found)
        for id, shard in list(self.under_way.items()):
            state = states.get(id)
            if id in states and (state is None or not state.is_final()):
                continue
            del self.under_way[id]
            if state is not None and (state.is_completed() or state.is_cancelled()):
                self.ended[state.type.value.lower()] += 1
                if state.is_cancelled():
                    self.troubles.append((shard.rows, "cancelled"))
                continue
            what = f"{state.name}: {state.message}" if state is not None else "its run was deleted"
            if shard.attempts <= self._parameters.retries:
                get_run_logger().warning("rows %s: %s; submitted again", shard.rows, what)
                self.ended["retried"] += 1
                self.submit(shard)
            else:
                self.ended["given_up"] += 1
                self.troubles.append((shard.rows, what))

    def _runs(self, which: FlowRunFilter) -> Iterable[FlowRun]:
        for page in count():
            runs = self._client.read_flow_runs(flow_run_filter=which, limit=_PAGE, offset=page * _PAGE)
            yield from runs
            if len(runs) < _PAGE:
                return


def _message(counts: Counter[str], ended: Counter[str]) -> str:
    said = {"ok": "rendered", "failed": "failed", "open": "not rendered"}
    told = ", ".join(f"{counts[status]} {word}" for status, word in said.items() if counts[status]) or "no rows"
    shards_said = {"completed": "shards", "retried": "retries", "given_up": "given up", "cancelled": "cancelled"}
    how = ", ".join(f"{ended[state]} {word}" for state, word in shards_said.items() if ended[state])
    return f"{told} ({how})" if how else told


def _publish(parameters: ShardParameters, message: str, troubles: list[tuple[str, str]]) -> None:
    """The run's summary in Prefect's UI."""
    lines = [f"**{message}**", "", f"Manifest: `{parameters.manifest}`", "", f"Videos: `{parameters.out}`"]
    if troubles:
        lines += ["", "| rows | what happened |", "| --- | --- |"]
        lines += [f"| {cell(rows)} | {cell(what)} |" for rows, what in troubles[:_TOLD_SHARDS]]
    if len(troubles) > _TOLD_SHARDS:
        lines += ["", f"… and {len(troubles) - _TOLD_SHARDS} more."]
    taken(lambda: create_markdown_artifact("\n".join(lines), key="submit-shards", description="Summary of the run"))
