"""What a device holds after a round: SO-LoRA's aggregation and its rivals, as plain functions of one signature.

    held = strategy(own, arrived, held)

`own` is the device's own update, `arrived` what its peers sent and the deadline let in, in any order; who is late or
gone is simply not among them. Every sum runs over senders by name, entry by entry in float64, so that two devices which
got the same updates and held the same hold the very same bytes afterwards, whatever machine they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import groupby
from typing import Any, Literal

import numpy as np

from contextlora.errors import PeerError, did_you_mean
from contextlora.federated.means import mean, over
from contextlora.federated.once import Sharing, alone
from contextlora.federated.robust import clipped, trimmed_mean
from contextlora.federated.slices import Slice

Choice = Literal["gate", "oracle", "sum"]
EVERYONE = "everyone"  # the task in whose name methods with one block for all tasks derive their A


@dataclass(frozen=True)
class Update:
    """One device's slice as it comes out of a round of local training.

    Attributes:
        sender: the device's name; sums run in its order.
        samples: the device trained on, N_j.
        version: counts up with every update of this sender.
        cluster: the sender's, where the strategy keeps clusters apart.
    """

    sender: str
    slice: Slice
    samples: int = 1
    version: int = 0
    cluster: str = ""

    def __post_init__(self) -> None:
        odd = [layer for layer, v in self.slice.values.items() if not np.isfinite(v).all()]
        if odd:  # one of them would spoil every mean it enters
            raise PeerError("E613", f"'{self.sender}' sent values that are not finite", where=odd[0])
        if self.samples < 1:
            raise PeerError("E613", f"'{self.sender}' claims {self.samples} samples; an update comes of at least one")


@dataclass(frozen=True)
class Held:
    """The adapters on a device and how an input finds them: y = W x + sum over the slices found of B A x.

    Attributes:
        slices: by cluster ("" where clusters do not matter) and task; B of each, whose A is that of its task.
        choice: "gate" (routing, eq. 26 to 29), "oracle" (the input's true task) or "sum" (all of them, always).
    """

    slices: Mapping[tuple[str, str], Slice] = field(default_factory=dict)
    choice: Choice = "gate"


Strategy = Callable[[Update, Sequence[Update], Held], Held]


def ours(
    own: Update,
    arrived: Sequence[Update],
    held: Held,
    *,
    by_samples: bool = False,
    liars: int = 0,
    clip: float | None = None,
    once: Sharing = alone,
) -> Held:
    """Count-normalised means within a task; different tasks stay beside one another behind the gate.

        B_e = sum_j w_j B_j,e / sum_j w_j    over the devices j of the task whose entry e arrived, w_j = 1 or N_j

    An entry of which nothing arrived keeps what the device held: a message lost in one round unlearns nothing.

    Args:
        by_samples: weighs by N_j.
        liars: so many senders of one task may send anything; `robust.trimmed_mean` then takes the mean's place, all
            weighing alike, since N_j is a sender's own word. What too few have sent for the others to outvote the
            liars is not taken over in the device's own task: there it keeps its own values. Another task of at most
            2 x liars senders is taken on trust; what is false in it can mislead inputs of that task alone.
        clip: how many times the median update of its task a sender may move from what was held; see `robust.clipped`.
        once: shares what devices of one process that got the same of another task, and held the same, have then.
    """
    slices = dict(held.slices)
    for task, group in _by(_round(own, arrived), lambda u: u.slice.task).items():
        before, sent = slices.get(("", task)), [u.slice for u in group]
        weights = tuple(u.samples if by_samples else 1 for u in group)
        mine = own.slice if task == own.slice.task else None
        make = partial(_of_task, before, sent, weights, mine, liars, clip)
        *_, slices["", task] = once(("task", id(before), *map(id, sent), weights, id(mine)), make)
    return Held(_sorted(slices), "gate")


def _of_task(
    before: Slice | None,
    sent: Sequence[Slice],
    weights: Sequence[float],
    mine: Slice | None,
    liars: int,
    clip: float | None,
) -> tuple[Slice | None, Sequence[Slice], Slice]:
    """What `ours` holds of a task then; before it what went in, so that whoever keeps this keeps that, and its ids."""
    honest = sent if clip is None else clipped(sent, before, clip)
    if not liars or (len(sent) <= 2 * liars and mine is None):
        new = mean(honest, weights)
    else:
        new = trimmed_mean(honest, liars)
        new = new if mine is None else over(mine, new)
    return before, sent, over(before, new)


def hard_routing(
    own: Update, arrived: Sequence[Update], held: Held, *, by_samples: bool = False, once: Sharing = alone
) -> Held:
    """The oracle: the adapters of `ours`, each input sent to that of its true task."""
    return replace(ours(own, arrived, held, by_samples=by_samples, once=once), choice="oracle")


def lori_cat(
    own: Update, arrived: Sequence[Update], held: Held, *, by_samples: bool = False, once: Sharing = alone
) -> Held:
    """LoRI's merging by concatenation: the adapters of `ours`, all of them always on, y = W x + sum_i B_i A_i x."""
    return replace(ours(own, arrived, held, by_samples=by_samples, once=once), choice="sum")


def lori(
    own: Update, arrived: Sequence[Update], held: Held, *, by_samples: bool = False, once: Sharing = alone
) -> Held:
    """LoRI as published: what `lori_cat` does, of adapters that are LoRI's own.

    Not the aggregation but the adapters differ from `lori_cat`: A is an independent Gaussian for each task instead of
    orthogonal blocks, and B's mask is the largest |B| of a whole trial training over all layers together (LoRI-S)
    instead of SO-LoRA's gradients and entropies. See `methods`.
    """
    return lori_cat(own, arrived, held, by_samples=by_samples, once=once)


def local(own: Update, arrived: Sequence[Update], held: Held) -> Held:
    """Nobody's but the device's own."""
    return Held({("", own.slice.task): own.slice}, "sum")


def paper_mean(own: Update, arrived: Sequence[Update], held: Held) -> Held:
    """Eq. 24 to the letter: one plain mean over all tasks of a cluster, behind every member's A.

        y = W x + sum_c sum_{j in c} (1 / |c| sum_{i in c} B_i . M_i) A_j x,    c the clusters

    |c| counts the members that arrived. At S = 0 no two of them share an entry, and still each is divided by |c|: the
    gap that Theorem 1 bounds by a multiple of S is then (1 - 1 / |c|) of the whole update. Two members of one task
    have one A, which is taken once. A cluster of which nothing arrived is kept as it was; one that was formed anew is
    not known to replace another, so begin with an empty `held` then.
    """
    slices = dict(held.slices)
    for cluster, group in _by(_round(own, arrived), lambda u: u.cluster).items():
        for stale in [k for k in slices if k[0] == cluster]:
            del slices[stale]
        merged = mean([u.slice for u in group], [1] * len(group), counted=False)
        slices |= {(cluster, u.slice.task): replace(merged, task=u.slice.task) for u in group}
    return Held(_sorted(slices), "gate")


def single_cluster(own: Update, arrived: Sequence[Update], held: Held) -> Held:
    """`paper_mean` with all devices in one cluster, however often their masks collide."""
    return paper_mean(replace(own, cluster=""), [replace(u, cluster="") for u in arrived], Held())


def fedavg_lora(own: Update, arrived: Sequence[Update], held: Held, *, by_samples: bool = True) -> Held:
    """Traditional LoRA: A and B averaged apart, eq. 9 and 10, one adapter for all tasks.

        A = sum_j a_j A_j,  B = sum_j a_j B_j,  a_j = N_j / sum N over those that arrived

    The mean of products is not the product of means, eq. 13: that is what this baseline is there to show. A travels as
    its difference to what the shared seed gives; since the weights sum to one, its mean is the mean of A.
    """
    return _one_for_all(own, arrived, by_samples)


def ffa(own: Update, arrived: Sequence[Update], held: Held, *, by_samples: bool = True) -> Held:
    """FFA-LoRA: A frozen and the same for all tasks, B averaged (eq. 10), one adapter for all tasks.

    Where A is the same, the mean of the products is the product with the mean. A mask's missing entries count as zero.
    """
    return _one_for_all(own, arrived, by_samples)


def full(own: Update, arrived: Sequence[Update], held: Held, *, by_samples: bool = True) -> Held:
    """Full fine-tuning: the weights themselves averaged, as FedAvg does; they travel as differences to the base."""
    return _one_for_all(own, arrived, by_samples)


def _one_for_all(own: Update, arrived: Sequence[Update], by_samples: bool) -> Held:
    updates = _round(own, arrived)
    weights = [u.samples if by_samples else 1 for u in updates]
    merged = mean([u.slice for u in updates], weights, counted=False)
    return Held({("", EVERYONE): replace(merged, task=EVERYONE)}, "sum")


STRATEGIES: Mapping[str, Strategy] = {
    f.__name__: f
    for f in (ours, paper_mean, fedavg_lora, ffa, full, lori, lori_cat, single_cluster, local, hard_routing)
}


def choice_of(name: str) -> Choice:
    """How inputs find their adapters under the strategy of that name."""
    if name in ("ours", "paper_mean", "single_cluster"):
        return "gate"
    return "oracle" if name == "hard_routing" else "sum"


def strategy(name: str, options: Mapping[str, Any] | None = None, once: Sharing = alone) -> Strategy:
    """The strategy of that name, with these of its keywords; sharing if it can. Raises PeerError E610."""
    if name not in STRATEGIES:
        raise PeerError("E610", f"no aggregation '{name}'.{did_you_mean(name, STRATEGIES)}")
    found = STRATEGIES[name]
    more = {**(options or {}), **({"once": once} if "once" in signature(found).parameters else {})}
    return partial(found, **more) if more else found


def _round(own: Update, arrived: Sequence[Update]) -> list[Update]:
    """The newest update of each sender and task, by sender: the order of every sum.

    Raises PeerError E611 if a sender calls two different updates by one version: none of them can be the right one.
    """
    newest = {(own.sender, own.slice.task): own}
    for u in arrived:
        if u.sender == own.sender:
            continue  # an echo; the device knows better
        known = newest.setdefault((u.sender, u.slice.task), u)
        if u.version > known.version:
            newest[u.sender, u.slice.task] = u
        elif u.version == known.version and _content(u) != _content(known):
            raise PeerError("E611", f"'{u.sender}' sent two different updates as version {u.version}")
    return [newest[k] for k in sorted(newest)]


def _content(u: Update) -> tuple[object, ...]:
    masks, values = u.slice.masks, u.slice.values
    sent = {layer: (masks[layer].indices.tobytes(), values[layer].tobytes()) for layer in masks}
    return u.samples, u.cluster, sent


def _by(updates: Sequence[Update], key: Callable[[Update], str]) -> dict[str, list[Update]]:
    """Updates grouped by a name, each group still in the order of senders."""
    return {name: list(group) for name, group in groupby(sorted(updates, key=key), key)}


def _sorted(slices: Mapping[tuple[str, str], Slice]) -> dict[tuple[str, str], Slice]:
    return {k: slices[k] for k in sorted(slices)}
