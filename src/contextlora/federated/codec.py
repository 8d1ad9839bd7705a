"""The values of one sparse slice as bytes and back: bf16, blocks of int8 or int4. numpy only.

A slice is one flat float32 array: the active entries of B, layer after layer; `counts` says how many each layer has.
Positions are not here: both sides hold the mask (`bitmaps`). A block is 64 values of one layer that share a scale, so
that one layer's range never coarsens another's.

Both directions are pure functions of operations that IEEE 754 rounds exactly, so decoding gives the same floats on
every machine. The bytes themselves are the same wherever zlib is the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError

Floats = NDArray[np.float32]

BLOCK = 64
_LARGEST = float(np.finfo(np.float32).max)
_STORED, _DEFLATED = 0, 1


class Codec(IntEnum):
    """How values travel; the number is the one on the wire."""

    BF16 = 1  # 16 bits, rounded to the nearest, ties to even
    INT8 = 2  # -127 to 127 times the block's scale
    INT4 = 3  # -7 to 7 times the block's scale


_LEVELS = {Codec.INT8: 127, Codec.INT4: 7}


def encode(values: Floats, counts: Sequence[int], codec: Codec) -> bytes:
    """Values as bytes.

    Args:
        values: (N,) float32, finite.
        counts: values of each layer; their sum is N.

    Raises:
        PeerError: E633, values that are not finite or not as many as `counts` says.
    """
    check(values, counts)
    if codec is Codec.BF16:
        return _pack_bf16(_to_bf16(values))
    starts, lengths = _blocks(counts)
    scales, quantised = _quantise(values, starts, lengths, _LEVELS[codec])
    if codec is Codec.INT8:
        return _pack_bf16(scales) + pack(quantised.tobytes())
    nibbles = np.zeros(-(-values.size // 2) * 2, np.uint8)
    nibbles[: values.size] = quantised + 8
    return _pack_bf16(scales) + pack((nibbles[::2] << 4 | nibbles[1::2]).tobytes())


def check(values: Floats, counts: Sequence[int]) -> None:
    """Raises PeerError E633 unless values are float32, finite, and as many as the layers' counts add up to."""
    if values.dtype != np.float32 or values.shape != (sum(counts),):
        raise PeerError("E633", f"values should be float32 ({sum(counts)},), got {values.dtype} {values.shape}")
    if not np.isfinite(values).all():
        raise PeerError("E633", f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite")


def decode(payload: bytes | memoryview, counts: Sequence[int], codec: Codec) -> Floats:
    """What `encode` was given: exactly, or within `error_bound`. Allocates for `counts`, whatever the payload claims.

    Raises:
        PeerError: E631, bytes that `encode` never makes for these counts.
    """
    total = sum(counts)
    starts, lengths = _blocks(counts)
    rest = memoryview(payload)
    words, rest = _unpack_bf16(rest, total if codec is Codec.BF16 else starts.size)
    if codec is Codec.BF16:
        _nothing_after(rest)
        return _from_bf16(words)
    if (words >> 15).any():
        raise PeerError("E631", "a block's scale is negative")
    quantised = _unpack_levels(rest, total, codec)
    product = quantised * np.repeat(_from_bf16(words).astype(np.float64), lengths)
    return product.clip(-_LARGEST, _LARGEST).astype(np.float32)  # only a scale rounded up can leave float32's range


def error_bound(values: Floats, counts: Sequence[int], codec: Codec) -> NDArray[np.float64]:
    """The largest |decode(encode(x)) - x| for each value, shape (N,).

    bf16: half a unit in the last of 8 bits, ``|x| 2^-8``, and ``2^-134`` where that is denormal. Blocks: half a step,
    where the step is the block's peak over 127 (or 7), rounded up to bf16: ``peak / (2 levels) (1 + 2^-7) + 2^-134``.
    """
    if codec is Codec.BF16:
        return np.maximum(np.abs(values.astype(np.float64)) * 2.0**-8, 2.0**-134)
    starts, lengths = _blocks(counts)
    peaks = _peaks(values, starts)
    return np.repeat(peaks / (2 * _LEVELS[codec]) * (1 + 2.0**-7) + np.where(peaks > 0, 2.0**-134, 0), lengths)


# --- blocks of integers ----------------------------------------------------------------------------------------------


def _blocks(counts: Sequence[int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where each block starts and how long it is; the last one of a layer may be short, an empty layer has none."""
    ends = np.cumsum(np.asarray(counts, np.intp), dtype=np.intp)
    starts = [np.arange(end - n, end, BLOCK, dtype=np.intp) for n, end in zip(counts, ends, strict=True)]
    first = np.concatenate([np.empty(0, np.intp), *starts])
    return first, np.diff(first, append=sum(counts))


def _peaks(values: Floats, starts: NDArray[np.intp]) -> NDArray[np.float64]:
    peaks = np.maximum.reduceat(np.abs(values), starts) if starts.size else np.empty(0)
    return peaks.astype(np.float64)


def _quantise(
    values: Floats, starts: NDArray[np.intp], lengths: NDArray[np.intp], levels: int
) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """Scales as bf16, rounded up so that no value is clipped; and the levels. A block of zeros has scale 0."""
    scales = _to_bf16_up(_peaks(values, starts) / levels)
    steps = _from_bf16(scales).astype(np.float64)
    steps[steps == 0] = 1
    return scales, np.rint(values / np.repeat(steps, lengths)).astype(np.int8)


def _unpack_levels(section: memoryview, total: int, codec: Codec) -> NDArray[np.int8]:
    if codec is Codec.INT8:
        raw, rest = unpack(section, total)
        levels = np.frombuffer(raw, np.int8)
        outside = levels == -128
    else:
        raw, rest = unpack(section, -(-total // 2))
        pairs = np.frombuffer(raw, np.uint8)
        nibbles = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()
        if nibbles[total:].any():
            raise PeerError("E631", "the last pair of levels has one too many")
        levels = nibbles[:total].astype(np.int8) - np.int8(8)
        outside = levels == -8
    _nothing_after(rest)
    if outside.any():
        raise PeerError("E631", f"a level outside -{_LEVELS[codec]} to {_LEVELS[codec]}")
    return levels


# --- bf16 ------------------------------------------------------------------------------------------------------------


def _to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Finite float32 to the nearest bf16, ties to even; what would become infinite, to the largest finite one."""
    bits = x.view(np.uint32)
    words = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(words & 0x7FFF == 0x7F80, words - 1, words).astype(np.uint16)


def _to_bf16_up(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    """The smallest bf16 that is not below x as float32, for x >= 0 well inside its range."""
    return ((x.astype(np.float32).view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def _from_bf16(words: NDArray[np.uint16]) -> Floats:
    return (words.astype(np.uint32) << 16).view(np.float32)


def _pack_bf16(words: NDArray[np.uint16]) -> bytes:
    """Two sections: exponents, which deflate to about three bits, and mantissas with signs, which do not."""
    turned = words << 1 | words >> 15
    return pack((turned >> 8).astype(np.uint8).tobytes()) + pack(turned.astype(np.uint8).tobytes())


def _unpack_bf16(payload: memoryview, total: int) -> tuple[NDArray[np.uint16], memoryview]:
    exponents, rest = unpack(payload, total)
    mantissas, rest = unpack(rest, total)
    high, low = np.frombuffer(exponents, np.uint8), np.frombuffer(mantissas, np.uint8)
    if (high == 255).any():
        raise PeerError("E631", "a value or scale is not finite")
    turned = high.astype(np.uint16) << 8 | low
    return (turned >> 1 | turned << 15).astype(np.uint16), rest


# --- sections --------------------------------------------------------------------------------------------------------


def pack(stream: bytes) -> bytes:
    """One section: method (1 byte), length of what follows (4, little-endian), the stream as it is or deflated.

    Without matches: quantised values have no repeats worth finding, and false ones cost up to 16 %. Runs are tried too,
    for slices that have hardly been trained.
    """
    bodies = [_deflate(stream, strategy) for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)]
    method, body = min([(_STORED, stream), *((_DEFLATED, body) for body in bodies)], key=lambda one: len(one[1]))
    return bytes([method]) + len(body).to_bytes(4, "little") + body


def unpack(payload: memoryview, size: int, *, at_most: bool = False) -> tuple[bytes, memoryview]:
    """One section's stream of `size` bytes, or of any length up to it, and what follows the section.

    Inflates at most one byte more than `size`, so a section that would grow to gigabytes costs nothing.

    Raises:
        PeerError: E631, a section that is cut off, damaged or of another size.
    """
    length = int.from_bytes(payload[1:5], "little")
    if len(payload) < 5 or len(payload) - 5 < length or payload[0] not in (_STORED, _DEFLATED):
        raise PeerError("E631", "a section that is cut off or of an unknown method")
    body, rest = payload[5 : 5 + length], payload[5 + length :]
    stream = bytes(body[: size + 1]) if payload[0] == _STORED else _inflate(body, size)
    if len(stream) > size or (len(stream) < size and not at_most):
        more = "more" if len(stream) > size else "fewer"
        raise PeerError("E631", f"a section of {more} than the {size} bytes that belong here")
    return stream, rest


def _deflate(stream: bytes, strategy: int) -> bytes:
    deflater = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return deflater.compress(stream) + deflater.flush()


def _inflate(body: memoryview, size: int) -> bytes:
    inflater = zlib.decompressobj(-15)
    try:
        stream = inflater.decompress(body, size + 1)
    except zlib.error:
        raise PeerError("E631", "a damaged section") from None
    if len(stream) <= size and (not inflater.eof or inflater.unused_data):
        raise PeerError("E631", "a damaged section")
    return stream


def _nothing_after(rest: memoryview) -> None:
    if len(rest):
        raise PeerError("E631", f"{len(rest)} bytes after the last section")
