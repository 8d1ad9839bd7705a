"""Who a device is: its keys, its certificate, the authority that vouches for its name, the list of its peers.

A device makes two key pairs of its own and keeps their private halves: Ed25519 for what it says (`wire`), P-256 for TLS.
What leaves it is a request: name and both public keys. The authority's signature makes that a certificate.

    create_authority("authority")                      # on one machine: ca.key stays there
    create_identity("me", "ant")                       # on each device: me/request.pem goes to the authority
    sign_request("authority", "request.pem")           # authority/issued/ant.pem goes back, as me/certificate.pem
    load_identity("me")

The list of peers (peers.yaml) says whose messages count, which is not the authority's to decide:

    peers:
      ant: {key: 9f7b...64 hex digits, endpoint: "192.168.1.10:7447"}
      bee: {key: 03aa...}                              # no endpoint: it calls the others, nobody calls it
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from contextlora.errors import ConfigError, PeerError
from contextlora.strict import Strict, read_yaml, validate

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import Certificate, CertificateSigningRequest, Name

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what a certificate's common name and a zenoh key both take
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_MESSAGE_KEY = "urn:contextlora:ed25519:"  # a subject alternative name that carries the message key
_LARGEST = 1 << 16  # bytes of any key, request or certificate
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """What a device knows of itself.

    Attributes:
        name: the certificate's common name.
        key: signs its messages.
        tls_key: file of its TLS key.
        certificate: its own, PEM.
        authority: the authority's certificate, PEM.
    """

    name: str
    key: Ed25519PrivateKey = field(repr=False)
    tls_key: Path
    certificate: bytes = field(repr=False)
    authority: bytes = field(repr=False)


@dataclass(frozen=True)
class Peer:
    """What a device knows of another.

    Attributes:
        name: the certificate's common name.
        key: raw Ed25519 public key (32 bytes) of its messages.
        endpoint: "host:port" where it listens; None if it only calls.
    """

    name: str
    key: bytes
    endpoint: str | None = None


# --- the authority -------------------------------------------------------------------------------------------------


def create_authority(folder: str | Path, days: int = 3650) -> Path:
    """Makes an authority: ca.key (0600) and ca.pem, its certificate. Gives the certificate's path.

    Raises:
        PeerError: E650 if there is one already or the folder cannot be written, E635 without the extra.
    """
    x509, hashes, ec = _x509(), _crypto("hazmat.primitives.hashes"), _crypto("hazmat.primitives.asymmetric.ec")
    folder = Path(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"contextlora authority {os.urandom(4).hex()}")
    usage = {u: False for u in _USAGES} | {"key_cert_sign": True, "crl_sign": True}
    certificate = (
        _dated(_builder(name, name, key.public_key()), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _private_pem(key), 0o600)
    _write(folder / "ca.pem", _pem(certificate), 0o644)
    return folder / "ca.pem"


def sign_request(authority: str | Path, request: str | Path, days: int = 365) -> Path:
    """Vouches for a device's name and public keys. Gives the file to take back to it: certificate and authority's.

    A name belongs to the device that had it first: another device's request for it is refused until its file under
    issued/ is removed. Nothing of the request but the name and the two keys goes into the certificate.

    Raises:
        PeerError: E651 to E653 for files that cannot be used, E655 for a name that cannot be, E635.
    """
    x509, hashes = _x509(), _crypto("hazmat.primitives.hashes")
    authority, request = Path(authority), Path(request)
    key, own = _load_key(authority / "ca.key"), _certificates(authority / "ca.pem")[0]
    if _public(key) != _public(own):
        raise PeerError("E653", "ca.key is not the key of ca.pem", where=authority)
    asked = _load(request, x509.load_pem_x509_csr, "a request")
    if not asked.is_signature_valid:
        raise PeerError("E653", "the request is not signed by the key that it is for", where=request)
    name = check_name(_common_name(asked, request), request)
    issued = authority / "issued" / f"{name}.pem"
    if issued.exists() and _public(before := _certificates(issued)[0]) != _public(asked):
        until = before.not_valid_after_utc.date()
        text = f"'{name}' is another device's until {until}; remove that file to give the name away"
        raise PeerError("E653", text, where=issued)
    usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH])
    uri = x509.UniformResourceIdentifier(_MESSAGE_KEY + _message_key(asked, request).hex())
    certificate = (
        _dated(_builder(_name(name), own.subject, asked.public_key()), days, own.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(issued, _pem(certificate) + _pem(own), 0o644, again=True)
    return issued


# --- a device ------------------------------------------------------------------------------------------------------


def create_identity(folder: str | Path, name: str) -> Path:
    """Makes a device's keys, message.key and tls.key (0600), and request.pem. Gives the request's path.

    Raises:
        PeerError: E650 if keys are there already or the folder cannot be written, E655 for the name, E635.
    """
    x509, hashes, ec = _x509(), _crypto("hazmat.primitives.hashes"), _crypto("hazmat.primitives.asymmetric.ec")
    folder, name = Path(folder), check_name(name, folder)
    message = _crypto("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey.generate()
    tls = ec.generate_private_key(ec.SECP256R1())
    uri = x509.UniformResourceIdentifier(_MESSAGE_KEY + message.public_key().public_bytes_raw().hex())
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_name(name))
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .sign(tls, hashes.SHA256())
    )
    _write(folder / "message.key", _private_pem(message), 0o600)
    _write(folder / "tls.key", _private_pem(tls), 0o600)
    _write(folder / "request.pem", _pem(asked), 0o644)
    return folder / "request.pem"


def load_identity(folder: str | Path) -> Identity:
    """Reads message.key, tls.key and certificate.pem, and checks that they belong together and hold today.

    Raises:
        PeerError: E651 a private key that others can read, E652 a file that is missing or no such thing, E653 files
            that do not belong together or a certificate out of date, E635 without the extra.
    """
    folder = Path(folder)
    message, tls, file = _load_key(folder / "message.key"), _load_key(folder / "tls.key"), folder / "certificate.pem"
    certificate, authority = _chain(file)
    name = check_name(_common_name(certificate, file), file)
    if not hasattr(message, "sign") or not hasattr(message.public_key(), "public_bytes_raw"):
        raise PeerError("E652", "not an Ed25519 key", where=folder / "message.key")
    if _public(certificate) != _public(tls):
        raise PeerError("E653", "the certificate is for another tls.key", where=file)
    if _message_key(certificate, file) != message.public_key().public_bytes_raw():
        raise PeerError("E653", "the certificate is for another message.key", where=file)
    _check_dates(certificate, file)
    return Identity(name, message, folder / "tls.key", _pem(certificate), _pem(authority))


# --- the others ----------------------------------------------------------------------------------------------------


class _Entry(Strict):
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    endpoint: str | None = None


class _Peers(Strict):
    peers: dict[str, _Entry]


def load_peers(path: str | Path) -> dict[str, Peer]:
    """The peers in a file, by name; one's own entry may be among them.

    Raises:
        PeerError: E654 for a file or entry that cannot be used, two of one key, or two that could never meet; E655.
    """
    try:
        entries = validate(_Peers, read_yaml(path), path).peers
    except ConfigError as e:
        raise PeerError("E654", e.message, where=e.where) from None
    peers = {check_name(n, path): Peer(n, bytes.fromhex(e.key), e.endpoint) for n, e in entries.items()}
    seen: dict[bytes, str] = {}
    for peer in peers.values():
        if (other := seen.setdefault(peer.key, peer.name)) != peer.name:
            raise PeerError("E654", f"'{other}' and '{peer.name}' have the same key", where=path)
        if peer.endpoint is not None:
            check_endpoint(peer.endpoint, f"{path}: {peer.name}")
    if len(hidden := [p.name for p in peers.values() if p.endpoint is None]) > 1:
        text = f"{', '.join(hidden)}: of any two peers one must have an endpoint, or they cannot meet"
        raise PeerError("E654", text, where=path)
    return peers


def save_peers(path: str | Path, peers: Iterable[Peer]) -> None:
    """Writes a file that `load_peers` reads. Raises PeerError E650 if it cannot be written."""
    lines = ["peers:"]
    for p in sorted(peers, key=lambda p: p.name):
        end = f', endpoint: "{p.endpoint}"' if p.endpoint else ""
        lines.append(f'  {p.name}: {{key: "{p.key.hex()}"{end}}}')
    _write(Path(path), ("\n".join(lines) + "\n").encode(), 0o644, again=True)


def read_peer(certificate: str | Path, endpoint: str | None = None) -> Peer:
    """The peer that a certificate is about, signed by the authority that comes with it.

    Raises PeerError E652 to E655: the certificate, the endpoint, or the name cannot be used.
    """
    file = Path(certificate)
    found, _ = _chain(file)
    if endpoint is not None:
        check_endpoint(endpoint, file)
    return Peer(check_name(_common_name(found, file), file), _message_key(found, file), endpoint)


def check_name(name: str, where: object = "") -> str:
    """The name, if it is one that a device can have. Raises PeerError E655."""
    if not NAME.fullmatch(name):
        text = f"'{name[:80]}' cannot be a device's name: 1 to 64 letters, digits, '_' or '-'"
        raise PeerError("E655", text, where=where)
    return name


def check_endpoint(endpoint: str, where: object = "") -> str:
    """The endpoint, if it is one. Raises PeerError E654."""
    match = _ENDPOINT.fullmatch(endpoint)
    if not match or not 0 < int(match[2]) < 1 << 16:
        text = f"an endpoint is host:port, such as 192.168.1.10:7447 or [fe80::1]:7447, got '{endpoint[:80]}'"
        raise PeerError("E654", text, where=where)
    return endpoint


# --- files and certificates ----------------------------------------------------------------------------------------

_USAGES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
_USAGES += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")


def _crypto(module: str) -> Any:
    """A module of `cryptography`. Raises PeerError E635 without the extra."""
    import importlib

    try:
        return importlib.import_module(f"cryptography.{module}")
    except ImportError:
        raise PeerError("E635", "peers need the extra: pip install 'contextlora[peers]'") from None


def _x509() -> Any:
    return _crypto("x509")


def _name(common: str) -> Name:
    x509 = _x509()
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, common)])


def _builder(subject: Name, issuer: Name, key: Any) -> Any:
    x509 = _x509()
    number = x509.random_serial_number()
    return x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key).serial_number(number)


def _dated(builder: Any, days: int, latest: datetime.datetime | None = None) -> Any:
    """Valid from yesterday on: clocks of small devices differ; never longer than the authority itself."""
    now = datetime.datetime.now(datetime.UTC)
    end = now + days * _DAY
    return builder.not_valid_before(now - _DAY).not_valid_after(min(end, latest) if latest else end)


def _chain(file: Path) -> tuple[Certificate, Certificate]:
    """A device's certificate and that of the authority, which must have signed it. Raises PeerError E652, E653."""
    exceptions = _crypto("exceptions")
    found = _certificates(file)
    if len(found) != 2:
        text = f"holds {len(found)} certificates; it should be the file that the authority gave, with two"
        raise PeerError("E652", text, where=file)
    try:
        found[0].verify_directly_issued_by(found[1])
    except (ValueError, TypeError, exceptions.InvalidSignature):
        raise PeerError("E653", "the certificate is not signed by the authority beside it", where=file) from None
    return found[0], found[1]


def _certificates(file: Path) -> list[Certificate]:
    found: list[Certificate] = _load(file, _x509().load_pem_x509_certificates, "a certificate")
    return found


def _check_dates(certificate: Certificate, file: Path) -> None:
    now, start, end = datetime.datetime.now(datetime.UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now <= end:
        text = f"the certificate holds from {start.date()} to {end.date()}; today is {now.date()}. Let it be signed again"
        raise PeerError("E653", text, where=file)


def _common_name(signed: Certificate | CertificateSigningRequest, file: Path) -> str:
    found = [str(a.value) for a in signed.subject]
    if len(found) != 1:
        raise PeerError("E652", f"should have one subject, a common name; has {len(found)}", where=file)
    return found[0]


def _message_key(signed: Certificate | CertificateSigningRequest, file: Path) -> bytes:
    """The Ed25519 key that a request or certificate carries. Raises PeerError E652."""
    x509 = _x509()
    try:
        names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    match = re.fullmatch(_MESSAGE_KEY + "([0-9a-f]{64})", uris[0]) if len(uris) == 1 else None
    if not match:
        raise PeerError("E652", "carries no message key; was it made by contextlora?", where=file)
    return bytes.fromhex(match[1])


def _public(owner: Any) -> bytes:
    """The public key of a certificate, request or private key, in one form."""
    serialization = _crypto("hazmat.primitives.serialization")
    raw = owner.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return bytes(raw)


def _pem(thing: Certificate | CertificateSigningRequest) -> bytes:
    return bytes(thing.public_bytes(_crypto("hazmat.primitives.serialization").Encoding.PEM))


def _private_pem(key: EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    s = _crypto("hazmat.primitives.serialization")
    return bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))


def _load_key(file: Path) -> Any:
    """A private key that only its owner can read. Raises PeerError E651, E652."""
    load = _crypto("hazmat.primitives.serialization").load_pem_private_key
    return _load(file, lambda raw: load(raw, None), "a private key", private=True)


def _load(file: Path, read: Callable[[bytes], Any], what: str, *, private: bool = False) -> Any:
    """What is in a PEM file. The mode is that of the file that is open, not of what stands there a moment later."""
    exceptions = _crypto("exceptions")
    try:
        with file.open("rb") as f:
            mode = os.fstat(f.fileno()).st_mode & 0o777
            raw = f.read(_LARGEST + 1)
    except OSError as e:
        raise PeerError("E652", f"{what} cannot be read: {e.strerror}", where=file) from None
    if private and os.name == "posix" and mode & 0o077:
        text = f"others can read this private key (mode {mode:04o}); chmod 600 it, or make a new one if they may have"
        raise PeerError("E651", text, where=file)
    try:
        if len(raw) > _LARGEST:
            raise ValueError
        return read(raw)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):
        raise PeerError("E652", f"is not {what} in PEM", where=file) from None


def _write(file: Path, content: bytes, mode: int, *, again: bool = False) -> None:
    """Writes a file that has its mode from the start. Raises PeerError E650, also where one stands, unless `again`."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if again else os.O_EXCL)
        with os.fdopen(os.open(file, flags, mode), "wb") as f:
            f.write(content)
    except FileExistsError:
        raise PeerError("E650", "stands here already and is not overwritten", where=file) from None
    except OSError as e:
        raise PeerError("E650", f"cannot be written: {e.strerror}", where=file) from None
