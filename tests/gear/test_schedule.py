"""Lists of operations: complete, in order, and without deadlock, on random groups of every form."""

from __future__ import annotations

import math
from collections import Counter

import groups
import pytest
import small

from contextlora.errors import PlanError
from contextlora.gear.cost import QUEUE
from contextlora.gear.schedule import COMPUTE, Kind, pipeline_csv, schedule, torch_csv

SEEDS = range(60)
SENDS = {Kind.SEND: Kind.RECEIVE, Kind.SEND_GRADIENT: Kind.RECEIVE_GRADIENT}
NEEDS = {Kind.FORWARD: Kind.RECEIVE, Kind.BACKWARD: Kind.RECEIVE_GRADIENT}


def drawn(seed, **more):
    p, g = groups.draw(seed)
    micro = math.ceil(len(g.tasks) * p.work.batch / g.size)
    fresh = seed % (micro + 1) if g.cache else micro
    return p, g, micro, schedule(p, g, micro, fresh, **more)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_operation_once(seed):
    p, g, micro, plan = drawn(seed)
    fresh = [m for m in range(micro) if plan.fresh[m]]
    assert len(fresh) == (seed % (micro + 1) if g.cache else micro)
    assert set(plan.ops) == set(g.devices)
    done = {d: Counter((op.kind, op.micro) for op in ops if op.kind in COMPUTE) for d, ops in plan.ops.items()}
    everything = Counter((k, m) for k in COMPUTE for m in range(micro))
    if g.prefix:
        assert sum((done[x.device] for x in g.prefix), Counter()) == Counter((Kind.FORWARD, m) for m in fresh)
    if g.form == "data":
        assert sum((done[x.device] for x in g.trainers), Counter()) == everything
    else:
        for x in g.trainers:
            learns = x.stop > p.work.lowest
            assert done[x.device] == (everything if learns else Counter((Kind.FORWARD, m) for m in range(micro)))
    for d, ops in plan.ops.items():
        ends = [op.kind for op in ops if op.kind in (Kind.REDUCE, Kind.UPDATE)]
        learns = any(x.device == d and x.stop > p.work.lowest for x in g.trainers)
        assert ends == ([Kind.REDUCE] * (g.form == "data") + [Kind.UPDATE]) * learns
        assert [op.kind for op in ops[len(ops) - len(ends) :]] == ends


@pytest.mark.parametrize("seed", SEEDS)
def test_every_send_has_its_receive_in_the_same_order(seed):
    """gloo matches what one device sends another by order alone."""
    _, _, _, plan = drawn(seed)
    sent, received = {}, {}
    for d, ops in plan.ops.items():
        for op in ops:
            if op.kind in SENDS:
                sent.setdefault((d, op.peer), []).append((SENDS[op.kind], op.micro))
            elif op.kind in SENDS.values():
                received.setdefault((op.peer, d), []).append((op.kind, op.micro))
            elif op.kind is Kind.TAKE:
                received.setdefault((op.peer, d), []).append((Kind.RECEIVE, op.micro))
    assert sent == received


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hoist", [0, 1, 2])
def test_order_on_a_device(seed, hoist):
    _, g, micro, plan = drawn(seed, hoist=hoist)
    for d, ops in plan.ops.items():
        at = {(op.kind, op.micro): i for i, op in enumerate(ops)}
        computes = [op for op in ops if op.kind in COMPUTE]
        for i, op in enumerate(computes):
            here = at[op.kind, op.micro]
            if op.kind is Kind.BACKWARD:
                assert at[Kind.FORWARD, op.micro] < here
            receive = at.get((NEEDS[op.kind], op.micro))
            if receive is not None:
                assert receive < here
                between = sum(x.kind in COMPUTE for x in ops[receive:here])
                assert between == min(hoist, i)
            send = at.get((Kind.SEND if op.kind is Kind.FORWARD else Kind.SEND_GRADIENT, op.micro))
            assert send in (None, here + 1)
            take = at.get((Kind.TAKE, op.micro))
            assert op.kind is Kind.BACKWARD or take in (None, here - 1)
        if g.form == "pipeline" and any(op.kind is Kind.BACKWARD for op in ops):
            place = [x.device for x in g.trainers].index(d)
            assert in_flight(computes) == min(len(g.trainers) - place, micro)


def in_flight(computes):
    most = now = 0
    for op in computes:
        now += 1 if op.kind is Kind.FORWARD else -1
        most = max(most, now)
    return most


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("hoist", "extra"), [(0, 0), (1, 0), (2, 0), (2, 2), (5, 1)])
def test_no_deadlock(seed, hoist, extra):
    _, g, _, plan = drawn(seed, hoist=hoist, extra=extra)
    stuck = Player(plan, steps=3).play()
    assert not stuck, (g, stuck)


class Player:
    """Plays lists without time: a rendezvous is over when both sides have come to it."""

    def __init__(self, plan, steps):
        self.plan, self.group = plan, plan.group
        self.todo = {
            d: [(s, op) for s in range(steps) for op in [*ops, None]] for d, ops in plan.ops.items()
        }  # None: the end of a step
        self.sent, self.asked, self.entered = set(), set(), set()
        self.open = {d: [] for d in plan.ops}  # sends of this device that may not be over
        self.takes = {
            d: [(op.peer, d, Kind.SEND, op.micro, s) for s in range(steps) for op in ops if op.kind is Kind.TAKE]
            for d, ops in plan.ops.items()
        }
        for d in plan.ops:
            self.asked |= set(self.takes[d][:QUEUE])

    def play(self):
        """Plays to the end, or says who is stuck where."""
        moved = True
        while moved:
            moved = False
            for d, todo in self.todo.items():
                while todo and self.step(d, *todo[0]):
                    todo.pop(0)
                    moved = True
        return {d: todo[0] for d, todo in self.todo.items() if todo}

    def over(self, key):
        return key in self.sent and key in self.asked

    def step(self, d, s, op):
        trainers = [t.device for t in self.group.trainers]
        if op is None:
            return d not in trainers or all(map(self.over, self.open[d]))
        if op.kind in SENDS:
            frozen = not any(x.kind is Kind.BACKWARD for x in self.plan.ops[d])
            if frozen and not all(map(self.over, self.open[d])):
                return False
            key = (d, op.peer, op.kind, op.micro, s)
            self.sent.add(key)
            self.open[d].append(key)
        elif op.kind in SENDS.values():
            kind = Kind.SEND if op.kind is Kind.RECEIVE else Kind.SEND_GRADIENT
            self.asked.add((op.peer, d, kind, op.micro, s))
        elif op.kind is Kind.TAKE:
            if not self.over(self.takes[d][0]):
                return False
            assert self.takes[d].pop(0) == (op.peer, d, Kind.SEND, op.micro, s)
            self.asked |= set(self.takes[d][:QUEUE])
        elif op.kind is Kind.REDUCE:
            self.entered.add((d, s))
            return all((t, s) in self.entered for t in trainers)
        elif op.kind in COMPUTE:
            kind = Kind.SEND if op.kind is Kind.FORWARD else Kind.SEND_GRADIENT
            needed = [x.peer for x in self.plan.ops[d] if x.kind is NEEDS[op.kind] and x.micro == op.micro]
            return all(self.over((peer, d, kind, op.micro, s)) for peer in needed)
        return True


def test_a_receive_that_nobody_answers_is_found():
    """The player itself: a list without one of its sends gets stuck."""
    p = small.problem(2, 6, lowest=1, seed=4)
    plan = schedule(p, groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6)), 4)
    plan.ops["d0"] = tuple(op for op in plan.ops["d0"] if (op.kind, op.micro) != (Kind.SEND, 2))
    assert Player(plan, steps=1).play()


def test_fresh_micro_batches_are_spread():
    p = small.problem(2, 6, seed=4)
    g = groups.group("single", ("d0", 2, 6), size=1, prefix=[("d1", 0, 2)], ahead="streamed", cut=2, cache=True)
    assert schedule(p, g, 8, 4).fresh == (False, True) * 4
    assert schedule(p, g, 8, 0).ops["d1"] == ()


def test_micro_batches_go_round_in_the_order_in_which_trainers_need_them():
    p = small.problem(3, 6, seed=4)
    one = p.fleet.devices["d0"].model_copy(update={"speed": 1.0})
    for speeds, wanted in (((1.0, 1.0), [[0, 2], [1, 3]]), ((1.0, 0.5), [[0, 2, 3], [1]])):
        for name, speed in zip(("d1", "d2"), speeds, strict=True):
            p.fleet.devices[name] = one.model_copy(update={"speed": speed})
        prefix = {"prefix": [("d0", 0, 2)], "ahead": "streamed", "cut": 2}
        plan = schedule(p, groups.group("data", ("d1", 2, 6), ("d2", 2, 6), **prefix), 4)
        assert [[op.micro for op in plan.ops[d] if op.kind is Kind.TAKE] for d in ("d1", "d2")] == wanted
        assert [op.micro for op in plan.ops["d0"] if op.kind is Kind.SEND] == [0, 1, 2, 3]


def test_torch_csv():
    p = small.problem(2, 6, lowest=1, seed=4)
    g = groups.group("pipeline", ("d0", 0, 3), ("d1", 3, 6))
    first, second = torch_csv(schedule(p, g, 3, hoist=1)).splitlines()
    assert first == "0F0,0SEND_F0,0RECV_B0,0F1,0SEND_F1,0B0,0RECV_B1,0F2,0SEND_F2,0RECV_B2,0B1,0B2"
    assert second == "1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1RECV_F2,1B1,1SEND_B1,1F2,1B2,1SEND_B2"
    assert pipeline_csv(g, 7, p.work.lowest) == torch_csv(schedule(p, g, 7))
    with pytest.raises(PlanError, match="E405"):
        torch_csv(schedule(p, groups.group("data", ("d0", 0, 6), ("d1", 0, 6)), 4))


def test_torch_csv_has_idle_backwards_below_the_lowest_block():
    p = small.problem(3, 6, lowest=3, seed=4)
    rows = torch_csv(schedule(p, groups.group("pipeline", ("d0", 0, 2), ("d1", 2, 3), ("d2", 3, 6)), 2, hoist=0))
    assert rows.splitlines() == [
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1",
        "1RECV_F0,1F0,1SEND_F0,1RECV_F1,1F1,1SEND_F1,1RECV_B0,1B0,1SEND_B0,1RECV_B1,1B1,1SEND_B1",
        "2RECV_F0,2F0,2B0,2SEND_B0,2RECV_F1,2F1,2B1,2SEND_B1",
    ]


@pytest.mark.parametrize("seed", range(40))
def test_torch_agrees_that_nothing_hangs(seed):
    """PyTorch's own dry run, which takes a receive to be blocking: so receives stand right before their use."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    p = small.problem(4, 8, lowest=1 + seed % 6, seed=seed)
    g = groups.group("pipeline", ("d3", 0, 2), ("d1", 2, 3), ("d0", 3, 6), ("d2", 6, 8))
    rows = torch_csv(schedule(p, g, 1 + seed % 12, hoist=0)).splitlines()
    actions = {r: [schedules._Action.from_str(a) for a in row.split(",")] for r, row in enumerate(rows)}
    schedules._simulate_comms_compute(actions, lambda stage: stage, 4)
