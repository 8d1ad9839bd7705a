"""The run configuration: one YAML file, strict, with overrides; no torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from contextlora.errors import ConfigError
from contextlora.strict import Strict, parse_yaml, read_yaml, validate


def _exponent(value: Any) -> Any:
    """YAML 1.1 reads 2e-4, without a dot, as text; everything else stays what it is."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value


Number = Annotated[float, BeforeValidator(_exponent)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]


Method = Literal[
    "paper",
    "lora",
    "lora-per-task",
    "hard-routing",
    "o-lora",
    "hydralora",
    "mole",
    "mole-joint",
    "lori-d",
    "lori-s",
    "copies",
    "low-prerequisites",
    "by-depth",
    "learned-scales",
    "shared-block",
]


def select_layers(layers: str, count: int) -> range:
    """Parses `layers` for a stack of `count` decoder layers: "all", "top 1/3", "bottom 1/2" or "20-29"."""
    if layers == "all":
        return range(count)
    if m := re.fullmatch(r"(top|bottom) (\d+)/(\d+)", layers):
        share = Fraction(int(m[2]), int(m[3])) if int(m[3]) else Fraction(0)
        if 0 < share <= 1:
            n = max(1, round(share * count))
            return range(count - n, count) if m[1] == "top" else range(n)
    if (m := re.fullmatch(r"(\d+)-(\d+)", layers)) and int(m[1]) <= int(m[2]) < count:
        return range(int(m[1]), int(m[2]) + 1)
    raise ConfigError("E111", f"layers '{layers}': use 'all', 'top 1/3', 'bottom 1/2' or 'first-last' below {count}")


class AlignConfig(Strict):
    """The projector's own stage, before the tasks (SEMANTICS: whatever tasks share is frozen while they train).

    Attributes:
        epochs: passes of captions through the language model; None leaves the projector as it is, 0 only points it at
            the answers' words, which is most of the effect in a fraction of the time.
    """

    epochs: Annotated[Number, Field(ge=0, le=100)] | None = None
    lr: Positive = 2e-4
    batch_size: Annotated[int, Field(ge=1)] = 16


class TrainConfig(Strict):
    """How the blocks are trained. Defaults: the ContextLoRA paper's Table II.

    Attributes:
        epochs: passes over each task's samples.
        batch_size: samples of one task in one update; a level of n tasks trains n x batch_size samples a step.
        lr: peak learning rate, cosine decay to zero after a linear warm-up over `warmup_ratio` of the updates.
        max_grad_norm: gradient clipping, per task; 0 turns it off.
        accumulate: micro-batches of batch_size for one update.
        method: "paper" is ContextLoRA as published; the others are rivals to compare with (`contextlora.baselines`).
        gate_lr: peak learning rate of gates that learn after their experts (MoLE); None takes `lr`.
        penalty: weight of the loss term that a rival adds: O-LoRA's lambda, MoLE's alpha.
        schedule: "level" trains all tasks of a level together, "sequential" one task after another (Algorithm 1).
            "together" is an extension: all tasks at once in mixed batches under one optimizer, so that prerequisites
            which `frozen_ratio` lets their children tune go on seeing their own samples.
        frozen_ratio: 1 - delta; None takes the graph's.
        context: whether prerequisite answers enter the prompt: "none", "gold" (labels) or "predicted" (own answers).
        layers: decoder layers that carry blocks: "all", "top 1/3", "bottom 1/2" or "first-last".
        targets: names of linears that carry blocks; None means all of a decoder layer.
        label_noise: share of the roots' training pairs that are shuffled (robustness experiments).
        noise_tasks: the tasks whose pairs `label_noise` shuffles instead; None means every root with options.
        max_train: use this many training records, drawn by the seed; None uses all.
        prefix_cache_gb: memory for activations of frozen layers below the first block; 0 recomputes them.
        checkpoint_every: updates between checkpoints.
        activation_checkpointing: recompute activations in backward to save memory.
    """

    epochs: Annotated[int, Field(ge=1, le=1000)] = 4
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    lr: Positive = 2e-4
    warmup_ratio: Share = 0.03
    weight_decay: NotNegative = 0.0
    max_grad_norm: NotNegative = 1.0
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    method: Method = "paper"
    gate_lr: Positive | None = None
    penalty: NotNegative = 0.5
    schedule: Literal["level", "sequential", "together"] = "level"
    frozen_ratio: Share | None = None
    context: Literal["none", "gold", "predicted"] = "none"
    layers: str = "all"
    targets: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    label_noise: Share = 0.0
    noise_tasks: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    max_train: Annotated[int, Field(ge=1)] | None = None
    prefix_cache_gb: NotNegative = 2.0
    checkpoint_every: Annotated[int, Field(ge=1)] = 200
    activation_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def context_asked(self) -> Literal["none", "predicted"]:
        """The context of what is asked of the trained blocks: their own answers where training had the labels."""
        return "none" if self.context == "none" else "predicted"


class RunConfig(Strict):
    """A run: what is trained, on what, and where the result goes.

    Attributes:
        model: "smol", "smol-half", a hub id, or a folder.
        data: the data folder (data.jsonl, images/).
        graph: graph.yaml; None takes the one in the data folder.
        out: the run's folder: adapter/, checkpoints/, metrics.jsonl.
        dtype: of the frozen model; blocks are float32 always.
        device: where to run, e.g. "cpu" or "cuda".
        trackers: further metric sinks beside metrics.jsonl.
    """

    model: str = "smol"
    data: str = "data"
    graph: str | None = None
    out: str = "runs/run"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()
    align: AlignConfig = AlignConfig()
    train: TrainConfig = TrainConfig()

    @property
    def graph_path(self) -> Path:
        """Where the graph is read from."""
        return Path(self.graph) if self.graph else Path(self.data) / "graph.yaml"


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a run configuration; relative paths in it count from the file's own folder.

    Args:
        path: the YAML file; None starts from the defaults.
        overrides: "a.b=value" strings, values in YAML.

    Raises:
        ConfigError: E101 to E103, all faults at once.
    """
    data: Any = {} if path is None else read_yaml(path)
    if data is None:
        data = {}
    for text in overrides:
        data = override(data, text)
    config = validate(RunConfig, data, path or "--set")
    if path is None:
        return config
    home = Path(path).parent
    moved = {k: str(home / v) for k in ("data", "graph", "out") if (v := getattr(config, k)) is not None}
    if config.model != RunConfig.model_fields["model"].default and (home / config.model).is_dir():
        moved["model"] = str(home / config.model)
    return config.model_copy(update=moved)


def override(data: Any, text: str) -> Any:
    """`data` with one "a.b=value" set, the value in YAML. Raises ConfigError E101, E103, E107."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError("E107", f"'{text}' should be KEY=VALUE, e.g. train.epochs=2", where="--set")
    if not isinstance(data, dict):
        raise ConfigError("E103", f"expected keys and values, got {data!r}")
    data = dict(data)
    node = data
    *parents, last = key.split(".")
    for p in parents:
        child = node.get(p)
        node[p] = dict(child) if isinstance(child, dict) else {}
        node = node[p]
    node[last] = parse_yaml(value, f"--set {key}")
    return data
