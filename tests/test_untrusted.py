"""A manifest is anyone's: what its rows may name, where files land, and what does nothing that it looks like."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import fields
from pathlib import Path

import av
import pytest
from clips import make_clip
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import stub

from t2vz.errors import (
    ManifestError,
    ModelError,
    SourceCorrupt,
    SourceError,
    SourceForbidden,
    SourceTooLarge,
    T2VZError,
    UnsupportedModel,
    harmless,
)
from t2vz.manifest import read
from t2vz.media import sandbox
from t2vz.media.limits import Limits
from t2vz.media.probe import probe
from t2vz.models import policy, table
from t2vz.models.policy import ModelPolicy
from t2vz.plan import Job, Unready, plan
from t2vz.render import Render, Settings, file_name, opening, record_unready
from t2vz.results import read as results
from t2vz.spec import JobSpec


def manifest(path: Path, *rows: dict[str, str]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def edits(folder: Path, *sources: str) -> Path:
    rows = ({"id": f"{n}", "mode": "edit", "prompt": "x", "source": source} for n, source in enumerate(sources))
    return manifest(folder / "manifest.csv", *rows)


def error_of(item: object) -> T2VZError:
    assert isinstance(item, Unready), item
    return item.error


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 1, sound=False)


class Listener:
    """A server on loopback that answers nothing and counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.visits = self._socket.getsockname()[1], 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._socket.accept()
            except OSError:
                return
            self.visits += 1
            visitor.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


# Sources: from where


def test_only_files_and_objects_on_s3_are_read_and_no_server_is_asked(tmp_path: Path, listener: Listener) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    at = f"127.0.0.1:{listener.port}"
    sources = [
        f"http://{at}/x.mp4",
        f"https://{at}/x.mp4",
        f"HTTP://{at}/x.mp4",
        "http://169.254.169.254/latest/meta-data/",
        f"ftp://{at}/x.mp4",
        f"rtsp://{at}/x",
        f"tcp://{at}",
        f"s3://{at}/x.mp4",
        f"s3://user:password@{at}/x.mp4",
        f"S3://{at}/x.mp4",
        f"file://{secret}",
        f"file:{secret}",
        f"FILE:{secret}",
        f"file://localhost{secret}",
        f"concat:{secret}|{secret}",
        f"subfile,,start,0,end,9,,:{secret}",
        f"data:text/plain,{secret}",
        "pipe:0",
        "cache:http://x/",
        "/dev/zero",
        "/proc/self/environ",
        "~/secret.txt",
        "$HOME/secret.txt",
        f"{secret}\0.mp4",
        f"{secret}",
    ]
    with pytest.raises(av.FFmpegError):  # the listener would see it
        av.open(f"http://{at}/x.mp4")
    assert listener.visits == 1
    for item in plan(edits(tmp_path, *sources), None):
        error = error_of(item)
        assert isinstance(error, SourceError | ManifestError) or "names no S3 bucket" in error.message, error
        assert "not yours" not in error.message
        assert "password" not in error.message
    assert listener.visits == 1


@pytest.mark.parametrize("what", ["folder", "link", "linked folder", "linked picture", "dots", "s3", "beside"])
def test_sources_stay_below_the_roots(what: str, tmp_path: Path, clip: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "rootless"
    for folder in (root, other):
        folder.mkdir()
        (folder / "clip.mp4").write_bytes(clip.read_bytes())
    Image.new("RGB", (64, 64)).save(other / "a.png")
    (root / "link.mp4").symlink_to(other / "clip.mp4")
    (root / "linked").symlink_to(other)
    (root / "pictures").mkdir()
    (root / "pictures" / "1.png").symlink_to(other / "a.png")
    (root / "inner.mp4").symlink_to(root / "clip.mp4")
    bad = {
        "folder": other / "clip.mp4",
        "link": root / "link.mp4",
        "linked folder": root / "linked" / "clip.mp4",
        "linked picture": root / "pictures",
        "dots": f"{root}/../rootless/clip.mp4",
        "s3": "s3://some-bucket/clip.mp4",
        "beside": f"{root}less/clip.mp4",
    }[what]
    limits = Limits(roots=(str(root), "s3://my-bucket/in"))
    good, inner, refused, absent = plan(
        edits(tmp_path, f"{root}/clip.mp4", f"{root}/inner.mp4", str(bad), "/nowhere/x"), None, limits=limits
    )
    assert isinstance(good, Job)
    assert isinstance(inner, Job)
    assert isinstance(error_of(refused), SourceForbidden)
    # What is outside is not told apart by whether it is there.
    assert error_of(refused).message.partition(": ")[2] == error_of(absent).message.partition(": ")[2]
    with pytest.raises(SourceForbidden):
        sandbox.decode(str(bad), limits=limits)
    assert len(sandbox.decode(root / "clip.mp4", limits=limits)) == 12


def test_masks_and_pictures_stay_below_the_roots_too(tmp_path: Path, clip: Path) -> None:
    limits = Limits(roots=(str(tmp_path),))
    (tmp_path / "ip.safetensors").write_bytes(b"")
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder" / "config.json").write_text("{}")
    rows = (
        {"prompt": "x", "background_smoothing": "0.4", "foreground_mask": str(clip)},
        {"prompt": "x", "ip_adapter": "ip.safetensors", "ip_adapter_image": str(clip)},
    )
    for number, row in enumerate(rows):
        (item,) = plan(manifest(tmp_path / f"{number}.csv", row), None, limits=limits)
        assert isinstance(error_of(item), SourceForbidden)


def test_prefixes_of_a_bucket_are_roots() -> None:
    from t2vz.media.local import check_allowed

    limits = Limits(roots=("s3://my-bucket/in",))
    check_allowed("s3://my-bucket/in/x.mp4", limits)
    for uri in ("s3://my-bucket/inside/x.mp4", "s3://my-bucket/in/../out/x.mp4", "s3://other/in/x.mp4", "/in/x.mp4"):
        with pytest.raises(SourceForbidden):
            check_allowed(uri, limits)


def test_schemes_that_are_not_allowed_are_refused(clip: Path, tmp_path: Path) -> None:
    local, remote = plan(edits(tmp_path, str(clip), "s3://some-bucket/x.mp4"), None, limits=Limits(schemes=("file",)))
    assert isinstance(local, Job)
    assert isinstance(error_of(remote), SourceForbidden)
    (local,) = plan(edits(tmp_path, str(clip)), None, limits=Limits(schemes=("s3",)))
    assert isinstance(error_of(local), SourceForbidden)
    with pytest.raises(ValueError, match="only from file and s3"):
        Limits(schemes=("http",))


def test_the_endpoint_of_s3_is_the_operators(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listener: Listener
) -> None:
    """Whatever a row says, it is asked, and nobody else; of a bucket that it does not have."""
    from t2vz import storage

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://endpoint.invalid")
    store = storage.store(storage.split(f"s3://some-bucket/x.mp4?endpoint=http://127.0.0.1:{listener.port}")[0])
    assert store.config["endpoint"] == "http://endpoint.invalid"
    assert listener.visits == 0


# Sources: what is inside


def test_playlists_and_links_inside_of_media_are_not_followed(tmp_path: Path, clip: Path, listener: Listener) -> None:
    address = f"http://127.0.0.1:{listener.port}/x.mp4"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "hls-http": hls.format(address),
        "hls-file": hls.format(f"file://{clip}"),
        "hls-relative": hls.format(clip.name),
        "concat": f"ffconcat version 1.0\nfile '{clip}'\n",
        "concat-http": f"ffconcat version 1.0\nfile '{address}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "dash": f'<?xml version="1.0"?><MPD><BaseURL>{address}</BaseURL></MPD>',
        "asx": f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
        "m3u": f"{address}\n",
    }
    playlist = tmp_path / "playlist.m3u8"
    playlist.write_text(texts["hls-http"])
    with pytest.raises(av.FFmpegError):  # unguarded, they are followed
        av.open(str(playlist), options={"protocol_whitelist": "file,http,tcp", "allowed_extensions": "ALL"})
    visits = listener.visits
    assert visits > 0
    (tmp_path / clip.name).write_bytes(clip.read_bytes())
    for name, text in texts.items():
        for suffix in ("mp4", "mkv", "ts", "gif", "m3u8"):
            path = tmp_path / f"{name}.{suffix}"
            path.write_text(text)
            for reading in (sandbox.decode, probe):
                with pytest.raises(SourceCorrupt):
                    reading(path)
    assert listener.visits == visits


def test_movies_that_refer_to_other_files_are_not_followed(tmp_path: Path, clip: Path) -> None:
    """The data reference of a QuickTime file may name a file elsewhere (dref): it is never opened."""
    whole = clip.read_bytes()
    at = whole.index(b"dref") + 8 + 4  # version, count of entries, then the entry
    alias = len(whole[at:]) and whole.replace(b"url \x00\x00\x00\x01", b"url \x00\x00\x00\x00", 1)
    path = tmp_path / "refers.mov"
    path.write_bytes(alias)
    assert alias != whole
    with av.open(str(path)):
        pass
    try:
        clip_ = sandbox.decode(path)
    except SourceError:
        return
    assert len(clip_) <= 12


def test_a_postscript_that_is_called_png_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, witness = tmp_path / "bin", tmp_path / "witness"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {witness}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    path = tmp_path / "picture.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as picture, suppress(OSError):  # unguarded, it does
        picture.load()
    assert witness.exists()
    witness.unlink()
    sandbox._end_all()  # a reader with this PATH
    for reading in (sandbox.read_image, sandbox.image_size, sandbox.decode, probe):
        with pytest.raises(SourceCorrupt):
            reading(path)
    assert not witness.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_a_bomb_takes_its_row_and_no_other(tmp_path: Path, clip: Path) -> None:
    Image.new("RGB", (8000, 8000)).save(tmp_path / "bomb.png")  # 192 kB, and 192 MB once it is decoded
    limits = Limits(max_decode_bytes=60 * 10**6, max_pixels=8192**2)
    path = edits(tmp_path, "bomb.png", str(clip))
    settings = Settings(tmp_path / "out", str(path), "run", "cpu", limits)
    with opening(settings):
        bad, good = plan(path, None, limits=limits)
        assert isinstance(good, Job)
        assert isinstance(error_of(bad), SourceTooLarge)
        assert isinstance(bad, Unready)
        row = record_unready(bad, settings)
        work = Render(good, settings)
        work.run("decode")
    assert (row.status, row.error_stage, row.error_class, row.retryable) == (
        "failed",
        "decode",
        "SourceTooLarge",
        False,
    )
    assert "bomb.png" in str(row.error_message)
    assert work.clip is not None


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"max_source_bytes": 1000}, "MB, the limit is 0.001 MB"),
        ({"max_duration_s": 0.5}, "lasts 1 s, the limit is 0.5 s"),
        ({"max_pixels": 64 * 63}, "frames of 64x64"),
        ({"max_frames": 11}, "12 frames, the limit is 11"),
    ],
)
def test_each_limit_refuses_what_exceeds_it_and_no_less(
    limit: dict[str, float], said: str, clip: Path, tmp_path: Path
) -> None:
    path = edits(tmp_path, str(clip))
    (item,) = plan(path, None, limits=Limits(**limit))
    assert isinstance(error_of(item), SourceTooLarge)
    assert said in error_of(item).message
    assert clip.name in error_of(item).message
    enough = {"max_source_bytes": clip.stat().st_size, "max_duration_s": 1.0, "max_pixels": 64 * 64, "max_frames": 12}
    (item,) = plan(path, None, limits=Limits(**{name: enough[name] for name in limit}))
    assert isinstance(item, Job)


def test_an_object_that_is_too_large_is_not_fetched(s3, tmp_path: Path) -> None:
    from t2vz import storage

    bucket = s3.bucket()
    storage.put(bucket, "big.mp4", b"0" * 100_000)
    s3.requests()
    with pytest.raises(SourceTooLarge, match=r"big\.mp4"):
        sandbox.probe(f"{bucket}/big.mp4", Limits(max_source_bytes=99_999))
    assert [line.split()[0] for line in s3.requests()] == ["HEAD"]


def test_every_limit_is_an_option_of_the_commands_a_parameter_of_the_flow_and_documented() -> None:
    from t2vz.cli import cli
    from t2vz_flows.render_manifest import RenderParameters, model_policy, source_limits

    given = RenderParameters(manifest="m", out="o")
    assert source_limits(given) == Limits()
    assert model_policy(given) == ModelPolicy()
    given = RenderParameters(manifest="m", out="o", limits={"max_frames": 7, "roots": ["/in"]}, allow_pickles=True)
    assert source_limits(given) == Limits(max_frames=7, roots=("/in",))
    assert model_policy(given) == ModelPolicy(allow_pickles=True)
    page = (Path(__file__).parents[1] / "manifests" / "README.md").read_text()
    for command in ("plan", "run", "app"):
        options = {option.name: option.opts[0] for option in cli.commands[command].params}
        for name in (*(limit.name for limit in fields(Limits)), "allow_pickles", "model_checksums"):
            assert f"| `{options[name]}` |" in page


def test_limits_must_be_limits() -> None:
    for name in ("max_source_bytes", "max_frames", "max_decode_s"):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: 0})


# Names

HOSTILE_IDS = [
    "../../../escaped",
    "/etc/passwd",
    "..",
    ".",
    "...",
    ".hidden",
    "-rf",
    "~root",
    "CON",
    "con.mp4",
    "NUL",
    "aux ",
    "trailing.",
    "a" * 200,
    "é" * 150,
    "Straße",
    "STRASSE",
    "deer",
    "Deer",
    "DEER",
    "dееr",  # Cyrillic е
    "ｄｅｅｒ",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "a\u200bb",
    "\u202emp4.exe",
    "a/b",
    "a\\b",
    "a:b",
    "C:\\x",
    "%2e%2e%2f",
    "{0.__class__}",
    "{row}",
    "%s%n%d",
    "$(touch x)",
    "`touch x`",
    "; touch x",
    "| touch x",
    "[/red]",
    "=1+1",
    "<script>",
    "![x](http://127.0.0.1/x)",
    "con\u00a0",
]


def test_outputs_lie_in_the_folder_under_names_that_every_system_takes(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    here = set(Path.cwd().iterdir())
    rows = [{"id": id, "prompt": f"p{n}", "video_length": "1"} for n, id in enumerate(HOSTILE_IDS)]
    path, settings = manifest(tmp_path / "m.csv", *rows), Settings(tmp_path / "in" / "out", "m", "run", "cpu")
    settings.out.parent.mkdir()
    with opening(settings):
        for item in plan(path, None):
            if isinstance(item, Job):
                stub.render(item, settings)
            else:
                record_unready(item, settings)
    done = list(results(settings.out))
    assert len(done) == len(HOSTILE_IDS)
    assert {row.status for row in done} == {"ok"}
    names = [Path(row.output_uri or "").name for row in done]
    for name in names:
        assert (settings.out / "videos" / name).resolve().parent == (settings.out / "videos").resolve()
        assert len(name.encode()) <= 200
        assert name.isascii()
        assert name == name.strip(" .")
        assert name.split(".")[0].upper() not in {"CON", "NUL", "AUX", "PRN", "COM1", "LPT1"}
        assert not set(name) & set('<>:"/\\|?*%$`;{}[]~ ')
    assert len({name.casefold() for name in names}) == len(names)
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"out"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "m.csv", "outside"}
    assert list(outside.iterdir()) == []
    assert set(Path.cwd().iterdir()) == here


def test_a_link_in_the_way_of_a_video_is_replaced_and_not_followed(tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.csv", {"id": "one", "prompt": "x", "video_length": "1"})
    settings = Settings(tmp_path / "out", "m", "run", "cpu")
    (job,) = plan(path, None)
    assert isinstance(job, Job)
    with opening(settings):
        row = stub.render(job, settings)
    assert row is not None
    video, victim = settings.out / str(row.output_uri), tmp_path / "victim"
    victim.write_text("precious")
    video.unlink()
    video.symlink_to(victim)
    (job,) = plan(path, settings.out)
    assert isinstance(job, Job), "a link to something else is not the video"
    with opening(Settings(tmp_path / "out", "m", "run-2", "cpu")) as _:
        assert stub.render(job, Settings(tmp_path / "out", "m", "run-2", "cpu")) is not None
    assert victim.read_text() == "precious"
    assert not video.is_symlink()


@pytest.mark.parametrize("id", ["a\0b", "a\nb", "a\x1b[2Jb", "a\x7fb", "x" * 201])
def test_ids_that_are_no_names_are_refused(id: str, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f'id,prompt\n"{id}",x\n')
    (row,) = read(path)
    assert not hasattr(row, "spec")


def test_an_endless_line_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    with path.open("wb") as file:
        file.write(b"prompt\n")
        file.truncate(17 * 2**20)
    with pytest.raises(ManifestError, match="line 2 has over"):
        read(path)


# What is told


def test_messages_have_no_secrets_and_play_with_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("OTHER_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("PGPASSWORD", "postgres-word")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("HARMLESS", "some words")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    for text, told in {
        "token hf_abcdefgh refused": "token *** refused",
        "key wJalrXUtnFEMI, some words, abc": "key ***, some words, abc",
        "https://me:pass@host/x@y.mp4: gone": "https://***@host/x@y.mp4: gone",
        "s3://bucket/dir@2/x.mp4": "s3://bucket/dir@2/x.mp4",
        "https://h/x?X-Amz-Signature=abc&a=b": "https://h/x?X-Amz-Signature=***&a=b",
        "https://h/x?access_token=abc": "https://h/x?access_token=***",
        "a\x1b[2Jb\x07\nc": "a\ufffd[2Jb\ufffd c",
        "s3://me:pa/ss@bucket/x.mp4": "s3://***@bucket/x.mp4",
        "http://me:p@ss@host/x": "http://***@host/x",
        "http://host:8080/x@y.mp4": "http://host:8080/x@y.mp4",
        "hf_abcdefghij and postgres-word": "*** and ***",
        "x\u202e4pm.exe\u2028y": "x\ufffd4pm.exe y",
    }.items():
        assert harmless(text) == told
        assert T2VZError(text).message == told


def test_ids_and_prompts_make_no_links_pictures_or_tags_in_artifacts() -> None:
    from t2vz_flows.shown import cell

    assert cell("![x](http://h/x.png)") == r"!\[x\](http://h/x.png)"
    assert cell("<img src=x>&lt;b>") == "&lt;img src=x>&amp;lt;b>"
    assert cell("a|b\\`c`\nd_e") == r"a\|b\\\`c\` d_e"


# Models


def spec_of(**columns: str) -> JobSpec:
    return JobSpec.model_validate({"prompt": "x", **columns})


def test_every_model_of_a_row_is_asked_for(tiny_model: Path, tiny_controlnets: tuple[Path, Path]) -> None:
    spec = spec_of(
        mode="control",
        model=str(tiny_model),
        condition="depth+pose",
        source="x.mp4",
        controlnet="+".join(map(str, tiny_controlnets)),
        vae=str(tiny_model / "vae"),
        lora="mini/lora",
        depth_model="mini/depth",
        pose_model="mini/pose",
        person_detector="mini/detector",
    )
    columns = [column for column, *_ in table.references(spec)]
    assert len(columns) == len(table.identity(spec).split(" "))
    assert sorted(columns) == sorted(
        ["model", "lora", "vae", "controlnet", "controlnet", "depth_model", "pose_model", "person_detector"]
    )


def test_a_checksum_is_of_what_a_model_s_links_lead_to_and_links_in_a_ring_end(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.move(model / "unet", tmp_path / "elsewhere")
    (model / "unet").symlink_to(tmp_path / "elsewhere")
    assert policy.checksum(str(model)) == policy.checksum(str(tiny_model))
    weights = next((tmp_path / "elsewhere").glob("*.safetensors"))
    before = policy.checksum(str(model)), table.revision(str(model))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    after = policy.checksum(str(model)), table.revision(str(model))
    assert before[0] != after[0]
    assert before[1] != after[1], "a job of other weights is another job"
    for name in "abc":
        (model / name).symlink_to(model)
    assert (policy.checksum(str(model)), table.revision(str(model))) == after


def test_only_models_with_their_checksums_are_let_in(tiny_model: Path, tmp_path: Path) -> None:
    checksums = tmp_path / "models.json"
    allowed = ModelPolicy(checksums=str(checksums))
    path = manifest(tmp_path / "m.csv", {"prompt": "x", "model": str(tiny_model), "video_length": "1"})
    found = policy.checksum(str(tiny_model))
    assert found.startswith("sha256:")
    for listed, said in (
        ({}, "does not have it"),
        ({str(tiny_model): "sha256:0"}, "has another for it"),
        ([], "one JSON object"),
    ):
        checksums.write_text(json.dumps(listed))
        (item,) = plan(path, None, models=allowed)
        assert isinstance(error_of(item), ModelError)
        assert said in error_of(item).message
        if listed != []:
            assert found in error_of(item).message
    checksums.write_text(json.dumps({str(tiny_model): found}))
    (job,) = plan(path, None, models=allowed)
    assert isinstance(job, Job)

    # A byte in the middle of the weights, between planning and loading.
    weights = next((tiny_model / "unet").glob("*.safetensors"))
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        settings = Settings(tmp_path / "out", "m", "run", "cpu", models=allowed)
        with opening(settings), pytest.raises(ModelError, match="has another for it"):
            Render(job, settings).run("generate")
    finally:
        weights.write_bytes(before)


def test_pickles_are_refused_unless_they_are_allowed(tmp_path: Path, clip: Path) -> None:
    folder = tmp_path / "annotators"
    folder.mkdir()
    (folder / "ControlNetHED.pth").write_bytes(b"")
    row = {"mode": "control", "prompt": "x", "condition": "hed", "source": str(clip), "annotators": str(folder),
           "controlnet": "mini/controlnet-edge"}  # fmt: skip
    path = manifest(tmp_path / "m.csv", row)
    (item,) = plan(path, None)
    assert isinstance(error_of(item), UnsupportedModel)
    assert "allow_pickles" in error_of(item).message
    (item,) = plan(path, None, models=ModelPolicy(allow_pickles=True))
    assert isinstance(item, Job)


def test_models_that_bring_code_do_not_run_it(tiny_model: Path, tmp_path: Path) -> None:
    """Code beside a model, named in its configuration as the libraries' remote code is."""
    witness, folder = tmp_path / "witness", tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    code = f"open({str(witness)!r}, 'w')\nclass UNet2DConditionModel: pass\nclass Evil(UNet2DConditionModel): pass\n"
    for place in (folder, folder / "unet", folder / "text_encoder"):
        (place / "evil.py").write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}})
    )
    for number, changed in enumerate(
        (index, index | {"unet": ["evil", "Evil"]}, index | {"_class_name": ["evil", "Evil"]})
    ):
        (folder / "model_index.json").write_text(json.dumps(changed))
        small = {"width": "64", "height": "64", "video_length": "1", "num_inference_steps": "3"}
        path = manifest(tmp_path / "m.csv", {"prompt": f"{number}", "model": str(folder), **small})
        (job,) = plan(path, None)
        assert isinstance(job, Job)
        settings = Settings(tmp_path / "out", "m", f"run-{number}", "cpu")
        with opening(settings), suppress(T2VZError) if number else nullcontext():
            Render(job, settings).run("generate")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "layers_per_block", 10**12),
        ("unet", "block_out_channels", [64] * 100_000),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("vae", "latent_channels", 2**40),
        ("scheduler", "num_train_timesteps", 10**12),
    ],
)
def test_a_configuration_of_a_giant_is_refused_before_it_is_built(
    part: str, name: str, value: object, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (file,) = (folder / part).glob("*config.json")
    config = json.loads(file.read_text())
    assert name in config
    file.write_text(json.dumps(config | {name: value}))
    (job,) = plan(
        manifest(tmp_path / "m.csv", {"prompt": "x", "model": str(folder), "width": "64", "height": "64"}), None
    )
    assert isinstance(job, Job)
    settings = Settings(tmp_path / "out", "m", "run", "cpu")
    with opening(settings), pytest.raises(UnsupportedModel, match=name):
        Render(job, settings).run("generate")


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_pickled_weights_are_never_loaded(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(b"")
    for row in ({"model": f"./{file.name}"}, {"lora": f"./{file.name}"}, {"vae": f"./{file.name}"}):
        path = manifest(tmp_path / "m.csv", {"prompt": "x", **row})
        for models in (ModelPolicy(), ModelPolicy(allow_pickles=True)):
            (item,) = plan(path, None, models=models)
            assert isinstance(error_of(item), UnsupportedModel)
            assert "only .safetensors files are loaded" in error_of(item).message


def test_file_names_do_not_grow() -> None:
    assert all(len(file_name(id)) <= 80 for id in HOSTILE_IDS)
