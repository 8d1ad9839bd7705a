"""Label noise: exact count, only what may be touched, and the answers as a whole unchanged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.data.examples import Example
from contextlora.data.noise import label_noise
from contextlora.errors import ConfigError, DataError
from contextlora.graph import TaskGraph

GRAPH = TaskGraph.from_dict(
    {
        "tasks": {
            "a": {"question": "?", "options": ["a1", "a2", "a3"]},
            "b": {"question": "?", "options": ["b1", "b2"]},
            "free": {"question": "?"},
            "child": {"question": "?", "options": ["c1", "c2"], "after": ["a", "b"]},
        }
    }
)


def examples(n: int, splits: tuple[str, ...] = ("train", "valid")) -> list[Example]:
    """`n` examples whose root answers are all different, so that any move shows."""
    return [
        Example(
            f"e{i:03}",
            Path(f"{i}.png"),
            {"a": (f"a{i}",), "free": (f"f{i}",), "child": ("c1",)} | ({"b": (f"b{i}",)} if i % 3 else {}),
            {"a": "other words"},
            splits[i % len(splits)],
        )
        for i in range(n)
    ]


def moved(before: list[Example], after: list[Example]) -> set[tuple[str, str]]:
    pairs = zip(before, after, strict=True)
    return {(x.id, t) for x, y in pairs for t in x.answers if x.answers[t] != y.answers[t]}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 60), fraction=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_only_root_choices_of_train_move(n: int, fraction: float, seed: int) -> None:
    before = examples(n)
    after = label_noise(before, GRAPH, fraction, seed)
    eligible = [(e.id, t) for e in before if e.split == "train" for t in ("a", "b") if t in e.answers]
    assert moved(before, after) <= set(eligible)
    assert len(moved(before, after)) <= round(fraction * len(eligible))

    def answers(of: list[Example]) -> Counter[tuple[str, ...]]:
        return Counter(e.answers[t] for e in of for t in e.answers)

    assert answers(before) == answers(after)  # permuted: none lost, none new
    for x, y in zip(before, after, strict=True):
        assert replace(y, answers=x.answers) == x
        assert list(y.answers) == list(x.answers)


def test_the_count_is_exact() -> None:
    """With all answers different, a permutation of k pairs leaves about one of them where it was."""
    before = examples(600, ("train",))
    total = sum(t in e.answers for e in before for t in ("a", "b"))
    for fraction in (0.05, 0.1, 0.2, 1.0):
        fixed = [
            round(fraction * total) - len(moved(before, label_noise(before, GRAPH, fraction, s))) for s in range(200)
        ]
        assert min(fixed) == 0
        assert 0.75 < sum(fixed) / 200 < 1.25  # the expected number of fixed points is 1


def test_answers_cross_tasks_and_are_uniform() -> None:
    """Questions and answers are matched at random: an answer lands on its own task as often as that task occurs."""
    before = examples(400, ("train",))
    after = label_noise(before, GRAPH, 1.0, 7)
    landed = Counter((t, e.answers[t][0][0]) for e in after for t in ("a", "b") if t in e.answers)
    asked = {t: sum(t in e.answers for e in before) for t in ("a", "b")}
    for (question, answer), count in landed.items():
        expected = asked[question] * asked[answer] / sum(asked.values())
        assert abs(count - expected) < 4 * expected**0.5
    assert len(landed) == 4


def test_seeds_order_and_nesting() -> None:
    before = examples(200, ("train",))
    ten = label_noise(before, GRAPH, 0.1, 3)
    assert ten == label_noise(before, GRAPH, 0.1, 3)
    assert ten != label_noise(before, GRAPH, 0.1, 4)
    assert ten[::-1] == label_noise(before[::-1], GRAPH, 0.1, 3)
    still = {e.id for e, f in zip(before, ten, strict=True) if e is f}
    assert len(still) > 150
    assert label_noise(before, GRAPH, 0.0, 3) == before
    five = {e for e, _ in moved(before, label_noise(before, GRAPH, 0.05, 3))}
    assert five.isdisjoint(still)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_is_a_share(fraction: float) -> None:
    with pytest.raises(DataError, match="E209"):
        label_noise(examples(3), GRAPH, fraction, 0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 40), fraction=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_named_tasks_alone_move_and_by_default_the_roots(n: int, fraction: float, seed: int) -> None:
    before = examples(n)
    one = label_noise(before, GRAPH, fraction, seed, ("a",))
    assert {t for _, t in moved(before, one)} <= {"a"}
    own = sorted(e.answers["a"] for e in before if e.split == "train")
    assert own == sorted(e.answers["a"] for e in one if e.split == "train"), "permuted among its own pairs"
    roots = label_noise(before, GRAPH, fraction, seed)
    assert roots == label_noise(before, GRAPH, fraction, seed, ("a", "b")) == label_noise(before, GRAPH, fraction, seed)
    assert label_noise(before, GRAPH, fraction, seed, ()) == before


def test_the_default_is_what_it_ever_was() -> None:
    """Recorded before `tasks` came: results of old runs stay comparable."""
    after = label_noise(examples(12, ("train",)), GRAPH, 0.5, 7)
    told = "".join(f"{e.answers['a'][0]} {e.answers.get('b', ('-',))[0]};" for e in after)
    assert told == "a9 -;a1 b1;b11 b2;a3 -;b4 a2;a5 b5;a6 -;a7 b7;a8 b8;a4 -;a10 a11;a0 b10;"


def test_a_dependent_task_can_be_named() -> None:
    before = [Example(f"e{i}", None, {"a": ("a1",), "child": (f"c{i}",)}, {}, "train") for i in range(20)]
    assert {t for _, t in moved(before, label_noise(before, GRAPH, 1.0, 0, ("child",)))} == {"child"}


def test_tasks_that_cannot_be_noised_are_named() -> None:
    with pytest.raises(ConfigError, match=r"E104 no task 'chlid' .* Did you mean 'child'\?"):
        label_noise(examples(3), GRAPH, 0.1, 0, ("a", "chlid"))
    with pytest.raises(DataError, match="E209 noise_tasks: task 'free' has free answers"):
        label_noise(examples(3), GRAPH, 0.1, 0, ("free",))
