"""What people use today, on the plain model: DDP, and torch's own GPipe and 1F1B."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from model import BYTES, Setting, samples_of
from padding import Device, emulate
from plain import Loss, apart, learning, loss, plain, tensors
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from contextlora.data.collate import Sample
from contextlora.gear.plan import deal
from contextlora.models.inputs import ImageFeatures

BUCKET = 25.0  # MB of gradients in one message, DDP's own default: here by the same scale as all bytes


class Alone:
    """The whole batch on one device."""

    def __init__(self, setting: Setting, reader: ImageFeatures, device: Device, *, pad: bool = True):
        self.setting, self.all = setting, samples_of(setting, reader)
        self.model, self.mask = plain(setting, reader)
        self.loss: nn.Module = Loss(setting, self.model, self.mask)
        self.learn()
        if pad:
            emulate(self.model, device)

    def learn(self, mine: Iterable[nn.Parameter] | None = None) -> None:
        """Gives all that learns an optimizer, or what is both that and mine."""
        here = None if mine is None else {id(p) for p in mine}
        self.parameters = {n: p for n, p in learning(self.model).items() if here is None or id(p) in here}
        some = list(self.parameters.values()) or [nn.Parameter(torch.zeros(1))]  # a part that is frozen
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(some, lr=1e-4, fused=True)

    def gradients(self, update: int) -> None:
        """Adds up one update's."""
        self.loss(self.all[update]).backward()

    def check(self, reference: Mapping[str, Tensor]) -> float:
        """As in Job."""
        self.gradients(0)
        worst = self.apart(reference)
        self.optimizer.zero_grad()
        return worst

    def apart(self, reference: Mapping[str, Tensor]) -> float:
        """Of what this device has."""
        return apart({n: p.grad for n, p in self.parameters.items()}, reference)

    def updates(self) -> Iterator[float]:
        """As in Job."""
        for update in range(len(self.all)):
            self.gradients(update)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield time.perf_counter()


def shares(setting: Setting, samples: Sequence[Sample], by_speed: bool) -> list[list[Sample]]:
    """Samples by device: equally many, or as many as let all be done at once."""
    speeds = [d.speed or 1.0 for d in setting.fleet.devices.values()]
    counts = deal(len(samples), [1 / s if by_speed else 1.0 for s in speeds])
    rest = iter(samples)
    return [list(itertools.islice(rest, n)) for n in counts]


class Data(Alone):
    """DDP on the slices: every device passes its share of the batch in one go; buckets are summed behind backward."""

    def __init__(self, setting: Setting, reader: ImageFeatures, device: Device, *, by_speed: bool):
        super().__init__(setting, reader, device)
        self.count, self.by_speed = len(setting.fleet.devices), by_speed
        self.place = list(setting.fleet.devices).index(device.name)
        self.loss = DistributedDataParallel(self.loss, forward_sync_buffers=False, bucket_cap_mb=BUCKET / BYTES)

    def gradients(self, update: int) -> None:
        mine = shares(self.setting, self.all[update], self.by_speed)[self.place]
        (self.loss(mine) * self.count).backward()  # DDP divides by the number of devices


class Part(nn.Module):
    """A pipeline stage: units [start, stop)."""

    def __init__(self, rival: Pipeline, start: int, stop: int):
        super().__init__()
        core = rival.model.model
        self.rival, self.layers = [rival], nn.ModuleList(core.layers[max(0, start - 1) : stop - 1])
        self.embed = core.embed_tokens if start == 0 else None
        self.norm, self.rotary = core.norm if stop == len(core.layers) + 2 else None, core.rotary_emb

    def forward(self, x: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """Hidden states, or on the last stage every sample's share of the loss; ids and tasks every device knows."""
        rival = self.rival[0]
        rival.mask.now, rival.device.samples = rival.mask.rows[tasks], len(ids)
        hidden = self.embed(x) if self.embed is not None else x
        places = self.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=places)
        return hidden if self.norm is None else loss(rival.setting, rival.model, self.norm(hidden), ids)


class Pipeline(Alone):
    """torch.distributed.pipelining as it is: GPipe or 1F1B, micro-batches of k samples, given cuts."""

    def __init__(
        self,
        setting: Setting,
        reader: ImageFeatures,
        device: Device,
        *,
        kind: type[ScheduleGPipe] | type[Schedule1F1B],
        stages: Sequence[tuple[str, int, int]],
        k: int,
    ):
        super().__init__(setting, reader, device)
        self.device, self.k = device, k
        self.place = next(i for i, (name, _, _) in enumerate(stages) if name == device.name)
        self.last = self.place == len(stages) - 1
        part = Part(self, *stages[self.place][1:])
        self.learn(part.parameters())
        stage = PipelineStage(part, self.place, len(stages), torch.device("cpu"))
        micro = len(self.all[0]) // k
        self.schedule = kind(stage, micro, loss_fn=lambda out, _: out.sum(), scale_grads=False)

    def gradients(self, update: int) -> None:
        ids, tasks = tensors(self.setting, self.all[update])
        given = (ids,) if self.place == 0 else ()
        self.schedule.step(*given, target=ids if self.last else None, return_outputs=False, ids=ids, tasks=tasks)


def equal_cuts(units: int, devices: Sequence[str]) -> list[tuple[str, int, int]]:
    """As many layers for each device; inputs to the first, head to the last."""
    counts = deal(units - 2, [1.0] * len(devices))
    ends = list(itertools.accumulate([1, *counts]))
    ends[0], ends[-1] = 0, units
    return [(d, a, b) for d, (a, b) in zip(devices, itertools.pairwise(ends), strict=True)]
