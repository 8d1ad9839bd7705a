"""Devices that train in one forward pass do what they would do alone, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from contextlora.data.collate import Encoder
from contextlora.errors import PeerError
from contextlora.federated import together
from contextlora.federated.layer import layers
from contextlora.federated.local import Local, Turn, local_run, run_together
from contextlora.federated.methods import put_on
from contextlora.federated.setup import shares
from contextlora.federated.simulate import simulate
from contextlora.federated.slices import Mask, zeros
from contextlora.lora.attach import attach
from contextlora.models.inputs import ImageFeatures
from federated.federation import small, write_words

DEVICES = {"a": "weather", "b": "weather", "c": "light", "d": "light", "e": "action"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"), train=24)


def reader(dtype, settings=None):
    model, processor = tiny.llama(dtype)
    graph = tiny.graph()
    if settings is None:
        attach(model, graph, make=layers(0, dtype))
    else:
        put_on(model, graph, settings)
    return ImageFeatures(model, Encoder(processor, graph))


def close(one, other, tolerance):
    for layer, values in one.values.items():
        assert np.array_equal(one.masks[layer].indices, other.masks[layer].indices)
        assert np.allclose(values, other.values[layer], rtol=tolerance, atol=tolerance)


def begun(inputs, task, seed):
    """A device somewhere on the way: a third of the entries learns."""
    rng, masks = np.random.default_rng(seed), {}
    for path, layer in inputs.model.named_modules():
        if hasattr(layer, "orthogonal"):
            shape = layer.shape(task)
            masks[path] = Mask.of_bits(shape, rng.random(shape[0] * shape[1]) < 1 / 3)
    return Local.first(zeros(task, masks))


def test_each_does_what_it_would_do_alone_on_its_own_data(words):
    """In double precision; the devices' examples answer both tasks, so that a mixed-up share would show."""
    settings = small(words, "unused", {"a": "weather", "c": "light"}, train={"lr": 0.05, "batch_size": 2})
    mine, inputs = shares(settings), reader(torch.float64)
    halves = {"weather": mine["a"][:12], "light": mine["c"][12:]}
    counts = {"updates": 4, "total": 9}
    starts = {task: begun(inputs, task, seed) for seed, task in enumerate(halves)}
    alone = {}
    for task, examples in halves.items():
        first, _ = local_run(inputs, examples, starts[task], settings.train, **counts)
        alone[task] = first, local_run(inputs, examples, first, settings.train, **counts)
    turns = [Turn(starts[task], examples, task) for task, examples in halves.items()]
    joint = run_together(inputs, turns, settings.train, **counts)
    for (local, _), (first, _) in zip(joint, alone.values(), strict=True):
        close(local.block, first.block, 1e-5)
        assert local.update == 4
    again = run_together(
        inputs,
        [Turn(local, t.examples, t.task) for (local, _), t in zip(joint, turns, strict=True)],
        settings.train,
        **counts,
    )
    for (local, losses), (_, (second, wanted)) in zip(again, alone.values(), strict=True):
        close(local.block, second.block, 1e-5)
        assert losses == pytest.approx(wanted, rel=1e-6)
        assert np.abs(local.block.dense(next(iter(local.block.masks)))).max() > 0.01


def test_one_that_has_nothing_to_learn_stops_all_before_anything_changes(words):
    inputs = reader(torch.float32)
    settings = small(words, "unused", {"a": "weather"})
    none = Local.first(
        zeros("light", {p: Mask(m.shape, m.indices[:0]) for p, m in begun(inputs, "light", 0).learns.items()})
    )
    turns = [Turn(begun(inputs, "weather", 0), [], "weather"), Turn(none, [], "light")]
    with pytest.raises(PeerError, match="E608"):
        run_together(inputs, turns, settings.train, updates=1, total=2)


def groups_of(words, out, monkeypatch, **more):
    """Who trained with whom, and the devices at the end."""
    seen, run = [], together.run_together

    def watched(reader, turns, *given, **how):
        seen.append([t.task for t in turns])
        return run(reader, turns, *given, **how)

    monkeypatch.setattr(together, "run_together", watched)
    settings = small(words, out, DEVICES, **more)
    return seen, simulate(settings, silent=True, reader=reader(torch.float32, settings))


def test_a_simulation_pairs_tasks_that_do_not_meet(words, tmp_path, monkeypatch):
    alone, one = groups_of(words, tmp_path / "alone", monkeypatch, rounds=3)
    assert alone == [["weather"], ["weather"], ["light"], ["light"], ["action"]] * 3
    joint, other = groups_of(words, tmp_path / "joint", monkeypatch, rounds=3, together=3)
    assert joint == [["weather", "light"], ["weather", "light"], ["action"]] * 3  # the child has others' blocks on
    for name in DEVICES:
        assert other[name].losses == pytest.approx(one[name].losses, rel=1e-3)


def test_who_is_away_trains_with_nobody(words, tmp_path, monkeypatch):
    away = [{"what": "kill", "who": ["c"], "rounds": [1, 1]}]
    found, peers = groups_of(words, tmp_path / "run", monkeypatch, rounds=3, together=3, faults=away)
    assert found[3:6] == [["weather", "light"], ["weather"], ["action"]]
    assert sum(map(len, found)) == 14, "nothing is trained for nobody"
    assert {p.round for p in peers.values()} == {3}


def test_one_block_of_everyone_is_trained_by_one_at_a_time(words, tmp_path, monkeypatch):
    found, _ = groups_of(words, tmp_path / "run", monkeypatch, rounds=1, together=3, aggregate="ffa", limits={})
    assert all(len(group) == 1 for group in found)
