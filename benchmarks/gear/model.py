"""A scale model of LLaVA-1.5-7B. Planners are asked about the real one; what runs stands for it on a smaller scale.

What crosses the network is real: hidden states at a cut, and gradients of the slices, in 1/BYTES of the real model's
bytes. What computes is thin (attention and MLP of a few features), so that it is done long before the time that the
profile says, divided by `Setting.scale`; `padding` sleeps for the rest. The medium's rate is scaled by both, so that
all ratios are the real ones, and what is measured is given in the real model's seconds and bytes. 32 layers are merged
to BLOCKS units.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from contextlora.config import TrainConfig, select_layers
from contextlora.data.collate import Sample
from contextlora.data.examples import Example
from contextlora.gear.cost import Problem
from contextlora.gear.fleet import Fleet
from contextlora.gear.profile import Profile, Unit
from contextlora.gear.runtime import micro_batches
from contextlora.gear.shapes import LLAVA_7B, synthetic
from contextlora.gear.work import work_of
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, gated_layers
from contextlora.lora.sharing import Phase, along_graph
from contextlora.models.inputs import ImageFeatures
from contextlora.training.loop import Stage
from contextlora.training.prefix import FrozenPrefix

BLOCKS, TOKENS, ANSWER, HIDDEN, HEADS, INNER, WORDS = 8, 15, 2, 1008, 12, 12, 64
RANKS = 32  # of the real model's slices together
REAL = synthetic(LLAVA_7B, flops=1e13, ranks=RANKS)  # a device of speed 1
BYTES = REAL.cut / (TOKENS * HIDDEN * 4)
WIDTH = 4 * (HIDDEN + 2 * HEADS) + 3 * (HIDDEN + INNER)  # of one rank on all linears of a thin layer


@dataclass(frozen=True)
class Setting:
    """One configuration: what is trained on which fleet.

    Attributes:
        fleet: real devices, with the rate that was measured.
        tasks: without prerequisites: they train side by side.
        batch: samples of each in one update.
        updates: of one epoch.
        layers: that carry blocks, as in TrainConfig.
        scale: how many of the real model's seconds pass in one.
    """

    fleet: Fleet
    tasks: int
    batch: int
    updates: int
    epochs: int
    layers: str
    scale: float

    @cached_property
    def config(self) -> TrainConfig:
        """The paper's, but for these."""
        return TrainConfig(epochs=self.epochs, batch_size=self.batch, layers=self.layers)

    @cached_property
    def problem(self) -> Problem:
        """What planners are asked."""
        graph = _graph(self.tasks, RANKS // self.tasks)
        samples, layers = dict.fromkeys(graph.names, self.batch * self.updates), select_layers(self.layers, BLOCKS)
        work = work_of(graph, self.config, samples, len(MERGED.units), layers)
        return Problem(self.fleet, dict.fromkeys(self.fleet.devices, MERGED), work)

    @cached_property
    def graph(self) -> TaskGraph:
        """The thin model's: as many ranks as give 1/BYTES of the real slices' bytes."""
        real = sum(u.width for u in MERGED.units) * RANKS
        return _graph(self.tasks, max(1, round(real / BYTES / (BLOCKS * WIDTH * self.tasks))))

    @cached_property
    def phase(self) -> Phase:
        """All tasks side by side."""
        return Phase(tuple((t,) for t in self.graph.names), along_graph(self.graph))

    @cached_property
    def examples(self) -> list[Example]:
        """As many as there are updates; every task is asked about each."""
        answers = dict.fromkeys(self.graph.names, ("?",))
        count = self.batch * self.updates
        return [Example(id=str(i), image=None, answers=answers, questions={}, split="train") for i in range(count)]


def _graph(tasks: int, rank: int) -> TaskGraph:
    declared = {f"t{i}": {"question": "?"} for i in range(tasks)}
    return TaskGraph.from_dict({"name": "scale model", "rank": rank, "tasks": declared})


def merged(layer: Unit, name: str, many: int) -> Unit:
    """As many layers in one."""
    times = {w: tuple(many * t for t in getattr(layer, w)) for w in ("forward", "input_grad", "weight_grad")}
    return Unit(name=name, weights=many * layer.weights, saved=many * layer.saved, width=many * layer.width, **times)


MANY = (len(REAL.units) - 2) // BLOCKS
_BLOCKS = [merged(REAL.units[1], f"layers {MANY * i} to {MANY * (i + 1) - 1}", MANY) for i in range(BLOCKS)]
MERGED: Profile = REAL.model_copy(update={"units": (REAL.units[0], *_BLOCKS, REAL.units[-1])}).checked()


class Words:
    """An encoder that makes samples up: random tokens, the same for the same question every time."""

    pad = 0

    def __init__(self, graph: TaskGraph):
        self.graph = graph

    def sample(self, example: Example, task: str, **_: Any) -> Sample:
        """TOKENS tokens, the last ANSWER of them the answer."""
        key = f"{example.id} {task}"
        ids = tuple(random.Random(key).choices(range(1, WORDS), k=TOKENS))
        return Sample(key, task, None, ids[:-ANSWER], ids[-ANSWER:])


def thin(setting: Setting) -> ImageFeatures:
    """The thin model with random blocks, of which none is zero, and its reader."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=2,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = attach(LlamaForCausalLM(config).eval(), setting.graph, layers=setting.layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.B.normal_(std=0.02, generator=generator)
    return ImageFeatures(model, Words(setting.graph))  # type: ignore[arg-type]


def stage_alone(setting: Setting, reader: ImageFeatures) -> Stage:
    """The single process that all others must equal."""
    return Stage(reader, FrozenPrefix(reader, 0), setting.examples, setting.phase, setting.config)


def reference(setting: Setting, reader: ImageFeatures) -> dict[str, Tensor]:
    """A single process's gradients of the first update: "path.A" (R, d_in) and "path.B" (R, d_out)."""
    stage = stage_alone(setting, reader)
    stage._gradients(stage.runs, 0)
    found = {}
    for path, layer in gated_layers(reader.model).items():
        for side in "AB":
            grads = [layer.learning[f"{t}_{side}"].grad for t in setting.graph.names]
            found[f"{path}.{side}"] = torch.cat([g for g in grads if g is not None])
    return found


def samples_of(setting: Setting, reader: ImageFeatures) -> list[list[Sample]]:
    """All updates' samples, tasks in turn, so that any share has all of them."""
    runs, found = stage_alone(setting, reader).runs, []
    for update in range(setting.updates * setting.epochs):
        mixed = micro_batches(runs, update, 1 << 30)[0]
        by_task = [[s for s in mixed if s.task == t] for t in setting.graph.names]
        found.append([s for together in zip(*by_task, strict=True) for s in together])
    return found
