"""How messages get from one peer to another: the receiver asks, so it never holds or gets what it did not want.

    offer   id, length, chunk size         sender to receiver, again and again until it is asked or told done
    ask     id, ranges of chunks           at most a window of them is on the way at any time
    chunk   one of those chunks            see `chunks`
    done    id                             also the answer to an offer of what is here already

Nothing is lost when a link is: what arrived stays, and the next offer is answered with an ask for the holes. No
sockets, no clock and no threads in here; who calls must not do so from two threads at once.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from contextlora.errors import PeerError
from contextlora.federated.chunks import Assembler, place, split, transfer_id

CHUNK = 60 << 10  # with all headers it fits into one batch of zenoh, which is 64 KiB
WINDOW = 16  # chunks that one peer may be asked for and has not sent yet
_SMALLEST = 16 << 10
_PATIENCE = 1.0, 30.0  # seconds without a chunk before they are asked for again: at first, and at most
_AGAIN = 0.2, 1.0  # seconds before an offer that nobody took up is repeated: at first, and at most
_OFFER = struct.Struct("<32sII")
_ASK = struct.Struct("<32sH")
_RANGE = struct.Struct("<II")


class Kind(StrEnum):
    """What a frame is; the word is part of the key under which it travels."""

    OFFER = "offer"
    ASK = "ask"
    CHUNK = "chunk"
    DONE = "done"


Frame = tuple[Kind, bytes]


@dataclass(frozen=True)
class Parcel:
    """A message that is to be sent, cut up once for all its receivers.

    Attributes:
        name: the transfer's id.
        total: bytes.
        chunks: as they travel.
        deadline: when it is given up.
    """

    name: bytes
    total: int
    chunks: list[bytes]
    deadline: float

    @classmethod
    def of(cls, message: bytes, deadline: float) -> Parcel:
        """Raises PeerError E634 for an empty message or one of 4 GiB."""
        if len(message) >> 32:
            raise PeerError("E634", f"a message of {len(message)} bytes is too long for one transfer")
        return cls(transfer_id(message), len(message), split(message, CHUNK), deadline)

    def offer(self) -> Frame:
        return Kind.OFFER, _OFFER.pack(self.name, self.total, CHUNK)


class SharedAir:
    """A sender's air, of which each of n transfers under way has 1 / n: what would one have had alone?

    Keeps virtual time V with dV = dt / n. A transfer of b bits from V1 to V2 would have gone at b / (V2 - V1) alone.
    """

    def __init__(self) -> None:
        self._running, self._at, self._virtual = 0, 0.0, 0.0

    def start(self, now: float) -> float:
        """One more transfer; the virtual time at which it begins."""
        self._advance(now)
        self._running += 1
        return self._virtual

    def stop(self, now: float, since: float) -> float:
        """One less; virtual seconds since it began."""
        self._advance(now)
        self._running -= 1
        return self._virtual - since

    def _advance(self, now: float) -> None:
        self._virtual += (now - self._at) / max(self._running, 1)
        self._at = now


@dataclass
class _Outgoing:
    parcel: Parcel
    again: float  # when it is offered next
    wait: float = _AGAIN[0]
    since: float | None = None  # virtual time of the first ask
    cut: bool = False  # by a lost link, so that it measures nothing


@dataclass
class _Incoming:
    total: int
    todo: deque[tuple[int, int]]
    last: float  # when something of it arrived, or it was asked for again
    patience: float = _PATIENCE[0]
    vain: int = 0  # times that it was asked for again since something arrived
    awaited: set[int] = field(default_factory=set)

    def start_over(self, holes: list[tuple[int, int]], now: float) -> None:
        """Whatever was asked for and is not here may be lost."""
        self.todo, self.last = deque(holes), now
        self.awaited.clear()


class Link:
    """Both directions between this device and one peer.

    Args:
        air: shared by all links of the device.
        limit: bytes of the peer's messages that may be under way or wait to be read, in all.
        transfers: how many may be under way.

    Attributes:
        backlog: bytes of whole messages that nobody has read; whoever reads one takes its length off.
        rate: bit/s to the peer as last measured, with the air to itself; None before any measurement.
    """

    def __init__(self, air: SharedAir, limit: int, transfers: int = 8):
        self.air, self.limit, self.transfers, self.backlog = air, limit, transfers, 0
        self.rate: float | None = None
        self._box = Assembler(limit, transfers, _SMALLEST)
        self._incoming: dict[bytes, _Incoming] = {}
        self._outgoing: dict[bytes, _Outgoing] = {}
        self._asked: dict[tuple[bytes, int], None] = {}
        self._up = False

    # --- the link itself -------------------------------------------------------------------------------------------

    def up(self, now: float) -> list[Frame]:
        """The peer is there, perhaps again: everything that waits is offered."""
        self._up = True
        for out in self._outgoing.values():
            out.again, out.wait = now, _AGAIN[0]
        return self.tick(now)

    def down(self, now: float) -> None:
        """The peer is gone: what it asked for is void."""
        self._up = False
        self._asked.clear()
        for out in self._outgoing.values():
            out.cut |= out.since is not None
            self._unmeasured(out, now)

    def tick(self, now: float) -> list[Frame]:
        """To be called several times a second: repeats offers and asks that nobody answered, drops what is too late."""
        for out in [o for o in self._outgoing.values() if now > o.parcel.deadline]:
            self._drop(out, now)
        if not self._up:
            return []
        frames: list[Frame] = []
        served = {name for name, _ in self._asked}
        for name, out in self._outgoing.items():
            if now >= out.again and name not in served:
                frames.append(out.parcel.offer())
                out.wait = min(2 * out.wait, _AGAIN[1])
                out.again = now + out.wait
        for name, come in self._incoming.items():
            wait = come.patience * 2**come.vain
            if now - come.last > wait <= _PATIENCE[1]:  # beyond, it sleeps until it is offered again
                come.vain += 1
                come.start_over(self._box.holes(name), now)
        return frames + self._ask()

    # --- sending ---------------------------------------------------------------------------------------------------

    def send(self, parcel: Parcel, now: float) -> list[Frame]:
        """Offers a message until its deadline; one that is on its way already gets the new one."""
        self._outgoing.setdefault(parcel.name, _Outgoing(parcel, now)).parcel = parcel
        return self.tick(now)

    def on_ask(self, body: bytes, now: float) -> None:
        """The peer wants chunks, which `next_chunk` will give. Raises PeerError E659 for a frame that is no ask."""
        name, ranges = _read_ask(body)
        out = self._outgoing.get(name)
        if out is None:
            return  # done or too late; its offer will not be repeated either
        if out.since is None and not out.cut:
            out.since = self.air.start(now)
        for first, last in ranges:
            for index in range(first, min(last, first + WINDOW, len(out.parcel.chunks))):
                if len(self._asked) < 2 * WINDOW:
                    self._asked[name, index] = None
        out.again = now + _AGAIN[1]

    def next_chunk(self, now: float) -> bytes | None:
        """The next chunk that was asked for, in that order."""
        if not self._asked:
            return None
        name, index = next(iter(self._asked))
        del self._asked[name, index]
        out = self._outgoing[name]
        out.again = now + _AGAIN[1]
        return out.parcel.chunks[index]

    def on_done(self, body: bytes, now: float) -> None:
        """The peer has all of a message. Raises PeerError E659 for a frame that is no such word."""
        if len(body) != len(transfer_id(b"")):
            raise PeerError("E659", f"a frame of {len(body)} bytes that is no 'done'")
        out = self._outgoing.get(body)
        if out is None:
            return
        if out.since is not None and len(out.parcel.chunks) > 1:  # a single chunk would measure the way there and back
            took = self.air.stop(now, out.since)
            out.since = None
            self.rate = 8 * out.parcel.total / took if took > 0 else self.rate
        self._drop(out, now)

    def _drop(self, out: _Outgoing, now: float) -> None:
        self._unmeasured(out, now)
        del self._outgoing[out.parcel.name]
        for key in [k for k in self._asked if k[0] == out.parcel.name]:
            del self._asked[key]

    def _unmeasured(self, out: _Outgoing, now: float) -> None:
        if out.since is not None:
            self.air.stop(now, out.since)
            out.since = None

    # --- receiving -------------------------------------------------------------------------------------------------

    def on_offer(self, body: bytes, now: float) -> list[Frame]:
        """The peer has a message. Raises PeerError E623 over the limits, E636 if it contradicts itself, E659."""
        if len(body) != _OFFER.size:
            raise PeerError("E659", f"a frame of {len(body)} bytes that is no offer")
        name, total, size = _OFFER.unpack(body)
        if size > CHUNK:
            raise PeerError("E623", f"chunks of {size} bytes are over the limit of {CHUNK}")
        if name not in self._incoming and total <= self.limit and not self._make_room(total):
            return []  # the offer will come again
        if not self._box.expect(name, total, size):
            return [(Kind.DONE, name)]
        come = self._incoming.get(name)
        if come is None:
            self._incoming[name] = _Incoming(total, deque(self._box.holes(name)), now)
        elif now - come.last > come.patience / 2:  # the sender has stopped: it knows nothing of what we await
            come.start_over(self._box.holes(name), now)
        return self._ask()

    def on_chunk(self, body: bytes, now: float) -> tuple[bytes | None, list[Frame]]:
        """A chunk: gives the message if it was the last one missing.

        Raises PeerError E659 for one that was not asked for, E636 for a damaged one, E627 if all are the wrong message.
        """
        name, index = place(body)
        come = self._incoming.get(name)
        if come is None:
            if self._box.finished(name):
                return None, []
            raise PeerError("E659", "a chunk that was not asked for")
        try:
            message = self._box.add(body)
        except PeerError:
            if name not in self._box.unfinished():
                del self._incoming[name]
            raise
        come.awaited.discard(index)
        come.patience = min(max(_PATIENCE[0], 4 * (now - come.last)), _PATIENCE[1])  # a slow link is not a dead one
        come.last, come.vain = now, 0
        if message is None:
            return None, self._ask()
        del self._incoming[name]
        self.backlog += len(message)
        return message, [(Kind.DONE, name), *self._ask()]

    def _make_room(self, total: int) -> bool:
        """Whether so many bytes may come; of what was asked for in vain the most hopeless gives way."""
        keep = dict(self._incoming)
        hopeless = sorted((n for n, c in keep.items() if c.vain), key=lambda n: -keep[n].vain)
        for name in [b"", *hopeless]:
            keep.pop(name, None)
            held = self.backlog + sum(c.total for c in keep.values())
            if len(keep) < self.transfers and held + total <= self.limit:
                for gone in self._incoming.keys() - keep.keys():
                    self._box.forget(gone)
                self._incoming = keep
                return True
        return False

    def _ask(self) -> list[Frame]:
        """Fills the window up once half of it is free, oldest transfer first."""
        free = WINDOW - sum(len(c.awaited) for c in self._incoming.values())
        frames: list[Frame] = []
        if not self._up or 2 * free < WINDOW:
            return frames
        for name, come in self._incoming.items():
            ranges = []
            while free and come.todo:
                first, last = come.todo.popleft()
                cut = min(last, first + free)
                if cut < last:
                    come.todo.appendleft((cut, last))
                ranges.append((first, cut))
                come.awaited.update(range(first, cut))
                free -= cut - first
            if ranges:
                body = _ASK.pack(name, len(ranges)) + b"".join(_RANGE.pack(*r) for r in ranges)
                frames.append((Kind.ASK, body))
        return frames


def _read_ask(body: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """An ask's transfer and ranges. Raises PeerError E659."""
    if len(body) < _ASK.size:
        raise PeerError("E659", f"a frame of {len(body)} bytes that is no ask")
    name, count = _ASK.unpack_from(body)
    ranges = list(_RANGE.iter_unpack(body[_ASK.size :])) if (len(body) - _ASK.size) % _RANGE.size == 0 else []
    if not 0 < count == len(ranges) <= WINDOW or any(first >= last for first, last in ranges):
        raise PeerError("E659", "an ask that no peer makes")
    return name, ranges
