"""Accuracy per task of the embedded model on one data folder, with the linear probe beside it.

python benchmarks/accuracy.py DATA --split test --out runs/accuracy [--align 1.0] [--set epochs=4 --set lr=1e-3 ...]

Trains on the folder's split "train" (aligning the projector on it first where --align gives epochs), reads --split once
and prints majority class, logistic regression on the same frozen features, and the trained model with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from linear_probe import probe

from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder
from contextlora.data.records import load_examples
from contextlora.evaluation.evaluate import evaluate
from contextlora.graph import TaskGraph
from contextlora.models import load_model
from contextlora.models.inputs import ImageFeatures
from contextlora.strict import parse_yaml
from contextlora.training.align import align
from contextlora.training.loop import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--align", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    settings = {k: parse_yaml(v) for k, v in (s.split("=", 1) for s in args.set)}
    config = TrainConfig.model_validate(settings)
    graph = TaskGraph.load(args.data / "graph.yaml")
    start = time.perf_counter()
    model, processor = load_model("smol")
    if args.align:
        align(model, processor, load_examples(args.data, graph, split="train"), epochs=args.align)
        print(f"aligned after {time.perf_counter() - start:.0f} s", flush=True)
    reader = ImageFeatures(model, Encoder(processor, graph))
    train(model, processor, graph, data=args.data, out=args.out, config=config, features=reader)
    trained = time.perf_counter() - start
    print(f"trained after {trained:.0f} s", flush=True)
    result = evaluate(model, processor, graph, data=args.data, split=args.split, features=reader)
    probes = probe(args.data, args.split)
    rows = []
    print(f"{'task':14s} {'majority':>8s} {'probe':>6s} {'model':>6s}  95 % interval")
    for task, a in result.accuracy.items():
        majority, linear = (float(probes[task][k]) for k in ("majority", "probe"))
        rows.append({"task": task, "majority": majority, "probe": linear, **vars(a)})
        print(f"{task:14s} {majority:8.3f} {linear:6.3f} {a.mean:6.3f}  {a.low:.3f} to {a.high:.3f}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{trained:.0f} s to train, peak {memory:.1f} GiB, {torch.get_num_threads()} threads")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "accuracy.json").write_text(
        json.dumps({"data": args.data.name, "seconds": trained, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
