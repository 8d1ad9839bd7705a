"""Keys, requests and certificates as PEM: made, read and compared. Files and folders are `identity`'s.

A device has two key pairs, Ed25519 for its messages and P-256 for TLS. A request and a certificate carry its name as
their only subject, the TLS key as theirs, and the message key as a URI among the alternative names.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from contextlora.errors import PeerError

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
except ImportError:
    raise PeerError("E635", "peers need the extra: pip install 'contextlora[peers]'") from None

_MESSAGE_KEY = "urn:contextlora:ed25519:"
_DAY = datetime.timedelta(days=1)
_USES = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
_USES += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
Signed: TypeAlias = x509.Certificate | x509.CertificateSigningRequest


# --- making --------------------------------------------------------------------------------------------------------


def make_authority(days: int) -> tuple[bytes, bytes]:
    """An authority's private key and its certificate, which may sign devices' and nothing else."""
    key = generate_private_key(SECP256R1())
    name, public = _name(f"contextlora authority {os.urandom(4).hex()}"), key.public_key()
    uses = dict.fromkeys(_USES, False) | {"key_cert_sign": True, "crl_sign": True}
    certificate = (
        _builder(name, name, public, _now() + days * _DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**uses), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _private_pem(key), pem(certificate)


def make_request(name: str) -> tuple[bytes, bytes, bytes]:
    """A device's private keys for messages and TLS, and the request that carries their public halves."""
    message, tls = Ed25519PrivateKey.generate(), generate_private_key(SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(name))
        .add_extension(_alternative(message.public_key().public_bytes_raw()), critical=False)
        .sign(tls, hashes.SHA256())
    )
    return _private_pem(message), _private_pem(tls), pem(request)


def make_certificate(key: Any, own: x509.Certificate, request: Any, days: int, where: object) -> bytes:
    """What the authority with this key and certificate says of a request: its name and two keys, nothing else of it.

    Raises PeerError E652 for a request that names no device or carries no message key.
    """
    purpose = x509.oid.ExtendedKeyUsageOID
    subject = _name(common_name(request, where))
    end = min(_now() + days * _DAY, own.not_valid_after_utc)
    certificate = (
        _builder(subject, own.subject, request.public_key(), end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose.SERVER_AUTH, purpose.CLIENT_AUTH]), critical=False)
        .add_extension(_alternative(message_key(request, where)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return pem(certificate)


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, end: datetime.datetime) -> Any:
    """Valid from yesterday on: clocks of small devices differ."""
    start, number = _now() - _DAY, x509.random_serial_number()
    named = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key).serial_number(number)
    return named.not_valid_before(start).not_valid_after(end)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, common)])


def _alternative(message: bytes) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_MESSAGE_KEY + message.hex())])


def pem(signed: Signed) -> bytes:
    """A request or certificate as PEM."""
    return bytes(signed.public_bytes(serialization.Encoding.PEM))


def _private_pem(key: EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, none))


# --- reading -------------------------------------------------------------------------------------------------------


def parse_key(raw: bytes, where: object) -> Any:
    """A private key. Raises PeerError E652."""
    return _parse(raw, lambda r: serialization.load_pem_private_key(r, None), "a private key", where)


def parse_message_key(raw: bytes, where: object) -> Ed25519PrivateKey:
    """A private key for messages. Raises PeerError E652."""
    key = parse_key(raw, where)
    if not isinstance(key, Ed25519PrivateKey):
        raise PeerError("E652", "is not an Ed25519 key", where=where)
    return key


def parse_request(raw: bytes, where: object) -> x509.CertificateSigningRequest:
    """A request, signed by the key that it is for. Raises PeerError E652, E653."""
    request = _parse(raw, x509.load_pem_x509_csr, "a request", where)
    if not request.is_signature_valid:
        raise PeerError("E653", "the request is not signed by the key that it is for", where=where)
    return request


def parse_certificates(raw: bytes, where: object) -> list[x509.Certificate]:
    """All certificates, at least one. Raises PeerError E652."""
    return list(_parse(raw, x509.load_pem_x509_certificates, "a certificate", where))


def parse_chain(raw: bytes, where: object) -> tuple[x509.Certificate, x509.Certificate]:
    """A device's certificate and that of the authority, which must have signed it. Raises PeerError E652, E653."""
    found = parse_certificates(raw, where)
    if len(found) != 2:
        text = f"holds {len(found)} certificates; it should be the file that the authority gave, with two"
        raise PeerError("E652", text, where=where)
    try:
        found[0].verify_directly_issued_by(found[1])
    except (ValueError, TypeError, InvalidSignature):
        raise PeerError("E653", "the certificate is not signed by the authority beside it", where=where) from None
    return found[0], found[1]


def _parse(raw: bytes, read: Callable[[bytes], Any], what: str, where: object) -> Any:
    try:
        return read(raw)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PeerError("E652", f"is not {what} in PEM", where=where) from None


def common_name(signed: Signed, where: object) -> str:
    """Whom a request or certificate is about. Raises PeerError E652 for anything but one common name."""
    found = list(signed.subject)
    if len(found) != 1 or found[0].oid != x509.oid.NameOID.COMMON_NAME:
        raise PeerError("E652", "its subject should be one common name, the device's", where=where)
    return str(found[0].value)


def message_key(signed: Signed, where: object) -> bytes:
    """The Ed25519 public key that a request or certificate carries. Raises PeerError E652."""
    try:
        names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        uris = []
    match = re.fullmatch(_MESSAGE_KEY + "([0-9a-f]{64})", uris[0]) if len(uris) == 1 else None
    if not match:
        raise PeerError("E652", "carries no message key; was it made by contextlora?", where=where)
    return bytes.fromhex(match[1])


def public(owner: Any) -> bytes:
    """The public key of a certificate, request or private key, in one form."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(owner.public_key().public_bytes(serialization.Encoding.DER, form))


def check_dates(certificate: x509.Certificate, where: object) -> None:
    """Raises PeerError E653 if the certificate does not hold now."""
    now, start, end = _now(), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now <= end:
        text = f"the certificate holds from {start.date()} to {end.date()}; today is {now.date()}. Have it signed again"
        raise PeerError("E653", text, where=where)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
