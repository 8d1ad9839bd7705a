"""Many simulated devices on one resident base model: seconds a round, and the memory that they take beside it.

python benchmarks/federation.py [--devices 200] [--rounds 2] [--model smol] [--together 4]

Four tasks of sums, drawn here; each device has a share of its task's. One update of one sample a round, whole masks and
values in the first one, an exchange between all clusters in the second. What is measured is the federation, not what is
learnt. Seconds of processor are those of this process, on one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import torch
import yaml

from contextlora.federated.federation import load_federation
from contextlora.federated.layer import sparse_layers
from contextlora.federated.memory import resident
from contextlora.federated.setup import graph_of_devices, open_reader
from contextlora.federated.simulate import simulate

TASKS = {"odd": "odd", "more": "more than ten", "three": "a multiple of three", "low": "low in its last digit"}
WIDTH = 8  # examples of each device


def write_data(folder: Path, devices: int) -> None:
    rng, lines = random.Random(0), []
    for i in range(devices * WIDTH):
        a, b = rng.randrange(10), rng.randrange(10)
        truth = {"odd": (a + b) % 2, "more": a + b > 10, "three": (a + b) % 3 == 0, "low": (a + b) % 10 < 5}
        answers = {task: ["yes" if value else "no"] for task, value in truth.items()}
        lines.append(
            {"id": str(i), "split": "train", "answers": answers, "questions": dict.fromkeys(TASKS, f"{a} + {b}?")}
        )
    folder.mkdir()
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tasks = {t: {"question": f"Is the sum {what}?", "options": ["no", "yes"]} for t, what in TASKS.items()}
    (folder / "graph.yaml").write_text(yaml.safe_dump({"name": "sums", "rank": 8, "tasks": tasks}))


def write_federation(folder: Path, devices: int, rounds: int, model: str, together: int) -> Path:
    settings = {
        "model": model,
        "rounds": rounds,
        "updates": 1,
        "together": together,
        "exchange_every": 2,
        "train": {"batch_size": 1, "layers": "top 1/5", "prefix_cache_gb": 0},
        "slices": {"calibration": 1, "allocation": "uniform"},
        "radio": {"cast": "broadcast"},
        "devices": {f"d{i:03d}": [*TASKS][i % len(TASKS)] for i in range(devices)},
        "out": "run",
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(settings))
    return folder / "federation.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="smol")
    parser.add_argument("--together", type=int, default=1, help="devices in one forward pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_data(folder / "data", options.devices)
        config = write_federation(folder, options.devices, options.rounds, options.model, options.together)
        settings = load_federation(config)
        reader = open_reader(settings, graph_of_devices(settings))
        base = sum(t.nbytes for t in (*reader.model.parameters(), *reader.model.buffers()))
        blocks = sum(t.nbytes for layer in sparse_layers(reader.model).values() for t in (layer.A, layer.B, layer.mask))
        busy = time.process_time()
        peers = simulate(settings, silent=True, reader=reader, say=print)
        busy = time.process_time() - busy
        found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        kept = sum(f.stat().st_size for f in max((folder / "run" / "kept").iterdir()).iterdir())
    active, memory = sum(p.local.own.active for p in peers.values()), resident(peers.values())
    asked = f"--devices {options.devices} --rounds {options.rounds} --together {options.together}"
    print(f"`python benchmarks/federation.py {asked}`\n")
    print(f"{options.devices} devices, {active:,} active entries; {len(found[-1]['clusters'])} clusters")
    print(f"processor: {busy / options.rounds:.1f} s a round, calibration included")
    print(f"base model with {blocks / 1e6:.0f} MB of blocks: {base / 1e6:.0f} MB")
    print("devices: " + ", ".join(f"{what} {n / 1e6:.1f} MB" for what, n in memory.items()))
    print(f"that is {sum(memory.values()) / active:.1f} bytes an active entry; a checkpoint is {kept / 1e6:.1f} MB")
    print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
