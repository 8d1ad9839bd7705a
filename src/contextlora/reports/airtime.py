"""What the modelled air takes of one message: broadcast against unicast (SO-LoRA eq. 8 and 25). No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contextlora.federated.channel import RadioChannel
from contextlora.federated.federation import Federation
from contextlora.reports.jobs import Job
from contextlora.reports.probes import Measured, Scores
from contextlora.strict import validate

if TYPE_CHECKING:
    from contextlora.reports.bench import Bench

SIZES = {"1.05 MB": 1_050_000, "2.13 MB": 2_130_000, "16 MB": 16_000_000}  # int4, int8 of Table I's shapes; bf16
RUNS = 2000  # places and fadings, each another run of the channel
BLOCK = 20  # runs whose mean is one item: an interval over blocks is that over runs, in a fraction of the time


def radio(bench: Bench, job: Job) -> Measured:
    """One message of the first device to all others, in the first round of many runs, by its size.

    Parts: receivers "reached", "joules", receivers "per joule" (of the sums), "power" in W, and "missed": the share of
    links that planning counted on (power within p_max for the whole group at the gain that outage leaves) and that
    faded below it.
    """
    devices = {f"d{i:02}": "task" for i in range(job.federation["devices"])}
    s = validate(Federation, {**job.of_federation, "devices": devices}, job.title)
    names, parts = list(devices), dict[str, Scores]()
    for size, count in SIZES.items():
        found = [_one(s, names, 8 * count, (job.seed, run)) for run in range(RUNS)]
        reached, joules, power, missed, planned = map(np.array, zip(*found, strict=True))
        means = {"reached": reached, "joules": joules, "power": power}
        for what, values in means.items():
            blocks = values.reshape(-1, BLOCK).mean(1)
            parts.setdefault(what, {})[size] = {f"{i:04}": float(v) for i, v in enumerate(blocks)}
        ratio = reached.sum() / joules.sum() if joules.sum() else 0.0
        parts.setdefault("per joule", {})[size] = {"all runs": float(ratio)}
        if planned.sum():
            parts.setdefault("missed", {})[size] = {"all planned links": float(missed.sum() / planned.sum())}
            parts.setdefault("planned", {})[size] = {"share of runs": float((planned > 0).mean())}
    return Measured(parts["reached"], {}, parts)


def _one(s: Federation, names: list[str], bits: int, run: object) -> tuple[int, float, float, int, int]:
    """Receivers reached, J, W, links missed and planned of one message."""
    air = RadioChannel(names, s.radio, s.limits, run)
    power, seconds = air.demands(0, names, [bits] * len(names))
    allowed = bool(power[0] <= s.limits.power and seconds[0] <= s.limits.deadline)
    sent = air.transmit(0, names[0], names[1:], bits)
    links = len(names) - 1
    return len(sent.reached), sent.energy, sent.power, (links - len(sent.reached)) * allowed, links * allowed
