"""Certificate chains to sign with, made for the tests: a root of one's own, and a signer's certificate as C2PA asks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEYS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
}


def write(folder: Path, kind: str = "p256") -> tuple[Path, Path]:
    """(chain, key) in PEM."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, key = KEYS["p256"](), KEYS[kind]()
    root = _certificate("tests' root", root_key, "tests' root", root_key, is_root=True)
    leaf = _certificate("tests' signer", key, "tests' root", root_key, is_root=False)
    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(each.public_bytes(serialization.Encoding.PEM) for each in (leaf, root)))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, secret


def _certificate(subject: str, key: Any, issuer: str, issuer_key: Any, *, is_root: bool) -> x509.Certificate:
    def name(text: str) -> x509.Name:
        return x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "t2vz"), x509.NameAttribute(NameOID.COMMON_NAME, text)]
        )

    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    usage |= {"decipher_only": False, "digital_signature": not is_root, "key_cert_sign": is_root, "crl_sign": is_root}
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(is_root, None), True)
        .add_extension(x509.KeyUsage(**usage), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
    )
    if not is_root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    return builder.sign(issuer_key, hashes.SHA256())
