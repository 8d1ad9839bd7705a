"""One device of a plan on a tiny model; started by torchrun in tests. Writes what it ended with."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import tiny
from contextlora.config import TrainConfig
from contextlora.gear import launch
from contextlora.gear.lean import held_bytes
from contextlora.gear.plan import Plan
from contextlora.gear.progress import Keeper
from contextlora.gear.runtime import TeamStage
from contextlora.lora.attach import attach, gated_layers
from contextlora.training.track import Tracker


def dies_in(stage: int, update: int | None = None, saving: int | None = None) -> None:
    """This process is killed when it begins a stage, or an update of it, or is about to keep what it has after one."""
    begun, kept = launch._Work.run, Keeper.save

    def run(work: launch._Work, watch: Tracker, keeper: Keeper) -> None:
        if keeper.stage == stage:
            if update is None and saving is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if work.stage is not None:
                own = work.stage.update
                work.stage.update = lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == update else own(at)  # type: ignore[assignment, method-assign]
        begun(work, watch, keeper)

    def save(keeper: Keeper, trained: TeamStage, at: int, number: int) -> None:
        if (keeper.stage, at) == (stage, saving):
            os.kill(os.getpid(), signal.SIGKILL)
        kept(keeper, trained, at, number)

    launch._Work.run, Keeper.save = run, save  # type: ignore[method-assign]


def recorded() -> list[int]:
    """Bytes of weights that this device holds, stage after stage, as they will be once it has trained."""
    found: list[int] = []
    freed = launch.release

    def release(model: nn.Module, keep: Iterable[int]) -> None:
        freed(model, keep)
        found.append(held_bytes(model))

    launch.release = release  # type: ignore[attr-defined]
    return found


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
        dies_in(**{k: v for k, v in what["dies"].items() if k != "device"})
    out, held = Path(what["out"]), recorded()
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
        lean=True,
    )
    (out / f"{me}.json").write_text(json.dumps(held))
    layers = gated_layers(model).items()
    blocks = {f"{n}|{s}": t.contiguous() for n, la in layers for s, t in la.tensors().items()}
    save_file(blocks, out / f"{me}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
