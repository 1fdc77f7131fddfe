"""The command line: `t2vz plan`, `run`, `results`, `sheet`, `gallery`, `app`, `provenance`, `maintain`, `eval`.

Light: what renders is imported when it renders.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem

from t2vz.errors import OutputError, T2VZError, UnexpectedError, UnknownModel, translate, translating
from t2vz.media.limits import SCHEMES, Limits
from t2vz.processes import launched

if TYPE_CHECKING:
    from rich.console import Console

    from t2vz.manifest import Problem
    from t2vz.plan import ContentPolicy, Done, Job, Unready, Work
    from t2vz.results import ResultRow

OK, SOME_FAILED, UNUSABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_TOLD_ROWS = 20
_INTERRUPT_GRACE_S = 15.0
_GOES_ON = "finished rows are kept; the same command goes on with the others"
_INTERRUPTED, _TERMINATED = f"interrupted: {_GOES_ON}", f"stopped by SIGTERM: {_GOES_ON}"

# Before Prefect is imported; what the user has set wins.
_PREFECT_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "t2vz",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}

EPILOG = """\b
Exit codes:
    0  everything is well: all rows are rendered, no problems found
    1  some rows failed, or have problems
    2  wrong usage, or the manifest or output folder as a whole can't be used
  130  interrupted
  143  stopped by SIGTERM
T2VZ_DEBUG=1 shows tracebacks of errors."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; the process's own if None); returns the exit code."""
    try:
        code = cli.main(arguments, standalone_mode=False)
        sys.stdout.flush()
        return code or OK
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return UNUSABLE
    except click.ClickException as error:
        error.show()
        return UNUSABLE
    except (click.Abort, KeyboardInterrupt):
        click.echo(_INTERRUPTED, err=True)
        return INTERRUPTED
    except _Terminated:
        click.echo(_TERMINATED, err=True)
        return TERMINATED
    except BrokenPipeError:  # the reader of our output is gone (`t2vz results … | head`): exit as click does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("T2VZ_DEBUG") == "1":
            raise
        hint = "" if isinstance(error, T2VZError) else " (T2VZ_DEBUG=1 shows where)"
        click.echo(f"error: {translate(error, 'unknown').message}{hint}", err=True)
        return UNUSABLE


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="t2vz")
def cli() -> None:
    """Turn a manifest of prompts and source videos into videos and a results table."""


def _defaults(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    defaults = {}
    for text in values:
        column, equals, value = text.partition("=")
        if not equals or not column.strip():
            raise click.BadParameter(f"{text!r} is not of the form column=value")
        defaults[column.strip()] = value.strip()
    return defaults


def _columns(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a shell may complete `--default` to: the columns, and the values of those that have a choice of them."""
    from t2vz.columns import choices
    from t2vz.spec import JobSpec

    column, equals, _ = incomplete.partition("=")
    if equals and column in JobSpec.model_fields:
        found = [f"{column}={value}" for value in choices(JobSpec.model_fields[column].annotation)]
    else:
        found = [f"{name}=" for name in JobSpec.model_fields if name != "id"]
    return [CompletionItem(text) for text in found if text.startswith(incomplete)]


_content_option: Callable[[Any], Any] = click.option(
    "--content",
    type=click.Choice(["off", "flag", "withhold"]),
    default="flag",
    show_default=True,
    help="What the model's safety checker flags: off: it is not asked; flag: the row says so; withhold: no video.",
)
_default_option: Callable[[Any], Any] = click.option(
    "--default",
    "defaults",
    metavar="COLUMN=VALUE",
    multiple=True,
    callback=_defaults,
    shell_complete=_columns,
    help="Value for the cells that are empty in a column. Repeatable.",
)


def _input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of what sources and models the rows may name: the command's arguments `limits`, a dict of the fields of
    `Limits`, `allow_pickles` and `model_checksums`.
    """

    @functools.wraps(command)
    def gathered(**options: Any) -> Any:
        return command(limits={limit.name: options.pop(limit.name) for limit in fields(Limits)}, **options)

    checksums = "JSON file of {model: checksum}; only these are loaded."
    pickles = "Read the annotators' weights, which are pickles (tensors only)."
    click.option("--model-checksums", type=click.Path(), help=checksums)(gathered)
    click.option("--allow-pickles", is_flag=True, help=pickles)(gathered)
    for limit in reversed(fields(Limits)):
        meaning: str = limit.metadata["meaning"]
        if limit.name.startswith("max_"):
            flag, whole = f"--{limit.name.replace('_', '-')}", isinstance(limit.default, int)
            kind = click.IntRange(1) if whole else click.FloatRange(0, min_open=True)
            click.option(flag, type=kind, default=limit.default, show_default=True, help=f"{meaning}.")(gathered)
        else:
            flag = f"--source-{limit.name.removesuffix('s')}"
            choice = click.Choice(SCHEMES) if limit.name == "schemes" else None
            click.option(
                flag, limit.name, type=choice, multiple=True, default=limit.default, help=f"{meaning}. Repeatable."
            )(gathered)
    return gathered


@cli.command(epilog=EPILOG)
@click.argument("manifest", type=click.Path())
@click.option("--out", type=click.Path(), help="Output folder: what is done there is counted as done.")
@_default_option
@_input_options
@_content_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    manifest: str,
    out: str | None,
    defaults: dict[str, str],
    limits: dict[str, Any],
    allow_pickles: bool,
    model_checksums: str | None,
    content: ContentPolicy,
    as_json: bool,
) -> int:
    """Check MANIFEST and say what rendering it takes. Tells all problems at once; renders nothing."""
    from t2vz.models.policy import ModelPolicy
    from t2vz.plan import Unready, summarise
    from t2vz.plan import plan as planned

    policy = ModelPolicy(allow_pickles, model_checksums)
    unready: list[Unready] = []

    def items() -> Iterator[Job | Unready | Done]:
        for item in planned(manifest, out, defaults, Limits(**limits), models=policy, content=content):
            if isinstance(item, Unready):
                unready.append(item)
            yield item

    summary = summarise(items())
    problems = _problems(unready)
    if as_json:
        told = asdict(summary.to_do) | {
            "done": summary.done,
            "unready": summary.unready,
            "groups": [
                {"model": model, "mode": mode, **asdict(work)} for (model, mode), work in summary.groups.items()
            ],
            "problems": [asdict(problem) for problem in problems],
        }
        click.echo(json.dumps(told, ensure_ascii=False, indent=1))
        return SOME_FAILED if problems else OK
    for problem in problems:
        click.echo(f"row {problem.row} ({problem.id}): {problem}")
    click.echo(
        f"{_amount(summary.to_do)}; {summary.done} done before, {_counted(summary.unready, 'row')} with problems"
    )
    for (model, mode), work in summary.groups.items():
        click.echo(f"  {model} {mode}: {_amount(work)}")
    return SOME_FAILED if problems else OK


@cli.command(epilog=EPILOG)
@click.argument("manifest", type=click.Path())
@click.option("--out", type=click.Path(), required=True, help="Output folder for videos and results table.")
@_default_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, …")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    help="Processes that hold models; one for each GPU unless given. On the CPU they share the cores.",
)
@click.option(
    "--executor",
    type=click.Choice(["auto", "threads", "processes", "ray"]),
    default="auto",
    show_default=True,
    help="Workers as processes, as threads of this one, or on a Ray cluster (RAY_ADDRESS, or the one started here); "
    "auto: processes on GPUs and for several workers.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="Rows under way at once in each worker; bounds the clips in memory.",
)
@_input_options
@click.option("--max-failed", type=click.IntRange(0), help="More failed rows make the Prefect run Failed.")
@click.option("--verify", is_flag=True, help="Check the checksums of finished videos, not only their sizes.")
@click.option("--quality", is_flag=True, help="Measure the frames of every row: flicker, warp error, seams, drift.")
@click.option("--clip-model", help="CLIP model (folder or hub id) that measures them, too; implies --quality.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the UNet: minutes once, then faster on a GPU.")
@click.option(
    "--split",
    type=click.IntRange(1, 64),
    help="Processes that share the frames of each clip, one a device; under `accelerate launch`, all that it starts.",
)
@_content_option
@click.option("--sign-certificate", type=click.Path(), help="Sign the files as made by AI (C2PA): the chain, in PEM.")
@click.option("--sign-key", type=click.Path(), help="The certificate's private key, in PEM.")
@click.option("--sign-prompt", is_flag=True, help="Tell the prompt in the signed claim.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), help="Serve Prometheus metrics there.")
@click.option("--metrics-folder", type=click.Path(), help="Write them there, for node-exporter's textfile collector.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, only the closing counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in the end: counts, speed, failed rows.")
def run(
    manifest: str, out: str, defaults: dict[str, str], split: int | None, quiet: bool, as_json: bool, **options: Any
) -> int:
    """Render the rows of MANIFEST that are not done yet.

    Uses the Prefect server that PREFECT_API_URL names, else one of its own for the length of the run.
    """
    from rich.console import Console

    from t2vz.models.policy import ModelPolicy
    from t2vz.plan import Done, check_out
    from t2vz.plan import plan as planned
    from t2vz.quality import check_clip_model

    processes = launched()
    if processes > 1 and os.environ.get("RANK", "0") != "0":
        from t2vz.modes.split import main

        main(options["device"])
    if processes > 1 and split not in (None, processes):
        raise click.UsageError(f"--split {split}, but {processes} processes were launched; leave it out")
    split = split or processes
    # Before anything heavy starts: a model or manifest that can't be used, or nothing to do.
    if options["clip_model"] is not None:
        check_clip_model(options["clip_model"])
    policy = ModelPolicy(options["allow_pickles"], options["model_checksums"])
    done, limits = 0, Limits(**options["limits"])
    items = planned(manifest, out, defaults, limits, options["verify"], policy, options["content"])
    for done, item in enumerate(items, 1):  # noqa: B007
        if not isinstance(item, Done):
            break
    else:
        why = f"{manifest} has no rows" if not done else f"every row is done in {out}"
        if as_json:
            click.echo(_run_json(out, {"done": done}, 0.0))
        else:
            click.echo(f"nothing to render: {why}")
        if processes > 1:
            from t2vz.modes.split import leading

            with leading(processes, options["device"]):
                pass  # the other processes wait to be told
            _leave(OK)
        return OK

    check_out(out)
    console, began = Console(stderr=True), time.monotonic()
    with _interruptible(console):
        summary = _run_flow(console, quiet, manifest=manifest, out=out, defaults=defaults, split=split, **options)
    elapsed_s = time.monotonic() - began
    if as_json:
        click.echo(_run_json(out, summary, elapsed_s))
    else:
        _tell_run(out, summary, quiet, elapsed_s)
    code = SOME_FAILED if summary.get("failed") else OK
    if split > 1:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End a process that shared clips: at its very end torch's threads may abort it."""
    sys.stdout.flush()
    os._exit(code)


@cli.command(epilog=EPILOG)
@click.argument("out", type=click.Path())
@click.option("--status", type=click.Choice(["ok", "failed", "skipped"]), help="Only rows of this status.")
@click.option("--mode", type=click.Choice(["text", "control", "edit"]), help="Only rows of this mode.")
@click.option("--all", "everything", is_flag=True, help="Also rows that later versions of them replaced.")
@click.option("--export", "target", type=click.Path(), help="Write a .csv, .parquet or .json file instead.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def results(out: str, status: str | None, mode: str | None, everything: bool, target: str | None, as_json: bool) -> int:
    """Show the results table of the output folder OUT."""
    from t2vz.results import export, read

    if target is not None:
        with _writing(target), translating("results"):
            count = export(out, target, status=status, mode=mode, all=everything)
        click.echo(f"{_counted(count, 'row')} written to {target}")
        return OK
    found = read(out, all=everything).where(status=status, mode=mode)
    if as_json:
        click.echo(json.dumps(found.arrow().to_pylist(), ensure_ascii=False, indent=1, default=str))
        return OK
    for row in found:
        click.echo(_row_line(out, row))
    click.echo(_counted(len(found), "row"))
    return OK


@cli.command(epilog=EPILOG)
@click.argument("out", type=click.Path())
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--mode", type=click.Choice(["text", "control", "edit"]), help="Only rows of this mode.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many rows.")
@click.option("--columns", type=click.IntRange(1), default=1, show_default=True, help="Rows side by side.")
@click.option("--scale", type=click.FloatRange(0.1, 4), default=1.0, show_default=True, help="1: frames 128 px high.")
def sheet(out: str, file: Path, **options: Any) -> int:
    """Draw a contact sheet of the output folder OUT into FILE (.png, .webp, .jpg).

    Of each finished row eight frames: its source, its conditions and its result under each other, in step.
    """
    from t2vz.sheet import write_sheet

    count = write_sheet(out, file, **options)
    click.echo(f"{_counted(count, 'row')} drawn in {file}")
    return OK


@cli.command(epilog=EPILOG)
@click.option(
    "--out", type=click.Path(), default="playground-out", show_default=True, help="Output folder for what is rendered."
)
@click.option(
    "--manifest", type=click.Path(path_type=Path), help="Manifest to append to; OUT/playground.csv if absent."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at: this machine's own alone.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0: any free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, …")
@click.option("--max-upload-mb", type=click.IntRange(1), default=500, show_default=True, help="Of one uploaded file.")
@_input_options
@_content_option
def app(
    out: str,
    manifest: Path | None,
    host: str,
    port: int,
    device: str,
    max_upload_mb: int,
    limits: dict[str, Any],
    allow_pickles: bool,
    model_checksums: str | None,
    content: ContentPolicy,
) -> int:
    """Serve the playground: a page with a tab for each mode, to try rows and append them to a manifest.

    Needs the extra `app`: pip install 't2vz[app]'. Ends with Ctrl-C.
    """
    import uuid

    from t2vz import storage
    from t2vz.models.policy import ModelPolicy
    from t2vz.plan import check_out
    from t2vz.render import Settings

    if storage.is_remote(out):
        raise OutputError(f"{out}: the playground needs an output folder on this machine")
    check_out(out)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before its import, which reads it
    click.echo("starting …", err=True)
    try:
        from t2vz.app.page import serve
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error.name} is not installed: pip install 't2vz[app]'") from error
    from t2vz.app.runs import Playground

    kept = manifest or Path(out, "playground.csv")
    settings = Settings(
        out=Path(out),
        manifest=str(kept.absolute()),
        run_id=f"app-{uuid.uuid4()}",
        device=device,
        limits=Limits(**limits),
        models=ModelPolicy(allow_pickles, model_checksums),
        content=content,
    )
    with suppress(KeyboardInterrupt):  # how it ends
        serve(
            Playground(settings, kept),
            host=host,
            port=port,
            max_upload_bytes=max_upload_mb * 10**6,
            on_ready=lambda address: click.echo(f"playground at {address}; Ctrl-C ends it"),
        )
    return OK


@cli.command(epilog=EPILOG)
@click.argument("out", type=click.Path())
@click.option("--serve", "serves", is_flag=True, help="Show it on 127.0.0.1, with new rows as they come, until Ctrl-C.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of --serve; any free one unless given.")
@click.option("--file", type=click.Path(), help="Write the page there instead of OUT/gallery.html.")
@click.option("--embed", is_flag=True, help="Put the moving thumbnails into the page, to send it alone; no videos.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=20_000,
    show_default=True,
    help="At most so many rows, the last that finished.",
)
def gallery(out: str, serves: bool, port: int | None, file: str | None, embed: bool, limit: int) -> int:
    """Make a page to look at the output folder OUT: every row's source, conditions and result, moving in step.

    It can be filtered and sorted by status, mode, model, words and quality; a row opens to all that is known of it.
    Needs nothing but a browser: no network, no server unless --serve. Of a folder on S3 the page is written there, or
    served from here.
    """
    if serves and (file is not None or embed):
        raise click.UsageError("--serve writes no page; leave --file and --embed out")
    if port is not None and not serves:
        raise click.UsageError("--port is for --serve")
    if serves:
        from t2vz.gallery.serve import serve

        with suppress(KeyboardInterrupt):
            serve(out, port or 0, limit, on_start=lambda url: click.echo(f"the gallery is at {url} until Ctrl-C"))
        return OK
    from t2vz.gallery.page import write

    where, count = write(out, file, embed=embed, limit=limit)
    click.echo(f"{_counted(count, 'row')} shown in {where}")
    return OK


@cli.command(epilog=EPILOG)
@click.argument("video", type=click.Path())
def provenance(video: str) -> int:
    """Say what VIDEO tells of how it was made, as one JSON object: parameters, watermark, signature.

    null: it has none. A signature that is not valid counts as a problem.
    """
    from t2vz.media.provenance import read

    with translating("decode", video):
        found = read(video)
    click.echo(json.dumps(found, ensure_ascii=False, indent=1))
    return SOME_FAILED if found["signature"] and not found["signature"]["valid"] else OK


@cli.command(epilog=EPILOG)
@click.argument("out", type=click.Path())
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
@click.option(
    "--older-than", "days", type=click.FloatRange(0), metavar="DAYS", help="Also results and videos of that age."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def maintain(out: str, dry_run: bool, days: float | None, as_json: bool) -> int:
    """Tidy the output folder OUT: compact its table, remove what killed runs left and what no result names.

    Safe while runs are under way. Results and their videos are removed only with --older-than.
    """
    import uuid
    from datetime import timedelta

    from t2vz.maintain import maintain as tidied

    age = None if days is None else timedelta(days=days)
    report = tidied(out, f"maintain-{uuid.uuid4()}", dry_run=dry_run, older_than=age)
    if as_json:
        click.echo(json.dumps(asdict(report) | {"freed_bytes": report.freed_bytes}, ensure_ascii=False, indent=1))
        return OK
    if dry_run:
        for item in report.items:
            click.echo(f"{item.kind}  {item.key}  {item.size_bytes} bytes")
    for line in report.lines():
        click.echo(line)
    return OK


@cli.command(name="eval", epilog=EPILOG)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("eval-out"), show_default=True, help="Output folder."
)
@click.option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Part of the suite's cases; one of each kind at least.",
)
@click.option(
    "--part",
    "parts",
    type=click.Choice(["text", "ablation", "control", "edit", "long", "lossy"]),
    multiple=True,
    help="Only this part. Repeatable.",
)
@click.option(
    "--family",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of a family that t2vz.mini.train made, instead of the embedded one.",
)
@click.option("--steps", type=click.IntRange(3, 999), help="Denoising steps; fewer than usual only try the suite.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:0, …")
def evaluate(out: Path, family: Path | None, device: str, steps: int | None, **options: Any) -> int:
    """Measure the quality of the method with the embedded model, on a fixed suite of drawn scenes.

    Writes eval.json and eval.html into the output folder. The last line is one JSON object. About 25 minutes on two
    cores.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from t2vz.mini.evaluate import evaluate, family_in
    from t2vz.plan import check_out
    from t2vz.render import resolve_device

    check_out(out)
    if family is not None:
        _check_family(family, whole=not options["parts"] or "control" in options["parts"])
    given: dict[str, Any] = {} if family is None else {"family": family_in(family)}
    if steps is not None:
        given["steps"] = steps
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as progress:
        tasks: dict[str, Any] = {}

        def on_case(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(part, total=total)
            progress.update(tasks[part], completed=done)

        with _writing(out):
            keys = evaluate(out, device=resolve_device(device), on_case=on_case, **options, **given)
    click.echo(f"the page: {out / 'eval.html'}; all figures: {out / 'eval.json'}")
    click.echo(json.dumps(keys))
    return OK


def _check_family(folder: Path, *, whole: bool) -> None:
    """Raise UnknownModel if a member is missing. whole: those of control mode are needed, too."""
    control = ("controlnet-edge", "controlnet-depth", "controlnet-pose", "depth", "pose", "detector")
    missing = [name for name in ("base", "edit", *(control if whole else ())) if not (folder / name).is_dir()]
    if missing:
        raise UnknownModel(f"{folder}: not a family that t2vz.mini.train made: it has no {', '.join(missing)}")


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """What the operating system has against writing there, plainly."""
    try:
        yield
    except UnexpectedError as error:
        if isinstance(error.__cause__, OSError):
            why = error.__cause__.strerror or error.__cause__
            raise OutputError(f"{path}: can't be written ({why})", stage=error.stage) from error
        raise


def _run_flow(console: Console, quiet: bool, **parameters: Any) -> dict[str, Any]:
    """Run the flow in this process; its counts by status, and `run_id`. Raises what made it fail as a whole."""
    for name, value in _PREFECT_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("NO_PROXY", "no_proxy"):  # the run's own server is on this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    if "PREFECT_HOME" not in os.environ and not _can_be_written(Path("~/.prefect")):
        os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="t2vz-prefect-")
    if os.environ.get("T2VZ_DEBUG") != "1":
        warnings.simplefilter("ignore")  # of libraries, to their developers
    if not quiet:
        console.print("starting …", highlight=False)
    from t2vz.terminal import following, quiet_logs
    from t2vz_flows.render_manifest import RenderParameters, render_manifest
    from t2vz_flows.server import api

    with quiet_logs(console), api(), following(console, quiet):
        state = render_manifest(RenderParameters(**parameters), return_state=True)
        summary = state.result(raise_on_failure=False)
    if isinstance(summary, BaseException):
        raise summary
    return summary


def _can_be_written(folder: Path) -> bool:
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return False


class _Terminated(BaseException):
    """The process got SIGTERM."""


@contextmanager
def _interruptible(console: Console) -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind the run: the rows under way stop at their next step. A second one, or rows that don't
    stop in time, end the process at once, which every part of the run is made to bear.

    While the flow runs, Prefect takes SIGTERM first: it unwinds the flow, and then has it sent again.
    """

    def leave() -> None:
        console.show_cursor()
        code = TERMINATED if pressed[0] == signal.SIGTERM else INTERRUPTED
        click.echo(_TERMINATED if code == TERMINATED else _INTERRUPTED, err=True)
        os._exit(code)

    def interrupt(number: int, frame: object) -> NoReturn:
        if pressed:
            leave()
        pressed.append(number)
        watchdog = threading.Timer(_INTERRUPT_GRACE_S, leave)
        watchdog.daemon = True
        watchdog.start()
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    pressed: list[int] = []
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _tell_run(out: str, summary: dict[str, Any], quiet: bool, elapsed_s: float) -> None:
    """The closing summary: a line a row if they are few, the counts, where things are, what to know. On a terminal
    the lines are a table.
    """
    from rich.console import Console

    from t2vz.events import counted
    from t2vz.results import read

    rows: list[ResultRow] = []
    if not quiet and 0 < summary.get("ok", 0) + summary.get("failed", 0) <= _TOLD_ROWS:
        rows += read(out, all=True).where(run_id=summary["run_id"])
    console = Console()
    if console.is_terminal and not quiet:
        from t2vz.terminal import closing_table

        closing_table(console, rows, _rows_of(summary), elapsed_s)
    else:
        for row in rows:
            click.echo(_row_line(out, row))
        click.echo(counted(summary))
    click.echo(f"videos in {os.path.join(out, 'videos')}; the table: t2vz results {out}")


def _rows_of(summary: dict[str, Any]) -> Counter[str]:
    return Counter({name: number for name, number in summary.items() if name != "run_id"})


def _run_json(out: str, summary: dict[str, Any], elapsed_s: float) -> str:
    """A run's end as one JSON object."""
    from t2vz.results import read

    frames, failed = 0, []
    if summary.get("ok") or summary.get("failed"):
        found = read(out, all=True).where(run_id=summary["run_id"])
        frames = sum(found.where(status="ok").arrow()["frames"].drop_null().to_pylist())
        failed = [
            {
                "id": row.id,
                "stage": row.error_stage,
                "error": row.error_class,
                "message": row.error_message,
                "retryable": row.retryable,
            }
            for row in found.where(status="failed")
        ]
    told = {
        "run_id": summary.get("run_id"),
        "out": out,
        "rows": dict(_rows_of(summary)),
        "frames": frames,
        "elapsed_s": round(elapsed_s, 3),
        "frames_per_s": round(frames / elapsed_s, 3) if frames else 0.0,
        "failed_rows": failed,
    }
    return json.dumps(told, ensure_ascii=False)


def _row_line(out: str, row: ResultRow) -> str:
    video = os.path.join(out, row.output_uri) if row.output_uri else "-"
    seconds = "-" if row.wall_s is None else f"{row.wall_s:.1f} s"
    parts = [row.id, row.status, video, seconds]
    if row.error_message:
        parts.append(f"{row.error_stage}: {row.error_message}")
    if row.quality:
        parts.append(", ".join(f"{name} {value:.3g}" for name, value in json.loads(row.quality).items()))
    return "  ".join(parts)


def _problems(unready: Iterable[Unready]) -> list[Problem]:
    """What is wrong, cell by cell, in the manifest's order; a missing file or model is the row's as a whole."""
    from t2vz.manifest import Problem

    return [
        problem
        for item in unready
        for problem in item.problems or (Problem(item.row_number, item.id, "", "", item.error.message),)
    ]


def _amount(work: Work) -> str:
    jobs, frames = _counted(work.jobs, "job"), _counted(work.frames, "frame")
    return f"{jobs}, {frames}, {_counted(work.unet_evaluations, 'UNet evaluation')}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
