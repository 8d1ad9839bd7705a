"""What the gates cost: a mixed-task gated layer beside the bare frozen linear, and switching tasks beside PEFT.

python benchmarks/layer.py [--rounds 15]

Forward and backward (input gradient; for the gated layer also its blocks' gradients) of one layer, bf16, 16 x 36
tokens, four tasks of rank 8 mixed in the batch. Contenders take turns; ratios within a round, medians reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach
from contextlora.lora.gates import GateState
from contextlora.lora.layer import GatedLinear
from contextlora.models import load_model


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Mean time of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def layer_ratio(d_in: int, d_out: int, rounds: int) -> tuple[float, float]:
    """Median milliseconds of the bare layer, and the median ratio of the gated one to it."""
    graph = TaskGraph.from_dict({"rank": 8, "tasks": {t: {"question": "?"} for t in "abcd"}})
    base = nn.Linear(d_in, d_out, bias=False).bfloat16().requires_grad_(False)
    state = GateState(graph)
    gated = GatedLinear(base, state, "layer")
    gated.open(dict.fromkeys("abcd", 8))
    x = torch.randn(16, 36, d_in, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(16, 36, d_out, dtype=torch.bfloat16)
    gate = state.gate([*"abcd"] * 4)

    def mixed() -> None:
        with state.use(gate):
            gated(x).backward(dy)

    ratios, bare = [], []
    for _ in range(rounds):
        bare.append(seconds(lambda: base(x).backward(dy), 20))
        ratios.append(seconds(mixed, 20) / bare[-1])
    return statistics.median(bare) * 1e3, statistics.median(ratios)


def switching(rounds: int) -> tuple[float, float]:
    """Median milliseconds to change the task: PEFT's set_adapter, and entering `model.tasks`."""
    from peft import LoraConfig, get_peft_model

    graph = TaskGraph.from_dict({"rank": 8, "tasks": {t: {"question": "?"} for t in "abcd"}})
    ours, _ = load_model("smol")
    attach(ours, graph)
    config = LoraConfig(r=8, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
    theirs = get_peft_model(load_model("smol")[0], config, adapter_name="a")
    for name in "bcd":
        theirs.add_adapter(name, config)

    def enter(name: str) -> None:
        with ours.tasks(name):
            pass

    pairs = [
        (seconds(lambda n=n: theirs.set_adapter(n), 1), seconds(lambda n=n: enter(n), 1)) for n in [*"abcd"] * rounds
    ]
    return statistics.median(p for p, _ in pairs) * 1e3, statistics.median(o for _, o in pairs) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    for d_in, d_out in ((576, 576), (576, 1536), (1536, 576)):
        bare, ratio = layer_ratio(d_in, d_out, args.rounds)
        print(f"{d_in:5d} -> {d_out:5d}: frozen linear {bare:.2f} ms, gated {ratio:.2f} x")
    theirs, ours = switching(args.rounds)
    print(f"task switch: PEFT set_adapter {theirs:.2f} ms, model.tasks {ours:.2f} ms ({theirs / ours:.0f} x)")


if __name__ == "__main__":
    main()
