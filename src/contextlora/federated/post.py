"""What one device says of slices and has heard of others, as signed messages: its ends of the wire, kept in step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from contextlora.errors import PeerError
from contextlora.federated.bitmaps import Bits, decode_mask
from contextlora.federated.codec import Codec
from contextlora.federated.federation import Federation
from contextlora.federated.mailbox import Inbox, Message, Outbox
from contextlora.federated.once import Sharing, alone
from contextlora.federated.protocol import Bundles, unbundle
from contextlora.federated.slices import Layer, Mask, Slice
from contextlora.federated.wire import OVERHEAD, Kind, Limits, read_header

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Shapes = Mapping[Layer, tuple[int, int]]


@dataclass(frozen=True)
class Heard:
    """What a device has of another one: its mask, and the messages as they came, which it may pass on."""

    task: str
    masks: Mapping[Layer, Mask]
    announced: bytes
    version: int = 0
    values: bytes = b""


class Post:
    """A device's correspondence.

    Args:
        name: of this device.
        settings: what all devices agree on.
        key: its own.
        known: names of all devices by public key.
        shapes: of what learns and is sent of each layer, by task.
        once: shares what several devices of one process would make alike.

    Attributes:
        heard: by device, what it has of it; its own last words too.
        passed: by device, the messages that the last slot brought, as they came.
        bits: length of its next message, as far as it knows.
        damaged: bundles that could not be read, and rows that no device writes, by error code.
    """

    def __init__(
        self,
        name: str,
        settings: Federation,
        key: Ed25519PrivateKey,
        known: Mapping[bytes, str],
        shapes: Mapping[str, Shapes],
        once: Sharing = alone,
    ):
        self.name, self.settings, self.shapes, self.once = name, settings, shapes, once
        self.sizes = {task: [rows * width for rows, width in of.values()] for task, of in shapes.items()}
        self.task = settings.devices[name].task
        full, delta = Codec[settings.wire.full.upper()], settings.wire.delta
        self.outbox = Outbox(key, settings.name, self.task, full=full, delta=Codec[delta.upper()] if delta else None)
        limits = Limits(payload=max(Limits.payload, 3 * max(map(sum, self.sizes.values()))))
        self.inbox = Inbox(settings.name, known, self.sizes, limits, differences=delta is not None, once=once)
        self.heard: dict[str, Heard] = {}
        self.passed: dict[str, list[bytes]] = {}
        self.damaged: Counter[str] = Counter()
        self.bits = 0

    def start(self, own: Slice) -> None:
        """Begins with a slice of which nothing has been sent: a byte an entry, until one knows better."""
        self.bits = 8 * (OVERHEAD + own.active)

    @property
    def refused(self) -> Counter[str]:
        """Messages and bundles that were not let in, by error code."""
        return self.inbox.refused + self.damaged

    # --- what it says ----------------------------------------------------------------------------------------------

    def news(self, own: Slice, have: Collection[int | None], *, round_: int, whole: bool) -> list[bytes]:
        """Its own values, whole where someone lacks what a difference would be to; first the mask, if need be.

        Args:
            own: the entries that it trains.
            have: the version of its values that each receiver has, None for one that has not even the mask.
            round_: now; the version is one more.
            whole: send whole values in any case.
        """
        last, version, messages = self.heard.get(self.name), round_ + 1, list[bytes]()
        if last is None or None in have:
            mask = np.concatenate([own.masks[layer].bits() for layer in self.shapes[self.task]])
            announced = self.outbox.announce(mask, self.sizes[self.task], version=version, round=round_)
            last = Heard(self.task, own.masks, announced)
            messages.append(announced)
        elif whole or any(v != last.version for v in have):
            self.outbox.forget()
        else:
            self.outbox.acknowledged(last.version)
        values = np.concatenate([own.values[layer] for layer in self.shapes[self.task]])
        message = self.outbox.send(values, version=version, round=round_)
        self.heard[self.name] = replace(last, version=version, values=message)
        self.bits = 8 * len(message)
        return [*messages, message]

    def all_of(self, names: Sequence[str], lacking: Collection[str]) -> list[bytes]:
        """The last words of these devices, with the masks of those that are `lacking` where they go."""
        messages = list[bytes]()
        for heard, lacks in ((self.heard[n], n in lacking) for n in names if n in self.heard):
            if heard.values:
                messages += [heard.announced, heard.values] if lacks else [heard.values]
        return messages

    def packed(self, name: str, own: Mapping[Layer, Mask]) -> bytes:
        """A device's mask, each layer's bits packed, as collisions are counted on; `own` is this one's."""
        masks = own if name == self.name else self.heard[name].masks

        def make() -> bytes:
            return np.concatenate([masks[layer].bitmap() for layer in self.shapes[self.task]]).tobytes()

        return self.once(("packed", id(masks)), lambda: (masks, make()))[1]

    # --- what it hears ---------------------------------------------------------------------------------------------

    def take(self, arrived: Bundles) -> Iterator[tuple[str, Slice, int]]:
        """Lets in what has come of others' slices: whose, what it now is, and of which version."""
        self.passed = {}
        for raw, message in self.opened(arrived):
            kind, name, task = message.header.kind, message.name, message.header.task
            if self.settings.devices[name].task != task or kind is Kind.ROW:
                continue
            self.passed.setdefault(name, []).append(raw)
            if kind is Kind.MASK:
                self.heard[name] = Heard(task, self.masks(message.content, task), raw)  # type: ignore[arg-type]
            else:
                heard = self.heard[name] = replace(self.heard[name], version=message.header.version, values=raw)
                yield name, self._slice(heard, message), heard.version

    def opened(self, arrived: Bundles) -> Iterator[tuple[bytes, Message]]:
        """The messages that are let in, of all bundles; what is refused is counted."""
        for via in sorted(arrived):
            data = arrived[via]
            try:
                messages = self.once(data, lambda data=data: self._unbundled(data))  # type: ignore[misc]
            except PeerError as e:
                self.damaged[e.code] += 1
                continue
            for raw in messages:
                try:
                    yield raw, self.inbox.open(raw)
                except PeerError as e:
                    if e.code in ("E629", "E630", "E632"):  # what it has of the sender is no use: its row asks for all
                        sender = read_header(raw, self.inbox.limits).sender
                        self.heard.pop(self.inbox.peers[sender], None)

    def _unbundled(self, data: bytes) -> list[bytes]:
        """The messages of a bundle; one that came in another bundle too is that very object."""
        return [self.once(("message", m), lambda m=m: m) for m in unbundle(data)]  # type: ignore[misc]

    def announced(self, message: bytes, task: str) -> dict[Layer, Mask]:
        """The masks of a message that was let in before."""
        total = sum(self.sizes[task])
        return self.masks(self.once(("bits", message), lambda: decode_mask(message[OVERHEAD:], total)), task)

    def masks(self, bits: Bits, task: str) -> dict[Layer, Mask]:
        """A mask over all layers as one for each."""

        def make() -> dict[Layer, Mask]:
            parts = np.split(np.asarray(bits, bool), np.cumsum(self.sizes[task])[:-1])
            shapes = self.shapes[task].items()
            return {la: Mask.of_bits(s, part) for (la, s), part in zip(shapes, parts, strict=True)}

        # with the bits, that the id stays theirs
        return self.once(("masks", id(bits), task), lambda: (bits, make()))[1]

    def _slice(self, heard: Heard, message: Message) -> Slice:
        def make() -> Slice:
            ends = np.cumsum([len(m.indices) for m in heard.masks.values()])[:-1]
            values = np.split(np.asarray(message.content, np.float32), ends)
            return Slice(heard.task, heard.masks, dict(zip(heard.masks, values, strict=True)))

        content = message.content
        return self.once(("slice", id(content), id(heard.masks)), lambda: (content, heard.masks, make()))[2]
