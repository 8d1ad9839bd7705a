"""Fills `options`: groups without pipelines at once, pipelines cell by cell."""

from __future__ import annotations

import numpy as np

from contextlora.gear.cost import AHEAD, TINY
from contextlora.gear.options import STREAMED, Cell, Options, Prefixes, Rows
from contextlora.gear.pipelines import PLAIN, Probe
from contextlora.gear.tables import Array, Case, busy_all, deal_all, step

MOST = 1 << 19  # rows at once, to bound memory


def without_prefix(o: Options) -> None:
    """One device alone, with and without a cache, and data parallelism, all without streamed prefixes."""
    for k, case in o.cases.items():
        fill = o.pipelines[k].probe(np.inf).fill[1][PLAIN][0].min(-1)  # (devices,)
        one = 1 << np.arange(o.sets.devices)
        x = np.zeros(len(one), dtype=int) if o.shared else np.arange(len(one))
        o.keep(o.base[k, "none", 1] + x, one, float((case.steps * case.micro).sum()) * fill, np.inf, 0 * x, one)
        if "local" in o.kinds:
            skip = case.pace.forward[:, o.lowest, None] * (1 - case.fresh[True] / case.micro)
            fits = case.reach(1, case.cached)[:, 0] >= o.pipelines[k].units
            seconds = (case.steps * case.micro * (case.pace.both[:, -1:] - skip)).sum(-1)
            seconds = np.where(fits, seconds, np.inf)
            o.keep(o.base[k, "local", 1] + x, one, seconds, np.inf, 0 * x, one)
        for masks, seconds, hidden in _data(o, case, cut=0):
            slot = np.full(len(masks), o.base[k, "data", masks[0].item().bit_count()])
            total = (case.steps[:, None] * seconds).sum(0) + hidden.max(0)
            o.keep(slot, masks, total, 0.0, 0 * masks, masks)


def _data(o: Options, case: Case, cut: int) -> list[tuple[Array, Array, Array]]:
    """By number of devices: sets, seconds of a step in each run of steps, and what it hides of the ring, (runs, sets).

    Mirrors `cost`: behind a streamed prefix nothing runs ahead, and nothing is hidden.
    """
    end = o.pipelines[case.k].units
    fits = case.reach(1, case.waiting if cut else case.ahead)[:, cut] >= end
    frozen = 0.0 if cut else case.pace.forward[:, o.lowest]
    each = np.where(fits, case.pace.both[:, -1] - case.pace.both[:, cut], np.inf)
    found = []
    for n in range(2, o.sets.devices + 1):
        masks = o.sets.of_size[n]
        masks = masks[(fits | ~o.sets.member[masks]).all(-1)]
        if len(masks):
            member, ring = np.where(o.sets.member[masks], each, np.inf), o.ring[masks, 0]
            dealt = np.array([deal_all(int(m), member) for m in case.micro])
            busy = busy_all(dealt, np.broadcast_to(member, dealt.shape))
            rest = (busy - np.minimum(ring[:, None], np.minimum(dealt, AHEAD) * frozen)).max(-1)
            found.append((masks, rest + ring, busy.max(-1) - rest))
    return found


def streamed_without_pipeline(o: Options, limit: float, useful: Array) -> None:
    """One device, or data parallelism, behind a streamed prefix, where faster than `limit`."""
    for k, case in o.cases.items():
        for kind in o.kinds:
            if kind not in STREAMED:
                continue
            cached, _ = STREAMED[kind]
            fits = case.reach(1, (case.waiting, case.waiting + case.cached)[cached])[:, 1 : o.lowest + 1]
            d, at = np.nonzero(fits >= o.pipelines[k].units)
            step = case.micro[:, None] * case.pace.spans[d, at + 1, -1]
            slot = o.base[k, kind, 1] + (0 if o.shared else d) + 0 * d
            rows = Rows(slot, 1 << d, d, at, 0.0 * step, step, step)
            stream(o, case, o.prefixes[k], rows, cached, limit, useful)
        for cut in range(1, o.lowest + 1):
            speeds = 1 / np.maximum(case.pace.both[:, -1] - case.pace.both[:, cut], TINY)
            for masks, step, _ in _data(o, case, cut):
                to = np.arange(len(masks))  # all trainers of a set receive
                shares = o.sets.member[masks] * speeds
                ahead = o.prefixes[k] if o.shared else o.prefixes[k].mean(shares / shares.sum(-1, keepdims=True), cut)
                slot = 0 * to + o.base[k, "data streamed", int(masks[0]).bit_count()]
                rows = Rows(slot, masks, to, 0 * to + cut - 1, 0.0 * step + o.ring[masks, 1], step, step)
                stream(o, case, ahead, rows, False, limit, useful)


def stream(
    o: Options,
    case: Case,
    p: Prefixes,
    rows: Rows,
    cached: bool,
    limit: float,
    useful: Array,
    lower: Array | None = None,
) -> None:
    """Gives trainers every prefix of devices that are left, and notes what is faster than `limit`."""
    if o.shared:
        rows.to = 0 * rows.to
    fresh, free = case.fresh[cached], o.sets.full ^ rows.trainers
    rows.air = rows.air + (fresh * case.pace.medium)[:, None] if o.shared else 0.0 * rows.air
    best = _behind(case, p, rows, rows.low, free, fresh)
    rows = rows.pick(np.flatnonzero(best < limit))
    if o.whole:  # the only group of its stage: no other one wants the devices
        _note(o, case, p, rows, o.sets.full ^ rows.trainers, fresh, limit, lower)
        return
    inside = useful[o.sets.full ^ o.sets.big ^ o.sets.small] & (o.sets.small > 0)  # trainers are what is not in big
    begin = np.concatenate([[0], np.cumsum(inside)])
    small = o.sets.small[inside]
    starts = begin[np.concatenate([o.sets.begin, [len(o.sets.big)]])]
    free = o.sets.full ^ rows.trainers
    counts = starts[free + 1] - starts[free]
    for part in np.array_split(np.arange(len(counts)), 1 + int(counts.sum()) // MOST):
        n = counts[part]
        which = np.repeat(part, n)
        within = np.arange(len(which)) - np.repeat(np.cumsum(n) - n, n)
        _note(o, case, p, rows.pick(which), small[starts[free[which]] + within], fresh, limit, lower)


def _note(
    o: Options, case: Case, p: Prefixes, rows: Rows, prefix: Array, fresh: Array, limit: float, lower: Array | None
) -> None:
    mask = rows.trainers | prefix
    low = _behind(case, p, rows, rows.low, prefix, fresh)
    if lower is not None:
        np.minimum.at(lower, (rows.slot - o.part[case.k].start, mask), low)
        at = np.flatnonzero(low < limit)
        rows, prefix, mask = rows.pick(at), prefix[at], mask[at]
        low = _behind(case, p, rows, rows.high, prefix, fresh)
    at = np.flatnonzero(low < limit)
    o.keep(rows.slot[at], mask[at], low[at], rows.tau, rows.cut[at] + 1, rows.trainers[at])


def _behind(case: Case, p: Prefixes, rows: Rows, trainers: Array, prefix: Array, fresh: Array) -> Array:
    """Seconds of a stage whose steps take the trainers, the prefix, or the medium longest."""
    where = rows.to, prefix, rows.cut
    total = p.until(None, *where)
    for r, n in enumerate(case.steps):
        ahead = p.until(int(fresh[r]), *where)
        total += n * np.maximum(np.maximum(trainers[r], ahead), rows.air[r])
    return total


# --- pipelines -------------------------------------------------------------------------------------------------------


def cell(
    o: Options,
    k: int,
    taus: tuple[int, int],
    probe: Probe,
    below: Probe | None,
    limit: float,
    useful: Array,
) -> Cell:
    """Explores the pipelines whose tau is one of taus[0] to taus[1], by index.

    Where a lower threshold, `below`, gives the same fill, the pipeline belongs to a lower cell.
    """
    case, span = o.cases[k], o.part[k]
    lower = np.full((span.stop - span.start, o.sets.full + 1), np.inf)
    low, high = float(case.pace.taus[taus[0]]), probe.tau
    for n in range(2, o.sets.devices + 1):
        fill = probe.fill[n] if below is None else _new(probe.fill[n], below.fill[n])
        medium = o.medium(k, n)
        _plain(o, case, fill[PLAIN][0], n, (low, high), medium, lower)
        if "local" in o.kinds:
            _local(o, case, n, probe, below, (low, high), medium, lower)
        for kind in o.kinds:
            if kind in STREAMED:
                cached, kept = STREAMED[kind]
                rows = _behind_prefix(o, case, kind, fill[kept], n, (low, high), limit)
                stream(o, case, o.prefixes[k], rows, cached, limit, useful, lower)
    return Cell(k, *taus, probe, below, lower)


def _behind_prefix(
    o: Options, case: Case, kind: str, fill: Array, n: int, tau: tuple[float, float], limit: float
) -> Rows:
    """Pipelines of n stages that begin above a cut, where a prefix that costs nothing would make them fast enough."""
    medium, fill = o.medium(case.k, n), fill[1 : o.lowest + 1]
    at, which, x = np.nonzero(case.seconds(fill, np.maximum(tau[0], medium), n) < limit)
    fills, busy = fill[at, which, x], medium[x]
    low, high = (np.array([step(fills, np.maximum(t, busy), int(m), n) for m in case.micro]) for t in tau)
    air, slot = case.micro[:, None] * busy, o.base[case.k, kind, n] + x
    return Rows(slot, o.sets.of_size[n][which], x, at, air, low, high, tau[1])


def _new(now: Array, before: Array) -> Array:
    return np.where(now < before, now, np.inf)


def _plain(o: Options, case: Case, fill: Array, n: int, tau: tuple[float, float], medium: Array, lower: Array) -> None:
    which, x = np.nonzero(np.isfinite(fill))
    slot, mask = o.base[case.k, "none", n] + x, o.sets.of_size[n][which]
    fills, zero = fill[which, x], np.zeros(len(x), dtype=int)
    lower[slot - o.part[case.k].start, mask] = case.seconds(fills, np.maximum(tau[0], medium[x]), n)
    o.keep(slot, mask, case.seconds(fills, np.maximum(tau[1], medium[x]), n), tau[1], zero, mask)


def _local(
    o: Options,
    case: Case,
    n: int,
    probe: Probe,
    below: Probe | None,
    tau: tuple[float, float],
    medium: Array,
    lower: Array,
) -> None:
    """First trainers that keep a cache; tau bounds the others, as the first one's seconds differ from step to step."""
    base = o.base[case.k, "local", n]
    for d in range(o.sets.devices):
        _, both = o.pipelines[case.k].added[n - 1][d]
        stop = int(case.reach(n, case.cached)[d, 0]) + 1
        after = probe.joined[n - 1][d][1:stop]
        if below is not None:
            after = _new(after, below.joined[n - 1][d][1:stop])
        if not np.isfinite(after).any():
            continue
        width = after.shape[2]
        slot, mask = np.meshgrid(base + (np.arange(width) if o.shared else np.array([d])), o.sets.of_size[n][both])
        busy = medium if o.shared else medium[d : d + 1]
        bounds = [local_seconds(o, case, d, after, t, busy, n).min(0).ravel() for t in tau]
        at = slot.ravel() - o.part[case.k].start, mask.ravel()
        lower[at] = np.minimum(lower[at], bounds[0])  # on a shared medium, each device may be the set's first
        zero = np.zeros(slot.size, dtype=int)
        o.keep(slot.ravel(), mask.ravel(), bounds[1], tau[1], zero, mask.ravel())


def local_seconds(o: Options, case: Case, device: int, after: Array, tau: float, medium: Array, n: int) -> Array:
    """Seconds of n stages by where the first trainer ends (from 1 on), given the fill of what follows, `after`."""
    stops = np.arange(1, len(after) + 1)
    own = case.pace.both[device, stops]
    saved = case.pace.forward[device, np.minimum(stops, o.lowest)]
    total = np.zeros(after.shape)
    rest = np.maximum(tau, medium)
    for steps, micro, fresh in zip(case.steps, case.micro, case.fresh[True], strict=True):
        stage = (own - saved * (1 - fresh / micro)).reshape(-1, *[1] * (after.ndim - 1))
        total += steps * step(after + stage, np.maximum(rest, stage), int(micro), n)
    return total
