"""Many devices in one process, in lock step over a modelled channel, with the faults that a run asks for.

A clock of rounds: what the channel carries by the deadline arrives in its slot, all else does not. Every outcome
follows from the run's name and seed, so two simulations of one YAML are the same byte for byte.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from contextlora.federated.channel import Channel, uniform
from contextlora.federated.federation import Fault, Federation
from contextlora.federated.protocol import Exchange, Rounds, Slot


@dataclass
class Traffic:
    """What one round has cost on the air.

    Attributes:
        bytes: handed to the channel, by slot; a unicast counts once for each receiver.
        energy: J, of all devices.
        seconds: of the longest transmission of each slot, added up.
        asked, reached: receivers that bundles were for, and that had them by the deadline; rows do not count.
    """

    bytes: Counter[Slot] = field(default_factory=Counter)
    energy: float = 0.0
    seconds: float = 0.0
    asked: int = 0
    reached: int = 0


class Hub:
    """Moves the bytes of a simulation.

    Args:
        settings: with the faults.
        channel: what the bundles cross. Rows cross it too, but are repeated until they arrive: they are short, and
            without them there is no table.

    Attributes:
        round: the one it is in.
        traffic, there: what it has cost so far, and the devices that are there in it.
        rates: bit/s as each sender has last measured them, with its air to itself, by sender and receiver.
        late: bundles that arrive a round late, by slot and receiver: from whom, and what.
    """

    def __init__(self, settings: Federation, channel: Channel):
        self.settings, self.channel = settings, channel
        self.round, self.there, self.traffic = 0, frozenset[str](), Traffic()
        self.rates: dict[str, dict[str, float]] = {n: {} for n in settings.devices}
        self.late: dict[tuple[str, str], list[tuple[str, bytes]]] = defaultdict(list)

    def run(
        self,
        start: Callable[[str], Rounds],
        first: int,
        after: Callable[[], None],
    ) -> None:
        """All rounds of all devices.

        Args:
            start: a device's rounds, from where it was kept; called again when it comes back after a "kill".
            first: round to begin with.
            after: called at the end of each round.
        """
        going: dict[str, Rounds] = {}
        waiting: dict[str, Exchange] = {}
        for round_ in range(first, self.settings.rounds):
            self.round, self.traffic = round_, Traffic()
            self.there = frozenset(n for n in self.settings.devices if not self._befalls("kill", n))
            for name in sorted(going.keys() - self.there):
                going.pop(name).close()
                waiting.pop(name, None)
            for name in sorted(self.there - going.keys()):
                going[name] = start(name)
                waiting[name] = next(going[name])
            self._one_round(going, waiting)
            after()

    def _one_round(self, going: Mapping[str, Rounds], waiting: dict[str, Exchange]) -> None:
        """From everyone's rows to everyone's next rows, or the end."""
        begun = False
        while waiting and not (begun and all(w.slot == "rows" for w in waiting.values())):
            begun = True
            arrived = self._carry(waiting)
            for name in sorted(waiting):
                try:
                    waiting[name] = going[name].send(arrived[name])
                except StopIteration:
                    del waiting[name]

    def _carry(self, waiting: Mapping[str, Exchange]) -> dict[str, dict[str, bytes]]:
        """One slot: what each device gets, by sender."""
        arrived: dict[str, dict[str, bytes]] = {name: {} for name in waiting}
        (slot,) = {w.slot for w in waiting.values()}
        for receiver in waiting:
            for sender, data in self.late.pop((slot, receiver), []):
                arrived[receiver][f"{sender}, late"] = data
        longest = 0.0
        for sender in sorted(waiting):
            for receivers, data in waiting[sender].sends:
                reached, seconds = self._transmit(sender, receivers, data, slot)
                longest = max(longest, seconds)
                for receiver, what in self._through_faults(sender, reached, data, slot):
                    if receiver in arrived:
                        arrived[receiver][sender] = what
        self.traffic.seconds += longest
        return arrived

    def _transmit(self, sender: str, to: tuple[str, ...], data: bytes, slot: Slot) -> tuple[tuple[str, ...], float]:
        turns = min(1, len(to)) if self.settings.radio.cast == "broadcast" else len(to)
        self.traffic.bytes[slot] += turns * len(data)
        if slot == "rows":
            return to, 0.0
        sent = self.channel.transmit(self.round, sender, to, 8 * len(data))
        self.traffic.energy += sent.energy
        self.traffic.asked += len(to)
        self.traffic.reached += len(sent.reached)
        for receiver, seconds in zip(to, sent.seconds, strict=True):
            if receiver in sent.reached:
                self.rates[sender][receiver] = turns * 8 * len(data) / seconds
        return sent.reached, max((s for r, s in zip(to, sent.seconds, strict=True) if r in sent.reached), default=0.0)

    def _through_faults(
        self, sender: str, receivers: tuple[str, ...], data: bytes, slot: Slot
    ) -> Iterator[tuple[str, bytes]]:
        if self._befalls("drop", sender):
            return
        if self._befalls("corrupt", sender):
            data = _flipped(data, (self.settings.name, self.settings.seed, self.round, slot, sender))
        for receiver in receivers:
            if self._parted(sender, receiver):
                continue
            if self._befalls("late", sender):
                self.late[slot, receiver].append((sender, data))
            else:
                yield receiver, data

    def _now(self, what: str) -> Iterator[Fault]:
        for fault in self.settings.faults:
            if fault.what == what and fault.rounds[0] <= self.round <= fault.rounds[1]:
                yield fault

    def _befalls(self, what: str, name: str) -> bool:
        return any(name in fault.who for fault in self._now(what))

    def _parted(self, one: str, other: str) -> bool:
        return any((one in fault.who) != (other in fault.who) for fault in self._now("partition"))


def _flipped(data: bytes, key: tuple[object, ...]) -> bytes:
    """`data` with one bit flipped."""
    bit = int(uniform("corrupt", *key) * 8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
