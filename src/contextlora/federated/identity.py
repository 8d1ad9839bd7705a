"""Who a device is: its keys, its certificate, the authority that vouches for its name, the list of its peers.

A device makes its own keys and keeps their private halves. What leaves it is a request, name and public keys; the
authority's signature makes that a certificate.

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

import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from contextlora.errors import ConfigError, PeerError
from contextlora.strict import Strict, read_yaml, validate

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # what a certificate's common name and a zenoh key both take
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")
_LARGEST = 1 << 16  # bytes of any key, request or certificate


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
    from contextlora.federated.certificates import make_authority

    folder = Path(folder)
    key, certificate = make_authority(days)
    _write(folder / "ca.key", key, 0o600)
    _write(folder / "ca.pem", certificate, 0o644)
    return folder / "ca.pem"


def sign_request(authority: str | Path, request: str | Path, days: int = 365) -> Path:
    """Vouches for a device's name and public keys. Gives the file to take back to it: certificate and authority's.

    A name belongs to the device that had it first: another device's request for it is refused until its file under
    issued/ is removed. A certificate holds no longer than the authority's own.

    Raises:
        PeerError: E651 to E653 for files that cannot be used, E655 for a name that cannot be, E635.
    """
    from contextlora.federated import certificates as c

    authority, request = Path(authority), Path(request)
    key = c.parse_key(_read(authority / "ca.key", private=True), authority / "ca.key")
    own = c.parse_certificates(_read(authority / "ca.pem"), authority / "ca.pem")[0]
    if c.public(key) != c.public(own):
        raise PeerError("E653", "ca.key is not the key of ca.pem", where=authority)
    asked = c.parse_request(_read(request), request)
    name = check_name(c.common_name(asked, request), request)
    issued = authority / "issued" / f"{name}.pem"
    if issued.exists():
        before = c.parse_certificates(_read(issued), issued)[0]
        if c.public(before) != c.public(asked):
            until = before.not_valid_after_utc.date()
            text = f"'{name}' is another device's until {until}; remove that file to give the name away"
            raise PeerError("E653", text, where=issued)
    _write(issued, c.make_certificate(key, own, asked, days, request) + c.pem(own), 0o644, again=True)
    return issued


# --- a device ------------------------------------------------------------------------------------------------------


def create_identity(folder: str | Path, name: str) -> Path:
    """Makes a device's keys, message.key and tls.key (0600), and request.pem. Gives the request's path.

    Raises:
        PeerError: E650 if keys are there already or the folder cannot be written, E655 for the name, E635.
    """
    from contextlora.federated.certificates import make_request

    folder = Path(folder)
    message, tls, request = make_request(check_name(name, folder))
    _write(folder / "message.key", message, 0o600)
    _write(folder / "tls.key", tls, 0o600)
    _write(folder / "request.pem", request, 0o644)
    return folder / "request.pem"


def load_identity(folder: str | Path) -> Identity:
    """Reads message.key, tls.key and certificate.pem, and checks that they belong together and hold today.

    Raises:
        PeerError: E651 a private key that others can read, E652 a file that is missing or no such thing, E653 files
            that do not belong together or a certificate out of date, E635 without the extra.
    """
    from contextlora.federated import certificates as c

    message_file, tls_file, file = (Path(folder) / n for n in ("message.key", "tls.key", "certificate.pem"))
    message = c.parse_message_key(_read(message_file, private=True), message_file)
    tls = c.parse_key(_read(tls_file, private=True), tls_file)
    certificate, authority = c.parse_chain(_read(file), file)
    name = check_name(c.common_name(certificate, file), file)
    if c.public(certificate) != c.public(tls):
        raise PeerError("E653", "the certificate is for another tls.key", where=file)
    if c.message_key(certificate, file) != message.public_key().public_bytes_raw():
        raise PeerError("E653", "the certificate is for another message.key", where=file)
    c.check_dates(certificate, file)
    return Identity(name, message, tls_file, c.pem(certificate), c.pem(authority))


# --- the others ----------------------------------------------------------------------------------------------------


class _Entry(Strict):
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    endpoint: str | None = None


class _Peers(Strict):
    peers: dict[str, _Entry]


def load_peers(path: str | Path) -> dict[str, Peer]:
    """The peers in a file, by name; one's own entry is among them.

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
        lines.append(f'  "{p.name}": {{key: "{p.key.hex()}"{end}}}')  # quoted: 12 and true are names too
    _write(Path(path), ("\n".join(lines) + "\n").encode(), 0o644, again=True)


def read_peer(certificate: str | Path, endpoint: str | None = None) -> Peer:
    """The peer that a certificate is about, as it stands in a list of peers.

    Raises PeerError E652 to E655: the certificate, the endpoint or the name cannot be used; E635.
    """
    from contextlora.federated import certificates as c

    file = Path(certificate)
    found, _ = c.parse_chain(_read(file), file)
    if endpoint is not None:
        check_endpoint(endpoint, file)
    return Peer(check_name(c.common_name(found, file), file), c.message_key(found, file), endpoint)


def enroll_here(folder: str | Path, names: Iterable[str]) -> Path:
    """Several devices of one machine, to try things out: FOLDER/authority, FOLDER/NAME and FOLDER/peers.yaml.

    Each listens on a free port of the loopback interface. An authority that is there already is used. Gives the list
    of peers. Raises PeerError as the steps do that real devices take by themselves.
    """
    folder, listening, found = Path(folder), list[socket.socket](), list[Peer]()
    if not (folder / "authority").exists():
        create_authority(folder / "authority")
    for name in names:
        issued = sign_request(folder / "authority", create_identity(folder / name, name))
        _write(folder / name / "certificate.pem", issued.read_bytes(), 0o644)
        listening.append(socket.create_server(("127.0.0.1", 0)))  # all held until the end: no port comes twice
        found.append(read_peer(issued, f"127.0.0.1:{listening[-1].getsockname()[1]}"))
    for one in listening:
        one.close()
    save_peers(folder / "peers.yaml", found)
    return folder / "peers.yaml"


def check_name(name: str, where: object = "") -> str:
    """The name, if it is one that a device can have. Raises PeerError E655."""
    if not _NAME.fullmatch(name):
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


# --- files ---------------------------------------------------------------------------------------------------------


def _read(file: Path, *, private: bool = False) -> bytes:
    """A small file; one with a private key must be its owner's alone. Raises PeerError E651, E652."""
    try:
        with file.open("rb") as f:
            mode = os.fstat(f.fileno()).st_mode & 0o777  # of what is open here, not of what stands there a moment later
            raw = f.read(_LARGEST + 1)
    except OSError as e:
        raise PeerError("E652", f"cannot be read: {e.strerror}", where=file) from None
    if private and os.name == "posix" and mode & 0o077:
        text = f"others can read this private key (mode {mode:04o}); chmod 600 it, or make a new one if they may have"
        raise PeerError("E651", text, where=file)
    if len(raw) > _LARGEST:
        raise PeerError("E652", f"is larger than any key or certificate: {_LARGEST} bytes", where=file)
    return raw


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
