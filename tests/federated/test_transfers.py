"""Transfers between two ends without sockets: any loss, order and repetition; links that break; ends that lie."""

import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated.chunks import _head, split, transfer_id
from contextlora.federated.fabric.transfers import CHUNK, WINDOW, Kind, Link, Parcel, SharedAir

NEVER = 1e9


def data(size, seed=0):
    return random.Random(seed).randbytes(size)


def ask(name, *ranges):
    return struct.pack("<32sH", name, len(ranges)) + b"".join(struct.pack("<II", *r) for r in ranges)


class Pair:
    """Two ends and the way between them, at 20 steps a second of virtual time.

    Args:
        rate: chunks a step that each direction carries; control frames are free.
        lose: tells whether a frame gets lost.
        delay: steps on the way.
    """

    def __init__(self, *, rate=4.0, lose=lambda kind: False, delay=1, limit=64 << 20, rng=None):
        self.links = [Link(SharedAir(), limit), Link(SharedAir(), limit)]
        self.rate, self.lose, self.delay, self.rng = rate, lose, delay, rng
        self.step, self.way, self.credit, self.connected = 0, [], [0.0, 0.0], False
        self.got, self.chunks = [[], []], [0, 0]

    @property
    def now(self):
        return self.step / 20

    def connect(self, up=True):
        self.connected = up
        for end, link in enumerate(self.links):
            if up:
                self.post(end, link.up(self.now))
            else:
                link.down(self.now)
                self.way.clear()

    def send(self, end, message, deadline=NEVER):
        self.post(end, self.links[end].send(Parcel.of(message, deadline), self.now))

    def post(self, end, frames):
        for kind, body in frames:
            if self.connected and not self.lose(kind):
                self.way.append((self.step + self.delay, 1 - end, kind, body))

    def run(self, steps):
        for _ in range(steps):
            self.step += 1
            for end, link in enumerate(self.links):
                self.post(end, link.tick(self.now))
                self.credit[end] = min(self.credit[end] + self.rate, max(1, self.rate))
                while self.connected and self.credit[end] >= 1 and (chunk := link.next_chunk(self.now)):
                    self.credit[end] -= 1
                    self.chunks[end] += 1
                    self.post(end, [(Kind.CHUNK, chunk)])
            due = [w for w in self.way if w[0] <= self.step]
            self.way = [w for w in self.way if w[0] > self.step]
            if self.rng:
                due += self.rng.choices(due, k=len(due) // 3)
                self.rng.shuffle(due)
            for _, end, kind, body in due:
                self.deliver(end, kind, body)

    def deliver(self, end, kind, body):
        link, now = self.links[end], self.now
        if kind is Kind.ASK:
            link.on_ask(body, now)
        elif kind is Kind.DONE:
            link.on_done(body, now)
        elif kind is Kind.OFFER:
            self.post(end, link.on_offer(body, now))
        else:
            message, frames = link.on_chunk(body, now)
            self.post(end, frames)
            if message is not None:
                self.got[end].append(message)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 6 * CHUNK), min_size=1, max_size=3))
def test_any_loss_order_and_repetition_gives_each_message_once(seed, sizes):
    rng = random.Random(seed)
    loss = rng.random() * 0.6
    pair = Pair(lose=lambda kind: rng.random() < loss, rng=rng)
    sent = [[data(n, f"{i} {end}") for i, n in enumerate(sizes)] for end in (0, 1)]
    pair.connect()
    for end in (0, 1):
        for message in sent[end]:
            pair.send(end, message)
    for _ in range(2):
        pair.run(30)
        pair.connect(False)
        pair.run(5)
        pair.connect()
    loss = 0.3
    while pair.step < 4000 and min(len(got) for got in pair.got) < len(sizes):
        pair.run(40)
    pair.run(40)  # nothing comes twice
    assert sorted(pair.got[1]) == sorted(sent[0])
    assert sorted(pair.got[0]) == sorted(sent[1])


def test_an_undisturbed_transfer_sends_each_chunk_once():
    pair = Pair()
    pair.connect()
    message = data(100 * CHUNK + 1)
    pair.send(0, message)
    pair.run(60)
    assert (pair.got[1], pair.chunks) == ([message], [101, 0])
    assert pair.links[0].tick(pair.now + 100) == []  # done: nothing is offered any more


def test_a_cut_transfer_goes_on_where_it_was():
    pair = Pair()
    pair.connect()
    message = data(100 * CHUNK)
    pair.send(0, message)
    pair.run(12)
    before = pair.chunks[0]
    assert 20 < before < 80
    pair.connect(False)
    pair.run(200)
    assert pair.chunks[0] == before
    pair.connect()
    pair.run(60)
    assert pair.got[1] == [message]
    assert pair.chunks[0] <= 100 + WINDOW  # at most what was on the way when it broke went twice
    assert pair.links[0].rate is None  # and it is no measurement


@pytest.mark.parametrize("seconds", [0.3, 2.5])
def test_a_slow_link_is_not_taken_for_a_dead_one(seconds):
    pair = Pair(rate=0.05 / seconds, delay=int(20 * seconds))  # each chunk is as long on the way as the next one waits
    pair.connect()
    message = data(40 * CHUNK)
    pair.send(0, message)
    pair.run(int(80 * seconds * 20))
    assert pair.got[1] == [message]
    assert pair.chunks[0] <= 40 + 6  # but for the first ones, before it is known to be slow


def test_a_frozen_receiver_costs_the_sender_no_memory_and_comes_back():
    pair = Pair()
    pair.connect()
    message = data(60 * CHUNK)
    pair.send(0, message)
    pair.lose = lambda kind: True  # it takes nothing and says nothing, but its link stands
    pair.run(1000)
    assert len(pair.links[0]._asked) == 0
    pair.lose = lambda kind: False
    pair.run(100)
    assert pair.got[1] == [message]


def test_what_was_asked_for_over_a_lost_link_is_void():
    link, message = Link(SharedAir(), 1 << 24), data(10 * CHUNK)
    link.up(0.0)
    link.send(Parcel.of(message, NEVER), 0.0)
    link.on_ask(ask(transfer_id(message), (0, 10)), 0.0)
    assert link.next_chunk(0.0)
    link.down(0.0)
    assert link.next_chunk(0.0) is None
    assert link.up(1.0) == [Parcel.of(message, NEVER).offer()]


def test_nothing_is_sent_after_the_deadline():
    pair = Pair()
    pair.connect()
    pair.send(0, data(100 * CHUNK), deadline=0.5)
    pair.run(11)
    sent = pair.chunks[0]
    assert 0 < sent < 100
    pair.run(400)
    assert pair.chunks[0] == sent
    message = data(100 * CHUNK)
    pair.send(0, message)  # the same again: what is there is not sent again
    pair.run(100)
    assert pair.got[1] == [message]
    assert pair.chunks[0] <= 100 + WINDOW


def test_goodput_is_what_one_transfer_would_have_had_alone():
    """Processor sharing in closed form: b and c run side by side, then c alone; alone each would have had the rate."""
    air = SharedAir()
    b = air.start(10.0)
    c = air.start(10.0)
    bits, rate = 6e6, 2e6
    end_b = 10 + 2 * bits / rate
    assert bits / air.stop(end_b, b) == pytest.approx(rate)
    end_c = end_b + (2 * bits - bits) / rate  # c has twice as much, half of it still to go
    assert 2 * bits / air.stop(end_c, c) == pytest.approx(rate)
    later = air.start(end_c + 5)
    assert air.stop(end_c + 6, later) == pytest.approx(1.0)


def test_goodput_of_a_link_is_its_rate():
    pair = Pair(rate=1.0, delay=0)
    pair.connect()
    pair.send(0, data(200 * CHUNK))
    pair.run(230)
    assert pair.links[0].rate == pytest.approx(20 * CHUNK * 8, rel=0.05)


# --- ends that lie ---------------------------------------------------------------------------------------------------


def held_by(link, act):
    """Bytes that `link` holds, more than before, after `act`."""
    tracemalloc.start()
    act()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held


def offer(name, total, size=CHUNK):
    return struct.pack("<32sII", name, total, size)


def test_huge_announcements_are_refused_and_cost_nothing():
    link, now = Link(SharedAir(), limit=8 << 20), 0.0
    link.up(now)

    def announce():
        for seed in range(300):
            name = transfer_id(seed.to_bytes(4, "big"))
            for total in (1 << 32) - 1, (8 << 20) + 1:
                with pytest.raises(PeerError, match="E623"):
                    link.on_offer(offer(name, total), now)
            link.on_offer(offer(name, 8 << 20), now)  # allowed, and never sent

    assert held_by(link, announce) < 50_000


def test_a_flood_of_half_sent_messages_holds_no_more_than_the_limit():
    link, now, refused = Link(SharedAir(), limit=4 << 20), 0.0, 0
    link.up(now)

    def flood():
        nonlocal now, refused
        for seed in range(8):
            message = data(1 << 20, seed)
            link.on_offer(offer(transfer_id(message), len(message)), now)
            for chunk in split(message, CHUNK)[:-1]:
                try:
                    link.on_chunk(chunk, now)
                except PeerError:
                    refused += 1
            now += 40.0
            link.tick(now)

    held = held_by(link, flood)
    assert 3 << 20 < held < (4 << 20) + 200_000


def test_a_message_takes_the_place_of_one_that_nobody_goes_on_with():
    pair = Pair(limit=1 << 20, rate=1.0)
    pair.connect()
    pair.send(0, data(1 << 20), deadline=0.5)
    pair.run(11)
    assert pair.got[1] == []
    message = data(1 << 20, 1)
    pair.send(0, message)
    pair.run(100)
    assert pair.got[1] == [message]


def test_unread_messages_stop_the_flow_until_they_are_read():
    pair = Pair(limit=1 << 20)
    pair.connect()
    messages = [data(1 << 19, seed) for seed in range(4)]
    for message in messages:
        pair.send(0, message)
    pair.run(400)
    assert len(pair.got[1]) == 2
    pair.links[1].backlog -= 2 << 19
    pair.run(400)
    assert sorted(pair.got[1]) == sorted(messages)


def test_chunks_that_were_not_asked_for_are_refused():
    link, chunks = Link(SharedAir(), limit=1 << 20), split(data(200_000), CHUNK)
    with pytest.raises(PeerError, match="E659"):
        link.on_chunk(chunks[0], 0.0)
    with pytest.raises(PeerError, match="E636"):
        link.on_chunk(b"SOCH", 0.0)


def test_chunks_that_are_not_the_message_start_over():
    link, message, other = Link(SharedAir(), limit=1 << 20), data(3 * CHUNK), data(3 * CHUNK, 1)
    link.up(0.0)
    name = transfer_id(message)
    offer = struct.pack("<32sII", name, len(message), CHUNK)
    assert link.on_offer(offer, 0.0) == [(Kind.ASK, ask(name, (0, 3)))]
    piece = other[:CHUNK]
    link.on_chunk(_head(name, len(message), CHUNK, 0, piece) + piece, 0.0)
    link.on_chunk(split(message, CHUNK)[1], 0.0)
    with pytest.raises(PeerError, match="E627"):
        link.on_chunk(split(message, CHUNK)[2], 0.0)
    assert link.on_offer(offer, 0.0) == [(Kind.ASK, ask(name, (0, 3)))]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x" * 33,
        b"x" * 34,
        ask(bytes(32)),
        ask(bytes(32), (1, 1)),
        ask(bytes(32), (2, 1)),
        ask(bytes(32), (0, 1))[:-1],
    ],
)
def test_asks_that_no_peer_makes(body):
    with pytest.raises(PeerError, match="E659"):
        Link(SharedAir(), 1 << 20).on_ask(body, 0.0)


def test_a_flood_of_asks_queues_no_more_than_two_windows():
    link, message = Link(SharedAir(), 1 << 24), data(100 * CHUNK)
    link.up(0.0)
    link.send(Parcel.of(message, NEVER), 0.0)
    for first in range(100):
        link.on_ask(ask(transfer_id(message), (first, 2**32 - 1)), 0.0)
        link.on_ask(ask(bytes(32), (0, 2**32 - 1)), 0.0)
    served = 0
    while link.next_chunk(0.0):
        served += 1
    assert served == 2 * WINDOW


@pytest.mark.parametrize("kind", [Kind.OFFER, Kind.DONE])
def test_frames_of_another_length(kind):
    link = Link(SharedAir(), 1 << 20)
    with pytest.raises(PeerError, match="E659"):
        (link.on_offer if kind is Kind.OFFER else link.on_done)(b"x" * 39, 0.0)


def test_chunks_larger_than_ours_are_not_asked_for():
    with pytest.raises(PeerError, match="E623"):
        Link(SharedAir(), 1 << 20).on_offer(struct.pack("<32sII", bytes(32), 1 << 20, CHUNK + 1), 0.0)
