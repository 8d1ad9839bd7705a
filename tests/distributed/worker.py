"""One device of a plan on a tiny model; started by torchrun in tests. Writes what it ended with."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import tiny
from contextlora.config import TrainConfig
from contextlora.gear import launch
from contextlora.gear.plan import Plan
from contextlora.lora.attach import attach, gated_layers
from contextlora.training.track import Tracker


def dies_in(stage: int) -> None:
    """This process is killed when it begins a stage."""
    begun = launch._work

    def work(*args: object) -> None:
        if args[-1] == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        begun(*args)  # type: ignore[arg-type]

    launch._work = work


def main(order: Path) -> None:
    torch.set_num_threads(1)
    what = json.loads(order.read_text())
    plan = Plan.load(what["plan"])
    dist.init_process_group("gloo")
    me = plan.devices[dist.get_rank()]
    dtype = getattr(torch, what["dtype"])
    model, processor = tiny.llama(dtype)
    attach(model, tiny.graph(), layers=what["config"].get("layers", "all"), dtype=dtype)
    if what.get("dies", {}).get("device") == me:
        dies_in(what["dies"]["stage"])
    out = Path(what["out"])
    config = TrainConfig(**what["config"])
    tracker = Tracker(out / me, quiet=True)
    launch.train_planned(
        model,
        processor,
        tiny.graph(),
        plan,
        me=me,
        data=what["data"],
        out=out,
        config=config,
        tracker=tracker,
        resume=what["resume"],
    )
    layers = gated_layers(model).items()
    blocks = {f"{n}|{s}": t.contiguous() for n, la in layers for s, t in la.tensors().items()}
    save_file(blocks, out / f"{me}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
