"""Storage: the same answers from a folder and from S3, and plain, typed errors when it refuses or is away."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from t2vz import storage
from t2vz.errors import OutputError, ResultsError, StorageTimeout
from t2vz.storage import Place


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path / "out" if request.param == "folder" else f"{request.getfixturevalue('s3').bucket()}/a/b"


def test_objects_are_put_got_listed_and_removed_alike(place, tmp_path):
    assert storage.get(place, "x/1.json") is storage.head(place, "x/1.json") is None
    assert list(storage.entries(place, "x")) == []
    assert not (tmp_path / "out").exists()  # looking makes nothing
    storage.put(place, "x/1.json", b"one")
    storage.put(place, "x/y/2.json", b"two!")
    assert storage.create(place, "x/3.json", b"three")
    assert not storage.create(place, "x/3.json", b"other")
    assert storage.get(place, "x/3.json") == b"three"
    listed = list(storage.entries(place, "x"))
    assert [(entry.key, entry.size_bytes) for entry in listed] == [("x/1.json", 3), ("x/3.json", 5)]
    assert abs(listed[0].modified - datetime.now(UTC)) < timedelta(minutes=1)
    assert [entry.key for entry in storage.entries(place, "x", deep=True)] == ["x/1.json", "x/3.json", "x/y/2.json"]
    assert storage.head(place, "x/1.json") == listed[0]
    assert dict(storage.get_all(place, ["x/1.json", "gone", "x/3.json"])) == {"x/1.json": b"one", "x/3.json": b"three"}
    storage.put(place, "x/1.json", b"changed")
    storage.remove_unchanged(place, {entry.key: entry for entry in listed})
    assert [entry.key for entry in storage.entries(place, "x")] == ["x/1.json"]
    assert storage.rename(place, "x/1.json", "x/z/1.json")
    assert not storage.rename(place, "x/1.json", "x/z/1.json")
    storage.remove_all(place, ["x/z/1.json", "x/y/2.json", "gone"])
    storage.remove(place, "gone")
    assert list(storage.entries(place, "x", deep=True)) == []


def test_of_many_who_swap_one_wins(place):
    for n in range(20):
        storage.put(place, "key", b"old")
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda me: storage.swap(place, "key", b"old", b"new %d" % me), range(8)))
        assert won.count(True) == 1
        assert storage.get(place, "key") == b"new %d" % won.index(True)
        assert not storage.swap(place, "key", b"old", b"late"), n
        assert not storage.remove_if(place, "key", b"old")
        assert storage.remove_if(place, "key", b"new %d" % won.index(True))
    assert not storage.swap(place, "key", b"old", b"new")


def test_files_go_up_whole_and_come_down_in_parts(place, tmp_path):
    data = bytes(range(256)) * 2**13
    (tmp_path / "file").write_bytes(data)
    storage.upload(tmp_path / "file", place, "videos/file.mp4", {"Content-Type": "video/mp4", "sha256": "abc"})
    assert b"".join(storage.stream(place, "videos/file.mp4")) == data
    assert storage.ranges(place, "videos/file.mp4", [(0, 3), (1000, 1002)]) == [data[:3], data[1000:1002]]
    with pytest.raises(FileNotFoundError):
        list(storage.stream(place, "videos/gone"))


@pytest.mark.parametrize("faults", [{"before": 2}, {"after": 1}, {"before": 1, "after": 1}])
def test_errors_that_mend_are_waited_out(s3, faults):
    place = s3.bucket()
    s3.fails(**faults)
    storage.put(place, "key", b"one")
    s3.fails(**faults)
    assert storage.swap(place, "key", b"one", b"two")
    s3.fails(**faults)
    assert storage.get(place, "key") == b"two"
    s3.fails(**faults)
    storage.remove(place, "key")
    assert storage.head(place, "key") is None
    s3.fails(after=1)  # it was done, but the answer was lost, and the second try finds it there
    storage.create(place, "key", b"mine")
    assert storage.get(place, "key") == b"mine"


def test_refusals_are_told_plainly_and_without_secrets(s3, monkeypatch):
    with pytest.raises(OutputError, match=r"^s3://no-such-bucket: there is no such bucket"):
        storage.check("s3://no-such-bucket")
    with pytest.raises(OutputError, match="no such bucket"):
        storage.put("s3://no-such-bucket/prefix", "key", b"")
    for url in ("s3://", "s3:///key", "s3://UPPER/key"):
        with pytest.raises(OutputError, match="names no S3 bucket"):
            storage.normal(url)
    place = s3.bucket()
    s3.fails(before=100)
    monkeypatch.setattr(storage, "_RETRIES", 1)
    storage._store.cache_clear()
    with pytest.raises(StorageTimeout) as caught:
        storage.get(place, "key")
    s3.fails()
    storage._store.cache_clear()
    assert caught.value.retryable
    for text in (caught.value.message, repr(storage.store(place)), str(storage.table_options(place))):
        assert s3.secret not in text
    assert s3.secret not in storage._translated(place, f"bad {s3.secret}", "Error").message


def test_a_server_that_is_away_is_a_timeout(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setattr(storage, "_RETRIES", 1)
    with pytest.raises(StorageTimeout, match="s3://bucket: no answer in time"):
        storage.get("s3://bucket", "key")
    storage._store.cache_clear()


def test_a_folder_that_is_in_the_way_is_told(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ResultsError, match="can't be read or written"):
        storage.put(tmp_path / "out", "key", b"")
