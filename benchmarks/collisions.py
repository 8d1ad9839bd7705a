"""How often the slices of devices on one base really collide, beside eq. 19: where docs/so-lora.md has its S_max from.

contextlora init cs --instructions boolq.json --instructions piqa.json ...
python benchmarks/collisions.py cs/data [--share 0.1] [--layers "top 1/5"]

Two devices of the graph's first task, each with half of its data, and one of every other task; max_l S_l of all groups.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from typing import get_args

import numpy as np
import torch

from contextlora.federated.calibration import calibrate
from contextlora.federated.collisions import expected_rates, measured_rates
from contextlora.federated.federation import Federation
from contextlora.federated.local import first_batches
from contextlora.federated.setup import graph_of_devices, open_reader, shares
from contextlora.federated.sparsity import Allocation, first_slice
from contextlora.graph import TaskGraph
from contextlora.strict import validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--layers", default="top 1/5")
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, *others = TaskGraph.load(f"{options.data}/graph.yaml").names
    devices = {f"{first}-1": first, f"{first}-2": first, **{task: task for task in others}}
    given = {"data": options.data, "devices": devices, "train": {"layers": options.layers}}
    settings = validate(Federation, given, "benchmark")
    reader, data, found = open_reader(settings, graph_of_devices(settings)), shares(settings), {}
    for name, task in devices.items():
        batches = first_batches(reader, data[name], task, settings.train, settings.slices.calibration)
        found[name] = calibrate(reader, task, batches, spectra=True)
    print("| allocation | devices | densest layer | eq. 19 | counted |\n|---|---|---|---|---|")
    for how in get_args(Allocation):
        slices = {n: first_slice(c, round(options.share * c.entries), allocation=how) for n, c in found.items()}
        masks = {n: list(s.masks.values()) for n, s in slices.items()}
        sizes = [m.size for m in next(iter(masks.values()))]
        rates = {n: np.array([m.rate for m in of]) for n, of in masks.items()}
        packed = {n: np.concatenate([m.bitmap() for m in of]) for n, of in masks.items()}
        densest = max(r.max() for r in rates.values())
        for count in (2, 3, 4):
            for group in combinations(devices, count):
                expected = expected_rates(np.stack([rates[n] for n in group])).max()
                counted = measured_rates(np.stack([packed[n] for n in group]), sizes).max()
                print(f"| {how} | {', '.join(group)} | {densest:.3f} | {expected:.3f} | {counted:.3f} |")


if __name__ == "__main__":
    main()
