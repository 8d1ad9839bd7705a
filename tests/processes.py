"""Plans carried out by processes of their own on a tiny model: for tests of what they end with."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

import tiny
from contextlora.config import TrainConfig
from contextlora.gear.plan import Group, Part, Plan, PlannedGroup, PlannedStage, Predicted
from contextlora.lora.attach import attach, gated_layers
from contextlora.training.loop import train
from contextlora.training.track import Tracker

UNITS = 5  # inputs, three layers, head
TESTS = Path(__file__).parent
NOTHING = Predicted(step=0.0, cached_step=0.0, seconds=0.0, air=0.0, devices={})


def part(device, start=0, stop=UNITS, seconds=1.0):
    return Part(device=device, start=start, stop=stop, seconds=seconds)


def plan(*stages):
    """A plan from its groups, stage by stage."""
    made = [
        PlannedStage(groups=[PlannedGroup(group=g, predicted=NOTHING) for g in s], exchange=0, seconds=0)
        for s in stages
    ]
    return Plan(planner="by hand", fleet="test", model="tiny", units=UNITS, stages=made, seconds=0.0)


ROOTS, CHILD = ("weather", "light"), ("action",)
A, B, C = "a", "b", "c"


def pipeline(*cuts, tasks=ROOTS, devices=(A, B, C), size=2, **more):
    """Trainers of neighbouring units, one after another."""
    ends = list(itertools.pairwise(cuts))
    return Group(
        tasks=tasks,
        form="pipeline",
        trainers=[part(d, a, b) for d, (a, b) in zip(devices, ends, strict=False)],
        size=size,
        **more,
    )


def alone(words, folder, dtype, **config):
    model, processor = tiny.llama(dtype)
    attach(model, tiny.graph(), layers=config.get("layers", "all"), dtype=dtype)
    train(
        model,
        processor,
        tiny.graph(),
        data=words,
        out=folder,
        config=TrainConfig(**config),
        tracker=Tracker(folder, quiet=True),
    )
    return {f"{n}|{s}": t.clone() for n, la in gated_layers(model).items() for s, t in la.tensors().items()}


def ordered(tmp_path, words, stages, dtype, config, **more):
    """Writes a plan and the order for its workers."""
    made = plan(*stages)
    made.save(tmp_path / "plan.json")
    order = {"plan": str(tmp_path / "plan.json"), "data": str(words), "out": str(tmp_path), "config": config}
    (tmp_path / "order.json").write_text(json.dumps({**order, "dtype": dtype, "resume": False, **more}))
    return made


def environment(**more):
    path = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **{k: str(v) for k, v in more.items()}}


WORKER = str(TESTS / "distributed" / "worker.py")


def together(tmp_path, words, stages, dtype, resume=False, **config):
    """What every device ended with."""
    made = ordered(tmp_path, words, stages, dtype, config, resume=resume)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(len(made.devices)), WORKER, str(tmp_path / "order.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return {d: load_file(tmp_path / f"{d}.safetensors") for d in made.devices}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tiny", "contextlora.gear.launch"])  # torch and transformers are imported once for all


class Device:
    """A worker in a process of its own, forked from one that has done nothing but import what it needs."""

    def __init__(self, order, said, **env):
        self._said = said
        self._process = FORKS.Process(target=_work, args=(order, said, {k: str(v) for k, v in env.items()}))
        self._process.start()

    def wait(self, seconds=120):
        """What it has written; kills it if it has not ended by then."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise TimeoutError(self._said.read_text()[-3000:])
        return self._said.read_text()

    @property
    def returncode(self):
        return self._process.exitcode


def _work(order, said, env):
    os.environ.update(env)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [WORKER, str(order)]
    runpy.run_path(WORKER, run_name="__main__")


def apart(tmp_path, devices):
    """Starts every device by itself, as on machines of their own: no agent that ends the others."""
    shared = {"WORLD_SIZE": len(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Device(tmp_path / "order.json", tmp_path / f"{d}.said", RANK=i, **shared) for i, d in enumerate(devices)]


def ends(tmp_path, words, stages, dtype, resume=False, dies=None, **config):
    """As `together`, but started one by one; with `dies`, what the others said when that device was killed."""
    tmp_path.mkdir(exist_ok=True)
    made = ordered(tmp_path, words, stages, dtype, config, resume=resume, **({"dies": dies} if dies else {}))
    workers = apart(tmp_path, made.devices)
    said = [w.wait() for w in workers]
    if dies:
        assert workers[made.devices.index(dies["device"])].returncode == -signal.SIGKILL
        return "\n".join(said)
    assert not any(w.returncode for w in workers), said
    return {d: load_file(tmp_path / f"{d}.safetensors") for d in made.devices}
