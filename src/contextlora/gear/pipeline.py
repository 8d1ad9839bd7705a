"""A pipeline's trainers: a contiguous part of the layers each, run by torch.distributed.pipelining on our schedule.

Only hidden states cross a cut. Everything else (prompts, masks, tasks) every device knows from the walk, so a stage is
given the number of the micro-batch alone. Micro-batches of a step are padded to one shape, and to one size by samples
without an answer, which lose nothing and teach nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from contextlora.data.collate import Batch, collate
from contextlora.errors import RunError
from contextlora.gear.runtime import Team, TeamStage, active, micro_batches
from contextlora.gear.schedule import HOIST, pipeline_csv
from contextlora.lora.attach import decoder_layers
from contextlora.models.inputs import answer_nll
from contextlora.models.prompts import entering, lowest_block
from contextlora.training.prefix import hidden_before
from contextlora.training.step import TaskRun


class PipelineTeamStage(TeamStage):
    """A stage whose layers are divided among trainers."""

    def __init__(self, team: Team, *given: Any):
        super().__init__(team, *given)
        parts = team.group.trainers
        self.place = next(i for i, p in enumerate(parts) if p.device == team.me)
        self.count, self.part = len(parts), parts[self.place]
        stack = decoder_layers(self.model)[1]
        self.first, self.stop = max(0, self.part.start - 1), min(self.part.stop - 1, len(stack))
        mine = {id(p) for layer in stack[self.first : self.stop] for p in layer.parameters() if p.requires_grad}
        self.places = {r.name: [i for i, p in enumerate(r.parameters) if id(p) in mine] for r in self.runs}
        self.runs = [_only(r, mine) for r in self.runs]
        self.lowest = lowest_block(self.model)
        self.layers = _Part(self)
        self._engine: tuple[tuple[int, ...], Any] = ((), None)

    def update(self, update: int) -> dict[str, float]:
        """As in a single process; each trainer steps its own layers' ranks, clipped by the norm over all."""
        runs = active(self.runs, update, self.done)
        losses = self._gradients(runs, update)
        norms = self._norms(runs, losses, update)
        for r in runs:
            limit = r.config.max_grad_norm
            if limit and norms[r.name] > limit:
                for p in r.parameters:
                    assert p.grad is not None
                    p.grad.mul_(limit / (norms[r.name] + 1e-6))  # as clip_grad_norm_ has it
            if r.parameters:
                r.step(update)
        return losses

    def _norms(self, runs: Sequence[TaskRun], losses: dict[str, float], update: int) -> dict[str, float]:
        """Gradient norms over all trainers. Raises RunError E511, E515 on all of them, E529 here."""
        squares = torch.zeros(len(runs), dtype=torch.float64)
        for i, r in enumerate(runs):
            if missing := sum(p.grad is None for p in r.parameters):
                raise RunError("E529", f"{missing} of {len(r.parameters)} parameters of '{r.name}' got no gradient")
            squares[i] = sum((p.grad.double().square().sum() for p in r.parameters if p.grad is not None), squares[i])
        dist.all_reduce(squares, group=self.team.trainers)
        norms = dict(zip((r.name for r in runs), squares.sqrt().tolist(), strict=True))
        for name, value in losses.items():
            if not torch.isfinite(torch.tensor(value)):
                raise RunError("E515", f"loss of task '{name}' is {value} at update {update}; nothing applied")
        for name, norm in norms.items():
            if not torch.isfinite(torch.tensor(norm)):
                raise RunError("E511", f"gradient of task '{name}' is {norm} at update {update}; nothing applied")
        return norms

    def _gradients(self, runs: Sequence[TaskRun], update: int) -> dict[str, float]:
        batches = micro_batches(runs, update, self.team.group.size)
        tokens = self._tokens(runs, batches)
        size, width = max(map(len, batches)), max(len(s) for b in batches for s in b)
        pad = self.reader.encoder.pad
        full = [[*b, *[replace(b[0], answer=())] * (size - len(b))] for b in batches]
        self.layers.begin([collate(b, pad, width) for b in full], tokens)
        shape = (len(batches), size, width)
        if self._engine[0] != shape:  # torch's engine is for one shape; to make one takes messages to and fro
            self._engine = (shape, self._made(*shape))
        rows = torch.arange(len(batches) * size)
        args = (rows,) if self.place == 0 else ()
        last = self.place == self.count - 1
        self._engine[1].step(*args, target=rows if last else None, return_outputs=False, number=rows // size)
        found = torch.tensor([self.layers.losses.get(n, 0.0) for n in tokens], dtype=torch.float64)
        dist.all_reduce(found, group=self.team.trainers)  # only the last trainer knows them
        return dict(zip(tokens, found.tolist(), strict=True))

    def _made(self, micro: int, size: int, width: int) -> Any:
        """torch's engine for updates of `micro` micro-batches (size, width), with our schedule."""
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        device, group = embedding.device, self.team.trainers

        def hidden(boundary: int) -> Tensor:
            grad = boundary > self.lowest  # in decoder layers: some below it learn
            shape = size, width, embedding.shape[1]
            return torch.empty(shape, dtype=embedding.dtype, device=device, requires_grad=grad)

        given = (torch.arange(size, device=device),) if self.place == 0 else (hidden(self.first),)
        last = self.place == self.count - 1
        made = torch.empty(size, device=device, requires_grad=True) if last else hidden(self.stop)
        stage = PipelineStage(
            self.layers, self.place, self.count, device, input_args=given, output_args=(made,), group=group
        )
        runtime: Any = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            [stage], micro, loss_fn=_sum, scale_grads=False
        )
        ahead = 0 if embedding.is_cuda else HOIST  # NCCL runs what it is given in that order
        rows_of = pipeline_csv(self.team.group, micro, self.lowest + 1, ahead).splitlines()
        ranks = [self.team.ranks[p.device] for p in self.team.group.trainers]
        text = "\n".join(row for _, row in sorted(zip(ranks, rows_of, strict=True)))  # torch has a row for each rank
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "schedule.csv"
            path.write_text(text)
            runtime._load_csv(str(path), format="compute_comms")
        return runtime


def _sum(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()


def _only(run: TaskRun, mine: set[int]) -> TaskRun:
    """The run with those of its parameters that lie on this device; a part without any has no optimizer."""
    run.parameters = [p for p in run.parameters if id(p) in mine]
    if run.parameters:
        return TaskRun(run.tasks, run.samples, run.parameters, run.config)
    return run


class _Part(nn.Module):
    """What torch's stage calls: this device's layers for one micro-batch of the update that was begun.

    Attributes:
        losses: on the last trainer, by run.
    """

    def __init__(self, stage: PipelineTeamStage):
        super().__init__()
        self._of = [stage]  # in a list: no submodule
        self.begin([], {})

    def begin(self, batches: Sequence[Batch], tokens: dict[str, int]) -> None:
        """Takes up an update: its micro-batches, and answer tokens by run."""
        self._batches, self._tokens = batches, tokens
        self.losses: dict[str, float] = {}

    def forward(self, arrived: Tensor, number: Tensor) -> Tensor:
        """Hidden states for the next trainer, or on the last one every sample's share of the loss, (samples,)."""
        stage, batch = self._of[0], self._batches[int(number[0])]
        model, inputs = stage.model, stage.reader.inputs(batch)
        stack = list(decoder_layers(model)[1])
        entered = stage.prefix.replay(batch, inputs) if stage.place == 0 else entering(stack, stage.first, arrived)
        with model.tasks(batch.tasks, batch.prompt), entered:  # type: ignore[operator]
            if stage.place < stage.count - 1:
                return hidden_before(model, stage.stop, inputs)
            weighted, values = stage.weigh(batch, answer_nll(model, inputs, batch), self._tokens)
        for name, value in values.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        return weighted
