"""What the devices of a simulation hold in memory beside the base model; an array that several hold is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from contextlora.federated.peer import Peer
from contextlora.federated.slices import Slice


def resident(peers: Iterable[Peer]) -> dict[str, int]:
    """Bytes of all devices together, each buffer counted where it comes first:

    own (the slice that a device trains, its optimizer), held (the adapters of all tasks that it answers with), known
    (masks, values and messages of others, for differences and for passing on), means (for the gate).
    """
    seen, found = set[int](), dict[str, int]()
    peers = list(peers)
    for kind, of in (("own", _own), ("held", _held), ("known", _known), ("means", _means)):
        found[kind] = sum(_new(x, seen) for peer in peers for x in of(peer))
    return found


def _own(peer: Peer) -> Iterator[Any]:
    yield from _slice(peer.local.block)
    yield from (m.indices for m in peer.local.learns.values())
    yield from peer.local.optimizer.values()


def _held(peer: Peer) -> Iterator[Any]:
    for slice_ in peer.held.slices.values():
        yield from _slice(slice_)


def _known(peer: Peer) -> Iterator[Any]:
    for heard in peer.post.heard.values():
        yield from (m.indices for m in heard.masks.values())
        yield from (heard.announced, heard.values)
    for held in peer.post.inbox.slices.values():
        yield from held.versions.values()
    yield from (at[1] for at in (peer.post.outbox.base, peer.post.outbox.sent) if at is not None)


def _means(peer: Peer) -> Iterator[Any]:
    for mean in peer.means.values():
        yield from (mean.mean, mean.squares)


def _slice(slice_: Slice) -> Iterator[Any]:
    yield from (m.indices for m in slice_.masks.values())
    yield from slice_.values.values()


def _new(what: Any, seen: set[int]) -> int:
    """Bytes of the buffer behind an array, a tensor or bytes, if it has not been seen."""
    if isinstance(what, Tensor):
        storage = what.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
    else:
        while isinstance(what, np.ndarray) and isinstance(what.base, np.ndarray | bytes):
            what = what.base
        at, size = (what.ctypes.data, what.nbytes) if isinstance(what, np.ndarray) else (id(what), len(what))
    if not size or at in seen:
        return 0
    seen.add(at)
    return int(size)
