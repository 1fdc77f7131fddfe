"""Provenance: parameters, watermark and signature are in the files, and read back from them."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import c2pa
import certificates
import pytest

from t2vz.cli import main
from t2vz.errors import OutputError, UnexpectedError
from t2vz.library import Cutting, Source, joining, scan
from t2vz.media.provenance import Signing, _gif_comment, _manifest, _signer, check, read
from t2vz.plan import Job, plan
from t2vz.render import Settings, opening, render
from t2vz.results import ResultRow
from t2vz.results import read as results
from t2vz.spec import JobSpec

CLIP = Path(__file__).parents[2] / "manifests" / "clips" / "ball.mp4"
EDIT = {"mode": "edit", "source": CLIP, "video_length": 4}


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return Signing(*map(str, certificates.write(tmp_path_factory.mktemp("keys"))))


@pytest.fixture
def rendered(write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[ResultRow, Path]]:
    """Renders a row; its result and file."""

    def render_one(out: str = "out", signing: Signing | None = None, **columns: Any) -> tuple[ResultRow, Path]:
        row = {"id": "one", "seed": 1, "video_length": 4, "prompt": "a secret ball"} | columns
        (job,) = plan(write_manifest(tmp_path / "m.csv", row), None)
        assert isinstance(job, Job), job
        settings = Settings(tmp_path / out, "m.csv", "run", "cpu", signing=signing)
        with opening(settings):
            made = render(job, settings)
        assert made is not None
        assert made.status == "ok", made.error_message
        return made, tmp_path / out / (made.output_uri or "")

    return render_one


@pytest.mark.parametrize("format", ["mp4", "webm", "mkv", "gif", "png"])
def test_parameters_and_watermark_are_read_back_from_every_format(rendered, format):
    row, path = rendered(format=format, watermark="t2vz")
    found = read(path)
    assert found["watermark"] == "t2vz"
    assert found["signature"] is None
    parameters = json.loads(row.parameters)
    del parameters["cells"]  # may hold paths, which are no business of whoever gets the file
    assert found["parameters"].items() >= parameters.items()
    assert parameters["watermark"] == "t2vz"
    assert found["parameters"]["job_id"] == row.job_id


def test_a_file_without_a_mark_has_none(rendered):
    _, path = rendered()
    assert read(path)["watermark"] is None
    found = read(CLIP)
    assert (found["watermark"], found["signature"]) == (None, None)


def test_a_file_of_others_makes_this_process_ask_no_server_and_read_no_container(
    signing, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.c2pa"
        path = tmp_path / "foreign.mp4"
        claim = json.dumps(_manifest(JobSpec(prompt="x", model="m"), "r", prompt=False))
        with _signer(signing) as signer, c2pa.Builder(claim) as builder, CLIP.open("rb") as source:
            builder.set_remote_url(address)
            builder.set_no_embed()
            with path.open("w+b") as target:
                builder.sign(signer, "video/mp4", source, target)
        monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("opened here"))
        found = read(path)
        assert found["signature"]["valid"] is False
        assert address in found["signature"]["problems"][0]
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_gif_s_comment_however_long():
    text = bytes(range(48, 58)) * 800_000
    blocks = b"".join(bytes([len(part)]) + part for part in (text[at : at + 255] for at in range(0, len(text), 255)))
    assert _gif_comment(b"GIF89a\x21\xfe" + blocks + b"\0;").encode() == text
    assert _gif_comment(b"GIF89a\x21\xfe\x09cut") == "cut"
    assert _gif_comment(b"GIF89a\x21\xfe") == _gif_comment(b"GIF89a;") == ""


def test_a_watermark_changes_no_seed_and_no_rerun(rendered):
    first, again = (rendered(out, watermark="t2vz", seed="")[0] for out in ("one", "two"))
    plain, _ = rendered("plain", seed="")
    assert first.output_sha256 == again.output_sha256 != plain.output_sha256
    assert first.seed == plain.seed
    assert first.job_id != plain.job_id


@pytest.mark.parametrize(
    ("columns", "kind"), [({}, "trainedAlgorithmicMedia"), (EDIT, "compositeWithTrainedAlgorithmicMedia")]
)
def test_the_claim_says_that_ai_made_it_and_with_what(rendered, signing, columns, kind):
    row, path = rendered(signing=signing, **columns)
    assert row.signed is True
    assert hashlib.sha256(path.read_bytes()).hexdigest() == row.output_sha256
    assert path.stat().st_size == row.output_bytes
    signature = read(path)["signature"]
    assert signature["valid"] is True
    assert signature["trusted"] is False  # by nobody's list
    assert signature["signer"]["common_name"] == "tests' signer"
    (action,) = signature["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"] == f"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"
    said = {"t2vz.mode": row.mode, "t2vz.model": row.model, "t2vz.model_revision": row.model_revision}
    assert action["parameters"] == said, "the prompt is told only if asked for"


def test_what_is_joined_is_signed_as_its_parts_are(signing, tmp_path):
    style = {"mode": "edit", "prompt": "x", "num_inference_steps": "3", "video_length": "4", "width": "64"}
    out, source = tmp_path / "out", Source("ball.mp4", str(CLIP))
    found = scan([source], out, style | {"image_guidance_scale": "0"}, cutting=Cutting(max_frames=2))
    settings = Settings(out, str(found.manifest), "run", "cpu", signing=signing)
    with opening(settings):
        for job in plan(found.manifest, out):
            assert render(job, settings).status == "ok"
        ((_, join),) = joining(found, settings)
        joined = join()
    assert joined.status == "joined", joined.reason
    (row, _) = results(out)
    for path in (row.output_uri, joined.output_uri):
        signature = read(out / path)["signature"]
        assert signature["valid"] is True
        assert signature["actions"][0]["parameters"]["t2vz.model_revision"] == row.model_revision
    ((_, again),) = joining(found, settings)
    assert again.status == "kept"


def test_the_prompt_is_told_if_asked_for(rendered, signing):
    _, path = rendered(signing=Signing(signing.certificate, signing.key, prompt=True))
    (action,) = read(path)["signature"]["actions"]
    assert action["parameters"]["t2vz.prompt"] == "a secret ball"


def test_the_streams_are_those_of_the_unsigned_file(rendered, signing):
    (unsigned, plain), (_, path) = rendered("plain"), rendered(signing=signing)
    assert unsigned.signed is False
    assert packets(plain) == packets(path)
    assert read(plain)["parameters"] == read(path)["parameters"]


def packets(path: Path) -> list[tuple[int | None, bytes]]:
    with av.open(str(path)) as container:
        return [(packet.pts, bytes(packet)) for packet in container.demux() if packet.size]


def test_a_file_that_was_changed_since_is_told(rendered, signing, capsys):
    _, path = rendered(signing=signing)
    assert main(["provenance", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["signature"]["valid"] is True
    data = bytearray(path.read_bytes())
    at = data.rindex(b"mdat") + 40
    data[at] ^= 1
    path.write_bytes(data)
    assert main(["provenance", str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["signature"]["valid"] is False


@pytest.mark.parametrize("format", ["webm", "png"])
def test_what_can_not_be_signed_is_told_in_the_row(rendered, signing, format):
    row, path = rendered(signing=signing, format=format)
    assert row.signed is False
    assert row.warnings == ("not signed: only mp4 files are",)
    assert read(path)["signature"] is None


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_other_kinds_of_keys(rendered, kind, tmp_path):
    _, path = rendered(signing=Signing(*map(str, certificates.write(tmp_path / "keys", kind))))
    assert read(path)["signature"]["valid"] is True


def test_what_can_not_be_signed_with_is_told_before_anything_is_rendered(signing, tmp_path, monkeypatch):
    check(signing)
    other = certificates.write(tmp_path / "other")[1]
    (tmp_path / "text.pem").write_text("no key")
    for certificate, key, said in (
        (signing.certificate, tmp_path / "none.pem", "none.pem: can't be read"),
        (tmp_path / "none.pem", signing.key, "none.pem: can't be read"),
        (signing.certificate, tmp_path / "text.pem", "text.pem: no private key in PEM"),
        (tmp_path / "text.pem", signing.key, "text.pem: no chain of certificates in PEM"),
        (signing.certificate, other, "key.pem: not the key of the first certificate in"),
    ):
        with pytest.raises(OutputError) as caught:
            check(Signing(str(certificate), str(key)))
        assert said in caught.value.message
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UnexpectedError, match=r"pip install 't2vz\[provenance\]'"):
        check(signing)


def test_the_command_signs_and_keeps_the_key_to_itself(
    prefect_api, signing, write_manifest, tmp_path, capsys: pytest.CaptureFixture[str]
):
    path, out = write_manifest(tmp_path / "m.csv", {"id": "one", "watermark": "t2vz"}), tmp_path / "out"
    command = ["run", str(path), "--out", str(out), "--device", "cpu", "--sign-certificate", signing.certificate]
    assert main(command) == 2
    assert "give both" in capsys.readouterr().err
    assert main([*command, "--sign-key", str(tmp_path / "none.pem")]) == 2
    assert "none.pem: can't be read" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--sign-key", signing.key]) == 0
    (row,) = results(out)
    assert row.signed is True
    assert read(out / row.output_uri)["signature"]["valid"] is True
    told, log = capsys.readouterr()
    secret = Path(signing.key).read_bytes().split(b"\n")[1]
    assert secret.decode() not in told + log
    assert not [file for file in out.rglob("*") if file.is_file() and secret in file.read_bytes()]
