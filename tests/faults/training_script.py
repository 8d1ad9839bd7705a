"""Trains the tiny model in children that are killed, and prints what happened as JSON.

Usage: training_script.py FOLDER KILLS SEED. Run by test_kill.py in a process of its own, because it forks: the imports
of torch and transformers, seconds long, are then paid once and not for each of the children. A child is a real process
and dies by a real SIGKILL. FOLDER/data is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import tiny
from contextlora.config import TrainConfig
from contextlora.lora import adapter
from contextlora.training import checkpoint
from contextlora.training.loop import train
from contextlora.training.track import Tracker

CONFIG = {
    "epochs": 3,
    "lr": 1e-2,
    "checkpoint_every": 2,
    "layers": "top 2/3",
    "context": "predicted",
    "frozen_ratio": 0.5,
}
# Where a child waits to be killed: before or after the n-th call of a function within `checkpoint.save`, or around the
# saving of the adapter, when all is learnt.
POINTS = ["half a file", "before _seal", "before sync", "before rename", "after rename", "adapter", "clear"]


def work(out: Path) -> None:
    model, processor = tiny.llama(torch.bfloat16)
    train(
        model,
        processor,
        tiny.graph(),
        data=out.parent / "data",
        out=out,
        config=TrainConfig(**CONFIG),
        resume=True,
        tracker=Tracker(out, quiet=True),
    )


def digest(out: Path) -> str:
    found = hashlib.sha256()
    for path in sorted((out / "adapter" / "tasks").rglob("*.safetensors")):
        found.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return found.hexdigest()


def arm(point: str, skip: int, ready: Path) -> None:
    """Makes this process wait at a point, after `skip` calls have passed it."""
    count = [0]

    def wait(*_: object) -> None:
        count[0] += 1
        if count[0] > skip:
            ready.touch()
            time.sleep(60)

    def around(original, before=True):
        def call(*args, **kwargs):
            if before:
                wait()
            result = original(*args, **kwargs)
            if not before:
                wait()
            return result

        return call

    if point == "half a file":
        save_file = checkpoint.save_file

        def half(tensors, path):
            save_file(tensors, path)
            if count[0] >= skip:
                whole = Path(path).read_bytes()
                Path(path).write_bytes(whole[: len(whole) // 2])
            wait()

        checkpoint.save_file = half
    elif point in ("before _seal", "before sync"):
        name = point.split()[1]
        setattr(checkpoint, name, around(getattr(checkpoint, name)))
    elif point in ("before rename", "after rename"):
        Path.rename = around(Path.rename, point == "before rename")
    elif point == "adapter":
        adapter.Adapter.save = around(adapter.Adapter.save)
    elif point == "clear":
        real, checkpoint.clear = checkpoint.clear, lambda folder: (wait() if done(folder) else None, real(folder))
    else:
        raise AssertionError(point)


def done(folder: Path) -> bool:
    return (folder.parent / "adapter").exists()


def spawn(out: Path, point: str | None, skip: int, ready: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        if point:
            arm(point, skip, ready)
        work(out)
        code = 0
    except BaseException as e:  # told to the test, which expects none
        (out.parent / "error").write_text(f"{type(e).__name__}: {e}")
    finally:
        os._exit(code)


def await_end(pid: int, ready: Path, seconds: float) -> bool:
    """Waits until the child is at its point, or for `seconds`; whether it ended by itself before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not ready.exists():
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng, ready = random.Random(seed), folder / "ready"
    began = time.monotonic()
    os.waitpid(spawn(folder / "straight", None, 0, ready), 0)
    duration = time.monotonic() - began
    expected = digest(folder / "straight")
    places = POINTS if kills > len(POINTS) else ["half a file", "before rename"]
    todo: list[str | None] = [*places, *[None] * (kills - len(places))]
    rng.shuffle(todo)
    report = {"inside": 0, "outside": 0, "runs": 0, "wrong": 0, "by point": dict.fromkeys(places, 0)}
    out = folder / "run"
    while True:
        ready.unlink(missing_ok=True)
        point, skip = (todo[-1], rng.randrange(2)) if todo else (None, 0)
        pid = spawn(out, point, skip if point not in ("adapter", "clear") else 0, ready)
        if not await_end(pid, ready, 60 if point or not todo else rng.uniform(0, duration)):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            todo.pop()
            report["inside" if point else "outside"] += 1
            if point:
                report["by point"][point] += 1
            continue
        report["runs"] += 1  # it came to its end, before the kill or because there is none left
        report["wrong"] += digest(out) != expected
        if not todo:
            break
        shutil.rmtree(out)
    print(json.dumps({**report, "seconds": round(duration, 2)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
