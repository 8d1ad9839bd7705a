"""The two ends of the wire: what an owner of a slice sends, and what a receiver lets in.

Differences (`Kind.DELTA`) are taken against what the receiver *holds*, that is against decoded values, not against the
true ones of that version. So what one message loses the next one carries (error feedback), and after any number of
them the receiver is off by one message's rounding only. Both ends add in float32; each message names the sum's hash.

One thread at a time may use an end.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from contextlora.errors import PeerError
from contextlora.federated.bitmaps import Bits, decode_mask, encode_mask, mask_hash
from contextlora.federated.codec import Codec, Floats, check, decode, encode
from contextlora.federated.once import Sharing, alone
from contextlora.federated.wire import Header, Kind, Limits, authenticate, read_header, read_payload, run_hash, seal

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Row = dict[str, str | int | float | bool | None]


class Outbox:
    """The sender's end for one task's slice.

    Args:
        key: the sender's own.
        run: the run's id.
        task: whose slice.
        full: codec of whole values.
        delta: codec of differences; None: always whole values.

    After a restart an outbox sends whole values first, unless base, sent and mask are put back; the caller's version
    must go on from where it was.

    Attributes:
        mask, counts: hash of the mask announced last, and its active entries in each layer.
        base: version and values that the next difference is against; None: the next message is whole.
        sent: version and values of the last message, as receivers hold them, where there may be differences.
    """

    def __init__(
        self,
        key: Ed25519PrivateKey,
        run: str,
        task: str,
        *,
        full: Codec = Codec.INT8,
        delta: Codec | None = Codec.INT4,
    ):
        self.key, self.run, self.task, self.full, self.delta = key, run_hash(run), task, full, delta
        self.mask, self.counts = bytes(32), [0]
        self.base: tuple[int, Floats] | None = None
        self.sent: tuple[int, Floats] | None = None

    def announce(self, mask: Bits, sizes: Sequence[int], *, version: int, round: int) -> bytes:
        """The message that makes a mask known; values sent from now on are those of its active entries.

        Args:
            mask: (sum(sizes),) bool, layer after layer.
            sizes: entries of B in each layer.
            version: greater than that of any mask announced before.
        """
        self.mask, self.counts = mask_hash(mask), active(mask, sizes)
        self.forget()
        head = Header(Kind.MASK, self.run, self.task, version, round, count=sum(self.counts), mask=self.mask)
        return seal(head, encode_mask(mask), self.key)

    def send(self, values: Floats, *, version: int, round: int) -> bytes:
        """The message that brings receivers to these values: a difference if they hold a version, else whole.

        Args:
            values: (active entries,) float32, finite.
            version: greater than that of any values sent before.
        """
        check(values, self.counts)
        if self.base is not None and self.delta is not None:
            kind, codec, (base, held) = Kind.DELTA, self.delta, self.base
            with np.errstate(over="ignore"):  # encode refuses what is not finite
                payload = encode(values - held, self.counts, codec)
            held = held + decode(payload, self.counts, codec)
        else:
            kind, codec, base = Kind.VALUES, self.full, 0
            payload = encode(values, self.counts, codec)
            held = decode(payload, self.counts, codec)
        what = (base, codec, held.size, self.mask, _state(held))
        message = seal(Header(kind, self.run, self.task, version, round, *what), payload, self.key)
        self.sent = (version, held) if self.delta is not None else None
        return message

    def acknowledged(self, version: int) -> None:
        """Every receiver holds this version: if it is the last one sent, the next difference is against it.

        An answer that is late changes nothing: receivers keep the base that messages name, and the last version.
        """
        if self.sent is not None and self.sent[0] == version:
            self.base, self.sent = self.sent, None

    def forget(self) -> None:
        """Someone holds no version that a difference could be against: the next message is whole."""
        self.base, self.sent = None, None


def send_row(key: Ed25519PrivateKey, run: str, task: str, row: Row, *, version: int, round: int) -> bytes:
    """The message that carries a device's row of the table. Equal rows give equal bytes.

    Raises:
        PeerError: E634, values that are not finite, text that is not Unicode, or a row over the default limits.
    """
    try:
        payload = _row_bytes(row)
        _read_row(payload, Limits())
    except (TypeError, ValueError, PeerError) as e:
        raise PeerError("E634", f"a row that cannot be sent: {e}") from None
    return seal(Header(Kind.ROW, run_hash(run), task, version, round), payload, key)


@dataclass(frozen=True)
class Message:
    """What was let in.

    Attributes:
        header: who sent what.
        name: the sender's, as the receiver calls it.
        content: a mask (n,) of bool, the values (k,) of float32 as they now are, or a row.
    """

    header: Header
    name: str
    content: Bits | Floats | Row


@dataclass
class Holding:
    """What a receiver holds of one sender's task: the mask's hash, its active entries in each layer, and values by
    version: the last one's, and its base's. Nobody changes them: all receivers in a process may hold the same array.
    """

    mask: bytes
    counts: list[int]
    versions: dict[int, Floats] = field(default_factory=dict)


class Inbox:
    """The receiver's end: refuses, counting, all that is not a new message of a known sender about a known task.

    A refused message changes nothing but its counter.

    Args:
        run: the run's id.
        peers: names of the senders by public key.
        sizes: for each task, entries of B in each layer.
        limits: of any message.
        seen: what `seen` was before a restart, so that what was let in then is still a replay.
        differences: whether senders may send any; if not, no values are held here to which they could be.
        once: shares what receivers of one process make of a message alike.

    Attributes:
        refused: how many, by error code.
        accepted: how many were let in.
        seen: (sender's name, task, "mask" | "values" | "row") -> last version and round.
        slices: (sender's name, task) -> what is held.
    """

    def __init__(
        self,
        run: str,
        peers: Mapping[bytes, str],
        sizes: Mapping[str, Sequence[int]],
        limits: Limits | None = None,
        seen: Mapping[tuple[str, str, str], tuple[int, int]] | None = None,
        differences: bool = True,
        once: Sharing = alone,
    ):
        self.run, self.peers, self.sizes, self.limits = run_hash(run), peers, sizes, limits or Limits()
        self.differences, self._once = differences, once
        self.refused: Counter[str] = Counter()
        self.accepted = 0
        self.seen = dict(seen or {})
        self.slices: dict[tuple[str, str], Holding] = {}

    def open(self, data: bytes) -> Message:
        """Lets one message in.

        Raises:
            PeerError: E620 to E632, see docs/so-lora-wire.md. E629 asks for the mask, E630 and E632 for whole values.
        """
        try:
            message = self._open(data)
        except PeerError as e:
            self.refused[e.code] += 1
            raise
        self.accepted += 1
        return message

    def _open(self, data: bytes) -> Message:
        header = self._once(("header", data), lambda: read_header(data, self.limits))
        if header.run != self.run:
            raise PeerError("E624", "a message of another run")
        name = self.peers.get(header.sender)
        if name is None:
            raise PeerError("E625", f"an unknown sender, key {header.sender.hex()[:16]}")
        if header.task not in self.sizes:
            raise PeerError("E625", f"no such task here: '{header.task}'", where=name)
        payload = self._once(("signed", data), lambda: _signed(data, header))
        place = name, header.task, {Kind.MASK: "mask", Kind.ROW: "row"}.get(header.kind, "values")
        version, round_ = self.seen.get(place, (0, 0))
        if header.version <= version or header.round < round_:
            now = f"version {header.version} of round {header.round}"
            raise PeerError("E628", f"{now} came after version {version} of round {round_}", where=name)
        content = self._decode(name, header, payload)
        self.seen[place] = header.version, header.round
        return Message(header, name, content)

    def _decode(self, name: str, header: Header, payload: memoryview) -> Bits | Floats | Row:
        if header.kind is Kind.ROW:
            return self._once(("row", header), lambda: _read_row(payload, self.limits))
        if header.kind is Kind.MASK:
            return self._take_mask(name, header, payload)
        return self._take_values(name, header, payload)

    def _take_mask(self, name: str, header: Header, payload: memoryview) -> Bits:
        sizes = self.sizes[header.task]
        mask, counts, hashed = self._once(("mask", header), lambda: _read_mask(payload, sizes))
        if sum(counts) != header.count or hashed != header.mask:
            raise PeerError("E632", "the mask is not the one that its header names", where=name)
        held = self.slices.get((name, header.task))
        if held is None or held.mask != header.mask:  # the same mask again, for one who asked, must not lose the values
            self.slices[name, header.task] = Holding(header.mask, counts)
        return mask

    def _take_values(self, name: str, header: Header, payload: memoryview) -> Floats:
        held = self.slices.get((name, header.task))
        if held is None or held.mask != header.mask or header.count != sum(held.counts):
            raise PeerError("E629", f"values of '{header.task}' whose mask is not here; ask for it", where=name)
        if header.base and header.base not in held.versions:
            raise PeerError("E630", f"a difference to version {header.base}, not held here; ask for all", where=name)
        base = held.versions.get(header.base)
        # with its base, that no other array comes to have that one's id
        _, values, state = self._once(
            ("values", header, id(base)), lambda: (base, *_read_values(payload, header, held.counts, base))
        )
        if state != header.state or not np.isfinite(values).all():
            raise PeerError("E632", "the values are not those that the sender expects here; ask for all", where=name)
        if not self.differences:
            return values
        keep = {} if base is None else {header.base: base}  # until a later base says that our answer has arrived
        held.versions = {**keep, header.version: values}
        return values


def _signed(data: bytes, header: Header) -> memoryview:
    authenticate(data, header)
    return read_payload(data, header)


def _read_mask(payload: memoryview, sizes: Sequence[int]) -> tuple[Bits, list[int], bytes]:
    """A mask, its active entries in each layer, and its hash."""
    mask = decode_mask(payload, sum(sizes))
    return mask, active(mask, sizes), mask_hash(mask)


def _read_values(payload: memoryview, header: Header, counts: list[int], base: Floats | None) -> tuple[Floats, bytes]:
    """Values as they now are, read-only, and the hash of that."""
    values = decode(payload, counts, Codec(header.codec))
    if base is not None:
        with np.errstate(over="ignore"):
            values = base + values
    values.flags.writeable = False
    return values, _state(values)


def active(mask: Bits, sizes: Sequence[int]) -> list[int]:
    """Active entries of each layer of a mask that runs over all of them."""
    return [int(np.count_nonzero(part)) for part in np.split(mask, np.cumsum(np.asarray(sizes, np.intp))[:-1])]


def _state(values: Floats) -> bytes:
    return hashlib.sha256(values.astype("<f4", copy=False).tobytes()).digest()


def _row_bytes(row: Any) -> bytes:
    return json.dumps(row, allow_nan=False, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def _read_row(payload: bytes | memoryview, limits: Limits) -> Row:
    try:
        row: Any = json.loads(bytes(payload))
        canonical = _row_bytes(row) == payload  # so no key twice, no 1e999, no half of a surrogate pair
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise PeerError("E631", "a row that is not JSON as peers write it")
    plain = isinstance(row, dict) and all(isinstance(v, str | int | float | bool | None) for v in row.values())
    if not plain or len(row) > limits.fields or len(payload) > limits.row:
        raise PeerError("E631", f"a row should be at most {limits.fields} plain fields in {limits.row} bytes")
    return dict(row)
