"""The results store: nothing lost, nothing doubled, whatever is killed, and the same answer in any order."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import permutations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from t2vz import results
from t2vz.errors import ResultsError
from t2vz.results import Finished, ResultRow, ResultStore, export, read, replaces, schema

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def a_row(
    job: str = "a", status: str = "ok", start: float = 0, end: float = 1, run: str = "r1", **more: object
) -> ResultRow:
    values = {"job_id": job, "run_id": run, "id": f"row {job}", "status": status}
    values |= {"started_at": at(start), "finished_at": at(end)}
    if status == "ok":
        values |= {"output_uri": f"{job}-{run}.mp4", "output_sha256": run, "output_bytes": 10, "output_mtime_ns": 5}
    return ResultRow(**(values | more))


FULL = ResultRow(
    **{
        field.name: {
            "str": "NA, “ü”\n",
            "int": 2**62 + 1,
            "float": 0.1,
            "bool": True,
            "datetime": at(0.123456),
            "tuple[str, ...]": ("a", "b;c"),
        }[str(field.type).removesuffix(" | None")]
        for field in fields(ResultRow)
    }
    | {"job_id": "full", "run_id": "r1", "status": "ok"}
)
EMPTY = ResultRow(job_id="none", run_id="r1", id="x", status="skipped", started_at=NOON, finished_at=NOON, warnings=())


@pytest.mark.parametrize("flushed", [False, True])
def test_every_field_survives_the_way_through_record_and_table(tmp_path, flushed):
    store = ResultStore(tmp_path / "out #1 % ü")
    assert store.commit(EMPTY)
    if flushed:
        store.flush()  # a first batch whose columns are all None must not fix their types
    assert store.commit(FULL)
    if flushed:
        assert store.flush() == 1
        assert store.flush() == 0
    read_back = read(store.out)
    assert {row.job_id: row for row in read_back} == {"full": FULL, "none": EMPTY}
    assert read_back.arrow().schema == schema()
    frame = read_back.pandas().set_index("job_id")
    assert int(frame.seed["full"]) == 2**62 + 1  # beside a null; as a float it would be 2**62
    assert frame.started_at["full"] == FULL.started_at


def test_times_are_kept_in_utc(tmp_path):
    india = timezone(timedelta(hours=5, minutes=30))
    ResultStore(tmp_path).commit(replace(a_row(), started_at=at(0).astimezone(india)))
    (row,) = read(tmp_path)
    assert row.started_at == at(0)
    assert row.started_at.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 2**63},
        {"seed": "1"},
        {"prompt": b"x"},
        {"warnings": ["a"]},
        {"warnings": None},
        {"started_at": NOON.replace(tzinfo=None)},
        {"status": "done"},
        {"output_sha256": None},
        {"job_id": "../x"},
        {"run_id": ""},
    ],
)
def test_a_row_that_the_table_could_not_hold_is_refused_at_birth(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        a_row(**wrong)


def test_a_file_name_that_is_not_utf8_can_be_told(tmp_path):
    store = ResultStore(tmp_path)
    store.commit(a_row(status="failed", error_message=os.fsdecode(b"no \xff.mp4")))
    store.flush()
    assert next(iter(read(tmp_path))).error_message == "no ?.mp4"


# --- which row of a job stands ---------------------------------------------------------------------------

attempts = st.builds(
    lambda status, start, length: a_row("a", status, start, start + length),
    st.sampled_from(["ok", "failed", "skipped"]),
    st.integers(0, 6),
    st.integers(0, 6),
)


def stands(rows: list[ResultRow]) -> ResultRow:
    kept = rows[0]
    for row in rows[1:]:
        kept = row if replaces(row, kept) else kept
    return kept


@given(st.lists(attempts, min_size=1, max_size=4))
def test_the_order_of_arrival_does_not_matter(rows):
    outcomes = {(kept.status == "ok", results._holds_from(kept)) for kept in map(stands, permutations(rows))}
    assert len(outcomes) == 1
    oks = [row for row in rows if row.status == "ok"]
    ((is_ok, holds_from),) = outcomes
    if oks:
        last_ok = max(row.finished_at for row in oks)
        later_failures = [row for row in rows if row.status != "ok" and row.started_at > last_ok]
        assert is_ok == (not later_failures)
        assert holds_from == max([last_ok, *(row.started_at for row in later_failures)])


def test_a_failure_replaces_an_ok_only_if_it_began_after_it():
    ok = a_row(start=0, end=10)
    assert not replaces(a_row(status="failed", start=5, end=20), ok)
    assert replaces(ok, a_row(status="failed", start=5, end=20))
    assert replaces(a_row(status="failed", start=11, end=20), ok)
    assert replaces(a_row(start=1, end=11, run="r2"), ok)


@settings(max_examples=5, deadline=None, phases=[Phase.generate])  # shrinking 30 merges takes minutes
@given(st.lists(st.tuples(attempts, attempts), min_size=30, max_size=30))
def test_the_merge_in_the_table_follows_the_same_rule(tmp_path_factory, pairs):
    out = tmp_path_factory.mktemp("merge")
    store = ResultStore(out)
    expected = {}
    for half in (0, 1):
        for n, pair in enumerate(pairs):
            row = replace(pair[half], job_id=f"j{n}", run_id=f"r{half}", id=f"j{n}")
            expected[f"j{n}"] = stands([expected[f"j{n}"], row]) if half else row
            store.commit(row)
        assert {row.job_id: row for row in read(out)} == expected  # while the records wait
        store.flush()
    assert {row.job_id: row for row in read(out)} == expected


def test_records_of_one_job_in_one_flush_are_one_row_by_the_same_rule(tmp_path):
    store = ResultStore(tmp_path)
    store.commit(a_row("a", "ok", 0, 10, run="r1"))
    store.commit(a_row("a", "failed", 5, 20, run="r2"))
    store.commit(a_row("b", "failed", 1, 3, run="r2"))
    store.commit(a_row("b", "failed", 2, 2.5, run="r1"))
    assert store.flush() == 4
    table = DeltaTable(tmp_path / "results").to_pyarrow_dataset().to_table().to_pylist()
    assert sorted((row["job_id"], row["run_id"]) for row in table) == [("a", "r1"), ("b", "r1")]


# --- records ---------------------------------------------------------------------------------------------


def test_two_runs_at_the_same_job_keep_the_first_ok(tmp_path):
    mine, theirs = ResultStore(tmp_path), ResultStore(tmp_path)
    first, second = a_row(run="r1", start=0, end=2), a_row(run="r2", start=1, end=3)
    assert mine.commit(first)
    assert theirs.is_done("a")
    assert not theirs.is_done("b")
    assert not theirs.commit(second)
    assert mine.commit(first)  # the answer was lost, and it was tried again
    assert theirs.done() == {"a": Finished("a-r1.mp4", 10, 5, "r1")}
    theirs.flush()
    assert not mine.is_done("a")  # records only
    assert mine.done() == {"a": Finished("a-r1.mp4", 10, 5, "r1")}


def test_a_waiting_ok_whose_file_was_found_gone_gives_way(tmp_path):
    store = ResultStore(tmp_path)
    store.commit(a_row(run="r1", start=0, end=2))
    assert store.commit(a_row(run="r2", start=3, end=4))
    store.flush()
    assert store.done()["a"].output_uri == "a-r2.mp4"
    assert len(read(tmp_path, all=True)) == 1


def test_a_failed_row_is_not_done(tmp_path):
    store = ResultStore(tmp_path)
    store.commit(a_row(status="failed"))
    assert store.done() == {}
    store.flush()
    assert store.done() == {}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"job_id": 3}', b"\xff\xfe", b'{"started_at": "noon"}'])
def test_a_corrupt_record_is_set_aside_and_stops_nothing(tmp_path, caplog, body):
    store = ResultStore(tmp_path)
    store.commit(a_row("good"))
    (tmp_path / "records" / "bad.ok.json").write_bytes(body)
    assert set(store.done()) == {"good"}
    assert not store.is_done("bad")
    assert store.flush() == 1
    assert [row.job_id for row in read(tmp_path)] == ["good"]
    assert (tmp_path / "records" / "corrupt" / "bad.ok.json").read_bytes() == body
    assert "bad.ok.json" in caplog.text
    assert store.commit(a_row("bad"))  # its place is free again


def test_a_corrupt_record_does_not_block_the_commit_of_its_job(tmp_path):
    store = ResultStore(tmp_path)
    store.commit(a_row("good"))
    (tmp_path / "records" / "bad.ok.json").write_bytes(b"")
    assert store.commit(a_row("bad"))
    assert set(store.done()) == {"good", "bad"}


def test_small_files_are_joined_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_COMPACT_FILES", 4)
    store = ResultStore(tmp_path)
    for n in range(7):
        store.commit(a_row(f"j{n}"))
        store.flush()
    assert len(DeltaTable(tmp_path / "results").file_uris()) < 7
    assert len(store.done()) == 7


# --- reading ---------------------------------------------------------------------------------------------


def test_what_others_have_merged_is_found_by_the_look_after_one_that_failed(tmp_path, monkeypatch):
    store = ResultStore(tmp_path)
    store.commit(a_row("before"))
    store.flush()
    version = store.state().version
    store.commit(a_row("theirs", run="other"))
    store.flush()
    get, asked = results.storage.get, []

    def failing(place, key):
        asked.append(key)
        if key.endswith(".parquet") and sum(key.endswith(".parquet") for key in asked) == 1:
            raise results.storage.StorageTimeout("no answer")
        return get(place, key)

    monkeypatch.setattr(results.storage, "get", failing)
    monkeypatch.setattr(results.storage, "_READ_PAUSES_S", ())  # each look fails at once
    with pytest.raises(results.storage.StorageTimeout):
        store.merged_since(version, "mine")
    assert set(store.merged_since(version, "mine")) == {"theirs"}


def test_reading_creates_nothing(tmp_path):
    out = tmp_path / "out"
    assert ResultStore(out).done() == {}
    assert not ResultStore(out).is_done("a")
    with pytest.raises(ResultsError, match="no results"):
        read(out)
    with pytest.raises(ResultsError, match="no results"):
        export(out, tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_deltalake_would_misread_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="hex digits"):
        ResultStore(tmp_path / "my%20videos")


def test_a_foreign_table_is_refused_in_plain_words(tmp_path):
    DeltaTable.create(str(tmp_path / "results"), schema=pa.schema([("x", pa.int64())]))
    with pytest.raises(ResultsError, match="another version"):
        read(tmp_path)
    store = ResultStore(tmp_path)
    store.commit(a_row())
    with pytest.raises(ResultsError, match="another version"):
        store.flush()
    assert store.is_done("a")  # the record waits on


def test_current_is_the_newest_version_of_each_manifest_row(tmp_path):
    store = ResultStore(tmp_path)
    store.commit(a_row("old", start=0, end=1, id="1", mode="text"))
    store.flush()
    store.commit(a_row("new", "failed", start=2, end=3, id="1", mode="edit", model="m"))
    store.commit(a_row("other", start=4, end=5, id="2", mode="text"))
    assert [row.job_id for row in read(tmp_path)] == ["new", "other"]
    assert [row.job_id for row in read(tmp_path, all=True)] == ["old", "new", "other"]
    assert [row.job_id for row in read(tmp_path, all=True).where(status="ok", mode="text")] == [
        "old",
        "other",
    ]
    assert [row.job_id for row in read(tmp_path).where(model="m")] == ["new"]


def test_exports_read_back(tmp_path):
    store = ResultStore(tmp_path / "out")
    store.commit(FULL)
    store.commit(EMPTY)
    assert export(store.out, tmp_path / "x.csv") == 2
    assert export(store.out, tmp_path / "x.parquet", status="ok") == 1
    assert export(store.out, tmp_path / "x.json", all=True) == 2

    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        from_csv = {row["job_id"]: row for row in csv.DictReader(file)}
    assert from_csv["full"]["seed"] == str(2**62 + 1)
    assert from_csv["full"]["prompt"] == FULL.prompt
    assert json.loads(from_csv["full"]["warnings"]) == ["a", "b;c"]
    assert from_csv["none"]["prompt"] == from_csv["none"]["controlnets"] == ""
    assert pq.read_table(tmp_path / "x.parquet").to_pylist()[0]["seed"] == 2**62 + 1
    from_json = {row["job_id"]: row for row in json.loads((tmp_path / "x.json").read_text("utf-8"))}
    assert datetime.fromisoformat(from_json["full"]["started_at"]) == FULL.started_at
    assert from_json["none"]["seed"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.csv", "x.json", "x.parquet"]

    with pytest.raises(ResultsError, match=r"\.csv, \.parquet or \.json"):
        export(store.out, tmp_path / "x.xlsx")


# --- kill -9 and rivals ----------------------------------------------------------------------------------

WORKER = """
import random, sys
from datetime import UTC, datetime
from t2vz.results import ResultRow, ResultStore

out, run, jobs, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = ResultStore(out)
done = store.done()
todo = [n for n in range(jobs) if f"j{n}" not in done]
random.Random(seed).shuffle(todo)
print("ready", flush=True)
for count, n in enumerate(todo):
    started = datetime.now(UTC)
    status = "failed" if n % 10 == 9 else "ok"
    output = dict(output_uri=f"{n}", output_sha256="s", output_bytes=n, output_mtime_ns=n)
    store.commit(ResultRow(job_id=f"j{n}", run_id=run, id=f"{n}", status=status, seed=n,
                           started_at=started, finished_at=datetime.now(UTC),
                           **(output if status == "ok" else {})))
    print(f"j{n}", flush=True)
    if count % 5 == 4:
        store.flush(limit=3)
store.flush()
print("end", flush=True)
"""


def worker(out: Path, run: str, jobs: int, seed: int, acknowledged: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(out), run, str(jobs), str(seed)]
    with acknowledged.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE)


def check(out: Path, acknowledged: set[str], jobs: int) -> None:
    """Every acknowledged row is there, once, with its own content; in table and records together."""
    table = ResultStore(out).arrow()
    counts = Counter(table["job_id"].to_pylist())
    assert acknowledged <= set(counts)
    assert not {job: n for job, n in counts.items() if n > 1}
    in_delta = DeltaTable(out / "results").to_pyarrow_dataset().to_table()["job_id"].to_pylist()
    assert len(in_delta) == len(set(in_delta))
    for row in read(out):
        assert row.job_id == f"j{row.seed}"
        assert row.status == ("failed" if row.seed % 10 == 9 else "ok")
        assert row.seed < jobs


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_loses_and_doubles_nothing(tmp_path):
    """Two processes at once on one folder; one of them is killed at a random moment, 25 times."""
    jobs, chance = 2000, random.Random(7)
    out, log = tmp_path / "out", tmp_path / "acknowledged"
    log.touch()
    running: list[subprocess.Popen[bytes]] = []
    try:
        for kill in range(25):
            while len(running) < 2:
                n = kill * 2 + len(running)
                running.append(worker(out, f"r{n}", jobs, n, log))
            victim = running.pop(0)
            try:  # the moment of the kill: anywhere from its start to some commits and flushes later
                victim.wait(chance.uniform(0.3, 0.9))
            except subprocess.TimeoutExpired:
                os.kill(victim.pid, signal.SIGKILL)
            _, errors = victim.communicate()
            assert not errors, errors.decode()
    finally:
        for process in running:
            process.kill()
            process.communicate()
    acknowledged = {line for line in log.read_text().split("\n") if line.startswith("j")}
    assert len(acknowledged) > 20  # fewer if the machine is busy
    check(out, acknowledged, jobs)
    ResultStore(out).flush()
    check(out, acknowledged, jobs)
    assert not list((out / "records").glob("*.json"))


def test_two_runs_at_once_on_one_folder(tmp_path):
    jobs = 30
    out, log = tmp_path / "out", tmp_path / "acknowledged"
    both = [worker(out, f"r{n}", jobs, n, log) for n in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    check(out, {f"j{n}" for n in range(jobs)}, jobs)
    assert len(ResultStore(out).done()) == jobs - jobs // 10
    assert not list((out / "records").glob("*.json"))


@pytest.mark.parametrize("flushed", [True, False], ids=["in the table", "waiting"])
def test_failed_jobs_are_those_that_are_not_ok_since(tmp_path, flushed):
    store = ResultStore(tmp_path)
    why = {"error_stage": "decode", "error_message": "no such file"}
    for row in (a_row("stays", "failed", **why), a_row("mended", "failed", **why), a_row("good")):
        store.commit(row)
    if flushed:
        store.flush()
    store.commit(a_row("mended", start=5, end=6, run="r2"))
    assert dict(store.failed()) == {"stays": ("decode", "no such file")}
