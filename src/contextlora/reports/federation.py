"""A federation's page: one self-contained HTML file, however many of its rounds have ended. All text is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from contextlora.errors import RunError
from contextlora.federated.federation import Federation
from contextlora.gear.units import show_bytes
from contextlora.reports.federation_figures import (
    bytes_by_slot,
    collision_rates,
    device_map,
    energy_and_reach,
    loss_by_device,
    slots,
)
from contextlora.reports.grids import Section, plain_table, whole_page
from contextlora.reports.rounds import METRICS, Round, read_rounds, read_settings
from contextlora.reports.store import write_whole

ROWS = 500  # rounds in the table; metrics.jsonl has them all
REFUSALS = {  # as in docs/errors.md
    "E603": "a row of the table that no device of this federation writes",
    "E620": "not a message between peers, or a header that none writes",
    "E621": "a message of a newer format",
    "E622": "a message that is cut off or too long",
    "E623": "a message or transfer over the limits",
    "E624": "a message of another run",
    "E625": "an unknown sender or task",
    "E626": "a signature that is not the sender's",
    "E627": "a payload, or the chunks of a message, altered on the way",
    "E628": "a replay, or a version or round older than one that was let in",
    "E629": "values whose mask is not here: ask for it",
    "E630": "a difference to a version that is not here: ask for whole values",
    "E631": "a payload that cannot be decoded",
    "E632": "a mask or values that are not what their header says: ask for whole values",
}
MAP_NOTE = (
    "Clusters are those that the first device (by name) found in the last round, each named after its own first one; "
    "lines lead to a cluster's middle. Who aggregates with whom follows from collisions, power and delay together, so "
    "that clusters may lie across each other. Not heard: a device whose row that first one did not get in this round."
)
MEASURED = "No map: the channel was measured, not modelled, and says nothing of where devices are."
ALONE = "No map: a real device does not know where others are."
AIR_NOTE = (
    "Bytes are those handed to the channel; a unicast counts once for each receiver. Rows, which say who is there, "
    "cost no energy here. Receivers are counted once for every bundle that was for them; reached means by the deadline."
)
ALONE_NOTE = (
    "As {device} saw it: bytes are what it sent to others and received from them, with all that was repeated. Not "
    "known to it: what others spent and lost, whether its own bundles came in time, what its radio drew."
)
COLLISIONS_NOTE = (
    "Of each cluster, the share of positions in which two or more of its devices are active, in the layer where it is "
    "highest (eq. 19)."
)


def is_federation(folder: Path) -> bool:
    """Whether a round of a federation has ended here."""
    return bool(read_rounds(folder))


def write_federation_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes report.html for a federation's folder.

    Args:
        run_folder: with metrics.jsonl, and federation.yaml if it was kept.
        out: the file; None puts it into the folder.

    Raises:
        RunError: E525 where no round of a federation has ended, E523 if the file cannot be written.
    """
    folder = Path(run_folder)
    rounds = read_rounds(folder)
    if not rounds:
        raise RunError("E525", f"not a federation's folder: {METRICS} has no round that has ended", where=folder)
    path = Path(out) if out else folder / "report.html"
    write_whole(path, page(rounds, read_settings(folder), folder.resolve().name))
    return path


def page(rounds: Sequence[Round], settings: Federation | None, name: str) -> str:
    """The page's text; `name` is the run's where no settings are known."""
    names = devices(rounds, settings)
    tasks = {n: d.task for n, d in settings.devices.items()} if settings else {}
    most = settings.limits.collision if settings else None
    radius = settings.radio.radius if settings else None
    last = rounds[-1]
    alone = ALONE_NOTE.format(device=last.device) if last.device else ""
    sections = [
        Section(
            f"Devices and clusters, round {last.step}",
            figures=[("where they are, and were", device_map(rounds, radius))] if last.positions else (),
            below=_clusters(last) + _devices(rounds, names, tasks),
            note=MAP_NOTE if last.positions else ALONE if alone else MEASURED,
        ),
        Section("Loss", figures=[("by device", loss_by_device(rounds, tasks))]),
        Section("On the air", figures=_air(rounds), below=_goodput(last), note=alone or AIR_NOTE),
        Section("Collisions", figures=[("by round", collision_rates(rounds, most))], note=COLLISIONS_NOTE),
        Section("Refused", below=_refused(rounds)),
        Section("Rounds", below=_table(rounds), note=_left_out(rounds)),
        Section("The run", below=_facts(rounds, settings)),
    ]
    done = str(len(rounds)) if settings is None else f"{last.step + 1} of {settings.rounds}"
    what = f"devices: {len(names)}" + (f", tasks: {len(set(tasks.values()))}" if tasks else "")
    return whole_page(settings.name if settings else name, f"{what}, rounds: {done}", sections)


def devices(rounds: Sequence[Round], settings: Federation | None) -> list[str]:
    """All that are known, also those that were never there."""
    found = set(settings.devices if settings else ())
    for r in rounds:
        found.update(r.losses, r.positions, *r.clusters)
    return sorted(found)


def _clusters(last: Round) -> str:
    rows = [
        [g[0], str(len(g)), f"{s:.4f}", ", ".join(g)] for g, s in zip(last.clusters, last.collisions, strict=False) if g
    ]
    return plain_table(["cluster of", "devices", "worst collision", "which"], rows)


def _devices(rounds: Sequence[Round], names: Sequence[str], tasks: Mapping[str, str]) -> str:
    cluster_of = {n: g[0] for g in rounds[-1].clusters for n in g}
    rows = []
    for n in names:
        losses = [r.losses[n] for r in rounds if n in r.losses]
        first, last = (f"{losses[0]:.4f}", f"{losses[-1]:.4f}") if losses else ("", "")
        rows.append([n, tasks.get(n, ""), cluster_of.get(n, "not heard"), str(len(losses)), first, last])
    return plain_table(["device", "task", "cluster of", "rounds there", "first loss", "last loss"], rows)


def _air(rounds: Sequence[Round]) -> list[tuple[str, str]]:
    each = [f"{slot} {show_bytes(sum(r.bytes.get(slot, 0) for r in rounds))}" for slot in slots(rounds)]
    total = f"bytes: {show_bytes(sum(r.sent for r in rounds))} in all ({', '.join(each)})"
    if rounds[-1].device:
        received = show_bytes(sum(sum(r.received.values()) for r in rounds))
        arrived, awaited = _sum(r.arrived for r in rounds), _sum(r.awaited for r in rounds)
        total += f"; {received} received; {arrived:,.0f} of {awaited:,.0f} awaited bundles came in time"
        return [(total, bytes_by_slot(rounds))]
    asked, reached = _sum(r.asked for r in rounds), _sum(r.reached for r in rounds)
    spent = f"energy: {_sum(r.energy for r in rounds):.4g} J in all; {reached:,.0f} of {asked:,.0f} receivers reached"
    return [(total, bytes_by_slot(rounds)), (spent, energy_and_reach(rounds))]


def _sum(numbers: Iterable[float | None]) -> float:
    return sum(n for n in numbers if n is not None)


def _goodput(last: Round) -> str:
    rows = [[name, f"{rate / 1e6:.3g}"] for name, rate in sorted(last.goodput.items())]
    return plain_table(["to", "goodput as last measured, Mbit/s"], rows) if rows else ""


def _refused(rounds: Sequence[Round]) -> str:
    found = sum((Counter(r.refused) for r in rounds), start=Counter[str]())
    if not found:
        return '<p class="note">No message was refused.</p>'
    rows = [[code, f"{n:,}", REFUSALS.get(code, "")] for code, n in sorted(found.items())]
    return plain_table(["code", "messages", "what it means"], rows)


def _table(rounds: Sequence[Round]) -> str:
    columns: list[tuple[str, Callable[[Round], str | None]]] = [
        ("round", lambda r: str(r.step)),
        ("devices", lambda r: str(sum(map(len, r.clusters)) if r.device else len(r.losses))),
        ("loss", lambda r: f"{r.loss:.4f}"),
        ("clusters", lambda r: str(len(r.clusters))),
        *((f"{s}, bytes", lambda r, s=s: f"{r.bytes.get(s, 0):,}") for s in slots(rounds)),
        ("bytes", lambda r: f"{r.sent:,}"),
        ("bytes received", lambda r: f"{sum(r.received.values()):,}" if r.device else None),
        ("J", lambda r: None if r.energy is None else f"{r.energy:.4g}"),
        ("s to receive" if rounds[-1].device else "s on the air", lambda r: f"{r.seconds:.4g}"),
        ("reached", lambda r: None if r.reached is None else f"{r.reached:,}"),
        ("asked", lambda r: None if r.asked is None else f"{r.asked:,}"),
        ("arrived", lambda r: None if r.arrived is None else f"{r.arrived:,}"),
        ("awaited", lambda r: None if r.awaited is None else f"{r.awaited:,}"),
        ("worst collision", lambda r: f"{r.worst:.4f}"),
        ("refused", lambda r: ", ".join(f"{code}: {n}" for code, n in sorted(r.refused.items())) or "0"),
    ]
    known = [(head, of) for head, of in columns if any(of(r) is not None for r in rounds)]
    rows = [[of(r) or "" for _, of in known] for r in rounds[-ROWS:]]
    return f'<div class="numbers">{plain_table([head for head, _ in known], rows)}</div>'


def _left_out(rounds: Sequence[Round]) -> str:
    return f"The last {ROWS} rounds; {METRICS} has all {len(rounds)}." if len(rounds) > ROWS else ""


def _facts(rounds: Sequence[Round], settings: Federation | None) -> str:
    took = [b.time - a.time for a, b in pairwise(rounds)]
    facts: dict[str, Any] = {"a round took, median": f"{median(took):.3g} s"} if took else {}
    if (s := settings) is not None:
        limits, radio, delta = s.limits, s.radio, s.wire.delta
        air = f"{radio.bandwidth / 1e6:g} MHz, {radio.control}, outage {radio.outage:g}"
        facts |= {
            "model": s.model,
            "data": s.data,
            "seed": s.seed,
            "aggregation": s.aggregate,
            "updates a round": s.updates,
            "clusters exchange every": f"{s.exchange_every} rounds",
            "entries that learn": f"{s.slices.share:g} of B, {s.slices.allocation}",
            "values": f"{s.wire.full}, differences {delta}" if delta else s.wire.full,
            "limits": f"S_max {limits.collision:g}, p_max {limits.power:g} W, deadline {limits.deadline:g} s",
            "air": f"{radio.cast}, {f'as measured ({s.trace})' if s.trace else air}",
            "learning rate, batch": f"{s.train.lr:g}, {s.train.batch_size}",
        }
        for i, f in enumerate(s.faults):
            facts[f"fault {i + 1}"] = f"{f.what} {', '.join(f.who)} in rounds {f.rounds[0]} to {f.rounds[1]}"
    else:
        facts["settings"] = "not kept beside the rounds"
    return plain_table(["", ""], [[k, str(v)] for k, v in facts.items()])
