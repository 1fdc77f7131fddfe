"""Provenance: files signed as made by AI (C2PA, Content Credentials), and what a file says of how it was made.

The certificate chain and its key are the operator's, PEM files; the key is read where a file is signed, and kept
nowhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2vz.errors import EncodeError, OutputError, UnexpectedError
from t2vz.files import sync

if TYPE_CHECKING:
    from t2vz.media.encode import Encoded
    from t2vz.spec import JobSpec

SIGNED_FORMAT = "mp4"  # C2PA knows no WebM, Matroska or folder; of a GIF it would make one of several times the size
_MP4 = "video/mp4"

_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_READ_FRAMES = 64  # for the watermark, which is in each
# A file may name an address that its manifest is to be fetched from: who reads files of others asks nobody for them.
_ALONE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}


@dataclass(frozen=True)
class Signing:
    """What the operator signs with, and whether the claim tells the prompt.

    certificate: file with the chain, the signer's own first. key: file with its private key, without a password.
    """

    certificate: str
    key: str
    prompt: bool = False


def check(signing: Signing) -> None:
    """Raise OutputError if nothing can be signed with these."""
    with _signer(signing):
        pass


def signed(encoded: Encoded, signing: Signing, spec: JobSpec, model_revision: str) -> Encoded:
    """The finished mp4 file, signed; in the place of the unsigned one, and on the disk. Its streams stay bit for bit;
    the signature is another one each time.

    spec: of the row, whose mode, model and prompt are told. Raises EncodeError, OutputError.
    """
    import c2pa

    from t2vz.media.encode import checksum

    path = encoded.path
    draft = path.with_name(f"{path.name}-signed")
    try:
        with (
            _signer(signing) as signer,
            c2pa.Builder(json.dumps(_manifest(spec, model_revision, signing.prompt))) as builder,
            path.open("rb") as source,
            draft.open("w+b") as target,
        ):
            builder.sign(signer, _MP4, source, target)
        sync(draft)
        draft.replace(path)
    except c2pa.C2paError as error:
        raise EncodeError(f"the video can't be signed ({_one_line(error)})") from error
    finally:
        draft.unlink(missing_ok=True)
    sha256, size_bytes = checksum(path)
    return replace(encoded, sha256=sha256, size_bytes=size_bytes, mtime_ns=path.stat().st_mtime_ns)


def _manifest(spec: JobSpec, model_revision: str, prompt: bool) -> dict[str, Any]:
    kind = "compositeWithTrainedAlgorithmicMedia" if spec.mode == "edit" else "trainedAlgorithmicMedia"
    told = {"mode": spec.mode, "model": spec.model, "model_revision": model_revision}
    told |= {"prompt": spec.prompt} if prompt else {}
    action = {
        "action": "c2pa.created",
        "digitalSourceType": _SOURCE_TYPE + kind,
        "softwareAgent": {"name": "t2vz", "version": version("t2vz")},
        "parameters": {f"t2vz.{name}": value for name, value in told.items()},
    }
    return {
        "claim_generator_info": [{"name": "t2vz", "version": version("t2vz")}],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }


@contextmanager
def _signer(signing: Signing) -> Iterator[Any]:
    try:
        import c2pa
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise UnexpectedError("signing needs c2pa-python: pip install 't2vz[provenance]'", stage="settings") from error
    try:
        certificate, pem = Path(signing.certificate).read_bytes(), Path(signing.key).read_bytes()
    except OSError as error:
        raise OutputError(f"{error.filename}: can't be read to sign with ({error.strerror})") from error
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise OutputError(f"{signing.key}: no private key in PEM without a password; give one to sign with") from error
    try:
        signers = x509.load_pem_x509_certificates(certificate)[0].public_key()
    except ValueError as error:
        raise OutputError(f"{signing.certificate}: no chain of certificates in PEM") from error
    if signers != key.public_key():
        raise OutputError(f"{signing.key}: not the key of the first certificate in {signing.certificate}")
    if isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = {256: "es256", 384: "es384", 521: "es512"}.get(key.curve.key_size)
    else:
        algorithm = {rsa.RSAPrivateKey: "ps256", ed25519.Ed25519PrivateKey: "ed25519"}.get(
            next((kind for kind in (rsa.RSAPrivateKey, ed25519.Ed25519PrivateKey) if isinstance(key, kind)), None)
        )
    if algorithm is None:
        raise OutputError(f"{signing.key}: C2PA knows no signature with such a key; take P-256 or Ed25519")
    try:
        signer = c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(alg=algorithm.encode(), sign_cert=certificate, private_key=pem, ta_url=None)
        )
    except (c2pa.C2paError, ValueError) as error:
        raise OutputError(f"{signing.certificate}: can't be signed with, with this key ({_one_line(error)})") from error
    with signer:
        yield signer


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a finished output says of itself: `parameters` (its metadata), `watermark` (the text), `signature` (who
    signed, the claim's actions, and whether it is valid); None for what it doesn't have.

    Raises SourceError if it can't be read.
    """
    from t2vz.media.sandbox import decode
    from t2vz.media.watermark import read as watermark_of

    frames = decode(path, video_length=_READ_FRAMES).frames
    path = Path(path)
    return {"parameters": _parameters(path), "watermark": watermark_of([frames]), "signature": _signature(path)}


def _parameters(path: Path) -> dict[str, Any] | None:
    from t2vz.media.encode import METADATA_FILE
    from t2vz.media.sandbox import comment

    if path.is_dir():
        text = (path / METADATA_FILE).read_text("utf-8") if (path / METADATA_FILE).is_file() else ""
    elif path.suffix == ".gif":
        text = _gif_comment(path.read_bytes())
    else:
        text = comment(path)
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _gif_comment(data: bytes) -> str:
    """The last comment: blocks of at most 255 bytes, each behind its length, until one of none."""
    at, blocks = data.rfind(b"\x21\xfe") + 2, []
    while 2 <= at < len(data) and data[at]:
        blocks.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return b"".join(blocks).decode("utf-8", "replace")


def _signature(path: Path) -> dict[str, Any] | None:
    try:
        import c2pa
    except ImportError:  # not installed: nothing is known
        return None
    if path.suffix != f".{SIGNED_FORMAT}" or path.is_dir():
        return None
    with path.open("rb") as file, c2pa.Context(c2pa.Settings.from_dict(_ALONE)) as context:
        try:
            with c2pa.Reader(_MP4, file, context=context) as reader:
                store = json.loads(reader.json())
        except c2pa.C2paError.ManifestNotFound:
            return None
        except c2pa.C2paError as error:
            return {"valid": False, "problems": [_one_line(error)]}
    manifest = store["manifests"][store["active_manifest"]]
    actions = [
        action
        for assertion in manifest["assertions"]
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    problems = [f"{status['code']}: {status.get('explanation', '')}" for status in store.get("validation_status", ())]
    return {
        "valid": store.get("validation_state") in ("Valid", "Trusted"),
        "trusted": store.get("validation_state") == "Trusted",
        "problems": problems,
        "signer": manifest.get("signature_info", {}),
        "actions": actions,
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
