"""One run: its parameters, optimizer, schedule and order of samples. Nothing here is global."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contextlora.config import TrainConfig
from contextlora.data.collate import Sample
from contextlora.data.sampler import epoch_batches
from contextlora.errors import RunError


class Order:
    """Which samples come in which update, of one task or several in one run.

    Attributes:
        total: number of updates, epochs x ceil(samples / (batch_size x accumulate)).
    """

    def __init__(self, tasks: Sequence[str], samples: Sequence[Sample], config: TrainConfig):
        for task in {*tasks} - {s.task for s in samples}:
            raise RunError("E510", f"task '{task}' has no training sample; add answers or leave it out (--tasks)")
        self.tasks, self.samples, self.config = tuple(tasks), samples, config
        self.name = "+".join(tasks)
        self.lengths = [len(s) for s in samples]
        self.per_epoch = math.ceil(len(samples) / (config.batch_size * config.accumulate))
        self.total = config.epochs * self.per_epoch
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def micro_batches(self, update: int) -> list[list[Sample]]:
        """The micro-batches of one update."""
        epoch, at = divmod(update, self.per_epoch)
        c = self.config
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_batches(self.lengths, c.batch_size, seed=c.seed, task=self.name, epoch=epoch))
        batches = self._epoch[1][at * c.accumulate : (at + 1) * c.accumulate]
        return [[self.samples[i] for i in batch] for batch in batches]


class TaskRun(Order):
    """The training of one task, or with some methods of several that share one optimizer.

    Clipping, learning rate and optimizer state are the task's own, so that tasks which train together do what they
    would do one after another (SEMANTICS section 2).
    """

    def __init__(
        self, tasks: Sequence[str], samples: Sequence[Sample], parameters: list[nn.Parameter], config: TrainConfig
    ):
        super().__init__(tasks, samples, config)
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def lr(self, update: int) -> float:
        """Linear warm-up, then cosine decay to zero."""
        warmup = math.ceil(self.config.warmup_ratio * self.total)
        if update < warmup:
            return self.config.lr * (update + 1) / warmup
        done = (update - warmup) / max(1, self.total - warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * done))

    def clip(self, update: int) -> None:
        """Clips the task's gradient norm. Raises RunError E511 if it is not finite, before any task was changed."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise RunError("E511", f"gradient of task '{self.name}' is {norm} at update {update}; nothing applied")

    def step(self, update: int) -> None:
        """Applies the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(update)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # --- state for checkpoints ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Optimizer state as named tensors."""
        return {
            f"optimizer|{self.name}|{i}|{key}": value
            for i, p in enumerate(self.parameters)
            for key, value in self.optimizer.state[p].items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        for name, value in tensors.items():
            if name.startswith(f"optimizer|{self.name}|"):
                i, key = name.split("|")[2:]
                p = self.parameters[int(i)]
                self.optimizer.state[p][key] = value.to(p.device, copy=True)
