"""A discrete-event simulation of groups at work: the judge of the analytic model in `cost`, and of schedules. No torch.

Devices play their lists of `schedule` step after step. A device computes one thing at a time, with the profile's
seconds. A transfer leaves when its sender has the data and knows, one delay later, of the receiver's receive (gloo's
rendezvous); it then takes its turn, first come first served, on the medium that all share (half-duplex, twice by way of
an access point) or on its direction of a dedicated link, and arrives one more delay after its last byte. Devices
without a backward hold back the next output until the one before has left; trainers end a step when all they sent has
left, and a pipeline's when the last of them has (they clip by one norm). An all-reduce is a ring of 2(n - 1) rounds;
meanwhile its trainers take the next step's first micro-batches through the frozen units. An optimizer's update takes no
time: no profile has it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from contextlora.gear import cost
from contextlora.gear.clock import Clock, Flag, Process
from contextlora.gear.cost import AHEAD, QUEUE, Problem
from contextlora.gear.plan import Group, Plan, PlannedStage
from contextlora.gear.schedule import COMPUTE, Kind, Op, Schedule, schedule

MEDIUM = "(medium)"  # no device can have that name


@dataclass(frozen=True)
class Event:
    """Something that took time.

    Attributes:
        place: the device, MEDIUM, or "a > b" for a direction of a dedicated link.
        kind: of the operation; a transfer's is that of its send.
        group, step, micro: what for; micro is -1 in an all-reduce.
        start, end: seconds.
    """

    place: str
    kind: Kind
    group: int
    step: int
    micro: int
    start: float
    end: float


@dataclass(frozen=True)
class Trace:
    """What happened.

    Attributes:
        events: by their ends.
        steps: seconds of each step, by group; a group's first has the time to fill its pipeline and queues.
        sent: bytes by device.
        seconds: until the last event ended.
    """

    events: tuple[Event, ...]
    steps: tuple[tuple[float, ...], ...]
    sent: dict[str, float]
    seconds: float


def simulate(problem: Problem, groups: Sequence[Group], steps: int = 3) -> Trace:
    """Full steps, all micro-batches fresh, of groups that work side by side."""
    full = [math.ceil(len(g.tasks) * problem.work.batch / g.size) for g in groups]
    return play(problem, [schedule(problem, g, m) for g, m in zip(groups, full, strict=True)], [steps] * len(groups))


def play(problem: Problem, schedules: Sequence[Schedule], steps: Sequence[int]) -> Trace:
    """Plays lists, each as many times as `steps` says, all beginning at once."""
    world = _World(problem)
    groups = [_Running(world, i, s, n) for i, (s, n) in enumerate(zip(schedules, steps, strict=True))]
    for g in groups:
        g.start()
    world.clock.play()
    each = [tuple(b - a for a, b in itertools.pairwise([0.0, *g.ends])) for g in groups]
    last = max((e.end for e in world.events), default=0.0)
    return Trace(tuple(world.events), tuple(each), dict(world.sent), last)


# --- a whole stage ---------------------------------------------------------------------------------------------------


def simulated_seconds(problem: Problem, what: Plan | PlannedStage) -> float:
    """Seconds of a stage or plan, exchange of slices included.

    Groups go through their intervals of equal steps (`Work.intervals`). For every combination of intervals that run at
    once, a few steps are played until steps repeat, see `steady`; each group then goes on at that rate until the first
    of them reaches its interval's end. What a group takes until its pipeline and queues are full counts once.
    """
    if isinstance(what, Plan):
        return sum(simulated_seconds(problem, s) for s in what.stages)
    return _stage(problem, [g.group for g in what.groups]) + what.exchange


def _stage(problem: Problem, groups: Sequence[Group]) -> float:
    left = {i: _intervals(problem, g) for i, g in enumerate(groups)}
    wait: dict[int, float] = {}  # until a group's pipeline is full
    seconds = 0.0
    while left := {i: todo for i, todo in left.items() if todo}:
        rates = steady(problem, [schedule(problem, groups[i], *todo[0][1:]) for i, todo in left.items()])
        for i, (lead, _) in zip(left, rates, strict=True):
            wait.setdefault(i, lead)
        until = min(wait[i] + todo[0][0] * each for (i, todo), (_, each) in zip(left.items(), rates, strict=True))
        for (i, todo), (_, each) in zip(left.items(), rates, strict=True):
            still = min(wait[i], until)
            wait[i] -= still
            steps = todo[0][0] - (until - still) / each
            todo[:1] = [(steps, *todo[0][1:])] if steps > 1e-9 else []
        seconds += until
    return seconds


def _intervals(problem: Problem, group: Group) -> list[tuple[float, int, int]]:
    """A group's runs of equal steps: steps, micro-batches of one, fresh ones among them."""
    found, batch = [], problem.work.batch
    for steps, active, first in problem.work.intervals([problem.loads[t] for t in group.tasks]):
        micro = math.ceil(active * batch / group.size)
        found.append((float(steps), micro, min(micro, math.ceil(first * batch / group.size))))
    return found


def steady(problem: Problem, schedules: Sequence[Schedule], most: int = 64) -> list[tuple[float, float]]:
    """Seconds that each group loses once, and of a step in the long run, when all of them work at once.

    Plays 8 steps of the slowest group (and as many of the others as fit beside them), then 16, up to `most`, until the
    last steps of every group repeat with a period of at most 4; else takes the mean of the second half.
    """
    guess = [cost.step(problem, s.group, len(s.fresh), sum(s.fresh)).seconds for s in schedules]
    steps = 8
    while True:
        counts = [min(8 * most, math.ceil(steps * max(guess) / g)) if g > 0 else steps for g in guess]
        trace = play(problem, schedules, counts)
        window = min(sum(s) for s in trace.steps) * (1 + 1e-9)  # beyond it, some group has already left the medium
        found = [_rate(s, window) for s in trace.steps]
        if steps >= most or all(repeats for _, _, repeats in found):
            return [(lead, each) for lead, each, _ in found]
        steps *= 2


def _rate(steps: Sequence[float], window: float) -> tuple[float, float, bool]:
    """Seconds lost once, of a step, and whether steps repeat."""
    ends = list(itertools.accumulate(steps))
    within = max(2, sum(e <= window for e in ends))
    steps, done = steps[:within], ends[:within][-1]
    for period in range(1, 5):
        tail, before = steps[-period:], steps[-2 * period : -period]
        if len(before) == period and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(tail, before, strict=True)):
            each = sum(tail) / period
            return max(0.0, done - len(steps) * each), each, True
    half = steps[len(steps) // 2 :]
    each = sum(half) / len(half)
    return max(0.0, done - len(steps) * each), each, False


# --- the network -----------------------------------------------------------------------------------------------------

_Key = tuple[int, int, Kind, int, str, str]  # group, step, kind of the send, micro-batch or round, from, to


class _Transfer:
    """Flags of one transfer: the sender has it, knows of the receive, all of it is out, all of it is in."""

    def __init__(self, clock: Clock) -> None:
        self.offered, self.asked, self.gone, self.arrived = (Flag(clock) for _ in range(4))


class _World:
    """The clock, the network and the record."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.fleet, self.clock = problem, problem.fleet, Clock()
        self.events = list[Event]()
        self.sent: dict[str, float] = defaultdict(float)
        self._free: dict[str, float] = defaultdict(float)  # when the medium or a link is next free
        self._transfers: dict[_Key, _Transfer] = {}

    def transfer(self, key: _Key, size: float) -> _Transfer:
        """The transfer of that key, whoever mentions it first."""
        if key not in self._transfers:
            self._transfers[key] = _Transfer(self.clock)
            self.clock.begin(self._carry(key, size, self._transfers[key]))
        return self._transfers[key]

    def ask(self, key: _Key, size: float) -> Flag:
        """Posts a receive; returns the flag of its arrival."""
        t = self.transfer(key, size)
        self.clock.at(self.clock.now + self.fleet.delay(key[4], key[5]), t.asked.rise)
        return t.arrived

    def offer(self, key: _Key, size: float) -> Flag:
        """Starts a send; returns the flag of its end at the sender."""
        t = self.transfer(key, size)
        t.offered.rise()
        return t.gone

    def _carry(self, key: _Key, size: float, t: _Transfer) -> Process:
        group, step, kind, micro, a, b = key
        yield t.offered
        yield t.asked
        place = MEDIUM if self.fleet.shared else f"{a} > {b}"
        start = max(self.clock.now, self._free[place])
        self._free[place] = end = start + self.fleet.airtime(a, b, size)
        yield end
        self.sent[a] += size
        self.events.append(Event(place, kind, group, step, -1 if kind is Kind.REDUCE else micro, start, end))
        t.gone.rise()
        yield end + self.fleet.delay(a, b)
        t.arrived.rise()


# --- devices ---------------------------------------------------------------------------------------------------------


class _Running:
    """A group at work."""

    def __init__(self, world: _World, index: int, plan: Schedule, steps: int) -> None:
        self.world, self.index, self.plan, self.steps = world, index, plan, steps
        self.parts = {p.device: p for p in (*plan.group.prefix, *plan.group.trainers)}
        self.size = world.problem.cut(plan.group.size)
        self.ends = [0.0] * steps
        self._over = [Flag(world.clock) for _ in range(steps)]
        self._working = [len(plan.group.trainers) for _ in range(steps)]
        self._ahead = set[tuple[str, int, int]]()  # device, step and micro-batch that the frozen units have seen

    def start(self) -> None:
        for name in self.parts:
            self.world.clock.begin(self._device(name))

    def _key(self, step: int, op: Op, name: str) -> _Key:
        """Of the transfer that an operation of `name` is about."""
        if op.kind in (Kind.SEND, Kind.SEND_GRADIENT):
            return self.index, step, op.kind, op.micro, name, op.peer
        kind = Kind.SEND_GRADIENT if op.kind is Kind.RECEIVE_GRADIENT else Kind.SEND
        return self.index, step, kind, op.micro, op.peer, name

    def _device(self, name: str) -> Process:
        """Plays one device's list, step after step."""
        ops, world = self.plan.ops[name], self.world
        trains = any(p.device == name for p in self.plan.group.trainers)
        only_forward = not any(op.kind is Kind.BACKWARD for op in ops)
        queue = self._queue(name)
        for _ in range(QUEUE):
            next(queue, None)
        left = list[Flag]()  # of sends that may not have ended
        for step in range(self.steps):
            inputs: dict[tuple[Kind, int], Flag] = {}
            for op in ops:
                if op.kind in COMPUTE:
                    if (op.kind, op.micro) in inputs:
                        yield inputs[op.kind, op.micro]
                    yield from self._compute(name, step, op)
                elif op.kind in (Kind.RECEIVE, Kind.RECEIVE_GRADIENT):
                    use = Kind.FORWARD if op.kind is Kind.RECEIVE else Kind.BACKWARD
                    inputs[use, op.micro] = world.ask(self._key(step, op, name), self.size)
                elif op.kind in (Kind.SEND, Kind.SEND_GRADIENT):
                    yield from left if only_forward else ()
                    left = [*(() if only_forward else left), world.offer(self._key(step, op, name), self.size)]
                elif op.kind is Kind.TAKE:
                    yield world.transfer(self._key(step, op, name), self.size).arrived
                    next(queue, None)
                elif op.kind is Kind.REDUCE:
                    summed = Flag(world.clock)
                    world.clock.begin(self._reduce(name, step, summed))
                    yield from self._run_ahead(name, step + 1, summed)
                    yield summed
            if trains:
                yield from left
                left = []
                self.ends[step] = max(self.ends[step], world.clock.now)
                self._working[step] -= 1
                if not self._working[step]:
                    self._over[step].rise()
                if self.plan.group.form == "pipeline":
                    yield self._over[step]

    def _queue(self, name: str) -> Iterator[None]:
        """Posts the receive of one more of the prefix's micro-batches whenever it is asked to, over all steps."""
        for step in range(self.steps):
            for op in self.plan.ops[name]:
                if op.kind is Kind.TAKE:
                    self.world.ask(self._key(step, op, name), self.size)
                    yield

    def _compute(self, name: str, step: int, op: Op) -> Process:
        g, p, part = self.plan.group, self.world.problem, self.parts[name]
        cached = g.ahead == "local" and name == g.trainers[0].device and not self.plan.fresh[op.micro]
        if op.kind is Kind.BACKWARD:
            seconds = p.backward(name, part.start, part.stop, g.size)
        else:
            seconds = p.forward(name, g.cut if cached else part.start, part.stop, g.size)
            if (name, step, op.micro) in self._ahead:
                seconds -= p.forward(name, 0, p.work.lowest, g.size)
        start = self.world.clock.now
        yield start + seconds
        self.world.events.append(Event(name, op.kind, self.index, step, op.micro, start, start + seconds))

    def _run_ahead(self, name: str, step: int, until: Flag) -> Process:
        """Takes micro-batches of a step through the frozen units, as long as the flag is down."""
        clock, mine = self.world.clock, [op.micro for op in self.plan.ops[name] if op.kind is Kind.FORWARD]
        seconds = cost.frozen(self.world.problem, self.plan.group, self.parts[name])
        for micro in mine[:AHEAD] if seconds and step < self.steps else ():
            if until.up:
                return
            start = clock.now
            yield start + seconds
            self._ahead.add((name, step, micro))
            self.world.events.append(Event(name, Kind.FORWARD, self.index, step, micro, start, clock.now))

    def _reduce(self, name: str, step: int, done: Flag) -> Process:
        """Receives of all rounds stand open from the start; each round passes on what the one before brought."""
        world, ring = self.world, [t.device for t in self.plan.group.trainers]
        at, n, start = ring.index(name), len(ring), world.clock.now
        after, before = ring[(at + 1) % n], ring[at - 1]
        share = world.problem.slice_bytes(self.plan.group.tasks) / n
        rounds = range(2 * (n - 1))
        coming = [world.ask((self.index, step, Kind.REDUCE, r, before, name), share) for r in rounds]
        for r in rounds:
            gone = world.offer((self.index, step, Kind.REDUCE, r, name, after), share)
            yield coming[r]
            yield gone
        world.events.append(Event(name, Kind.REDUCE, self.index, step, -1, start, world.clock.now))
        done.rise()
