"""What a federation's folder says of its rounds: metrics.jsonl, one line a round, and federation.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from contextlora.errors import ConfigError
from contextlora.federated.federation import Federation, load_federation

METRICS, SETTINGS = "metrics.jsonl", "federation.yaml"


class Round(BaseModel):
    """One round as `federated.simulate.standing` puts it, or as `federated.device.standing`: a real device knows less.

    Keys that are not known here are passed over; None is what nobody there could know.

    Attributes:
        step: the round's number, from 0.
        time: when it ended, s since 1970.
        device: the real one whose round it is; "" is a simulation's, of all devices.
        bytes: handed to the channel, by slot; sent by the one device.
        received: bytes, by slot.
        energy: J, of all devices.
        seconds: on the air; of a real device until what it awaited had come.
        asked, reached: receivers that bundles were for, and that had them by the deadline.
        awaited, arrived: bundles that the device waited for, and that came in time.
        goodput: bit/s to others as last measured.
        loss: the mean of `losses`, nats a token.
        losses: by device that was there.
        clusters: each one's devices, as the first device has found them.
        collisions: max_l S_l of each cluster.
        refused: messages and bundles that were not let in, by error code.
        positions: m, by device; none where the channel was measured.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    time: float
    device: str = ""
    bytes: Mapping[str, int]
    received: Mapping[str, int] = {}
    energy: float | None = None
    seconds: float
    asked: int | None = None
    reached: int | None = None
    awaited: int | None = None
    arrived: int | None = None
    goodput: Mapping[str, float] = {}
    loss: float
    losses: Mapping[str, float]
    clusters: tuple[tuple[str, ...], ...]
    collisions: tuple[float, ...]
    refused: Mapping[str, int]
    positions: Mapping[str, tuple[float, float]] = {}

    @property
    def sent(self) -> int:
        """Bytes of all slots."""
        return sum(self.bytes.values())

    @property
    def worst(self) -> float:
        """The highest collision rate of any layer of any cluster."""
        return max(self.collisions, default=0.0)


def read_rounds(folder: Path) -> list[Round]:
    """The rounds that have ended, in order. A resumed run repeats some: the last record of each counts.

    A line that a kill cut short, or of something else than a federation, is none.
    """
    found: dict[int, Round] = {}
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            one = Round.model_validate_json(line)
        except ValidationError:
            continue
        found[one.step] = one
    return [found[i] for i in sorted(found)]


def read_settings(folder: Path) -> Federation | None:
    """What the devices had agreed on, where it was kept."""
    try:
        return load_federation(folder / SETTINGS)
    except ConfigError:
        return None
