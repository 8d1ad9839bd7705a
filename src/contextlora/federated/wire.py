"""One message between peers: a fixed header, its Ed25519 signature, the payload. Byte table: docs/so-lora-wire.md.

The signature is over the header, which holds the payload's SHA-256: so a message is known to be authentic before its
payload has been hashed, or even has arrived. Nothing here looks at versions or decodes; `mailbox` does.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from contextlora.errors import PeerError
from contextlora.federated.codec import Codec

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = 1
_MAGIC = b"SOLR"
_DOMAIN = b"contextlora message\0"  # a signature made for anything else is none here, nor the other way round
_HEAD = struct.Struct("<4sHBB32s32s64sIIIII32s32s32s")
_SIGNATURE = 64
OVERHEAD = _HEAD.size + _SIGNATURE
_TASK = re.compile(rb"[A-Za-z0-9_-]{1,64}")  # as graph.py names tasks
_NO_HASH = bytes(32)


class Kind(IntEnum):
    """What a message brings; the number is the one on the wire."""

    MASK = 1  # which entries of B are active: once
    VALUES = 2  # all active values
    DELTA = 3  # their difference to a version that the receiver has said it holds
    ROW = 4  # the sender's row of the table from which clusters are formed, and its status


@dataclass(frozen=True)
class Limits:
    """All that a message may ask a receiver to hold. Checked before anything is allocated.

    Attributes:
        positions: entries of B of one task over all layers (2^28 is 13 times Qwen2.5-1.5B at rank 32).
        payload: bytes of a mask or of values.
        row: bytes of a row.
        fields: of a row.
    """

    positions: int = 1 << 28
    payload: int = 64 << 20
    row: int = 16384
    fields: int = 64


@dataclass(frozen=True)
class Header:
    """Who says what about which version. All hashes are SHA-256 (32 bytes).

    Attributes:
        run: hash of the run's id.
        task: whose slice.
        version: of the adapter, from 1; of a row: any number that grows.
        round: in which it was sent.
        base: version that a delta is against, else 0.
        codec: of the values, else 0.
        count: active entries, of a mask or of values.
        mask: hash of the mask that the values belong to, or that is announced.
        state: hash of the values as the receiver must hold them afterwards.
        sender: raw Ed25519 public key; filled in by `seal`, as are the payload's length and hash.
    """

    kind: Kind
    run: bytes
    task: str
    version: int
    round: int
    base: int = 0
    codec: int = 0
    count: int = 0
    mask: bytes = _NO_HASH
    state: bytes = _NO_HASH
    sender: bytes = _NO_HASH
    length: int = 0
    digest: bytes = _NO_HASH

    def pack(self) -> bytes:
        """As bytes. Raises PeerError E634 for a field that does not fit."""
        task = self.task.encode()
        numbers = (self.version, self.round, self.base, self.count, self.length)
        if not _TASK.fullmatch(task) or any(not 0 <= n < 1 << 32 for n in numbers):
            raise PeerError("E634", f"a message cannot carry task '{self.task[:80]}' with {numbers}")
        what = (_MAGIC, FORMAT, self.kind, self.codec, self.run, self.sender, task)
        return _HEAD.pack(*what, *numbers, self.digest, self.mask, self.state)


def run_hash(run: str) -> bytes:
    """What messages of the run with this id carry."""
    return hashlib.sha256(run.encode()).digest()


def public_key(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes by which others know the owner of `key`."""
    return bytes(key.public_key().public_bytes_raw())


def seal(header: Header, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The signed message. Fills in the header's sender, length and payload hash."""
    digest = hashlib.sha256(payload).digest()
    head = replace(header, sender=public_key(key), length=len(payload), digest=digest).pack()
    return head + bytes(key.sign(_DOMAIN + head)) + payload


def read_header(data: bytes | memoryview, limits: Limits) -> Header:
    """The header of what may be a message: format, lengths and counts are in order; nothing is authenticated.

    `data` may be the message's first `OVERHEAD` bytes alone.

    Raises:
        PeerError: E620 not a message, E621 of a newer format, E622 truncated, E623 over a limit.
    """
    if len(data) < OVERHEAD:
        raise PeerError("E622", f"{len(data)} bytes are no whole message")
    magic, version, kind, codec, run, sender, task, *numbers, digest, mask, state = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise PeerError("E620", "not a message")
    if version != FORMAT:
        raise PeerError("E621", f"a message of format {version}; this is {FORMAT}. Are all peers of one release?")
    name = task.rstrip(b"\0")
    number, round_, base, count, length = numbers
    if kind not in list(Kind) or not _TASK.fullmatch(name) or not _consistent(Kind(kind), codec, number, base, mask):
        raise PeerError("E620", "a header that no peer writes")
    if length > (limits.row if kind == Kind.ROW else limits.payload) or count > limits.positions:
        raise PeerError("E623", f"a message of {length} bytes and {count} values is over the limits")
    what = (number, round_, base, codec, count, mask, state, sender, length, digest)
    return Header(Kind(kind), run, name.decode(), *what)


def authenticate(data: bytes | memoryview, header: Header) -> None:
    """Checks the signature in a message's first `OVERHEAD` bytes. Raises PeerError E626, or E635 without the extra."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise PeerError("E635", "peers need the extra: pip install 'contextlora[peers]'") from None
    head, signature = bytes(data[: _HEAD.size]), bytes(data[_HEAD.size : OVERHEAD])
    try:
        Ed25519PublicKey.from_public_bytes(header.sender).verify(signature, _DOMAIN + head)
    except (InvalidSignature, ValueError):
        raise PeerError("E626", "the signature is not the sender's, or the header was altered") from None


def read_payload(data: bytes | memoryview, header: Header) -> memoryview:
    """The payload of a whole message. Raises PeerError E622 for another length, E627 for other bytes than signed."""
    payload = memoryview(data)[OVERHEAD:]
    if len(payload) != header.length:
        raise PeerError("E622", f"a payload of {len(payload)} bytes where the header says {header.length}")
    if hashlib.sha256(payload).digest() != header.digest:
        raise PeerError("E627", "the payload was altered")
    return payload


def _consistent(kind: Kind, codec: int, version: int, base: int, mask: bytes) -> bool:
    """Whether fields that a kind does not use are zero, and those that it does are possible."""
    carries = kind in (Kind.VALUES, Kind.DELTA)
    return (
        (codec in list(Codec) if carries else codec == 0)
        and (0 < base < version if kind is Kind.DELTA else base == 0 and version > 0)
        and (mask == _NO_HASH) == (kind is Kind.ROW)
    )
