"""The frozen prefix: same result with and without, within its memory, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

import tiny
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.lora.attach import decoder_layers, detach
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training.loop import known_samples, task_samples, train, training_examples
from contextlora.training.plan import prepare
from contextlora.training.prefix import GROUP, FrozenPrefix
from tiny import furthest

FAMILIES = [tiny.llama, tiny.llava, tiny.idefics3, tiny.qwen25vl]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


def prepared(runs, data, family=tiny.llama, *, layers="top 1/3", budget=2**30, dtype=torch.float64, tasks=("weather",)):
    g = tiny.graph()
    model, processor = runs.attached(family, layers=layers, dtype=dtype, fill=0.1)
    reader = ImageFeatures(model, Encoder(processor, g))
    examples = training_examples(data, g, TrainConfig())
    prefix = FrozenPrefix(reader, budget)
    samples = [task_samples(reader, examples, t, "none", {}) for t in tasks]
    for found in samples:
        prefix.admit(found)
    return model, reader, prefix, [s for found in samples for s in found]


def counting(model, at=0):
    calls = []
    decoder_layers(model)[1][at].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@every_family
def test_training_is_the_same_with_and_without(runs, words, pictures, family):
    """1e-10 in fp64, not bit-equal: the cache computes other samples together than a batch does."""
    data = words if family is tiny.llama else pictures
    how = {"family": family, "layers": "top 1/3", "epochs": 2, "fill": 0.1}
    with_cache, without = runs.trained(data, **how), runs.trained(data, prefix_cache_gb=0, **how)
    some = runs.trained(data, prefix_cache_gb=2e-5, **how)
    assert furthest(with_cache, without) < 1e-10
    assert furthest(some, without) < 1e-10


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bit_equal_to_the_plain_forward_when_the_batch_is_the_group(runs, words, pictures, family, dtype):
    data = words if family is tiny.llama else pictures
    model, reader, prefix, samples = prepared(runs, data, family, dtype=dtype)
    group = sorted(samples, key=lambda s: (len(s), s.key))
    assert len(group) <= GROUP
    batch = collate(group, reader.encoder.pad)
    inputs = reader.inputs(batch)
    with torch.no_grad(), model.tasks(batch.tasks):
        plain = answer_nll(model, inputs, batch)
        calls = counting(model)
        with prefix.replay(batch, inputs):
            first = answer_nll(model, inputs, batch)
        assert len(calls) == 1
        with prefix.replay(batch, inputs):
            again = answer_nll(model, inputs, batch)
        assert len(calls) == 1, "the second time nothing below is computed"
    assert torch.equal(plain, first)
    assert torch.equal(plain, again)


def test_padding_of_the_group_changes_nothing(runs, words):
    """A sample's own activations do not depend on which longer samples lie beside it."""
    _model, reader, prefix, samples = prepared(runs, words, tasks=("weather", "action"))
    for s in samples:
        batch = collate([s], reader.encoder.pad)
        with torch.no_grad():
            kept = prefix._hidden(batch, reader.inputs(batch))
            alone = prefix._compute(reader.inputs(batch))
        assert torch.allclose(kept, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_memory_stays_within_the_budget_and_the_rest_is_recomputed(runs, words, share):
    model, reader, prefix, samples = prepared(runs, words, tasks=("weather", "light", "action"))
    width = 32 * 8
    everything = sum(map(len, samples)) * width
    budget = int(everything * share)
    model, reader, prefix, samples = prepared(runs, words, tasks=("weather", "light", "action"), budget=budget)
    calls = counting(model)
    for _ in range(2):
        for s in samples:
            batch = collate([s], reader.encoder.pad)
            with torch.no_grad():
                prefix._hidden(batch, reader.inputs(batch))
    held = sum(t.untyped_storage().nbytes() for t in prefix._kept.values())
    assert held <= budget
    groups = {id(g) for g in prefix._group_of.values()}
    outside = [s for s in samples if s.key not in prefix._group_of]
    assert len(calls) == len(groups) + 2 * len(outside)
    if share == 1:
        assert not outside
    if share == 0:
        assert not groups
    if share == 0.5:
        assert groups
        assert outside


@every_family
def test_what_ran_ahead_is_used_once_and_is_bit_equal(runs, words, pictures, family):
    data = words if family is tiny.llama else pictures
    model, reader, prefix, samples = prepared(runs, data, family, budget=0, dtype=torch.float32)
    calls, first, second = counting(model), *(collate(samples[i : i + 3], reader.encoder.pad) for i in (0, 3))

    def loss(batch):
        inputs = reader.inputs(batch)
        with torch.no_grad(), model.tasks(batch.tasks), prefix.replay(batch, inputs):
            return answer_nll(model, inputs, batch)

    want = [loss(first), loss(second)]
    prefix.run_ahead(first)
    assert len(calls) == 3
    assert torch.equal(loss(first), want[0])
    assert len(calls) == 3  # it was there
    assert torch.equal(loss(first), want[0])
    assert torch.equal(loss(second), want[1])
    assert len(calls) == 5


def test_the_same_question_of_two_tasks_is_kept_once(runs, words):
    _model, _reader, prefix, samples = prepared(runs, words)
    before, left = dict(prefix._group_of), prefix._left
    prefix.admit(samples[::2])
    assert prefix._left == left
    assert all(prefix._group_of[k] is g for k, g in before.items())


def test_without_layers_below_nothing_happens(runs, words):
    model, _reader, prefix, samples = prepared(runs, words, layers="all")
    assert prefix.depth == 0
    assert not prefix._group_of
    with prefix.replay(collate(samples, 0), {}):
        assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("own", [False, True])
def test_layers_are_put_back_after_an_error(runs, words, own):
    model, reader, prefix, samples = prepared(runs, words)
    batch = collate(samples[:2], reader.encoder.pad)
    layers = decoder_layers(model)[1]
    if own:  # as offloading does
        for layer in layers:
            layer.forward = layer.forward
    state = [dict(vars(layer)) for layer in layers]
    hooks = [len(layer._forward_pre_hooks) for layer in layers]
    with pytest.raises(KeyError), prefix.replay(batch, reader.inputs(batch)):
        raise KeyError(vars(layers[0])["forward"])
    assert [dict(vars(layer)) for layer in layers] == state
    boom = layers[0].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
    fresh = FrozenPrefix(reader, 0)
    with pytest.raises(ZeroDivisionError), fresh.replay(batch, reader.inputs(batch)):
        pass
    boom.remove()
    assert [len(layer._forward_pre_hooks) for layer in layers] == hooks
    assert [dict(vars(layer)) for layer in layers] == state


def test_a_prefix_of_its_own_for_each_stage(runs, words):
    """What the second stage keeps must not depend on the first: a resumed run has not seen it."""
    seen = []
    original = FrozenPrefix.admit

    def spy(self, samples):
        seen.append((self, self._left))
        original(self, samples)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(FrozenPrefix, "admit", spy)
        runs.trained(words, layers="top 1/3", epochs=1)
    assert [left == 2 * 2**30 for _, left in seen] == [True, False, True]
    assert seen[0][0] is seen[1][0] is not seen[2][0]


@every_family
def test_several_runs_share_one(runs, words, pictures, family):
    """The second run computes nothing below the blocks, and either run gives what it gives alone."""
    data = words if family is tiny.llama else pictures
    g, settings = tiny.graph(), TrainConfig(epochs=2, lr=1e-2, layers="top 1/3")
    model, processor = family(torch.float64)
    prepare(model, g, settings)
    reader = ImageFeatures(model, Encoder(processor, g))
    prefix = FrozenPrefix(reader, 2**30)
    prefix.admit(known_samples(reader, training_examples(data, g, settings), settings))
    calls, blocks = counting(model), []
    for kept in (prefix, prefix, None):
        detach(model)
        prepare(model, g, settings)
        out = runs.folder / str(len(blocks))
        train(model, processor, g, data=data, out=out, config=settings, features=reader, prefix=kept)
        blocks.append(runs.blocks(model))
        counted, calls[:] = len(calls), []
        assert (counted == 0) == (len(blocks) == 2)
    assert furthest(blocks[0], blocks[1]) == 0
    assert furthest(blocks[0], blocks[2]) < 1e-5  # masters are float32
