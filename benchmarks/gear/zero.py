"""DeepSpeed: ZeRO-1 and ZeRO-3 on the slices, and its PipelineModule; on gloo, with torch's AdamW: nothing compiles."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from model import Setting
from padding import Device
from plain import apart, loss, tensors
from rivals import Alone, shares
from torch import Tensor, nn

from contextlora.models.inputs import ImageFeatures

QUIET = {"steps_per_print": 1 << 30, "gradient_clipping": 0.0, "wall_clock_breakdown": False}


def deepspeed() -> Any:
    """The library, on CPU; only where it is asked for."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as library

    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # shared memory is not what is measured, and it would be compiled for a minute
    library.init_distributed(dist_backend="gloo", verbose=False)
    return library


class Zero(Alone):
    """ZeRO over shares of the batch: 1 divides the optimizer's state, 3 weights and gradients too."""

    def __init__(self, setting: Setting, reader: ImageFeatures, device: Device, *, stage: int, by_speed: bool):
        super().__init__(setting, reader, device)
        library = deepspeed()
        self.count, self.by_speed = len(setting.fleet.devices), by_speed
        self.place = list(setting.fleet.devices).index(device.name)
        divided = {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": False,
            "stage3_param_persistence_threshold": 0,
        }
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": divided,
            "zero_allow_untested_optimizer": True,
        }
        self.engine, *_ = library.initialize(
            model=self.loss,
            model_parameters=list(self.parameters.values()),
            optimizer=self.optimizer,
            config={**config, **QUIET},
        )

    def gradients(self, update: int) -> None:
        mine = shares(self.setting, self.all[update], self.by_speed)[self.place]
        self.engine.backward(self.engine(mine) * self.count)  # it divides by the number of devices

    def check(self, reference: Mapping[str, Tensor]) -> float:
        from deepspeed.utils import safe_get_full_grad

        self.gradients(0)
        worst = apart({n: safe_get_full_grad(p) for n, p in self.parameters.items()}, reference)
        self.engine.step()
        return worst

    def updates(self) -> Iterator[float]:
        for update in range(len(self.all)):
            self.gradients(update)
            self.engine.step()
            yield time.perf_counter()


class _Unit(nn.Module):
    """One unit of the model as PipelineModule wants it; the mask follows from how many micro-batches have passed."""

    def __init__(self, rival: Pipe, unit: int):
        super().__init__()
        core, self.rival, self.passed = rival.model.model, [rival], 0
        layers = len(core.layers)  # type: ignore[arg-type, union-attr]
        self.embed = core.embed_tokens if unit == 0 else None  # type: ignore[union-attr]
        self.layer = core.layers[unit - 1] if 0 < unit <= layers else None  # type: ignore[index, union-attr]
        self.norm = core.norm if unit > layers else None  # type: ignore[union-attr]
        self.rotary = core.rotary_emb  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        rival = self.rival[0]
        ids, tasks = rival.micro[self.passed % len(rival.micro)]
        self.passed += 1
        rival.mask.now, rival.device.samples = rival.mask.rows[tasks], len(ids)
        if self.embed is not None:
            return self.embed(x).requires_grad_()  # it wants a gradient to come back to every stage
        if self.layer is not None:
            return self.layer(x, position_embeddings=self.rotary(x, torch.arange(x.shape[1])[None]))
        return loss(rival.setting, rival.model, self.norm(x), ids)


class Pipe(Alone):
    """PipelineModule: 1F1B over equally many units a device, micro-batches of k samples."""

    def __init__(self, setting: Setting, reader: ImageFeatures, device: Device, *, k: int):
        super().__init__(setting, reader, device)
        library = deepspeed()
        from deepspeed.pipe import PipelineModule

        self.device = device
        count, units = len(self.all[0]) // k, setting.problem.units
        self.micro = [tensors(setting, s[i : i + k]) for s in self.all for i in range(0, len(s), k)]
        module = PipelineModule(
            layers=[_Unit(self, u) for u in range(units)],
            num_stages=len(setting.fleet.devices),
            loss_fn=lambda out, _: out.sum() * count,  # it takes the mean over micro-batches
            partition_method="uniform",
        )
        self.learn(module.parameters())
        self.optimizer = torch.optim.SGD(self.optimizer.param_groups[0]["params"], lr=1.0)
        config = {"train_micro_batch_size_per_gpu": k, "gradient_accumulation_steps": count}
        self.engine, *_ = library.initialize(
            model=module,
            model_parameters=self.optimizer.param_groups[0]["params"],
            optimizer=self.optimizer,
            config={**config, **QUIET},
        )
        self.data = iter([(ids, ids) for ids, _ in self.micro] * 2)

    def check(self, reference: Mapping[str, Tensor]) -> float:
        """From what a step of plain gradient descent with rate 1 changes, since the engine keeps no gradients."""
        before = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.engine.train_batch(self.data)
        worst = apart({n: before[n] - p.detach() for n, p in self.parameters.items()}, reference)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        return worst

    def updates(self) -> Iterator[float]:
        for _ in self.all:
            self.engine.train_batch(self.data)
            yield time.perf_counter()
