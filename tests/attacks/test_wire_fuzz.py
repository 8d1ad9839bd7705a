"""10,000 hostile messages, 2,000 chunks: each refused with one PeerError and counted; nothing held is lost."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contextlora.errors import PeerError
from contextlora.federated.chunks import Assembler, split
from contextlora.federated.codec import Codec
from contextlora.federated.mailbox import Inbox, Outbox, send_row
from contextlora.federated.wire import OVERHEAD, Header, Kind, Limits, public_key, read_header, run_hash, seal

SIZES = (200, 0, 300)
KEY, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i in (1, 2))


def conversation():
    """An inbox in the middle of a run, and the messages that it would take next, one of each kind."""
    rng = np.random.default_rng(0)
    mask = rng.random(sum(SIZES)) < 0.2
    held, new = rng.standard_normal((2, np.count_nonzero(mask))).astype(np.float32)
    box = Inbox("r1", {public_key(KEY): "north"}, {"math": SIZES})
    deltas, whole = Outbox(KEY, "r1", "math"), Outbox(KEY, "r1", "math", full=Codec.BF16, delta=None)
    box.open(deltas.announce(mask, SIZES, version=1, round=0))
    whole.announce(mask, SIZES, version=1, round=0)
    old = deltas.send(held, version=1, round=1)
    box.open(old)
    deltas.acknowledged(1)
    again = Outbox(KEY, "r1", "math").announce(mask, SIZES, version=4, round=2)
    row = send_row(KEY, "r1", "math", {"power": 0.5, "x": 1.0}, version=4, round=2)
    ahead = [again, whole.send(new, version=4, round=2), deltas.send(new, version=4, round=2), row]
    return box, ahead, old


def held(box):
    """All that an inbox knows, as bytes."""
    return pickle.dumps((box.seen, box.slices, box.accepted))


def outsider(rng, messages):
    """What someone without a key can do to messages that he saw. Never the message itself."""
    data = bytearray(rng.choice(messages))
    original = bytes(data)
    at = rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data += rng.randbytes(rng.randrange(1, 300))
        case 3:
            data[at : at + 4] = rng.choice([b"\0" * 4, b"\xff" * 4, rng.randbytes(4)])
        case 4:
            data = data[:at] + rng.choice(messages)[at:]
        case 5:
            data = bytearray(rng.randbytes(rng.randrange(2 * OVERHEAD)))
        case 6:
            head = replace(read_header(original, Limits()), version=rng.randrange(1 << 32))
            data = bytearray(seal(head, original[OVERHEAD:], STRANGER))
        case 7:
            del data[at : at + rng.randrange(1, 50)]
    return bytes(data) if bytes(data) not in messages else outsider(rng, messages)


def insider(rng, messages):
    """What the owner of a known key can do: sign headers and payloads that no peer writes."""
    data = rng.choice(messages)
    head, payload = read_header(data, Limits()), bytearray(data[OVERHEAD:])
    number = rng.choice([0, 1, 2, 3, 99, 500, 501, 1 << 28, (1 << 32) - 1, rng.randrange(1 << 32)])
    at = rng.randrange(len(payload))
    match rng.randrange(7):
        case 0:
            payload[at] ^= 1 << rng.randrange(8)
        case 1:
            payload = payload[:at]
        case 2:
            payload[at : at + 4] = number.to_bytes(4, "little")
        case 3:
            payload = bytearray(rng.randbytes(rng.randrange(300)))
        case 4:
            head = replace(head, **{rng.choice(["base", "count", "round"]): number})
        case 5:
            head = replace(head, codec=rng.randrange(4))
        case 6:
            head = replace(head, kind=rng.choice(list(Kind)))
    return seal(head, bytes(payload), KEY)


def test_nothing_that_an_outsider_makes_gets_in():
    box, messages, old = conversation()
    rng, before = random.Random(0), held(box)
    for n in range(1, 8001):
        with pytest.raises(PeerError):
            box.open(old if n % 100 == 0 else outsider(rng, messages))
        assert box.refused.total() == n
    assert held(box) == before
    assert box.refused["E628"] == 80
    assert {"E620", "E621", "E622", "E623", "E624", "E625", "E626", "E627"} <= set(box.refused)
    for message in messages[:2] + messages[3:]:  # whole values and a difference have the same version
        box.open(message)


def test_an_insider_harms_at_most_his_own_slice():
    box, messages, _ = conversation()
    rng, codes, taken = random.Random(1), Counter(), 0
    for _ in range(2000):
        before, refused = held(box), box.refused.total()
        message = insider(rng, messages)
        try:
            got = box.open(message)
        except PeerError as e:
            codes[e.code] += 1
            assert box.refused.total() == refused + 1
            assert held(box) == before
        else:
            taken += 1
            if got.header.kind in (Kind.VALUES, Kind.DELTA):
                assert np.isfinite(got.content).all()
            box, _, _ = conversation()
    assert {"E620", "E623", "E628", "E629", "E630", "E631", "E632"} == set(codes)
    assert taken  # a row with another number in it, a later round: his to say


def test_hostile_chunks():
    _, messages, _ = conversation()
    assembler, rng = Assembler(smallest=1), random.Random(2)
    chunks = [c for m in messages for c in split(m, 100)]
    for _ in range(2000):
        bad = bytearray(rng.choice(chunks))
        bad[rng.randrange(len(bad))] ^= rng.randrange(1, 256)
        with pytest.raises(PeerError):
            assembler.add(bytes(bad))
    rng.shuffle(chunks)
    assert sorted(filter(None, map(assembler.add, chunks))) == sorted(messages)
    assert assembler.refused.total() == 2000


def test_a_pickle_is_not_a_message():
    box, *_ = conversation()
    frozen = b"cbuiltins\nexec\n(S'raise SystemExit'\ntR."
    for data in (frozen, frozen + bytes(OVERHEAD)):
        with pytest.raises(PeerError):
            box.open(data)
    head = Header(Kind.ROW, run_hash("r1"), "math", 9, 9)
    with pytest.raises(PeerError, match="E631"):
        box.open(seal(head, frozen, KEY))
