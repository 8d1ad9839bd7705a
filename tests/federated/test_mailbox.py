"""From an outbox to an inbox: what arrives is what was sent, differences keep track, all else is refused, counted."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.codec import BLOCK, Codec, decode, encode, error_bound
from contextlora.federated.mailbox import Inbox, Outbox, send_row
from contextlora.federated.wire import OVERHEAD, Header, Kind, Limits, public_key, read_header, run_hash, seal

SIZES = (300, 0, 500, 1200)
KEY, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)) for i in (1, 2))


def inbox(**changes):
    given_ = {"run": "r1", "peers": {public_key(KEY): "north"}, "sizes": {"math": SIZES, "code": SIZES}}
    return Inbox(**(given_ | changes))


def mask(seed=0):
    return np.random.default_rng(seed).random(sum(SIZES)) < 0.1


def values(seed=0, at=None):
    n = np.count_nonzero(mask() if at is None else at)
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def refused(box, data, code):
    before = box.refused[code], box.accepted, dict(box.seen)
    with pytest.raises(PeerError) as e:
        box.open(data)
    assert e.value.code == code
    assert (box.refused[code] - 1, box.accepted, dict(box.seen)) == before


def opened():
    """An outbox and an inbox between which the mask has travelled."""
    out, box = Outbox(KEY, "r1", "math"), inbox()
    box.open(out.announce(mask(), SIZES, version=1, round=0))
    return out, box


def test_a_mask_arrives_once_then_values():
    out, box = Outbox(KEY, "r1", "math", full=Codec.BF16), inbox()
    got = box.open(out.announce(mask(), SIZES, version=1, round=0))
    assert (got.name, got.header.kind, got.header.task, got.header.round) == ("north", Kind.MASK, "math", 0)
    np.testing.assert_array_equal(got.content, mask())
    v = decode(encode(values(), [values().size], Codec.BF16), [values().size], Codec.BF16)
    got = box.open(out.send(v, version=3, round=1))
    assert (got.header.kind, got.header.version) == (Kind.VALUES, 3)
    np.testing.assert_array_equal(got.content, v)
    assert (box.accepted, dict(box.refused)) == (2, {})


def test_without_differences_neither_end_holds_values():
    out, box = Outbox(KEY, "r1", "math", full=Codec.BF16, delta=None), inbox(differences=False)
    box.open(out.announce(mask(), SIZES, version=1, round=0))
    for round_ in range(3):
        message = out.send(values(round_), version=round_ + 2, round=round_)
        out.acknowledged(round_ + 2)
        got = box.open(message)
        assert (got.header.kind, got.header.base) == (Kind.VALUES, 0)
        np.testing.assert_allclose(got.content, values(round_), rtol=2**-8)
    assert (out.base, out.sent, box.slices["north", "math"].versions) == (None, None, {})
    refused(box, message, "E628")
    other = Outbox(KEY, "r1", "math", full=Codec.BF16)
    other.announce(mask(), SIZES, version=9, round=9)
    other.send(values(), version=10, round=9)
    other.acknowledged(10)
    refused(box, other.send(values(1), version=11, round=9), "E630")


@pytest.mark.parametrize("full", Codec)
@pytest.mark.parametrize("delta", Codec)
def test_every_pair_of_codecs_stays_within_its_bound(full, delta):
    out, box = Outbox(KEY, "r1", "math", full=full, delta=delta), inbox()
    box.open(out.announce(mask(), SIZES, version=1, round=0))
    counts = [int(m.sum()) for m in np.split(mask(), np.cumsum(SIZES)[:-1])]
    truth, held = values(), None
    for version in range(1, 6):
        got = box.open(out.send(truth, version=version, round=version))
        assert got.header.kind == (Kind.VALUES if held is None else Kind.DELTA)
        sent = truth if held is None else truth - held
        bound = error_bound(sent, counts, full if held is None else delta) + np.spacing(np.abs(truth))
        assert (np.abs(got.content - truth.astype(np.float64)) <= bound).all()
        out.acknowledged(version)
        held, truth = got.content, (truth + 0.01 * values(version)).astype(np.float32)


def drift(feedback, rounds, n=BLOCK):
    """Largest |truth - held| after each round, when one entry shakes and the others creep by less than half a step."""
    out, box = Outbox(KEY, "r1", "t"), inbox(sizes={"t": (n,)})
    box.open(out.announce(np.ones(n, bool), (n,), version=1, round=0))
    truth = np.zeros(n, np.float32)
    held = box.open(out.send(truth, version=1, round=1)).content
    errors = []
    for k in range(2, rounds + 2):
        step = np.full(n, 0.05, np.float32)
        step[0] = (-1) ** k
        before, truth = truth, truth + step
        if feedback:
            out.acknowledged(k - 1)
            held = box.open(out.send(truth, version=k, round=k)).content
        else:
            held = held + decode(encode(truth - before, [n], Codec.INT4), [n], Codec.INT4)
        errors.append(float(np.abs(truth - held).max()))
    return errors


def test_with_feedback_the_sum_of_decoded_deltas_tracks_the_truth():
    c = (1 + 2.0**-7) / 14  # half a step over the peak: error_bound
    bounded, lost = drift(True, 200), drift(False, 200)
    assert max(bounded) <= c / (1 - c) + 1e-5  # |e'| <= c (1 + |e|), the largest step being 1
    assert lost[-1] == pytest.approx(200 * 0.05, rel=1e-3)  # without, the creeping entries never arrive
    assert lost[99] == pytest.approx(100 * 0.05, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["arrives", "lost", "answer lost", "answer late"]), min_size=1), st.integers(0, 99))
def test_lost_messages_and_answers_never_lead_astray(fates, seed):
    """Whatever is lost, the receiver can follow and is as near as the last message that came; it never has to ask."""
    out, box = opened()
    rng, truth, late = np.random.default_rng(seed), values(seed), None
    for version, fate in enumerate(fates, 1):
        truth = (truth + 0.01 * rng.standard_normal(truth.size)).astype(np.float32)
        message = out.send(truth, version=version, round=version)
        if late:
            out.acknowledged(late)
            late = None
        if fate == "lost":
            continue
        got = box.open(message)
        assert np.abs(got.content - truth).max() < 0.05
        if fate == "arrives":
            out.acknowledged(version)
        late = version if fate == "answer late" else None
    assert not box.refused


def test_a_restarted_receiver_asks_and_a_restarted_sender_sends_all():
    out, box = opened()
    box.open(out.send(values(), version=1, round=1))
    out.acknowledged(1)
    delta = out.send(values(1), version=2, round=2)
    again = inbox(seen=box.seen)
    refused(again, delta, "E629")
    again.open(out.announce(mask(), SIZES, version=2, round=2))
    refused(again, delta, "E630")
    whole = out.send(values(1), version=3, round=2)
    assert read_header(whole, Limits()).kind == Kind.VALUES
    np.testing.assert_array_equal(again.open(whole).content, box.open(whole).content)
    after = Outbox(KEY, "r1", "math")
    after.announce(mask(), SIZES, version=3, round=3)
    assert again.open(after.send(values(2), version=4, round=3)).header.kind == Kind.VALUES


def test_the_same_mask_again_keeps_the_values_another_one_drops_them():
    out, box = opened()
    box.open(out.send(values(), version=1, round=1))
    out.acknowledged(1)
    delta = out.send(values(1), version=2, round=2)
    box.open(out.announce(mask(), SIZES, version=2, round=2))
    box.open(delta)
    box.open(out.announce(mask(5), SIZES, version=3, round=3))
    old = Outbox(KEY, "r1", "math")
    old.announce(mask(), SIZES, version=1, round=0)
    refused(box, old.send(values(3), version=3, round=3), "E629")
    box.open(out.send(values(3, mask(5)), version=4, round=3))


def test_replays_and_late_ones_are_refused_also_after_a_restart():
    out, box = opened()
    first = out.send(values(), version=1, round=1)
    second = out.send(values(1), version=2, round=2)
    box.open(second)
    refused(box, second, "E628")
    refused(box, first, "E628")
    refused(inbox(seen=box.seen), second, "E628")
    refused(box, out.send(values(1), version=3, round=1), "E628")  # a new version of an old round
    other = Outbox(KEY, "r1", "code")
    box.open(other.announce(mask(), SIZES, version=1, round=0))  # tasks and kinds count for themselves
    box.open(other.send(values(), version=1, round=1))
    box.open(send_row(KEY, "r1", "math", {}, version=1, round=0))


def test_strangers_other_runs_and_other_tasks_are_refused():
    _, box = opened()
    for key, run, task, code in [
        (STRANGER, "r1", "math", "E625"),
        (KEY, "r2", "math", "E624"),
        (KEY, "r1", "law", "E625"),
    ]:
        refused(box, Outbox(key, run, task).announce(mask(), SIZES, version=9, round=9), code)


def test_a_forged_sender_is_refused():
    _, box = opened()
    message = bytearray(send_row(STRANGER, "r1", "math", {"power": 1.0}, version=5, round=1))
    at = message.index(public_key(STRANGER))
    message[at : at + 32] = public_key(KEY)
    refused(box, bytes(message), "E626")
    two, head = (send_row(KEY, "r1", "math", {"power": p}, version=5, round=1) for p in (1.0, 2.0))
    refused(box, two[:OVERHEAD] + head[OVERHEAD:], "E627")  # another payload that was signed too
    refused(box, two[: OVERHEAD - 64] + head[OVERHEAD - 64 : OVERHEAD] + two[OVERHEAD:], "E626")
    box.open(two)


def resealed(message, payload=None, **changes):
    """A message of the true sender that says something else: what a peer that went bad can do."""
    header = read_header(message, Limits())
    return seal(replace(header, **changes), message[OVERHEAD:] if payload is None else payload, KEY)


def test_a_known_sender_cannot_say_just_anything():
    out, box = opened()
    message = out.send(values(), version=4, round=1)
    refused(box, resealed(message, count=values().size + 1), "E629")
    refused(box, resealed(message, count=1 << 31), "E623")
    refused(box, resealed(message, mask=bytes(31) + b"\1"), "E629")
    refused(box, resealed(message, state=bytes(32)), "E632")
    refused(box, resealed(message, codec=Codec.INT4), "E631")
    refused(box, resealed(message, codec=9), "E620")
    refused(box, resealed(message, base=3), "E620")
    refused(box, resealed(message, kind=Kind.DELTA, base=3), "E630")
    refused(box, resealed(message, kind=Kind.MASK), "E620")
    refused(box, resealed(message, version=0), "E620")
    refused(box, resealed(message, payload=b""), "E631")
    announced = Outbox(KEY, "r1", "math").announce(mask(1), SIZES, version=2, round=1)
    refused(box, resealed(announced, count=3), "E632")
    refused(box, resealed(announced, mask=b"\1" * 32), "E632")
    box.open(message)


def test_a_refused_difference_leaves_its_base_where_it_was():
    out, box = opened()
    box.open(out.send(values(), version=1, round=1))
    out.acknowledged(1)
    delta = out.send(values(1), version=2, round=2)
    refused(box, resealed(delta, state=bytes(32)), "E632")
    refused(box, resealed(delta, payload=delta[OVERHEAD:-1]), "E631")
    box.open(delta)


def test_a_sum_that_overflows_is_refused():
    out, box = opened()
    big = np.full(values().size, 3e38, np.float32)
    box.open(out.send(big, version=1, round=1))
    out.acknowledged(1)
    with pytest.raises(PeerError, match="E633"):
        out.send(-big, version=2, round=2)
    up = encode(big, [values().size], Codec.BF16)
    with np.errstate(over="ignore"):
        state = hashlib.sha256((big + big).tobytes()).digest()
    head = Header(Kind.DELTA, run_hash("r1"), "math", 2, 2, 1, Codec.BF16, big.size, out.mask, state)
    refused(box, seal(head, up, KEY), "E632")


def test_lengths_are_checked_before_anything_else():
    out, box = opened()
    message = out.send(values(), version=4, round=1)
    refused(box, b"", "E622")
    refused(box, message[: OVERHEAD - 1], "E622")
    refused(box, message[:-1], "E622")
    refused(box, message + b"\0", "E622")
    refused(box, b"PICK" + message[4:], "E620")
    refused(box, message[:4] + struct.pack("<H", 2) + message[6:], "E621")
    refused(inbox(limits=Limits(payload=10)), message, "E623")
    refused(inbox(limits=Limits(positions=10)), message, "E623")
    huge = bytearray(message[:OVERHEAD]) + bytes(100)
    at = message.index(struct.pack("<I", len(message) - OVERHEAD))
    huge[at : at + 4] = b"\xff" * 4
    refused(box, bytes(huge), "E623")
    box.open(memoryview(message))


def test_rows_are_flat_json_with_one_form():
    box = inbox()
    row = {"power": 0.1, "task": "mäths", "bits": 2**60, "here": True, "gone": None}
    message = send_row(KEY, "r1", "math", row, version=1, round=0)
    assert message == send_row(KEY, "r1", "math", dict(reversed(row.items())), version=1, round=0)
    assert box.open(message).content == row
    bad = [b"", b"[]", b'{"a":{}}', b'{"a":NaN}', b'{"a":1e999}', b'{"a":1,"a":1}', b'{"a": 1}', b'{"a":"\\ud800"}']
    bad += [b"[" * 4000, b"\xff", b'{"a":' + b"9" * 4000 + b".0}", b"\x80\x04N.", b"null"]
    bad += [b"{" + b",".join(b'"%02d":0' % i for i in range(65)) + b"}"]
    for payload in bad:
        refused(box, resealed(message, payload=payload, version=2), "E631")
    refused(box, resealed(message, payload=b'{"a":"' + b"x" * 20000 + b'"}', version=2), "E623")
    for row in ({"a": float("nan")}, {"a": "\ud800"}, {"a": [1]}, {"a": b"x"}, {"a": "x" * 20000}):
        with pytest.raises(PeerError, match="E634"):
            send_row(KEY, "r1", "math", row, version=1, round=0)


@pytest.mark.parametrize("changes", [{"task": "../x"}, {"task": ""}, {"version": -1}, {"version": 1 << 32}])
def test_what_a_header_cannot_hold_is_refused_when_sent(changes):
    what = {"task": "math", "version": 1} | changes
    with pytest.raises(PeerError, match="E634"):
        send_row(KEY, "r1", what["task"], {}, version=what["version"], round=0)


def test_same_bytes_on_every_run():
    def all_messages():
        out, _ = opened()
        yield out.announce(mask(), SIZES, version=1, round=0)
        yield out.send(values(), version=1, round=1)
        out.acknowledged(1)
        yield out.send(values(1), version=2, round=2)

    assert list(all_messages()) == list(all_messages())
