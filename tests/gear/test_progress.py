"""Taking a stage up again: who has what, and what a prefix sends to a trainer that has forgotten its cache."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.config import TrainConfig
from contextlora.data.collate import Sample
from contextlora.gear.plan import Group, Part
from contextlora.gear.progress import _latest
from contextlora.gear.runtime import Team, active, begins, micro_batches, pieces
from contextlora.training.step import Order

COUNT = 3
kept = st.tuples(st.sampled_from([2, 4, 6]), st.sets(st.integers(0, COUNT - 1), min_size=1))
offers = st.lists(st.lists(kept, max_size=2), min_size=1, max_size=4)


@given(offers)
def test_the_latest_update_of_which_all_is_there(kept):
    told = [[{"done": {"t": u}, "places": {"t": sorted(p)}} for u, p in mine] for mine in kept]
    together = {u: set().union(*(p for mine in kept for v, p in mine if v == u)) for u in (2, 4, 6)}
    want = max((u for u, places in together.items() if len(places) == COUNT), default=0)
    update, holders = _latest(told, "t", COUNT)
    assert update == want
    assert len(holders) == (COUNT if want else 0)
    assert all(any(u == want and place in p for u, p in kept[rank]) for place, rank in enumerate(holders))


def sample(task, i):
    return Sample(f"{task if i % 3 else 'both'} {i}", task, None, (1,) * (2 + i % 4), (2,))


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.data())
def test_what_is_sent_again_was_made_together_before(first, second, batch, size, epochs, data):
    """With a cache, every piece is one of an undisturbed stage; no more comes than is needed, and no less."""
    config = TrainConfig(batch_size=batch, epochs=epochs)
    runs = [Order((t,), [sample(t, i) for i in range(n)], config) for t, n in (("a", first), ("b", second))]
    prefix = [Part(device=d, start=0, stop=2, seconds=s) for d, s in (("p", 1.0), ("q", 2.0))]
    group = Group(
        tasks=("a", "b"),
        form="single",
        trainers=[Part(device="t", start=2, stop=5)],
        size=size,
        ahead="streamed",
        prefix=prefix,
        cut=2,
        cache=True,
    )
    team = Team(group, {"t": 0, "p": 1, "q": 2}, "t", None)
    total = max(r.total for r in runs)
    whole = list(pieces(team, runs, total, {}))
    assert sorted(s.key for p in whole for s in p.samples) == sorted({s.key for r in runs for s in r.samples})
    done = {r.name: data.draw(st.integers(0, r.total)) for r in runs}
    again, had, came = iter(pieces(team, runs, total, done)), set(), []
    for update in range(begins(runs, done), total):
        for b in micro_batches(active(runs, update, done), update, size):
            while missing := {s.key for s in b} - had:
                piece = next(again)
                assert piece in whole
                assert missing & {s.key for s in piece.samples} or len(b) > 1
                came.append(piece)
                had |= {s.key for s in piece.samples}
    assert next(again, None) is None
    assert len({id(p) for p in came}) == len(came)
