"""A federation's rounds as one device goes through them, without any transport: whoever carries it moves the bytes.

The same generator runs in a simulation, hundreds side by side, and alone in a real process (sans I/O): it yields what
is to be sent and from whom something is awaited, and is sent what has arrived by the deadline.

A round t (SO-LoRA section IV-C):

    rows      everyone tells everyone what it holds and will send; from these all compute the same clusters
    (train)   each on its own data
    slices    within each cluster
    across    every `exchange_every` rounds: from each cluster, the device nearest to another cluster passes on what
    inward    it has to the nearest one there, and that one to its own cluster
    (aggregate)
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from contextlora.errors import PeerError

if TYPE_CHECKING:
    from contextlora.federated.peer import Peer

Slot = Literal["rows", "slices", "across", "inward"]
SLOTS: tuple[Slot, ...] = ("rows", "slices", "across", "inward")
_HEAD = struct.Struct("<4sIB")  # magic, round, slot; then each message behind its length
_MAGIC = b"SOBU"
_LENGTH = struct.Struct("<I")
MAX_MESSAGES = 1024


@dataclass(frozen=True)
class Exchange:
    """What a device sends in a slot, and waits for.

    Attributes:
        round, slot: when.
        sends: bundles and whom each is for.
        expects: devices from which one bundle each may come; whatever has not come by the deadline is done without.
    """

    round: int
    slot: Slot
    sends: tuple[tuple[tuple[str, ...], bytes], ...]
    expects: frozenset[str]


Bundles = Mapping[str, bytes]  # by the device that handed it over
Rounds = Generator[Exchange, Bundles, None]


def bundle(round_: int, slot: Slot, messages: Iterable[bytes]) -> bytes:
    """Messages of one slot as one transfer. Nothing here is authenticated: the messages are, each by its sender."""
    parts = [_LENGTH.pack(len(m)) + m for m in messages]
    return _HEAD.pack(_MAGIC, round_, SLOTS.index(slot)) + b"".join(parts)


def place(data: bytes) -> tuple[int, Slot]:
    """The round and slot of a bundle. Raises PeerError E620 for anything else."""
    if len(data) < _HEAD.size:
        raise PeerError("E620", "not a bundle of messages")
    magic, round_, slot = _HEAD.unpack_from(data)
    if magic != _MAGIC or slot >= len(SLOTS):
        raise PeerError("E620", "not a bundle of messages")
    return round_, SLOTS[slot]


def unbundle(data: bytes) -> list[bytes]:
    """The messages of a bundle. Raises PeerError E620 for anything else, E622 for one that is cut off."""
    place(data)
    messages, at = list[bytes](), _HEAD.size
    while at < len(data):
        if len(messages) == MAX_MESSAGES or len(data) - at < _LENGTH.size:
            raise PeerError("E622", "a bundle that is cut off or of too many messages")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise PeerError("E622", "a bundle that is cut off")
        messages.append(data[at : at + length])
        at += length
    return messages


def rounds(peer: Peer) -> Rounds:
    """All rounds of one device, from the one it is in. A device that was away goes on in the round of the others."""
    while peer.round < peer.settings.rounds:
        t, everyone = peer.round, peer.others
        rows = yield Exchange(t, "rows", ((everyone, bundle(t, "rows", peer.rows())),), frozenset(everyone))
        peer.meet(rows)
        peer.train()
        for slot in SLOTS[1:] if peer.exchanges else SLOTS[1:2]:
            sends = tuple((to, bundle(peer.round, slot, what)) for to, what in peer.sends(slot))
            arrived = yield Exchange(peer.round, slot, sends, peer.expects(slot))
            peer.take(arrived)
        peer.aggregate()
