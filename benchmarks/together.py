"""What several devices' mini-batches in one forward pass could gain: seconds a sample of one device's update, by batch.

python benchmarks/together.py DATA [--layers "top 1/5"] [--rounds 5]

A joint pass over n devices of b samples each costs at least a pass of one device over n b samples, since only the
blocks differ; so the ratio of two rows bounds the gain from above. Batches take turns, so that a busy machine slows
all alike. DATA: a data folder with its graph.yaml; the first task is trained. See `together` in docs/so-lora.md.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from contextlora.federated.federation import Federation
from contextlora.federated.local import Local, local_run
from contextlora.federated.methods import first_local
from contextlora.federated.setup import graph_of_devices, open_reader, shares
from contextlora.graph import TaskGraph
from contextlora.strict import validate
from contextlora.training.loop import known_samples
from contextlora.training.prefix import FrozenPrefix

BATCHES = (1, 2, 4, 8, 16)
SAMPLES = 32  # of one measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--layers", default="top 1/5")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TaskGraph.load(f"{options.data}/graph.yaml").names[0]
    given = {
        "data": options.data,
        "devices": {"one": task},
        "train": {"layers": options.layers},
        "max_samples": SAMPLES,
    }
    settings = validate(Federation, given, "benchmark")
    reader, (mine,) = open_reader(settings, graph_of_devices(settings)), shares(settings).values()
    below = FrozenPrefix(reader, 2 << 30)
    below.admit([s for s in known_samples(reader, mine, settings.train) if s.task == task])
    first = first_local(reader, mine, task, settings, below)

    def seconds(batch: int, start: Local) -> float:
        config = settings.train.model_copy(update={"batch_size": batch})
        count = SAMPLES // batch
        begun = time.process_time()
        local_run(reader, mine, start, config, updates=count, total=count, prefix=below)
        return (time.process_time() - begun) / (count * batch)

    seconds(1, first)  # fills the prefix
    taken = {b: [] for b in BATCHES}
    for _ in range(options.rounds):
        for batch in BATCHES:
            taken[batch].append(seconds(batch, first))
    alone = statistics.median(taken[1])
    print("| samples at once | ms a sample | x one by one |\n|---|---|---|")
    for batch, found in taken.items():
        each = statistics.median(found)
        print(f"| {batch} | {each * 1e3:.1f} | {alone / each:.2f} |")


if __name__ == "__main__":
    main()
