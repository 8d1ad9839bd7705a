"""What all devices of a federation agree on: one YAML, read by a simulation and by every real device."""

from __future__ import annotations

from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from contextlora.config import TrainConfig, override
from contextlora.errors import did_you_mean
from contextlora.federated.aggregate import STRATEGIES
from contextlora.federated.settings import Limits, Radio
from contextlora.gear.units import Seconds
from contextlora.strict import Strict, read_yaml, validate

SHARED = ("ffa", "fedavg_lora", "full")  # one adapter for all tasks
Aggregate = Literal[
    "ours",
    "paper_mean",
    "single_cluster",
    "lori",
    "lori_cat",
    "hard_routing",
    "local",
    "ffa",
    "fedavg_lora",
    "full",
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class SliceConfig(Strict):
    """How a task's sparse slice is laid out.

    Attributes:
        share: s, the share of B's entries over all layers that learn and travel.
        allocation: how layers share it: "entropy" (eq. 20 to 22), "uniform" or "global".
        temperature: of "entropy"; higher is more even.
        floor: the fewest entries of a layer.
        calibration: mini-batches that masks and entropies are taken from.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    allocation: Literal["entropy", "uniform", "global"] = "entropy"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    floor: Annotated[int, Field(ge=0)] = 1
    calibration: Annotated[int, Field(ge=1)] = 8


class WireConfig(Strict):
    """How values travel: whole ones ("bf16", "int8", "int4") and differences (the same, or none)."""

    full: Literal["bf16", "int8", "int4"] = "int8"
    delta: Literal["bf16", "int8", "int4"] | None = "int4"


class GateConfig(Strict):
    """How an input of an unknown task finds its adapter (eq. 26 to 29).

    Attributes:
        scaled, sharpness, floor, reach: as in `taskgate.TaskGate`.
        ranks: k, how many ranks answer for a token; None takes as many as one adapter has.
    """

    scaled: bool = True
    sharpness: Annotated[float, Field(ge=0)] = 8.0
    floor: Annotated[float, Field(ge=0)] = 0.5
    reach: Annotated[float, Field(gt=0)] = 1.5
    ranks: Annotated[int, Field(ge=1)] | None = None


class MeanConfig(Strict):
    """How slices of one task are averaged; see `aggregate.ours`.

    Attributes:
        by_samples: weigh each device by its samples; None is what the aggregation does by itself.
        liars: so many devices of one task may send anything.
        clip: how many times the median update of its task a device may move what was held.
    """

    by_samples: bool | None = None
    liars: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(gt=0)] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those that were asked for, as a strategy takes them."""
        return {k: v for k, v in self.model_dump().items() if v != type(self).model_fields[k].default}


class Fault(Strict):
    """Something that goes wrong in a simulation.

    Attributes:
        what: "kill" (the device is gone, then comes back from its checkpoint), "drop" (its bundles are lost), "late"
            (they arrive a round late), "corrupt" (a bit of each is flipped) or "partition" (the named devices and all
            others do not hear each other).
        who: devices.
        rounds: first and last round, both included.
    """

    what: Literal["kill", "drop", "late", "corrupt", "partition"]
    who: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    rounds: Annotated[tuple[int, int], Field(strict=False)]


class Device(Strict):
    """One device: its task, and its data where it is not an equal share of the task's."""

    task: str
    data: str | None = None


class Federation(Strict):
    """A federation.

    Attributes:
        name: of the run; all randomness follows from it and `seed`.
        model, data, graph, dtype: as in a run's configuration.
        out: the run's folder.
        seed: of A, masks' ties, channel and order of samples.
        rounds: T.
        updates: local updates in each round.
        exchange_every: rounds from one exchange between clusters to the next.
        train: hyperparameters; epochs do not count here, updates do.
        aggregate: "ours", or a rival: see `methods`.
        mean: how slices of one task are averaged.
        pack: at the end, store the adapters of a device's cluster as one dense B, if they collide no more than S_max.
        trace: a CSV of measured rates in the place of the radio model.
        wait: how long a real device waits for others in one slot; the deadline of `limits` is what planning counts.
        max_samples: each device trains on so many of its examples, drawn by its name; None is all of them.
        devices: by name.
        together: of a simulation: so many devices of different tasks may share a forward pass. Faster where batches are
            small, and rounded differently, so that the bytes are not those of devices that train alone.
        faults: of a simulation.
    """

    name: Name = "federation"
    model: str = "smol"
    data: str = "data"
    graph: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    out: str = "runs/federation"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 10
    updates: Annotated[int, Field(ge=1)] = 8
    exchange_every: Annotated[int, Field(ge=1)] = 5
    train: TrainConfig = TrainConfig()
    slices: SliceConfig = SliceConfig()
    wire: WireConfig = WireConfig()
    gate: GateConfig = GateConfig()
    aggregate: Aggregate = "ours"
    mean: MeanConfig = MeanConfig()
    pack: bool = False
    radio: Radio = Radio()
    limits: Limits = Limits()
    trace: str | None = None
    wait: Annotated[Seconds, Field(gt=0)] = 30.0
    max_samples: Annotated[int, Field(ge=1)] | None = None
    devices: dict[Name, Device] = Field(min_length=1)
    together: Annotated[int, Field(ge=1)] = 1
    faults: Annotated[tuple[Fault, ...], Field(strict=False)] = ()

    @field_validator("devices", mode="before")
    @classmethod
    def _task_alone(cls, value: Any) -> Any:
        """`car: weather` for `car: {task: weather}`."""
        if not isinstance(value, dict):
            return value
        return {n: {"task": d} if isinstance(d, str) else d for n, d in value.items()}

    @model_validator(mode="after")
    def _faults_befall_devices(self) -> Federation:
        for fault in self.faults:
            for who in fault.who:
                if who not in self.devices:
                    raise ValueError(f"faults: no device '{who}'.{did_you_mean(who, self.devices)}")
        return self

    @model_validator(mode="after")
    def _means_are_taken(self) -> Federation:
        for option in self.mean.options.keys() - signature(STRATEGIES[self.aggregate]).parameters.keys():
            able = [n for n, f in STRATEGIES.items() if option in signature(f).parameters]
            raise ValueError(f"mean.{option}: '{self.aggregate}' does not take it; {', '.join(able)} would")
        if self.mean.liars and self.mean.by_samples:
            raise ValueError("mean.by_samples: counts of samples are a sender's own word; leave it or `liars` out")
        most = max(Counter(d.task for d in self.devices.values()).values())
        if most <= 2 * self.mean.liars:
            text = f"{self.mean.liars} of a task cannot be outvoted by fewer than {2 * self.mean.liars + 1} devices"
            raise ValueError(f"mean.liars: {text}, but no task has more than {most}")
        if self.pack and self.aggregate in SHARED:
            raise ValueError(f"pack: '{self.aggregate}' holds one adapter for all tasks already")
        if self.pack and self.aggregate in ("paper_mean", "single_cluster"):
            raise ValueError(f"pack: '{self.aggregate}' holds one B for all tasks of a cluster already")
        return self

    @model_validator(mode="after")
    def _rates_are_measured_at_full_power(self) -> Federation:
        if self.radio.measured and self.trace is None and self.radio.control != "full":
            raise ValueError("radio.measured: rates are measured at full power; set radio.control to 'full' with it")
        return self

    @property
    def graph_path(self) -> Path:
        """Where the graph is read from."""
        return Path(self.graph) if self.graph else Path(self.data) / "graph.yaml"

    @property
    def planned(self) -> Limits:
        """What clusters are planned under: S_max keeps tasks' masks apart, and has no meaning for rivals without any.

        Nor for LoRI, which ties its devices to no collision rate, and for a single cluster, which is to hold all.
        """
        if self.aggregate in (*SHARED, "lori", "single_cluster"):
            return self.limits.model_copy(update={"collision": 1.0})
        return self.limits

    @property
    def total_updates(self) -> int:
        """Of each device, over all rounds."""
        return self.rounds * self.updates


def load_federation(path: str | Path, overrides: tuple[str, ...] = ()) -> Federation:
    """Reads a federation's YAML; relative paths count from its folder. Raises ConfigError E101 to E103."""
    data: Any = read_yaml(path)
    for text in overrides:
        data = override(data, text)
    found = validate(Federation, data, path)
    home = Path(path).parent
    moved: dict[str, Any] = {
        k: str(home / v) for k in ("data", "graph", "out", "trace") if (v := getattr(found, k)) is not None
    }
    if (home / found.model).is_dir():
        moved["model"] = str(home / found.model)
    moved["devices"] = {
        n: d.model_copy(update={"data": str(home / d.data)}) if d.data else d for n, d in found.devices.items()
    }
    return found.model_copy(update=moved)


def save_federation(settings: Federation, path: Path) -> None:
    """Writes a federation's YAML into its own folder, `settings.out`, for whoever looks at the run later."""
    data: Any = settings.model_dump(mode="json") | {"out": "."}
    for at, key in [(data, "data"), (data, "graph"), (data, "trace"), *((d, "data") for d in data["devices"].values())]:
        if at[key] is not None:
            at[key] = str(Path(at[key]).resolve())
    if Path(settings.model).is_dir():
        data["model"] = str(Path(settings.model).resolve())
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
