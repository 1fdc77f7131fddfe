"""The commands that render nothing, and what all commands have in common. `run` is in tests/flows."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.csv
import pytest
from PIL import Image

from t2vz.cli import _tell_run, cli, main
from t2vz.results import ResultRow, ResultStore
from t2vz.sheet import strip_key

HEAVY = ("torch", "prefect", "diffusers", "transformers", "controlnet_aux", "decord", "accelerate", "cv2")

GOOD = "id,prompt,video_length\nboat,a boat,4\n"
BAD = """id,mode,prompt,width,warp,source
one,txet,a boat,,,
two,text,a boat,1o0,neerest,
three,edit,make it snow,,,nowhere.mp4
four,text,a boat,64,,
"""


def write(folder: Path, text: str) -> str:
    path = folder / "manifest.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def result(id: str, status: str = "ok", **values: object) -> ResultRow:
    now = datetime.now(UTC)
    return ResultRow(job_id=f"job-{id}", run_id="run", id=id, status=status, started_at=now, finished_at=now, **values)


@pytest.fixture
def out(tmp_path: Path) -> str:
    """An output folder with two rows."""
    store = ResultStore(tmp_path / "out")
    store.commit(result("boat", mode="text", wall_s=2.5, output_uri="videos/boat.mp4", output_bytes=1,
                        output_mtime_ns=1, output_sha256="0"))  # fmt: skip
    store.commit(result("deer", "failed", mode="edit", error_stage="decode", error_message="deer.mp4: cut short"))
    return str(tmp_path / "out")


@pytest.mark.parametrize("command", [["--help"], ["plan", "{manifest}"], ["results", "{out}"]])
def test_light_commands_import_nothing_heavy(command: list[str], tmp_path: Path, out: str) -> None:
    arguments = [part.format(manifest=write(tmp_path, GOOD), out=out) for part in command]
    script = (
        f"import sys; from t2vz.cli import main; code = main({arguments!r}); "
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_help_documents_exit_codes_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ["", *cli.commands]:
        assert main([*filter(None, [command]), "--help"]) == 0
        told = capsys.readouterr().out
        for code in ("0 ", "1 ", "2 ", "130 "):
            assert f"\n  {code:>5}" in told or f"  {code}" in told, (command, code)


def test_a_run_that_left_all_rows_to_another_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _tell_run(str(tmp_path / "out"), {"skipped": 2, "run_id": "run"}, quiet=False, elapsed_s=1.0)
    assert capsys.readouterr().out.startswith("2 left to another run")


def test_plan_tells_what_rendering_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", write(tmp_path, GOOD), "--default", "num_inference_steps=10", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # t1 is the noisiest step and t0 one below it: the anchor's 1 step between them, then all 10 for 4 frames.
    assert (told["jobs"], told["frames"], told["unet_evaluations"]) == (1, 4, 41)
    assert [(group["model"], group["mode"]) for group in told["groups"]] == [("mini", "text")]
    assert told["problems"] == []
    assert main(["plan", write(tmp_path, GOOD)]) == 0
    assert "1 job" in capsys.readouterr().out


def test_plan_tells_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", write(tmp_path, BAD)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (mode,) = (line for line in lines if "mode" in line and "one" in line)
    assert "'txet'" in mode
    assert "did you mean 'text'?" in mode
    assert any("two" in line and "width" in line and "whole number" in line for line in lines)
    assert any("two" in line and "warp" in line and "did you mean 'nearest'?" in line for line in lines)
    assert any("three" in line and "nowhere.mp4" in line for line in lines)
    assert not any("four" in line for line in lines)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["plan", str(tmp_path / "none.csv")], ["results", str(tmp_path / "none")]):
        assert main(command) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ")
        assert len(told.err.splitlines()) == 1
        assert told.out == ""


@pytest.mark.parametrize(
    "command", [["plan"], ["plan", "m.csv", "--default", "width"], ["run", "m.csv"], ["nonsense"], ["results", "--x"]]
)
def test_wrong_usage_exits_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 2
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nonsense", "{manifest}", "mini/base", "mini"])
def test_a_clip_model_that_is_none_is_refused_before_the_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, out = write(tmp_path, GOOD), tmp_path / "new"
    assert main(["run", manifest, "--out", str(out), "--clip-model", name.format(manifest=manifest)]) == 2
    assert capsys.readouterr().err.startswith("error: clip_model: ")
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["results", "{out}", "--export", "{folder}/taken.csv"], "taken.csv: can't be written (Is a directory)"),
        (["results", "{out}", "--export", f"{{folder}}/{'x' * 300}.csv"], "can't be written (File name too long)"),
        (["eval", "--out", "{manifest}"], "manifest.csv: not a folder"),
        (
            ["eval", "--out", "{folder}/new", "--family", "{folder}"],
            "not a family that t2vz.mini.train made: it has no b",
        ),
        (["sheet", "{out}", "{folder}/s.txt"], "s.txt: name a file that ends in .png, .webp or .jpg"),
        (["sheet", "{out}", "{folder}/s.png", "--scale", "nan"], "scale must be a number above 0"),
    ],
)
def test_what_can_not_be_written_is_told_plainly_and_first(
    command: list[str], said: str, tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken.csv").mkdir()
    manifest = write(tmp_path, GOOD)
    assert main([part.format(out=out, folder=tmp_path, manifest=manifest) for part in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "Error:" not in line


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T2VZ_DEBUG", "1")
    with pytest.raises(Exception, match="no such manifest"):
        main(["plan", str(tmp_path / "none.csv")])


def test_results_filters(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", out]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["boat", "ok"],
        ["deer", "failed"],
        ["2", "rows"],
    ]
    assert main(["results", out, "--status", "failed"]) == 0
    assert capsys.readouterr().out == "deer  failed  -  -  decode: deer.mp4: cut short\n1 row\n"
    assert main(["results", out, "--mode", "text", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["id"], row["wall_s"]) == ("boat", 2.5)


def test_a_sheet_has_no_more_columns_than_rows(out: str, tmp_path: Path) -> None:
    strip = Path(out) / strip_key("videos/boat.mp4")
    strip.parent.mkdir()
    Image.new("RGB", (320, 128)).save(strip)
    sizes = []
    for columns in (1, 10**6):
        assert main(["sheet", out, str(tmp_path / "s.png"), "--columns", str(columns)]) == 0
        with Image.open(tmp_path / "s.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[0] == sizes[1]


def test_results_export(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", out, "--status", "ok", "--export", str(tmp_path / "t.csv")]) == 0
    assert capsys.readouterr().out == f"1 row written to {tmp_path / 't.csv'}\n"
    assert pyarrow.csv.read_csv(tmp_path / "t.csv")["id"].to_pylist() == ["boat"]
    assert main(["results", out, "--export", str(tmp_path / "t.xls")]) == 2


@pytest.mark.parametrize("command", [["results", "{out}"], ["results", "{out}", "--json"], ["--help"]])
def test_reader_that_goes_away(command: list[str], out: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        arguments = [part.format(out=out) for part in command]
        done = subprocess.run(
            [sys.executable, "-m", "t2vz.cli", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr == ""
    assert done.returncode == 1
