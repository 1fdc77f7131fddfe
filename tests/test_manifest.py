"""Manifests: every cell as written, every problem told, and a million rows no trouble."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from t2vz import storage
from t2vz.columns import columns_table, with_table
from t2vz.errors import ManifestError
from t2vz.manifest import BadRow, Row, read
from t2vz.spec import JobSpec

ROOT = Path(__file__).parents[1]


@pytest.fixture
def manifest(tmp_path):
    def write(text: str | bytes, name: str = "m.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def specs(path: Path, **defaults: str) -> list[JobSpec]:
    rows = list(read(path, defaults))
    assert not [str(problem) for row in rows if isinstance(row, BadRow) for problem in row.problems]
    return [row.spec for row in rows if isinstance(row, Row)]


def problems(path: Path) -> list[tuple[int, str, str, str]]:
    return [(p.row, p.column, p.value, p.suggestion) for r in read(path) if isinstance(r, BadRow) for p in r.problems]


def only_bad(path: Path) -> BadRow:
    (row,) = (row for row in read(path) if isinstance(row, BadRow))
    return row


# --- reading cells ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_dialects(manifest, delimiter, bom, newline):
    lines = [["id", " prompt ", "seed"], ["0012", '"a ""b""\nc"', ""], ["NA", "None", "9223372036854775807"]]
    path = manifest(bom + newline.join(delimiter.join(line) for line in lines) + newline)
    first, second = specs(path)
    assert (first.id, first.prompt, first.seed) == ("0012", 'a "b"\nc', None)
    assert (second.id, second.prompt, second.seed) == ("NA", "None", 2**63 - 1)


def test_cells_are_trimmed_and_blank_rows_passed_over_but_counted(manifest):
    path = manifest('\nprompt, seed\n a cat , 1\n\n,\n "dog, wet", 2\n')
    assert [(row.number, row.spec.prompt, row.spec.seed) for row in read(path)] == [(1, "a cat", 1), (4, "dog, wet", 2)]


def test_parquet_gives_what_csv_gives(tmp_path, manifest):
    table = pa.table(
        {
            "prompt": ["a", "b", None],
            "mode": pa.array(["control", "text", None]).dictionary_encode(),
            "source": ["clip.mp4", None, None],
            "condition": pa.array([["edge", "depth"], None, None], pa.list_(pa.string())),
            "controlnet_conditioning_scale": pa.array([[0.5, 1.0], None, None], pa.list_(pa.float64())),
            "width": [512.0, float("nan"), None],
            "seed": pa.array([2**62 + 1, None, None], pa.int64()),
            "guidance_scale": pa.array([0.1, 7.5, None], pa.float32()),
            "audio": [False, None, None],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    path = manifest(
        "prompt,mode,source,condition,controlnet_conditioning_scale,width,seed,guidance_scale,audio\n"
        "a,control,clip.mp4,edge+depth,0.5+1,512,4611686018427387905,0.1,false\n"
        "b,text,,,,,,7.5,\n"
        ",,,,,,,,\n"
    )
    rows = list(read(tmp_path / "m.parquet"))
    assert rows == list(read(path))  # the made ids, too
    assert rows[0].spec.condition == ("edge", "depth")
    assert rows[0].spec.seed == 2**62 + 1


def test_row_numbers_survive_ragged_rows(manifest):
    path = manifest('prompt,seed\na,1\nb\nc,1,2\nd,4\n"e" x,5\nf,6\n')
    rows = list(read(path))
    assert [(row.number, isinstance(row, Row)) for row in rows] == [
        (1, True),
        (2, False),
        (3, False),
        (4, True),
        (5, False),
        (6, True),
    ]
    assert rows[1].problems[0].reason == "has 1 cell where the header has 2"
    assert "line 6" in rows[4].problems[0].reason
    assert len({row.id for row in rows}) == 6


def test_a_quote_that_is_never_closed_is_told_with_its_line(manifest):
    bad = only_bad(manifest('prompt\na\n"b\nc\n'))
    assert bad.number == 2
    assert "line 3) opens a quote that is never closed" in bad.error.message


def test_what_an_unclosed_quote_swallows_is_told(manifest):
    assert "the rows after it may be inside it" in only_bad(manifest('prompt\n"b\nc\nd\n')).error.message
    bad, good = read(manifest('prompt\n"b\nc "d"\ne\n'))
    assert "what is up to line 3 was read as a part of it" in bad.error.message
    assert (good.number, good.spec.prompt) == (2, "e")


def test_delimiters_after_the_last_column(manifest):
    rows = list(read(manifest("prompt,seed,,\na,1,,\nb,2\nc,3, ,x\nd\n")))
    assert [(row.number, isinstance(row, Row)) for row in rows] == [(1, True), (2, True), (3, False), (4, False)]
    assert [row.spec.seed for row in rows[:2]] == [1, 2]


@pytest.mark.parametrize("line", ["sep=|", '\ufeff"sep=|"', "\nSEP=|"])
def test_excels_line_before_the_header(manifest, line):
    rows = list(read(manifest(f'{line}\nprompt|seed\na, b|1\n"c" x|2\n')))
    assert rows[0].spec.prompt == "a, b"
    assert f"line {4 + line.count(chr(10))}" in rows[1].error.message


def test_parquet_lists_and_whole_numbers(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "mode": ["control", "control", "text"],
            "source": ["x", "x", None],
            "condition": pa.array([["edge", "depth"], ["edge", None], None], pa.list_(pa.string(), 2)),
            "seed": [1e18, None, 2.0**53],
        }
    )
    pq.write_table(table, tmp_path / "m.parquet")
    first, bad, last = read(tmp_path / "m.parquet")
    assert (first.spec.condition, first.spec.seed, last.spec.seed) == (("edge", "depth"), 10**18, 2**53)
    assert "empty element in column condition" in bad.error.message


# --- ids -------------------------------------------------------------------------------------------------


def test_made_ids_depend_on_the_content_only(manifest):
    before = {row.spec.prompt: row.id for row in read(manifest("prompt,seed\na,1\nb,\nc,3\n"))}
    after = {row.spec.prompt: row.id for row in read(manifest("seed,mode,prompt\n3,,c\n7,,new\n,,b\n1,,a\n"))}
    assert {prompt: after[prompt] for prompt in before} == before
    assert all(len(id) == 10 and int(id, 16) >= 0 for id in before.values())


def test_made_ids_leave_out_how_much_is_done_at_once(manifest):
    one, other = (next(read(manifest(f"prompt,chunk_size\na,{size}\n"))).id for size in ("", "4"))
    assert one == other


def test_rows_that_are_alike_get_ids_of_their_own(manifest):
    ids = [row.id for row in read(manifest("prompt\na\nb\na\na\n"))]
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert [row.spec.id for row in read(manifest("prompt\na\nb\na\na\n"))] == ids


def test_a_repeated_id_names_the_first_row_and_keeps_results_apart(manifest):
    rows = list(read(manifest("id,prompt\nx,a\ny,a\nx,a\nx,a\n")))
    assert [isinstance(row, Row) for row in rows] == [True, True, False, False]
    assert "id is the id of row 1 already" in str(rows[2].problems[0])
    assert len({row.id for row in rows}) == 4
    assert rows[2].fingerprint != rows[3].fingerprint


def test_ids_are_free_text_without_control_characters(manifest):
    assert specs(manifest("id,prompt\nmy shot/№ 1: “ü”,a\n"))[0].id == "my shot/№ 1: “ü”"
    bad = only_bad(manifest("id,prompt\na\x1b[31mb,a\n"))
    assert [p.column for p in bad.problems] == ["id"]
    assert bad.id.isalnum()


# --- problems of rows ------------------------------------------------------------------------------------


def test_all_problems_of_a_row_at_once_in_plain_words(manifest):
    path = manifest(
        "mode,prompt,source,condition,seed,width,fps,audio,guidance_scale\ncontrl,,x,deph+edge,-1,wide,x,perhaps,nan\n"
    )
    assert problems(path) == [
        (1, "mode", "contrl", "control"),
        (1, "prompt", "", ""),
        (1, "condition", "deph", "depth"),
        (1, "width", "wide", ""),
        (1, "fps", "x", ""),
        (1, "guidance_scale", "nan", ""),
        (1, "seed", "-1", ""),
        (1, "audio", "perhaps", ""),
    ]
    message = only_bad(path).error.message
    for part in (
        "mode must be one of text, control, edit (it is 'contrl'); did you mean 'control'?",
        "prompt is needed",
        "seed must be at least 0",
        "width must be a whole number",
        "fps is not a rate",
        "audio must be true or false",
        "guidance_scale must be a finite number",
    ):
        assert part in message
    assert "\n" not in message
    assert "Input should" not in message


def test_problems_that_span_columns_are_told_apart(manifest):
    path = manifest("mode,prompt,source,crf,end_s,start_s\ntext,a,clip.mp4,,,\nedit,b,clip.mp4,60,2,3\n")
    source = str(path.parent / "clip.mp4")
    assert problems(path) == [(1, "source", source, ""), (2, "end_s", "2", ""), (2, "crf", "60", "")]


def test_a_bad_cell_does_not_hide_what_is_wrong_between_the_others(manifest):
    path = manifest("mode,prompt,seed,source,end_s,start_s\ntext,a,-1,clip.mp4,,\nedit,,1,clip.mp4,2,3\n")
    source = str(path.parent / "clip.mp4")
    assert problems(path) == [
        (1, "seed", "-1", ""),
        (1, "source", source, ""),
        (2, "prompt", "", ""),
        (2, "end_s", "2", ""),
    ]


def test_every_constraint_of_the_columns_has_plain_words(manifest):
    bad = {"seed": "9" * 5000, "t1": "0", "crf": "64", "num_inference_steps": "1.5", "prompt": "x" * 10_001}
    bad |= {"end_s": "0", "id": "i" * 201, "image_guidance_scale": "high", "fps": "0"}
    bad = only_bad(manifest(",".join(bad) + "\n" + ",".join(bad.values()) + "\n"))
    assert len(bad.problems) == 9
    assert not [p.reason for p in bad.problems if "not accepted" in p.reason]
    assert len(bad.error.message) < 2000


def test_a_mended_row_has_another_fingerprint(manifest):
    first, again, mended = (only_bad(manifest(f"id,prompt,seed\nx,a,{seed}\n")).fingerprint for seed in ("u", "u", "v"))
    assert first == again != mended


# --- defects of the whole --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        ("prompt\ncafé".encode("latin-1"), "line 2 is not UTF-8"),
        ("prompt\na".encode("utf-16"), "line 1 is not UTF-8"),
        (b"id,seed\n1,2\n", "no prompt column; the columns are id, seed"),
        (b"prompt,sead,wdith,zzz\na,1,2,3\n", r"'sead' .*'seed'\?\), 'wdith' .*'width'\?\), 'zzz'$"),
        (b"Prompt\na\n", "'Prompt' .*did you mean 'prompt'"),
        (b"prompt,seed,prompt \na,1,b\n", "column prompt appears more than once"),
        (b"prompt,,seed\na,,1\n", "column 2 has no name"),
        (b"PK\x03\x04...", "spreadsheet"),
        (b"PAR1 but not really", "not a readable Parquet file"),
    ],
)
def test_defects_of_the_whole_are_told_at_once(manifest, content, message):
    with pytest.raises(ManifestError, match=message) as caught:
        read(manifest(content))
    assert "m.csv: " in caught.value.message
    assert "\n" not in caught.value.message


def test_a_manifest_that_cannot_be_opened(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        read(tmp_path / "none.csv")
    with pytest.raises(ManifestError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ManifestError, match="no such manifest"):
        read("a\0b")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(ManifestError, match="not a regular file"):
        read(tmp_path / "pipe")


def test_parquet_columns_that_are_no_cells_are_refused(tmp_path):
    for cell, kind in (({"x": 1}, "struct"), ([["a"]], "list<.*list<"), (b"a", "binary")):
        pq.write_table(pa.table({"prompt": ["a"], "seed": [cell]}), tmp_path / "m.parquet")
        with pytest.raises(ManifestError, match=f"column seed holds {kind}"):
            read(tmp_path / "m.parquet")


def test_a_parquet_file_that_breaks_off_is_told_in_our_words(tmp_path):
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": [f"{n}" * 9 for n in range(9999)]}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"m\.parquet"):
        list(read(path))


# --- defaults and paths ----------------------------------------------------------------------------------


def test_defaults_fill_only_what_is_empty_and_used(manifest):
    path = manifest("mode,prompt,source,seed\n,a,,\nedit,b,x.mp4,5\n")
    text, edit = specs(path, seed="3", image_guidance_scale="2", t1="40", t0="30", width="")
    assert (text.seed, text.t1, text.image_guidance_scale) == (3, 40, 1.5)
    assert (edit.seed, edit.t1, edit.image_guidance_scale) == (5, None, 2.0)
    assert "t1" not in edit.model_fields_set


def test_a_default_mode_decides_which_defaults_are_used(manifest):
    (spec,) = specs(manifest("seed\n1\n"), mode="edit", source="c.mp4", prompt="snow", image_guidance_scale="2")
    assert (spec.mode, spec.image_guidance_scale, spec.prompt) == ("edit", 2.0, "snow")


def test_defaults_do_not_change_made_ids(manifest):
    path = manifest("prompt\na\n")
    assert next(read(path)).id == next(read(path, {"seed": "4"})).id


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"sead": "1"}, "'sead' .*did you mean 'seed'"),
        ({"seed": "one"}, "seed must be a whole number"),
        ({"id": "x"}, "no.* default for id|can't be a default for id"),
        ({"mode": "txt"}, "did you mean 'text'"),
    ],
)
def test_bad_defaults_stop_the_manifest(manifest, defaults, message):
    with pytest.raises(ManifestError, match=message):
        read(manifest("prompt\na\n"), defaults)


def test_a_default_that_only_some_rows_can_use_is_no_fault_of_the_others(manifest):
    defaults = {"depth_model": "org/depth", "canny_low": "50", "negative_prompt": "blue", "revision": "main"}
    path = manifest("mode,prompt,source,condition,guidance_scale\ncontrol,a,c,depth,\ncontrol,a,c,pose,1\n,b,,,\n")
    depth, pose, text = specs(path, **defaults)
    assert (depth.depth_model, pose.canny_low, text.negative_prompt) == ("org/depth", 50, "blue")
    row = only_bad(manifest("mode,prompt,source,condition,depth_model\ncontrol,a,c,pose,org/depth\n"))
    assert row.problems[0].column == "depth_model"


@pytest.mark.parametrize("cell", ["mini/lora+", "+mini/lora", "+"])
def test_an_empty_part_is_not_the_manifests_folder(manifest, tmp_path, cell):
    (tmp_path / "found.safetensors").touch()
    (problem,) = only_bad(manifest(f"prompt,lora\na,{cell}\n")).problems
    assert (problem.column, problem.reason) == ("lora", "has an empty part: remove the +")


def test_a_file_whose_name_holds_a_plus_is_told(manifest, tmp_path):
    (tmp_path / "film+ink.safetensors").touch()
    (problem,) = only_bad(manifest("prompt,lora\na,film+ink.safetensors\n")).problems
    assert (problem.column, problem.value) == ("lora", "film+ink.safetensors")
    assert "rename the file" in problem.reason


def test_paths_are_relative_to_the_manifest(tmp_path, manifest, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "my.safetensors").touch()
    monkeypatch.chdir(ROOT)
    path = manifest(
        "mode,prompt,source,condition_video,condition,controlnet,model,depth_model\n"
        "control,a,clips/../c.mp4,,edge+depth,nets+org/net,my.safetensors,../d\n"
        "control,b,,/abs/s.mp4,pose,,sd15,\n"
        "edit,c,s3://bucket/c.mp4,,,,org/model,\n"
    )
    a, b, c = specs(path)
    assert a.source == str(tmp_path / "c.mp4")
    assert a.controlnet == (str(tmp_path / "nets"), "org/net")
    assert a.model == str(tmp_path / "my.safetensors")
    assert a.depth_model == str(tmp_path.parent / "d")
    assert (b.condition_video, b.model) == ("/abs/s.mp4", "sd15")
    assert (c.source, c.model) == ("s3://bucket/c.mp4", "org/model")


def test_a_manifest_on_s3(s3, manifest):
    bucket = s3.bucket()
    header = "mode,prompt,source,condition,model\n"
    path = manifest(header + "control,a,clips/../c.mp4,edge,sd15\ncontrol,b,/abs/s.mp4,pose,\nedit,c,../d.mp4,,x\n")
    storage.upload(path, bucket, "deep/rows.csv")
    a, b, c = specs(f"{bucket}/deep/rows.csv")
    assert [spec.source for spec in (a, b, c)] == [f"{bucket}/deep/c.mp4", "/abs/s.mp4", f"{bucket}/d.mp4"]
    assert (a.model, c.model) == ("sd15", "x")
    with pytest.raises(ManifestError, match=rf"^{bucket}/none.csv: no such object"):
        read(f"{bucket}/none.csv")
    storage.put(bucket, "bad.csv", b"promt\na\n")
    with pytest.raises(ManifestError, match=rf"^{bucket}/bad.csv: .*did you mean 'prompt'"):
        read(f"{bucket}/bad.csv")


# --- the size of it, and the documentation ---------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc (Linux)")
def test_memory_grows_with_the_ids_only_and_nothing_heavy_is_imported(tmp_path):
    """100 MB of manifest in a fresh process, whose peak stays near what Python and pydantic take."""
    with (tmp_path / "m.csv").open("w") as file:
        file.write("prompt,seed\n")
        file.writelines(f"{n} {'long ' * 400},{n}\n" for n in range(50_000))
    code = (  # VmHWM, because ru_maxrss is handed down from the parent process
        "import json, sys; from t2vz.manifest import read; rows = sum(1 for _ in read(sys.argv[1]));"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0];"
        "print(json.dumps([rows, int(peak), sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.csv"], capture_output=True, check=True, text=True)
    rows, peak_kib, modules = json.loads(done.stdout)
    assert rows == 50_000
    assert peak_kib < 80_000
    assert not {"torch", "diffusers", "transformers", "pyarrow", "pandas", "numpy"} & set(modules)


def test_the_readme_has_the_present_table_of_columns():
    readme = (ROOT / "manifests" / "README.md").read_text("utf-8")
    assert readme == with_table(readme), "run: make columns"
    table = columns_table()
    assert table.count("\n") == len(JobSpec.model_fields) + 2
    assert "| `fps` | rate |  | frames/s | all |" in table


def test_the_example_in_the_readme_reads(manifest):
    readme = (ROOT / "manifests" / "README.md").read_text("utf-8")
    example = readme.split("```csv\n")[1].split("```")[0]
    assert [spec.mode for spec in specs(manifest(example))] == ["text", "control", "edit"]
