"""The pages: their commands are run or parsed, their outputs are compared, their manifests read, their links followed.

What a block's language says:

    console      `$ ` lines are commands, run in the page's folder; what follows is what they print
    sh           commands for a shell with servers, GPUs or other folders: their names and options are checked
    python       run, in the page's folder, in order
    csv [FILE]   a manifest, without a bad row unless `problems` stands there; written for the commands after it
    text         shown only

    python tests/test_docs.py    writes what the `console` commands print into the pages anew
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from t2vz.cli import cli, main
from t2vz.manifest import BadRow, read
from t2vz.reference import commands_table, with_commands
from t2vz.results import schema
from t2vz.spec import JobSpec

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "manifests/README.md", "manifests/TUTORIAL.md", "manifests/HOWTO.md", "manifests/MOVING.md"),
    *("t2vz/README.md", "t2vz/modes/README.md", "t2vz/engine/README.md", "t2vz/mini/README.md"),
    *("flows/README.md", "infra/README.md", "infra/RUNBOOK.md"),
)
HERE = "/home/you/t2vz"  # what the pages call the folder that their commands are given in
# Whose blocks are checked here; those of flows/ and infra/ have tests of their own.
OURS = tuple(page for page in PAGES if not page.startswith(("flows/", "infra/", "t2vz/mini/")))
# Rendered by the commands of these pages, in their order, in one folder each.
RUN = ("manifests/TUTORIAL.md", "manifests/HOWTO.md", "manifests/MOVING.md", "t2vz/README.md")


class Block(NamedTuple):
    """A fenced block: its page, the words after the fence, its text."""

    page: str
    language: str
    words: tuple[str, ...]
    text: str


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text("utf-8")
    for info, body in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        language, *words = info.split() or [""]
        yield Block(page, language, tuple(words), body)


def of(language: str, pages: tuple[str, ...] = OURS) -> list[Block]:
    return [block for page in pages for block in blocks(page) if block.language == language]


# --- what is run ------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """A command of a `console` block, and what the page says it prints."""

    command: str
    output: str


def said(block: Block) -> list[Said]:
    parts = re.split(r"^\$ (.*)\n", block.text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"{block.page}: a console block begins with a command"
    return [Said(command, output) for command, output in zip(parts[1::2], parts[2::2], strict=True)]


def printed(command: str) -> str:
    """What a `t2vz` command prints on standard output, in the present folder."""
    program, *arguments = shlex.split(command)
    assert program == "t2vz", f"{command}: only t2vz is run here"
    told, log = StringIO(), StringIO()
    with redirect_stdout(told), redirect_stderr(log):
        main(arguments)
    assert "Traceback" not in log.getvalue(), log.getvalue()
    return told.getvalue().replace(str(Path.cwd()), HERE)


def plain(output: str) -> str:
    """Without what differs from run to run and from machine to machine: times, run ids, checksums."""
    output = re.sub(r"\b\d+(\.\d+)? s\b", "# s", output)
    output = re.sub(r'("run_id": )"[^"]*"', r"\1#", output)
    output = re.sub(r'("elapsed_s|"frames_per_s)": [\d.]+', r'\1": #', output)
    return re.sub(r"-[0-9a-f]{12}(?=\.)", "-#", output)


def follow(page: str, folder: Path) -> Iterator[tuple[Block, Said, str]]:
    """Do what a page says, in `folder`: each command with what it prints. Its Python is run, too."""
    (folder / "manifests").mkdir()
    shutil.copytree(ROOT / "manifests" / "clips", folder / "manifests" / "clips")
    if page == "t2vz/README.md":  # which names a manifest.csv that it does not show
        row = "id,prompt,width,height,video_length,num_inference_steps\none,a red ball,64,64,2,3\n"
        (folder / "manifest.csv").write_text(row)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks(page):
            if block.language == "csv" and block.words:
                Path(block.words[0]).write_text(block.text, "utf-8")
            elif block.language == "python":
                exec(compile(block.text, page, "exec"), {"__name__": "__main__"})
            elif block.language == "console":
                for one in said(block):
                    yield block, one, printed(one.command)
    finally:
        os.chdir(before)


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("page", RUN)
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    for _, one, output in follow(page, tmp_path):
        # Rows are told in the order in which they ended.
        assert sorted(plain(output).splitlines()) == sorted(plain(one.output).splitlines()), one.command


def test_every_console_block_and_every_python_is_run() -> None:
    assert {block.page for block in (*of("console", PAGES), *of("python", PAGES))} <= set(RUN)
    assert len(of("console")) >= 8
    assert len(of("python")) >= 6


def test_only_known_languages() -> None:
    assert {block.language for page in OURS for block in blocks(page)} <= {"console", "sh", "python", "csv", "text"}


# --- what is parsed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("csv"), ids=lambda block: f"{block.page}: {block.text.splitlines()[1][:40]}")
def test_manifests_are_manifests(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text(block.text, "utf-8")
    rows = list(read(path))
    assert rows
    assert any(isinstance(row, BadRow) for row in rows) == ("problems" in block.words)


def commands(pages: tuple[str, ...] = OURS) -> list[tuple[str, list[str]]]:
    """(page, words) of each line of the shell blocks."""
    lines = [(block.page, line) for block in of("sh", pages) for line in block.text.splitlines()]
    return [(page, shlex.split(line, comments=True)) for page, line in lines]


def test_t2vz_knows_its_commands() -> None:
    found = [words[1:] for _, words in commands() if words[0] == "t2vz"]
    assert len(found) >= 8
    for name, *arguments in found:
        with cli.commands[name].make_context(name, list(arguments)) as context:  # raises for options that there are not
            for column, value in (context.params.get("defaults") or {}).items():
                JobSpec.model_validate({"prompt": "-", column: value})


def test_make_knows_its_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = [words[1] for _, words in commands() if words[0] == "make"]
    assert {"demo", "test", "setup"} <= set(found) <= set(targets)


def test_prefect_takes_its_commands() -> None:
    """Runs: parameters and deployments are held against the flows'. What else there is is run in tests/flows."""
    from t2vz_flows.render_library import LibraryParameters
    from t2vz_flows.render_manifest import RenderParameters
    from t2vz_flows.submit_shards import ShardParameters

    takes: dict[str, Any] = {"render-library": LibraryParameters, "render-manifest": RenderParameters,
                             "submit-shards": ShardParameters}  # fmt: skip
    deployed = yaml.safe_load((ROOT / "infra" / "prefect.yaml").read_text())["deployments"]
    names = {one["name"] for one in deployed}
    run_there = (ROOT / "flows" / "README.md").read_text()
    seen = 0
    for page, words in commands():
        if words[0] != "prefect":
            continue
        seen += 1
        if words[1:3] == ["deployment", "run"]:
            flow, _, name = words[3].partition("/")
            assert name in names, page
            key, _, given = words[5].partition("=")
            assert (words[4], key) == ("--param", "parameters")
            parameters = takes[flow].model_validate(json.loads(given))
            style = getattr(parameters, "style", None) or parameters.defaults
            source = {"source": "a.mp4"} if "mode" in style else {}
            JobSpec.model_validate({"prompt": "-", **source, **style})
        else:
            assert shlex.join(words) in run_there, f"{page}: {shlex.join(words)} is not among what tests/flows runs"
    assert seen >= 4


def test_other_programs_are_few() -> None:
    assert {words[0] for _, words in commands() if words} <= {"t2vz", "make", "prefect", "python", "export", "eval",
                                                                "_T2VZ_COMPLETE=fish_source"}  # fmt: skip
    for page, words in commands():
        if words[0] == "python":
            assert (ROOT / words[1]).exists(), page


# --- what is said of the code -----------------------------------------------------------------------------


def test_the_reference_has_the_present_commands() -> None:
    page = (ROOT / "t2vz" / "README.md").read_text("utf-8")
    assert page == with_commands(page), "run: make columns"
    assert all(f"### `t2vz {name} " in commands_table() for name in cli.commands)


def test_every_column_of_the_results_is_told() -> None:
    page = (ROOT / "t2vz" / "README.md").read_text("utf-8")
    table = page.partition("## The results table")[2].partition("## Python")[0]
    told: dict[str, str] = {}
    for names, kind in re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|", table, re.MULTILINE):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind)
    types = {"string": "str", "int64": "int", "double": "float", "bool": "bool", "timestamp[us, tz=UTC]": "datetime",
             "list<item: string>": "list of str", "list<element: string>": "list of str"}  # fmt: skip
    assert told == {field.name: types[str(field.type)] for field in schema()}


def test_every_setting_is_told() -> None:
    page = (ROOT / "t2vz" / "README.md").read_text("utf-8")
    told = set(re.findall(r"`(T2VZ_\w+)`", page.partition("## Settings")[2]))
    sources = [path.read_text("utf-8") for folder in ("t2vz", "flows") for path in (ROOT / folder).rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\bT2VZ_[A-Z_]+\b", text)} - {"T2VZ_COMPLETE"}
    assert told == used


def test_every_error_and_exit_code_is_told() -> None:
    page = (ROOT / "t2vz" / "README.md").read_text("utf-8").partition("## Exit codes")[2].partition("## Completion")[0]
    assert {"0", "1", "2", "130", "143"} == set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))


def test_arguments_of_diffusers_pipeline_are_all_told() -> None:
    import inspect

    from diffusers import TextToVideoZeroPipeline

    page = (ROOT / "manifests" / "MOVING.md").read_text("utf-8").partition("## From diffusers")[2]
    names = set(inspect.signature(TextToVideoZeroPipeline.__call__).parameters) - {"self"}
    assert not {name for name in names if f"`{name}`" not in page}


# --- links and pictures -----------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text("utf-8")), target


def test_the_demo_has_every_mode_and_condition_of_the_embedded_model() -> None:
    rows = [row for row in read(ROOT / "manifests" / "demo.csv") if not isinstance(row, BadRow)]
    assert len(rows) == 9
    assert {row.spec.mode for row in rows} == {"text", "control", "edit"}
    assert {name for row in rows for name in row.spec.condition} >= {"edge", "depth", "pose"}


def test_the_page_on_the_modes_shows_the_rows_of_their_manifest() -> None:
    shown = re.findall(r"\(pictures/([\w-]+)\.webp\)", (ROOT / "t2vz" / "modes" / "README.md").read_text("utf-8"))
    made = {row.id: row for row in read(ROOT / "manifests" / "modes.csv") if not isinstance(row, BadRow)}
    there = {path.stem for path in (ROOT / "t2vz" / "modes" / "pictures").iterdir()}
    assert set(shown) == set(made) == there
    prompts = {
        row["prompt"]
        for block in of("csv", ("t2vz/modes/README.md",))
        for row in csv.DictReader(block.text.splitlines())
    }
    assert prompts <= {row.spec.prompt for row in made.values()}


def rewrite(page: str, folder: Path) -> None:
    """Put what the page's commands print into it."""
    path = ROOT / page
    text = path.read_text("utf-8")
    made: dict[Block, str] = {}
    for block, one, output in follow(page, folder):
        made[block] = made.get(block, "") + f"$ {one.command}\n{output}"
    for block, new in made.items():
        text = text.replace(f"```console\n{block.text}```", f"```console\n{new}```")
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    import tempfile

    for given in sys.argv[1:] or RUN:
        with tempfile.TemporaryDirectory() as scratch:
            rewrite(given, Path(scratch))
            print(given)
