"""What every device of a group does in one optimizer step, as data: lists that are simulated, drawn and run. No torch.

Trainers of a pipeline go one-forward-one-backward: at position a of n at most min(n - a, M) of the M micro-batches wait
for their backward, which is what `cost.memory_of` counts. Receives stand up to HOIST computations before the one that
needs them, because gloo's point-to-point is rendezvous: data leaves once the sender knows of the receive, so a late
receive exposes the link (SEMANTICS section 3). Sends stand right after the computation that makes them.

Stages wholly below the lowest block are forward-only, as are the devices of a streamed prefix. Micro-batches of a
streamed prefix do not arrive by a receive in the list but through a queue at the trainer, which has receives for
`cost.QUEUE` of them open at any time, also for the next step's: so the prefix runs ahead across steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from contextlora.errors import PlanError
from contextlora.gear.cost import Problem, pace, there_and_back
from contextlora.gear.plan import Group, deal

HOIST = 2  # computations: on slow links 1 takes up to 1.3 times as long, and 3 gains no more than 2 %


class Kind(StrEnum):
    """What an operation does; the values of the first six are those of torch.distributed.pipelining."""

    FORWARD = "F"
    BACKWARD = "B"  # for inputs and weights at once: split, the stage above a frozen one would lose its gradient
    SEND = "SEND_F"
    RECEIVE = "RECV_F"
    SEND_GRADIENT = "SEND_B"
    RECEIVE_GRADIENT = "RECV_B"
    TAKE = "TAKE"  # from the queue that a streamed prefix fills
    REDUCE = "REDUCE"  # sum of the slices' gradients over data-parallel trainers
    UPDATE = "UPDATE"  # of the device's share of the slices


TORCH = frozenset(list(Kind)[:6])
COMPUTE = frozenset((Kind.FORWARD, Kind.BACKWARD))


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        micro: the micro-batch, counted over the whole group; -1 where it is about none.
        peer: who sends or receives, "" where nobody does.
    """

    kind: Kind
    micro: int = -1
    peer: str = ""


@dataclass(frozen=True)
class Schedule:
    """One step of a group.

    Attributes:
        fresh: by micro-batch, whether it goes through the frozen units below `cut`; if not, it is in the cache.
        ops: by device, in order. A computation waits for the receive of its micro-batch; sends do not wait.
    """

    group: Group
    fresh: tuple[bool, ...]
    ops: dict[str, tuple[Op, ...]]


def schedule(
    problem: Problem, group: Group, micro: int, fresh: int | None = None, *, hoist: int = HOIST, extra: int = 0
) -> Schedule:
    """The lists for one step.

    Args:
        micro: M, micro-batches of the step.
        fresh: how many of them are not in the cache; None for all.
        hoist: computations that a receive is posted ahead.
        extra: micro-batches that the stages of a pipeline, but for the last, have in flight beyond min(n - a, M); takes
            memory that `cost.memory_of` does not count.
    """
    new = _spread(micro, micro if fresh is None or not group.cache else min(fresh, micro))
    taker = _takers(problem, group, micro)
    maker = _makers(problem, group, new)
    ops = {p.device: _ahead(p.device, maker, taker) for p in group.prefix}
    for place, part in enumerate(group.trainers):
        if group.form == "data":
            ops[part.device] = _alone(part.device, maker, taker)
        else:
            ops[part.device] = _stage(group, place, maker, problem.work.lowest, hoist, extra)
    return Schedule(group, new, ops)


def torch_csv(plan: Schedule) -> str:
    """A pipeline's lists in the `compute_comms` CSV that `_PipelineScheduleRuntime` loads: a row a rank, rank = stage.

    torch wants a backward of every stage and a gradient across every boundary. Those below the lowest block, and the
    receives and sends that go with them, stand here for its sake: no gradient crosses there, so they do nothing.

    Raises:
        PlanError: E405 for data-parallel trainers, who have no pipeline.
    """
    if plan.group.form == "data":
        raise PlanError("E405", "data-parallel trainers have no pipeline's schedule", where=", ".join(plan.group.tasks))
    rows, last = [], len(plan.group.trainers) - 1
    for stage, part in enumerate(plan.group.trainers):
        ops = [op for op in plan.ops[part.device] if op.kind in TORCH]
        kinds = {op.kind for op in ops}
        if Kind.BACKWARD not in kinds:
            idle = [Kind.BACKWARD] if stage == last else [Kind.RECEIVE_GRADIENT, Kind.BACKWARD]
            ops += [Op(kind, m) for m in range(len(plan.fresh)) for kind in idle]
        if stage and Kind.SEND_GRADIENT not in kinds:
            ops = [
                x for op in ops for x in (op, Op(Kind.SEND_GRADIENT, op.micro)) if x is op or op.kind is Kind.BACKWARD
            ]
        rows.append(",".join(f"{stage}{op.kind}{op.micro}" for op in ops))
    return "\n".join(rows) + "\n"


def pipeline_csv(group: Group, micro: int, lowest: int, hoist: int = HOIST) -> str:
    """`torch_csv` of a pipeline's step, from what its trainers know: all but profiles."""
    made_here = [""] * micro  # or taken from a queue, which is no part of the CSV
    parts = enumerate(group.trainers)
    ops = {p.device: _stage(group, place, made_here, lowest, hoist, 0) for place, p in parts}
    return torch_csv(Schedule(group, (True,) * micro, ops))


# --- who has which micro-batch ---------------------------------------------------------------------------------------


def _spread(micro: int, fresh: int) -> tuple[bool, ...]:
    """Which micro-batches are fresh: evenly spread, since a prefix can run only a short queue ahead."""
    return tuple((m + 1) * fresh // micro > m * fresh // micro for m in range(micro))


def _takers(problem: Problem, group: Group, micro: int) -> list[str]:
    """By micro-batch, the trainer whose first it is: in the order in which trainers would begin with them."""
    first = group.trainers if group.form == "data" else group.trainers[:1]
    each = [there_and_back(problem, p, group) for p in first]
    due = [(j * each[i], i) for i, count in enumerate(deal(micro, each)) for j in range(count)]
    return [first[i].device for _, i in sorted(due)]


def _makers(problem: Problem, group: Group, fresh: Sequence[bool]) -> list[str]:
    """By micro-batch, the device of the prefix that makes it, "" for none: in the order in which they would be done."""
    if not group.prefix:
        return [""] * len(fresh)
    each = [pace(problem, group, p) for p in group.prefix]
    done = [((j + 1) * each[i], i) for i, count in enumerate(deal(sum(fresh), each)) for j in range(count)]
    order = iter(sorted(done))
    return [group.prefix[next(order)[1]].device if new else "" for new in fresh]


# --- lists -----------------------------------------------------------------------------------------------------------


def _ahead(name: str, maker: Sequence[str], taker: Sequence[str]) -> tuple[Op, ...]:
    """Of a device of a streamed prefix."""
    mine = [m for m, who in enumerate(maker) if who == name]
    return tuple(op for m in mine for op in (Op(Kind.FORWARD, m), Op(Kind.SEND, m, taker[m])))


def _alone(name: str, maker: Sequence[str], taker: Sequence[str]) -> tuple[Op, ...]:
    """Of a data-parallel trainer."""
    ops = list[Op]()
    for m in (m for m, who in enumerate(taker) if who == name):
        ops += [Op(Kind.TAKE, m, maker[m])] if maker[m] else []
        ops += [Op(Kind.FORWARD, m), Op(Kind.BACKWARD, m)]
    return (*ops, Op(Kind.REDUCE), Op(Kind.UPDATE))


def _stage(group: Group, place: int, maker: Sequence[str], lowest: int, hoist: int, extra: int) -> tuple[Op, ...]:
    """Of one stage of a pipeline; a single trainer is its only stage."""
    part, last, micro = group.trainers[place], len(group.trainers) - 1, len(maker)
    below = group.trainers[place - 1].device if place else ""
    above = group.trainers[place + 1].device if place < last else ""
    learns, owes = part.stop > lowest, place > 0 and part.start > lowest
    held = last + 1 - place + (extra if above else 0)  # the last stage's backward waits for nobody
    computes = _alternate(micro, min(held, micro)) if learns else _forwards(micro)
    ops = list[Op]()
    for i, op in enumerate(computes):
        first, end = (0 if i == 0 else i + hoist), i + hoist + 1
        ops += [r for c in computes[first:end] if (r := _receive(c, below, above))]
        if op.kind is Kind.FORWARD and place == 0 and maker[op.micro]:
            ops.append(Op(Kind.TAKE, op.micro, maker[op.micro]))
        ops.append(op)
        if op.kind is Kind.FORWARD and above:
            ops.append(Op(Kind.SEND, op.micro, above))
        elif op.kind is Kind.BACKWARD and owes:
            ops.append(Op(Kind.SEND_GRADIENT, op.micro, below))
    return (*ops, Op(Kind.UPDATE)) if learns else tuple(ops)


def _alternate(micro: int, held: int) -> list[Op]:
    """One-forward-one-backward with `held` micro-batches in flight."""
    ops = [Op(Kind.FORWARD, m) for m in range(held)]
    for m in range(micro):
        ops.append(Op(Kind.BACKWARD, m))
        ops += [Op(Kind.FORWARD, m + held)] if m + held < micro else []
    return ops


def _forwards(micro: int) -> list[Op]:
    return [Op(Kind.FORWARD, m) for m in range(micro)]


def _receive(compute: Op, below: str, above: str) -> Op | None:
    """The receive that a computation needs: from below for a forward, from above for a backward."""
    if compute.kind is Kind.FORWARD:
        return Op(Kind.RECEIVE, compute.micro, below) if below else None
    return Op(Kind.RECEIVE_GRADIENT, compute.micro, above) if above else None
