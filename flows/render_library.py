"""The flow `render-library`: a folder of videos in one style. What is new or changed is rendered; long ones in parts.

What a library comes to is in `t2vz.library`, what a row takes in the flow `render-manifest`, which runs inside.
"""

from collections import Counter
from typing import Any, Literal

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote
from pydantic import BaseModel, Field

from t2vz import library, storage
from t2vz.library import Joined, Library
from t2vz.render import Settings, opening
from t2vz_flows.lifecycle import begin
from t2vz_flows.options import RenderOptions
from t2vz_flows.render_manifest import RenderParameters, model_policy, render_manifest, signing_of, source_limits
from t2vz_flows.shown import cell, taken

_TOLD_SOURCES = 100  # in the summary artifact


class CuttingParameters(BaseModel):
    """Which sources are cut into parts, and where; the parts' videos are joined again."""

    by: Literal["length", "scenes", "none"] = Field(
        default="length", title="Cut by", description="Length, or where scenes begin (and long scenes by length)"
    )
    max_clip_s: float = Field(
        default=library.Cutting.max_clip_s, title="Longest clip (s)", description="Longer sources are cut", gt=0
    )
    max_frames: int = Field(
        default=library.Cutting.max_frames,
        title="Most frames",
        description="Sources that would have more are cut",
        ge=1,
    )


class LibraryParameters(BaseModel):
    """Which videos, in which style, where to."""

    folder: str = Field(
        title="Folder", description="The source videos, with those in folders below; or s3://bucket/prefix"
    )
    out: str = Field(title="Output folder", description="Gets videos and results table; or s3://bucket/prefix")
    style: dict[str, str] = Field(
        title="Style",
        description="Column → value for every source: mode (control or edit), prompt, and any other column; "
        "paths are absolute",
    )
    glob: str = Field(default="**/*", title="Glob", description="Which files of the folder; videos only are taken")
    name: str = Field(
        default="library", title="Name", description="Of the manifest in the output folder: one for each style there"
    )
    cutting: CuttingParameters = Field(
        default=CuttingParameters(), title="Cutting", description="What becomes of long sources"
    )
    render: RenderOptions = Field(default=RenderOptions(), title="Rendering", description="As in render-manifest")


@flow(
    name="render-library",
    flow_run_name="{parameters.folder}",
    description="Render the videos of a folder that are new or changed, in one style.",
    persist_result=False,
)
def render_library(parameters: LibraryParameters) -> Any:
    """Render what is new or changed and join the parts of long sources; returns counts.

    Rows that fail, and sources whose parts wait for such a row, stop no others: a later run mends them. Raises
    SourceError (no such folder), ManifestError (a style that no row could have), OutputError.
    """
    if (end := begin()) is not None:
        return end
    found = library.scan(
        library.find(parameters.folder, parameters.glob, out=parameters.out),
        parameters.out,
        parameters.style,
        cutting=library.Cutting(**parameters.cutting.model_dump()),
        name=parameters.name,
        limits=source_limits(parameters.render),
    )
    state = render_manifest(
        RenderParameters(manifest=str(found.manifest), out=parameters.out, **dict(parameters.render)),
        return_state=True,
    )
    rendered = state.result(raise_on_failure=False)
    if not isinstance(rendered, dict):
        raise rendered
    joined = _join_all(found, parameters)
    counts: Counter[str] = Counter(one.status for one in joined)
    summary = {"sources": found.sources, "rows": found.rows, **rendered, **counts}
    message = _message(found, str(state.message), counts)
    _publish(parameters, found, message, joined)
    if state.is_failed() or counts["failed"]:
        return Failed(message=message, data=summary)
    return Completed(message=message, data=summary)


def _join_all(found: Library, parameters: LibraryParameters) -> list[Joined]:
    settings = Settings(
        out=storage.normal(parameters.out),
        manifest=str(found.manifest),
        run_id=str(runtime.flow_run.id),
        limits=source_limits(parameters.render),
        models=model_policy(parameters.render),
        content=parameters.render.content,
        signing=signing_of(parameters.render),
    )
    joined: list[Joined] = []
    with opening(settings):
        for id, what in library.joining(found, settings):
            result: Any = join_source(id, quote(what)) if callable(what) else what
            joined.append(result)
    return joined


@task(name="join", task_run_name="join {id}", cache_policy=NO_CACHE, persist_result=False)
def join_source(id: str, call: Any) -> Any:
    """The videos of a source's parts made one."""
    joined = call()
    logger = get_run_logger()
    for warning in joined.warnings:
        logger.warning("%s: %s", id, warning)
    if joined.status == "failed":
        logger.error("%s: %s", id, joined.reason)
    return joined


def _message(found: Library, rendered: str, counts: Counter[str]) -> str:
    said = {"joined": "joined", "kept": "joined before", "waiting": "to be joined later", "failed": "can't be joined"}
    parts = [f"{counts[status]} {word}" for status, word in said.items() if counts[status]]
    parts += [f"{len(found.left_out)} files left out"] if found.left_out else []
    return "; ".join(filter(None, (f"{found.sources} sources: {rendered}", ", ".join(parts))))


def _publish(parameters: LibraryParameters, found: Library, message: str, joined: list[Joined]) -> None:
    """The run's summary in Prefect's UI."""
    lines = [f"**{message}**", "", f"Sources: `{parameters.folder}`", "", f"Videos: `{parameters.out}`", ""]
    told = [one for one in joined if one.status != "kept"]
    if told:
        lines += ["| long source | | |", "| --- | --- | --- |"]
        lines += [
            f"| {cell(one.id)} | {one.status} | {cell(one.output_uri or one.reason)} |" for one in told[:_TOLD_SOURCES]
        ]
    if len(told) > _TOLD_SOURCES:
        lines += ["", f"… and {len(told) - _TOLD_SOURCES} more."]
    lines += ["", *(f"- left out: {cell(reason)}" for reason in found.left_out[:_TOLD_SOURCES])]
    taken(lambda: create_markdown_artifact("\n".join(lines), key="render-library", description="Summary of the run"))
