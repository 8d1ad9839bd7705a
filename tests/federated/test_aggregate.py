"""Aggregation against formulas written out: dense numpy for the rivals, loops over entries for ours."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import numpy as np
import pytest
from federation import SHAPES, content, of_dense, projections, sparse, updates
from hypothesis import given
from hypothesis import strategies as st

from contextlora.errors import PeerError
from contextlora.federated import aggregate
from contextlora.federated.aggregate import EVERYONE, STRATEGIES, Held, Update, ours
from contextlora.federated.slices import A_SIDE, Mask, Slice


def dense(slice_, layer):
    return slice_.dense(layer).astype(np.float64) if layer in slice_.masks else np.zeros(SHAPES[layer])


def by_loops(sent, before, weight):
    """The count-normalised mean, one entry at a time, as dense arrays with NaN where nothing is held."""
    out = {}
    for layer, (r, d) in SHAPES.items():
        out[layer] = np.full((r, d), np.nan)
        for e in range(r * d):
            found = [(u, dense(u.slice, layer).flat[e]) for u in sent if e in u.slice.masks[layer].indices]
            if found:
                out[layer].flat[e] = sum(weight(u) * v for u, v in found) / sum(weight(u) for u, _ in found)
            elif before is not None and e in before.masks[layer].indices:
                out[layer].flat[e] = dense(before, layer).flat[e]
    return out


def holds(slice_, expected):
    for layer, values in expected.items():
        assert np.array_equal(slice_.masks[layer].indices, np.flatnonzero(~np.isnan(values)))
        np.testing.assert_allclose(slice_.dense(layer), np.nan_to_num(values), rtol=1e-6, atol=1e-7)


@given(updates(least=2), st.data(), st.booleans())
def test_ours_is_the_mean_over_what_arrived_entry_by_entry(sent, data, by_samples):
    held = Held()
    weight = (lambda u: u.samples) if by_samples else (lambda u: 1)
    for _ in range(2):  # the second round loses other messages, and keeps what they had said
        own, arrived = sent[0], data.draw(st.lists(st.sampled_from(sent[1:]), unique_by=id))
        before, held = held, ours(own, arrived, held, by_samples=by_samples)
        here = [own, *arrived]
        assert {t for _, t in held.slices} == {u.slice.task for u in here} | {t for _, t in before.slices}
        for task in {u.slice.task for u in here}:
            expected = by_loops([u for u in here if u.slice.task == task], before.slices.get(("", task)), weight)
            holds(held.slices["", task], expected)
        for key in before.slices.keys() - {("", u.slice.task) for u in here}:
            assert held.slices[key] is before.slices[key]
        assert held.choice == "gate"


@given(updates())
def test_the_papers_mean_divides_by_all_members_whoever_has_the_entry(sent):
    held = aggregate.paper_mean(sent[0], sent[1:], Held())
    assert set(held.slices) == {(u.cluster, u.slice.task) for u in sent}
    for (cluster, task), got in held.slices.items():
        members = [u.slice for u in sent if u.cluster == cluster]
        assert got.task == task
        for layer in SHAPES:
            expected = sum(dense(s, layer) for s in members) / len(members)
            np.testing.assert_allclose(got.dense(layer), expected, rtol=1e-6, atol=1e-7)


@given(updates())
def test_a_single_cluster_is_the_papers_mean_over_everybody(sent):
    held = aggregate.single_cluster(sent[0], sent[1:], Held({("gone", "a"): sent[0].slice}))
    for layer in SHAPES:
        expected = sum(dense(u.slice, layer) for u in sent) / len(sent)
        for got in held.slices.values():
            np.testing.assert_allclose(got.dense(layer), expected, rtol=1e-6, atol=1e-7)
    assert {t for _, t in held.slices} == {u.slice.task for u in sent}


def test_a_silent_cluster_stays_as_it_was_and_a_changed_one_is_replaced():
    rng = np.random.default_rng(0)
    a, b, c = (Update(n, sparse(n, rng), cluster="x" if n != "c" else "y") for n in "abc")
    held = aggregate.paper_mean(a, [b, c], Held())
    later = aggregate.paper_mean(a, [], held)
    assert set(later.slices) == {("x", "a"), ("y", "c")}
    assert later.slices["y", "c"] is held.slices["y", "c"]


@given(updates(with_a=True), st.booleans())
def test_fedavg_averages_a_and_b_apart(sent, by_samples):
    held = aggregate.fedavg_lora(sent[0], sent[1:], Held(), by_samples=by_samples)
    n = np.array([u.samples if by_samples else 1 for u in sent], np.float64)
    alpha = n / n.sum()
    for layer in SHAPES:
        b = sum(w * dense(u.slice, layer) for w, u in zip(alpha, sent, strict=True))
        a = sum(w * dense(u.slice, layer + A_SIDE) for w, u in zip(alpha, sent, strict=True))
        merged = held.slices["", EVERYONE]
        np.testing.assert_allclose(merged.dense(layer), b, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(merged.dense(layer + A_SIDE), a, rtol=1e-6, atol=1e-6)
        # eq. 13: the aggregated product is the double sum, cross terms B_i A_j and all
        pairs = ((p * q, u, v) for p, u in zip(alpha, sent, strict=True) for q, v in zip(alpha, sent, strict=True))
        crossed = sum(w * dense(u.slice, layer).T @ dense(v.slice, layer + A_SIDE) for w, u, v in pairs)
        np.testing.assert_allclose(merged.dense(layer).T @ merged.dense(layer + A_SIDE), crossed, atol=1e-5)
    assert held.choice == "sum"


@given(updates(least=2))
def test_with_one_a_for_all_the_mean_of_products_is_the_product_of_ffas_mean(sent):
    a = projections(np.random.default_rng(7))
    held = aggregate.ffa(sent[0], sent[1:], Held())
    total = sum(u.samples for u in sent)
    assert list(held.slices) == [("", EVERYONE)]
    assert held.choice == "sum"
    for layer in SHAPES:
        products = sum(u.samples / total * dense(u.slice, layer).T @ a[layer] for u in sent)
        np.testing.assert_allclose(held.slices["", EVERYONE].dense(layer).T @ a[layer], products, atol=1e-5)


@given(updates())
def test_concatenation_and_the_oracle_hold_what_ours_holds_and_local_its_own(sent):
    gate, cat, hard = (f(sent[0], sent[1:], Held()) for f in (ours, aggregate.lori_cat, aggregate.hard_routing))
    assert content(gate)[1:] == content(cat)[1:] == content(hard)[1:]
    assert (gate.choice, cat.choice, hard.choice) == ("gate", "sum", "oracle")
    alone = aggregate.local(sent[0], sent[1:], gate)
    assert alone.slices == {("", sent[0].slice.task): sent[0].slice}


@pytest.mark.parametrize("n", [2, 5])
def test_theorem_1_fails_for_the_plain_mean_where_masks_are_disjoint(n):
    """S = 0, so the bound on the gap is 0; the plain mean's gap is (1 - 1/n)^2 of the update and ours' is 0."""
    rng = np.random.default_rng(n)
    sent = []
    for i in range(n):
        b = np.zeros((4, 10), np.float32)
        b.flat[i :: n + 1] = rng.standard_normal(len(b.flat[i :: n + 1]))
        sent.append(Update(f"d{i}", of_dense(f"t{i}", {"l": b})))
    a = rng.standard_normal((4, 6))
    plain, kept = (f(sent[0], sent[1:], Held()) for f in (aggregate.paper_mean, ours))
    for u in sent:
        own = u.slice.dense("l").astype(np.float64)
        mask = own != 0
        merged = np.where(mask, plain.slices["", u.slice.task].dense("l"), 0)
        gap = np.linalg.norm(own.T @ a - merged.T @ a) / np.linalg.norm(own.T @ a)
        assert gap == pytest.approx(1 - 1 / n, rel=1e-6)
        assert np.array_equal(kept.slices["", u.slice.task].dense("l"), u.slice.dense("l"))


@given(updates(with_a=True), st.data())
def test_the_order_of_arrival_changes_no_bit(sent, data):
    shuffled = data.draw(st.permutations(sent[1:]))
    for f in [*STRATEGIES.values(), partial(ours, by_samples=True), partial(ours, liars=1, clip=1.5)]:
        before = f(sent[-1], sent[:1], Held())
        assert content(f(sent[0], sent[1:], before)) == content(f(sent[0], shuffled, before))


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"local"}))
def test_sums_that_depend_on_their_order_run_in_that_of_senders(name):
    """In float64, 1e20 + 1 - 1e20 is 0 and 1e20 - 1e20 + 1 is 1."""
    sent = [
        Update(n, of_dense("a", {"l": np.full((1, 2), v), "l" + A_SIDE: np.full((1, 3), v)}))
        for n, v in (("x", 1e20), ("y", 1.0), ("z", -1e20))
    ]
    held = {str(content(STRATEGIES[name](p[0], p[1:], Held()))) for p in permutations(sent)}
    assert len(held) == 1


@given(updates(with_a=True, least=2), st.sampled_from(sorted(set(STRATEGIES) - {"local"})))
def test_all_devices_that_heard_the_same_hold_the_same_bytes(sent, name):
    held = [content(STRATEGIES[name](own, [u for u in sent if u is not own], Held())) for own in sent]
    assert all(h == held[0] for h in held)


def test_a_senders_newest_update_counts_once_and_an_echo_not_at_all():
    rng = np.random.default_rng(0)
    own, old, new = (Update(n, sparse("a", rng), version=v) for n, v in (("me", 3), ("you", 1), ("you", 2)))
    echo = Update("me", sparse("a", rng), version=9)
    expected = content(ours(own, [new], Held()))
    for arrived in ([old, new], [new, old], [new, new, old, echo]):
        assert content(ours(own, arrived, Held())) == expected


def refused(code, call):
    with pytest.raises(PeerError, match=code):
        call()


def test_what_cannot_be_aggregated_is_refused_and_named():
    rng = np.random.default_rng(0)
    own = Update("me", sparse("a", rng))
    other = Slice("a", {"l.0": Mask((3, 5), np.array([0]))}, {"l.0": np.ones(1, np.float32)})
    refused("E611 'you' sent two different updates as version 1", lambda: ours(own, two_faces(rng), Held()))
    refused(r"E612 l.0: B of \(2, 5\) and \(3, 5\)", lambda: ours(own, [Update("you", other)], Held()))
    refused("E613 'me' claims 0 samples", lambda: Update("me", own.slice, samples=0))
    bad = Slice("a", {"l.0": Mask((2, 5), np.array([0]))}, {"l.0": np.array([np.nan], np.float32)})
    refused("E613 l.0: 'you' sent values that are not finite", lambda: Update("you", bad))
    refused("E610 no aggregation 'our'. Did you mean 'ours'", lambda: aggregate.strategy("our"))
    assert aggregate.strategy("ffa") is aggregate.ffa


def two_faces(rng):
    return [Update("you", sparse("a", rng), version=1) for _ in range(2)]
