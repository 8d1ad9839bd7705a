"""Real peers over TLS, with nobody in between: each listens, calls the others, and talks to each of them directly.

Who may do what is decided in `access`, by certificates' names, before anything gets here. How messages get across is
decided in `transfers`; this is what joins them: a session, threads, and the count of what went through.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from contextlora.errors import PeerError, did_you_mean
from contextlora.federated.fabric import Arrival, Traffic
from contextlora.federated.fabric.access import configuration
from contextlora.federated.fabric.transfers import WINDOW, Frame, Kind, Link, Parcel, SharedAir
from contextlora.federated.identity import Identity, Peer, check_endpoint
from contextlora.federated.wire import run_hash

if TYPE_CHECKING:
    import zenoh

_DOMAIN = b"contextlora offer\0"  # a signature made for anything else is none here, nor the other way round
_SIGNATURE = 64
_TICK = 0.1  # seconds between two looks at what has waited too long


class _Line:
    """What is to go to one peer, control frames before chunks; a thread of its own waits here for the link."""

    def __init__(self, link: Link, lock: threading.RLock):
        self.link, self.frames, self.work = link, deque[Frame](), threading.Condition(lock)

    def put(self, frames: list[Frame]) -> None:
        self.frames.extend(frames)
        self.work.notify()


class ZenohFabric:
    """See `Fabric`. Opens at once; peers appear in `alive` as they are found, and again after they were lost.

    Args:
        identity: of this device.
        peers: all that may take part, by name; one's own entry says where to listen.
        run: the run's id; devices of another run do not hear this one.
        listen: "host:port" to listen on instead of one's own endpoint, such as "0.0.0.0:7447".
        limit: bytes that one peer may have under way, and that may wait to be read; a message is at most this long.
        lease: seconds after which a peer that says nothing is gone.

    Attributes:
        traffic: by peer.
        refused: frames that were not let in, by error code.

    Raises:
        PeerError: E654 for peers that lack this device or have it with another key, E656 if it cannot listen, E635.
    """

    def __init__(
        self,
        identity: Identity,
        peers: Mapping[str, Peer],
        run: str,
        *,
        listen: str | None = None,
        limit: int = 128 << 20,
        lease: float = 2.0,
    ):
        self.name, self.refused = identity.name, Counter[str]()
        self._key, self._peers = identity.key, {n: p for n, p in peers.items() if n != identity.name}
        self.traffic = {n: Traffic() for n in self._peers}
        self._space = f"contextlora/{run_hash(run).hex()[:16]}"
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._alive: set[str] = set()
        self._arrivals: deque[tuple[float, Arrival]] = deque()
        air = SharedAir()
        self._lines = {n: _Line(Link(air, limit), self._lock) for n in self._peers}
        self._closing = threading.Event()
        own = peers.get(identity.name)
        if own is None or own.key != identity.key.public_key().public_bytes_raw():
            text = f"'{identity.name}' is not in the list of peers with the key of this device"
            raise PeerError("E654", text)
        listen = check_endpoint(listen) if listen else own.endpoint
        self._session = _open(configuration(identity, own, self._peers, self._space, listen, lease), listen)
        self._threads: list[threading.Thread] = []
        self._start()

    def now(self) -> float:
        """Seconds of this machine's steady clock."""
        return time.monotonic()

    def alive(self) -> frozenset[str]:
        """The peers whose liveliness token is here."""
        with self._lock:
            return frozenset(self._alive)

    def goodput(self) -> dict[str, float]:
        """Bit/s of content by peer, from the last whole message of two chunks or more that went through uncut."""
        with self._lock:
            return {n: line.link.rate for n, line in self._lines.items() if line.link.rate is not None}

    def send(self, to: Sequence[str], message: bytes, deadline: float) -> None:
        """See `Fabric`."""
        for name in to:
            if name not in self._lines:
                raise PeerError("E657", f"no peer '{name}'.{did_you_mean(name, self._lines)}")
        parcel = Parcel.of(message, deadline)
        with self._lock:
            if self._closing.is_set():
                raise PeerError("E657", "the fabric is closed")
            for name in to:
                self._lines[name].put(self._lines[name].link.send(parcel, self.now()))

    def receive(self, deadline: float) -> Iterator[Arrival]:
        """See `Fabric`. What arrives after the deadline is left for the next call, however late this one is read."""
        while True:
            with self._news:
                while not self._arrivals and (left := deadline - self.now()) > 0 and not self._closing.is_set():
                    self._news.wait(left)
                if not self._arrivals or self._arrivals[0][0] > deadline:
                    return
                _, arrival = self._arrivals.popleft()
                self._lines[arrival.sender].link.backlog -= len(arrival.message)
            yield arrival

    def close(self) -> None:
        """See `Fabric`. The others notice at once."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            self._news.notify_all()
            for line in self._lines.values():
                line.work.notify_all()
        self._session.close()  # type: ignore[no-untyped-call,unused-ignore]  # zenoh's stubs leave some results out
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> ZenohFabric:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- threads: one that reads and one that writes for each peer, one for offers, one that looks at the clock ------

    def _start(self) -> None:
        import zenoh

        session, me = self._session, self.name
        # Rings drop the oldest frame when they are full: a flood costs its sender, not our memory or other links.
        offers = session.declare_subscriber(f"{self._space}/offer/*/{me}", zenoh.handlers.RingChannel(16 * WINDOW))
        self._run(self._read, offers, self._take_offer)
        for name in self._peers:
            ring: Any = zenoh.handlers.RingChannel(4 * WINDOW)
            frames = session.declare_subscriber(f"{self._space}/link/{name}/{me}/*", ring)
            self._run(self._read, frames, self._take_frame)
            self._run(self._write, name)
        self._run(self._watch)
        session.liveliness().declare_subscriber(f"{self._space}/alive/*", self._seen, history=True)
        self._token = session.liveliness().declare_token(f"{self._space}/alive/{me}")

    def _run(self, loop: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=loop, args=args, name=f"fabric {self.name} {loop.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self, subscriber: Any, take: Callable[[str, Kind, bytes], None]) -> None:
        for sample in subscriber:  # ends when the session is closed
            key, body = str(sample.key_expr).removeprefix(self._space).split("/"), sample.payload.to_bytes()
            with self._lock:
                try:
                    name, kind = key[2], Kind(key[4] if key[1] == "link" else key[1])
                    if name in self._peers:
                        self.traffic[name].received += len(body)
                    take(name, kind, body)
                except PeerError as e:
                    self.refused[e.code] += 1
                except ValueError:  # no such kind of frame
                    self.refused["E659"] += 1

    def _take_offer(self, name: str, kind: Kind, body: bytes) -> None:
        """Raises PeerError E658 for an offer that the peer has not signed for this device."""
        signed, signature = body[:-_SIGNATURE], body[-_SIGNATURE:]
        peer = self._peers.get(name)
        if peer is None or not _is_signed(peer.key, signature, self._route(name, self.name) + signed):
            raise PeerError("E658", "an offer that is not from the peer that it names", where=name)
        self._lines[name].put(self._lines[name].link.on_offer(signed, self.now()))

    def _take_frame(self, name: str, kind: Kind, body: bytes) -> None:
        line, now = self._lines[name], self.now()
        if kind is Kind.ASK:
            line.link.on_ask(body, now)
            line.put([])
        elif kind is Kind.DONE:
            line.link.on_done(body, now)
        elif kind is Kind.CHUNK:
            message, frames = line.link.on_chunk(body, now)
            line.put(frames)
            if message is not None:
                self._arrivals.append((now, Arrival(name, message)))
                self._news.notify_all()
        else:
            raise PeerError("E659", f"'{kind}' has no place on a link", where=name)

    def _write(self, name: str) -> None:
        line, traffic = self._lines[name], self.traffic[name]
        while not self._closing.is_set():
            with line.work:
                frame = line.frames.popleft() if line.frames else self._next_chunk(line)
                if frame is None:
                    line.work.wait()
                    continue
                kind, body = frame
                if kind is Kind.OFFER:
                    body += self._key.sign(self._route(self.name, name) + body)
                traffic.sent += len(body)
                traffic.chunks += kind is Kind.CHUNK
            self._put(name, kind, body)

    def _next_chunk(self, line: _Line) -> Frame | None:
        chunk = line.link.next_chunk(self.now())
        return None if chunk is None else (Kind.CHUNK, chunk)

    def _put(self, name: str, kind: Kind, body: bytes) -> None:
        """Waits while the link is full, which is why each peer has its own thread; a dead link ends the wait."""
        import zenoh

        key = f"offer/{self.name}/{name}" if kind is Kind.OFFER else f"link/{self.name}/{name}/{kind}"
        urgent = zenoh.Priority.DATA if kind is Kind.CHUNK else zenoh.Priority.INTERACTIVE_HIGH
        block = zenoh.CongestionControl.BLOCK
        try:
            self._session.put(f"{self._space}/{key}", body, congestion_control=block, priority=urgent)
        except zenoh.ZError:  # closed meanwhile, or the link broke: what did not get through is asked for again
            self._closing.wait(_TICK)

    def _watch(self) -> None:
        while not self._closing.wait(_TICK):
            with self._lock:
                for line in self._lines.values():
                    line.put(line.link.tick(self.now()))

    def _seen(self, sample: zenoh.Sample) -> None:
        import zenoh

        name = str(sample.key_expr).rpartition("/")[2]
        if name not in self._lines:
            return
        with self._lock:
            line, now = self._lines[name], self.now()
            if sample.kind == zenoh.SampleKind.PUT:
                self._alive.add(name)
                line.put(line.link.up(now))
            else:
                self._alive.discard(name)
                line.frames.clear()
                line.link.down(now)

    def _route(self, sender: str, receiver: str) -> bytes:
        """What an offer's signature is over besides it: good in this run, from one to the other, and nowhere else."""
        return _DOMAIN + f"{self._space}/{sender}/{receiver}\0".encode()


def _open(config: dict[str, Any], listen: str | None) -> zenoh.Session:
    """Raises PeerError E656, E635."""
    try:
        import zenoh
    except ImportError:
        raise PeerError("E635", "peers need the extra: pip install 'contextlora[peers]'") from None
    try:
        return zenoh.open(zenoh.Config.from_json5(json.dumps(config)))
    except zenoh.ZError as e:
        text = f"cannot listen on {listen}: {str(e).splitlines()[0][:300]}" if listen else str(e)[:300]
        raise PeerError("E656", text) from None


def _is_signed(key: bytes, signature: bytes, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True
