"""Transfers that resume: any order, twice, damaged, cut off; memory stays bounded."""

import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.chunks import Assembler, place, split, transfer_id


def message(n, seed=0):
    return random.Random(seed).randbytes(n)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 700), st.randoms(use_true_random=False))
def test_any_order_and_repeats_give_the_message_once(n, size, rng):
    data, box = message(n), Assembler(smallest=1)
    chunks = split(data, size)
    order = chunks + rng.choices(chunks, k=5)
    rng.shuffle(order)
    got = [out for chunk in order if (out := box.add(chunk)) is not None]
    assert got == [data]
    assert (box.unfinished(), box.holes(transfer_id(data)), dict(box.refused)) == ([], [], {})


def test_holes_are_what_is_missing_and_sending_them_finishes():
    data, box = message(10_000), Assembler(smallest=1)
    chunks, name = split(data, 1000), transfer_id(data)
    assert box.holes(name) == []
    for i in (1, 2, 5, 8):
        box.add(chunks[i])
    assert box.holes(name) == [(0, 1), (3, 5), (6, 8), (9, 10)]
    missing = [i for first, last in box.holes(name) for i in range(first, last)]
    assert [box.add(chunks[i]) for i in missing] == [None] * 5 + [data]


def test_an_expected_transfer_has_holes_before_its_first_chunk():
    data, box = message(10_000), Assembler()
    name, chunks = transfer_id(data), split(data, 1024)
    assert box.expect(name, 10_000, 1024)
    assert (box.holes(name), box.unfinished()) == ([(0, 10)], [name])
    assert place(chunks[7]) == (name, 7)
    box.add(chunks[7])
    assert box.expect(name, 10_000, 1024)  # announced again: nothing is lost
    assert box.holes(name) == [(0, 7), (8, 10)]
    for size, total, code in (
        (2048, 10_000, "E636"),
        (1024, 9999, "E636"),
        (0, 10_000, "E623"),
        (1024, 1 << 40, "E623"),
    ):
        with pytest.raises(PeerError, match=code):
            box.expect(name, total, size)
    assert box.refused == {"E636": 2, "E623": 2}
    assert [box.add(c) for c in chunks][-1] == data
    assert not box.expect(name, 10_000, 1024)


def test_two_transfers_side_by_side():
    a, b, box = message(3000, 1), message(5000, 2), Assembler()
    pairs = [c for pair in zip(split(a, 1024), split(b, 1024), strict=False) for c in pair] + split(b, 1024)[3:]
    assert [out for c in pairs if (out := box.add(c))] == [a, b]


def refused(box, chunk, code):
    before = box.refused[code]
    with pytest.raises(PeerError, match=code):
        box.add(chunk)
    assert box.refused[code] == before + 1


def test_every_flipped_bit_and_every_cut_leaves_a_hole():
    data, box = message(300), Assembler(smallest=1)
    first, second = split(data, 200)
    for bit in range(8 * len(first)):
        bad = bytearray(first)
        bad[bit // 8] ^= 1 << bit % 8
        refused(box, bytes(bad), "E636")
    for n in range(len(first)):
        refused(box, first[:n], "E636")
    assert box.unfinished() == []
    box.add(second)
    assert box.add(first) == data


def forged(name, total, size, index, piece):
    crc = zlib.crc32(piece, zlib.crc32(struct.pack("<32sIII", name, total, size, index)))
    return struct.pack("<4s32sIIII", b"SOCH", name, total, size, index, crc) + piece


def test_chunks_that_contradict_each_other():
    data, box = message(3000), Assembler()
    name, chunks = transfer_id(data), split(data, 1024)
    box.add(chunks[0])
    refused(box, forged(name, 3000, 1024, 0, bytes(1024)), "E636")
    refused(box, forged(name, 3000, 2048, 1, bytes(952)), "E636")
    refused(box, forged(name, 3000, 1024, 3, bytes(1)), "E636")
    refused(box, forged(name, 3000, 1024, 2, bytes(951)), "E636")
    refused(box, forged(name, 3000, 1024, 2**32 - 1, b""), "E636")
    refused(box, forged(name, 3000, 0, 0, b""), "E623")
    refused(box, forged(name, 0, 0, 0, b""), "E623")
    assert [box.add(c) for c in chunks[1:]] == [None, data]


def test_chunks_that_are_not_the_message_start_over():
    data, box = message(3000), Assembler()
    chunks = split(data, 1024)
    box.add(forged(transfer_id(data), 3000, 1024, 1, bytes(1024)))
    box.add(chunks[0])
    refused(box, chunks[2], "E627")
    assert [box.add(c) for c in chunks][-1] == data


def test_memory_is_bounded():
    box = Assembler(limit=100_000, transfers=4)
    refused(box, split(message(100_001), 1024)[0], "E623")
    refused(box, split(message(5000), 512)[0], "E623")  # as many objects as bytes
    for seed in range(50):
        box.add(split(message(3000, seed), 1024)[0])
    assert box.unfinished() == [transfer_id(message(3000, seed)) for seed in range(46, 50)]
    for seed in range(3):
        box.add(split(message(60_000, seed), 1024)[0])
    assert box.unfinished() == [transfer_id(message(60_000, 2))]


def test_a_late_repeat_of_a_finished_transfer_does_not_begin_one():
    data, box = message(3000), Assembler()
    for c in split(data, 1024):
        box.add(c)
    assert box.add(split(data, 1024)[0]) is None
    assert box.unfinished() == []


def test_nothing_to_split():
    for data, size in ((b"", 10), (b"x", 0)):
        with pytest.raises(PeerError, match="E634"):
            split(data, size)
