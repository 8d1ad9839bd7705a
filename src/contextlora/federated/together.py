"""Simulated devices that train side by side: their mini-batches in one forward pass, where `together` allows it.

A pass over a few short samples does not fill a processor: one over four devices' single samples takes less than half
of the time of four (`benchmarks/together.py`). What is computed with other samples rounds differently, so that a
simulation of this kind is close to one of devices that train alone, and not the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from contextlora.federated.local import Local, run_together

if TYPE_CHECKING:
    from contextlora.federated.fabric.local import Hub
    from contextlora.federated.peer import Peer

Trained = tuple[Local, list[float]]


def alone(peer: Peer) -> Trained:
    """What a device is after this round's updates, and its losses."""
    return _run([peer])[0]


class Together:
    """Trains a device, and with it others whose turn is yet to come.

    Devices may share a pass that are of different tasks without prerequisites (their blocks are apart, and what they
    train with does not depend on what they hear in this round), and stand at the same update of the same round.

    Args:
        most: devices in one pass.
        peers: all that have begun, by name.
        hub: knows who is there.
    """

    def __init__(self, most: int, peers: Mapping[str, Peer], hub: Hub):
        self.most, self.peers, self.hub = most, peers, hub
        self._trained: dict[tuple[str, int], Trained] = {}

    def train(self, peer: Peer) -> Trained:
        """As `alone`."""
        key = peer.name, peer.round
        if key not in self._trained:
            group = [peer, *self._mates(peer)]
            self._trained |= {(p.name, peer.round): t for p, t in zip(group, _run(group), strict=True)}
        return self._trained.pop(key)

    def _mates(self, peer: Peer) -> Iterator[Peer]:
        """Others that may train with it, by name."""
        taken, update = {peer.task}, peer.turn().at.update
        if self._bound(peer):
            return
        for mate in (self.peers[n] for n in sorted(self.hub.there) if n > peer.name):
            if len(taken) == self.most:
                return
            if mate.task in taken or self._bound(mate) or (mate.name, peer.round) in self._trained:
                continue
            if mate.round == peer.round and mate.turn().at.update == update and mate.prefix is peer.prefix:
                taken.add(mate.task)
                yield mate

    def _bound(self, peer: Peer) -> bool:
        """Whether its block is everyone's, or others are on beside it."""
        return peer.owner != peer.task or bool(peer.reader.encoder.graph.prerequisites(peer.task))


def _run(group: Sequence[Peer]) -> list[Trained]:
    first, turns = group[0], [peer.turn() for peer in group]
    s = first.settings
    counts = {"updates": s.updates, "total": s.total_updates}
    return run_together(first.reader, turns, s.train, **counts, prefix=first.prefix)
