"""A message in pieces, for transfers that resume: pieces may come in any order, twice, damaged, or not at all.

An assembler belongs to one link, so a peer that sends rubbish can crowd out only its own transfers. It holds what
arrived and nothing for what is merely announced.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise

from contextlora.errors import PeerError

CHUNK = 64 << 10
_MAGIC = b"SOCH"
_HEAD = struct.Struct("<4s32sIIII")  # magic, SHA-256 of the message, its length, chunk size, index, CRC-32 of the rest


def transfer_id(message: bytes) -> bytes:
    """What a transfer is asked for by: the message's SHA-256."""
    return hashlib.sha256(message).digest()


def split(message: bytes, size: int = CHUNK) -> list[bytes]:
    """Chunks of `size` bytes of the message, the last one shorter; chunk i can be sent again at any time."""
    if not message or size < 1:
        raise PeerError("E634", f"{len(message)} bytes cannot be sent in chunks of {size}")
    name, pieces = transfer_id(message), [message[at : at + size] for at in range(0, len(message), size)]
    return [_head(name, len(message), size, i, piece) + piece for i, piece in enumerate(pieces)]


def place(chunk: bytes) -> tuple[bytes, int]:
    """The transfer's id and the index that a chunk claims, unchecked. Raises PeerError E636 for what is no chunk."""
    if len(chunk) < _HEAD.size or chunk[:4] != _MAGIC:
        raise PeerError("E636", "not a chunk")
    _, name, _, _, index, _ = _HEAD.unpack_from(chunk)
    return name, index


def _head(name: bytes, total: int, size: int, index: int, piece: bytes) -> bytes:
    # The check covers the header too: a damaged index would otherwise put good bytes in a wrong place.
    crc = zlib.crc32(piece, zlib.crc32(struct.pack("<32sIII", name, total, size, index)))
    return _HEAD.pack(_MAGIC, name, total, size, index, crc)


@dataclass
class _Transfer:
    total: int
    size: int
    pieces: dict[int, bytes] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return -(-self.total // self.size)


class Assembler:
    """Puts the messages of one link together.

    Args:
        limit: bytes that all unfinished transfers together may announce, hence hold.
        transfers: how many may be unfinished.
        smallest: chunk size below which a transfer is refused: a chunk costs some hundred bytes beside its content.

    Attributes:
        refused: how many chunks, by error code.
    """

    def __init__(self, limit: int = 128 << 20, transfers: int = 16, smallest: int = 1024):
        self.limit, self.transfers, self.smallest = limit, transfers, smallest
        self.refused: Counter[str] = Counter()
        self._open: dict[bytes, _Transfer] = {}
        self._done: deque[bytes] = deque(maxlen=64)

    def add(self, chunk: bytes) -> bytes | None:
        """Takes one chunk; gives the message when it was the last one missing.

        A chunk of a message that is complete, or that is here already, changes nothing. A new transfer that does not
        fit beside the others takes the place of those that began first.

        Raises:
            PeerError: E636, a chunk that is damaged or fits no transfer; E623, a message over the limit; E627, all
                chunks are here and are not the message (the transfer starts over). Counted in `refused`.
        """
        try:
            return self._add(chunk)
        except PeerError as e:
            self.refused[e.code] += 1
            raise

    def expect(self, name: bytes, total: int, size: int) -> bool:
        """Makes room for a transfer that was announced, so that its holes are known; False if it is complete.

        Raises PeerError as `add` does: E623 over the limit, E636 not what was announced before. Counted in `refused`.
        """
        try:
            self._check_limits(total, size)
            return not self.finished(name) and self._transfer(name, total, size) is not None
        except PeerError as e:
            self.refused[e.code] += 1
            raise

    def finished(self, name: bytes) -> bool:
        """Whether a transfer was completed not long ago."""
        return name in self._done

    def holes(self, name: bytes) -> list[tuple[int, int]]:
        """Ranges [first, last) of chunks that a transfer lacks; none if it is unknown or done."""
        transfer = self._open.get(name)
        if transfer is None:
            return []
        here = [-1, *sorted(transfer.pieces), transfer.chunks]
        return [(a + 1, b) for a, b in pairwise(here) if b > a + 1]

    def forget(self, name: bytes) -> None:
        """Lets go of an unfinished transfer."""
        self._open.pop(name, None)

    def unfinished(self) -> list[bytes]:
        """Ids of transfers under way, in the order in which they began."""
        return list(self._open)

    def _add(self, chunk: bytes) -> bytes | None:
        name, total, size, index, piece = self._read(chunk)
        if self.finished(name):
            return None
        transfer = self._transfer(name, total, size)
        if transfer.pieces.setdefault(index, piece) != piece:
            raise PeerError("E636", f"chunk {index} came twice with different content")
        if len(transfer.pieces) < transfer.chunks:
            return None
        del self._open[name]
        message = b"".join(transfer.pieces[i] for i in range(transfer.chunks))
        if transfer_id(message) != name:
            raise PeerError("E627", "the chunks do not add up to the message that they name")
        self._done.append(name)
        return message

    def _check_limits(self, total: int, size: int) -> None:
        if not 0 < total <= self.limit or size < min(self.smallest, total):
            raise PeerError("E623", f"a transfer of {total} bytes in chunks of {size} is over the limits")

    def _transfer(self, name: bytes, total: int, size: int) -> _Transfer:
        transfer = self._open.get(name) or self._begin(name, total, size)
        if (transfer.total, transfer.size) != (total, size):
            raise PeerError("E636", "a chunk of another size than the others of its transfer")
        return transfer

    def _begin(self, name: bytes, total: int, size: int) -> _Transfer:
        while len(self._open) >= self.transfers or sum(t.total for t in self._open.values()) + total > self.limit:
            del self._open[next(iter(self._open))]
        self._open[name] = _Transfer(total, size)
        return self._open[name]

    def _read(self, chunk: bytes) -> tuple[bytes, int, int, int, bytes]:
        name, index = place(chunk)
        _, _, total, size, _, _ = _HEAD.unpack_from(chunk)
        piece = chunk[_HEAD.size :]
        if chunk[: _HEAD.size] != _head(name, total, size, index, piece):
            raise PeerError("E636", "a damaged chunk")
        self._check_limits(total, size)
        if index * size >= total or len(piece) != min(size, total - index * size):
            raise PeerError("E636", f"chunk {index} of {len(piece)} bytes has no place in its message")
        return name, total, size, index, piece
