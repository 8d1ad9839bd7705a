"""Masks as bytes and back, near the entropy bound ``log2 C(n, k)``; what they hash to. numpy only.

A mask travels once, then only values do. Of two forms the smaller one travels: the packed bits, or the gaps between the
rarer kind of bit. A gap's high part is one byte (255 means: 255 and more to come), deflated; its low bits, if gaps are
long, are as good as random and travel as they are. With one active entry in ten that is within 1 % of the bound.
"""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError
from contextlora.federated.codec import pack, unpack

Bits = NDArray[np.bool_]

_HEAD = struct.Struct("<BBI")  # form, low bits of a gap, number of gaps
_BITMAP, _ONES, _ZEROS = 0, 1, 2


def encode_mask(mask: Bits) -> bytes:
    """A mask (n,) of bool, n < 2^32, as bytes."""
    rarer = _ZEROS if 2 * np.count_nonzero(mask) > mask.size else _ONES
    bitmap = _HEAD.pack(_BITMAP, 0, 0) + pack(np.packbits(mask).tobytes())
    return min(bitmap, _encode_gaps(mask, rarer), key=len)


def decode_mask(payload: bytes | memoryview, size: int) -> Bits:
    """The mask (size,) that was encoded. Allocates for `size`, whatever the payload claims.

    Raises:
        PeerError: E631, bytes that `encode_mask` never makes for a mask of this size.
    """
    rest = memoryview(payload)
    if len(rest) < _HEAD.size:
        raise PeerError("E631", "a mask that is cut off")
    form, shift, count = _HEAD.unpack_from(rest)
    allowed = [(_BITMAP, 0, 0), *((rarer, _low_bits(size, count), min(count, size // 2)) for rarer in (_ONES, _ZEROS))]
    if (form, shift, count) not in allowed:
        raise PeerError("E631", f"not a mask of {size} entries")
    rest = rest[_HEAD.size :]
    if form == _BITMAP:
        packed, rest = unpack(rest, -(-size // 8))
        bits = np.unpackbits(np.frombuffer(packed, np.uint8))
        mask, spare = bits[:size].astype(bool), bool(bits[size:].any())
    else:
        mask, rest = _decode_gaps(rest, size, shift, count)
        spare = False
        if form == _ZEROS:
            mask = ~mask
    if spare or len(rest):
        raise PeerError("E631", "a mask with more in it than its entries")
    return mask


def mask_hash(mask: Bits) -> bytes:
    """SHA-256 of length and bits: what messages name a mask by, whichever form it travelled in."""
    return hashlib.sha256(struct.pack("<Q", mask.size) + np.packbits(mask).tobytes()).digest()


def mask_bound(size: int, active: int) -> float:
    """``log2 C(size, active)``: the bits that tell one mask with so many active entries from all others."""
    return (math.lgamma(size + 1) - math.lgamma(active + 1) - math.lgamma(size - active + 1)) / math.log(2)


def _low_bits(size: int, count: int) -> int:
    """Bits of a gap that travel as they are, so that high parts are 32 at most on average.

    A code of whole bits is nearly ideal for so many different numbers, and few of them need a second byte.
    """
    return max(0, ((size + 1) // (count + 1)).bit_length() - 5)


def _encode_gaps(mask: Bits, rarer: int) -> bytes:
    gaps = np.diff(np.flatnonzero(mask == (rarer == _ONES)), prepend=-1) - 1
    shift = _low_bits(mask.size, gaps.size)
    high, low = gaps >> shift, gaps & ((1 << shift) - 1)
    ends = np.cumsum(high // 255 + 1) - 1
    stream = np.full(ends[-1] + 1 if ends.size else 0, 255, np.uint8)
    stream[ends] = high % 255
    bits = (low[:, None] >> np.arange(shift) & 1).astype(np.uint8)
    return _HEAD.pack(rarer, shift, gaps.size) + pack(stream.tobytes()) + pack(np.packbits(bits).tobytes())


def _decode_gaps(rest: memoryview, size: int, shift: int, count: int) -> tuple[Bits, memoryview]:
    raw, rest = unpack(rest, count + (size >> shift) // 255, at_most=True)
    packed, rest = unpack(rest, -(-count * shift // 8))
    stream = np.frombuffer(raw, np.uint8)
    ends = np.flatnonzero(stream != 255)
    if ends.size != count or (count and ends[-1] != stream.size - 1) or (not count and stream.size):
        raise PeerError("E631", f"a mask of {count} gaps that holds {ends.size}")
    high = 255 * (np.diff(ends, prepend=-1) - 1) + stream[ends]
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))
    low = bits[: count * shift].reshape(count, shift) @ (1 << np.arange(shift, dtype=np.int64))
    places = np.cumsum((high << shift) + low + 1) - 1
    if (count and places[-1] >= size) or bits[count * shift :].any():
        raise PeerError("E631", f"a mask that reaches beyond its {size} entries")
    mask = np.zeros(size, bool)
    mask[places] = True
    return mask, rest
