"""A frozen prefix on other devices: what it makes of micro-batches travels ahead of the trainers that wait for it.

Both sides walk through the same micro-batches in the same order, which follow from the plan, the seed and the update,
so that nothing but activations is sent. At most `ahead` micro-batches are under way between two devices.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contextlora.data.collate import Batch, Sample, collate
from contextlora.lora.attach import decoder_layers
from contextlora.models.inputs import ImageFeatures
from contextlora.models.prompts import entering
from contextlora.training.prefix import hidden_before, together


@dataclass(frozen=True)
class Piece:
    """A micro-batch on its way.

    Attributes:
        samples: whose activations travel: with a cache, those that the trainer has not seen.
        source: rank of the device that computes them.
        trainer: rank of the one that uses them.
    """

    samples: tuple[Sample, ...]
    source: int
    trainer: int


class Sender:
    """The prefix's side.

    Args:
        reader: of a model whose first `depth` decoder layers are whole.
        depth: how many of them run here.
        ahead: micro-batches that may be under way to one trainer.
    """

    def __init__(self, reader: ImageFeatures, depth: int, ahead: int):
        self.reader, self.depth, self.ahead = reader, depth, ahead
        self._under_way: dict[int, deque[tuple[Any, Tensor]]] = {}

    @torch.no_grad()
    def send(self, piece: Piece) -> None:
        """Computes and sends one; waits first while too many are under way."""
        batch = collate(piece.samples, self.reader.encoder.pad)
        hidden = hidden_before(self.reader.model, self.depth, self.reader.inputs(batch)).cpu().contiguous()
        waiting = self._under_way.setdefault(piece.trainer, deque())
        while len(waiting) >= self.ahead:
            waiting.popleft()[0].wait()
        waiting.append((dist.isend(hidden, piece.trainer), hidden))  # the tensor must live until it is gone

    def finish(self) -> None:
        """Waits until everything has arrived."""
        for waiting in self._under_way.values():
            while waiting:
                waiting.popleft()[0].wait()


class Receiver:
    """The trainer's side: stands in for the layers below the cut, like `FrozenPrefix`.

    Args:
        reader: of the model that trains.
        depth: decoder layers that ran elsewhere.
        pieces: all that will come for this rank, in order.
        cache: keep what has come for later epochs.
        ahead: receives that are posted before they are needed: a late one exposes the link.
    """

    def __init__(self, reader: ImageFeatures, depth: int, pieces: Iterable[Piece], cache: bool, ahead: int):
        self.reader, self.depth, self.cache, self.ahead = reader, depth, cache, ahead
        self.stack = decoder_layers(reader.model)[1]
        embedding = reader.model.get_input_embeddings().weight  # type: ignore[operator]
        self._width, self._dtype = int(embedding.shape[1]), embedding.dtype
        self._pieces = iter(pieces)
        self._posted: deque[tuple[Piece, Tensor, Any]] = deque()
        self._kept: dict[str, Tensor] = {}

    def admit(self, samples: Sequence[Sample]) -> None:
        """Nothing to decide here: what comes was decided by the plan."""

    @contextmanager
    def replay(self, batch: Batch, inputs: dict[str, Any]) -> Iterator[None]:
        """Inside, a forward pass over `inputs` starts above the cut."""
        missing = {s.key for s in batch.samples} - self._kept.keys()
        while missing:
            missing -= self._arrive()
        hidden = together([self._kept[s.key] for s in batch.samples], batch.input_ids.shape[1])
        if not self.cache:
            self._kept.clear()
        device = next(self.reader.model.parameters()).device
        with entering(list(self.stack), self.depth, hidden.to(device)):
            yield

    def _arrive(self) -> set[str]:
        """Waits for the next piece; gives what it brought."""
        self._post()
        piece, hidden, work = self._posted.popleft()
        work.wait()
        self._post()
        self._kept |= {s.key: row[: len(s)].clone() for s, row in zip(piece.samples, hidden, strict=True)}
        return {s.key for s in piece.samples}

    def _post(self) -> None:
        while len(self._posted) < self.ahead and (piece := next(self._pieces, None)) is not None:
            longest = max(map(len, piece.samples))
            hidden = torch.empty(len(piece.samples), longest, self._width, dtype=self._dtype)
            self._posted.append((piece, hidden, dist.irecv(hidden, piece.source)))
