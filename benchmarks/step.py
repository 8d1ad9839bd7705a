"""Tokens a second of a training step, contextlora beside PEFT, side by side in one run on the embedded model.

python benchmarks/step.py [--rounds 5] [--samples 16] [--tokens 36] [--layers "top 1/3"] [--device cpu] [--json]

Every contender does the same work on the same random tokens: forward, backward and AdamW on LoRA weights of all
language linears, cross-entropy on the last four tokens of each sample. They take turns, round after round, so that a
machine whose speed drifts slows all of them; the ratio to PEFT is taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from contextlora.data.collate import Encoder, Sample, collate
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, trainable_parameters
from contextlora.models import load_model
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training.prefix import FrozenPrefix

ANSWER = 4
EPOCHS = 3  # over which one filling of the prefix cache is shared
Step = Callable[[], None]


def sampled(count: int, tokens: int, tasks: list[str]) -> list[Sample]:
    """Random text-only samples, tasks in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40000, (count, tokens), generator=generator).tolist()
    return [
        Sample(str(i), tasks[i % len(tasks)], None, tuple(row[:-ANSWER]), tuple(row[-ANSWER:]))
        for i, row in enumerate(ids)
    ]


def four_tasks() -> TaskGraph:
    """Four roots of rank 8: R = 32."""
    return TaskGraph.from_dict({"rank": 8, "tasks": {t: {"question": "?"} for t in ("a", "b", "c", "d")}})


def ours(args: argparse.Namespace, layers: str, graph: TaskGraph, cached: bool = False) -> Step:
    """Our step: mixed tasks, per-sample gates."""
    model, processor = load_model("smol", device=args.device)
    attach(model, graph, layers=layers)
    parameters = trainable_parameters(model, graph.names)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0, fused=True)
    reader = ImageFeatures(model, Encoder(processor, graph))
    batch = collate(sampled(args.samples, args.tokens, list(graph.names)), reader.encoder.pad)
    prefix = FrozenPrefix(reader, 2**30 if cached else 0)
    if cached:
        prefix.admit(batch.samples)

    def step() -> None:
        inputs = reader.inputs(batch)
        with model.tasks(batch.tasks), prefix.replay(batch, inputs):
            loss = answer_nll(model, inputs, batch).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def filling(args: argparse.Namespace, layers: str, graph: TaskGraph) -> Step:
    """What fills the prefix cache: one forward pass through the layers below the lowest block."""
    model, processor = load_model("smol", device=args.device)
    attach(model, graph, layers=layers)
    reader = ImageFeatures(model, Encoder(processor, graph))
    batch = collate(sampled(args.samples, args.tokens, list(graph.names)), reader.encoder.pad)

    @torch.no_grad()
    def step() -> None:
        prefix = FrozenPrefix(reader, 2**30)
        prefix.admit(batch.samples)
        with prefix.replay(batch, reader.inputs(batch)):
            pass

    return step


def peft(args: argparse.Namespace, rank: int) -> Step:
    """PEFT's LoRA with its defaults: SDPA attention, logits at every position."""
    from peft import LoraConfig, get_peft_model

    base, processor = load_model("smol", device=args.device)
    base.get_decoder().set_attn_implementation("sdpa")
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0, fused=True
    )
    pad = Encoder(processor, four_tasks()).pad
    batch = collate(sampled(args.samples, args.tokens, ["a"]), pad)
    ids, mask = batch.input_ids.to(args.device), batch.attention_mask.to(args.device)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def frozen_body(args: argparse.Namespace) -> Step:
    """What no LoRA step can avoid: the body's forward and the gradient of its input."""
    model, _ = load_model("smol", device=args.device)
    body = model.get_decoder()
    x = torch.randn(args.samples, args.tokens, body.config.hidden_size, dtype=torch.bfloat16, device=args.device)

    def step() -> None:
        e = x.clone().requires_grad_()
        body(inputs_embeds=e, use_cache=False).last_hidden_state.sum().backward()

    return step


def gemm_floor(args: argparse.Namespace) -> Step:
    """The same matrix products alone: x W^T and dy W of every language linear."""
    model, _ = load_model("smol", device=args.device)
    weights = [m.weight for n, m in model.get_decoder().named_modules() if n.endswith("_proj")]
    n = args.samples * args.tokens
    shapes = {w.shape for w in weights}
    xs = {s: torch.randn(n, s[1], dtype=torch.bfloat16, device=args.device) for s in shapes}
    ys = {s: torch.randn(n, s[0], dtype=torch.bfloat16, device=args.device) for s in shapes}

    @torch.no_grad()
    def step() -> None:
        for w in weights:
            torch.nn.functional.linear(xs[w.shape], w)
            _ = ys[w.shape] @ w

    return step


def timed(step: Step, device: str, repeats: int = 3) -> float:
    """Seconds of one step: the mean of a few, ended by a synchronisation."""
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    sync()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=36)
    parser.add_argument("--layers", default="top 1/3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    contenders: dict[str, Step] = {
        "PEFT LoRA r=32": peft(args, 32),
        "PEFT LoRA r=8": peft(args, 8),
        "contextlora 4 x 8, all layers": ours(args, "all", four_tasks()),
        f"contextlora 4 x 8, {args.layers}": ours(args, args.layers, four_tasks()),
        (cached := f"contextlora 4 x 8, {args.layers}, prefix cached"): ours(args, args.layers, four_tasks(), True),
        (fill := "filling that cache, forward only"): filling(args, args.layers, four_tasks()),
        "frozen body, forward + input gradient": frozen_body(args),
        "matrix products alone": gemm_floor(args),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
    for _ in range(args.rounds):
        for name, step in contenders.items():
            times[name].append(timed(step, args.device))
    shared = zip(times[cached], times[fill], strict=True)
    times[f"{cached}, an epoch of {EPOCHS} with the filling"] = [c + f / EPOCHS for c, f in shared]
    rival = times["PEFT LoRA r=32"]
    rows: list[dict[str, Any]] = []
    for name, spent in times.items():
        ratio = statistics.median(r / s for r, s in zip(rival, spent, strict=True))
        speed = args.samples * args.tokens / statistics.median(spent)
        rows.append({"contender": name, "tokens_per_s": round(speed, 1), "x_peft": round(ratio, 2)})
        print(f"{name:76s} {speed:8.0f} tokens/s   {ratio:5.2f} x PEFT r=32")
    if args.json:
        args.json.write_text(
            json.dumps({"device": args.device, "threads": torch.get_num_threads(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
