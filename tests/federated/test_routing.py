"""Answering with what is held: each output against the same numbers computed by hand, foreign prompts bit for bit."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from contextlora.errors import PeerError, RunError
from contextlora.federated.aggregate import Held
from contextlora.federated.routing import RoutedLinear, pooled_prompts, routed, top_k
from contextlora.federated.slices import Mask, Slice
from contextlora.federated.taskgate import TaskGate, TaskMean
from contextlora.lora.attach import adapted_layers, attach, attached_state, decoder_layers, gated_layers, going_on
from tiny_llava import save_tiny_llava

GRAPH = tiny.graph()
RANKS = {"weather": 4, "light": 3, "action": 4}
# prompts of two tasks, and of none: which words they use tells them apart
WORDS = {"weather": range(12, 18), "light": range(18, 24), "foreign": range(40, 46)}


def prompts(kind, n, seed=0, length=6):
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor(list(WORDS[kind]))
    return words[torch.randint(len(words), (n, length), generator=generator)]


@pytest.fixture(scope="module")
def model():
    return tiny.llama()[0]


def sizes(model):
    path, stack = decoder_layers(model)
    return {
        f"{path}.{i}.{name}": m
        for i, layer in enumerate(stack)
        for name, m in layer.named_modules()
        if isinstance(m, torch.nn.Linear)
    }


def project(task, layer):
    """Some A that depends on task and layer alone; layers are recognised by what they end in."""
    d_in = 48 if layer.endswith("down_proj") else 32
    seed = [*task.encode(), *layer.encode()]
    return np.random.default_rng(seed).standard_normal((RANKS.get(task, 4), d_in)).astype(np.float32)


def held_on(model, tasks, choice="gate", rate=0.5):
    """Sparse slices on every linear of the model."""
    rng = np.random.default_rng(0)
    slices = {}
    for task in tasks:
        masks, values = {}, {}
        for layer, linear in sizes(model).items():
            shape = (RANKS.get(task, 4), linear.out_features)
            masks[layer] = Mask(shape, np.flatnonzero(rng.random(shape) < rate).astype(np.int64))
            values[layer] = (0.1 * rng.standard_normal(len(masks[layer].indices))).astype(np.float32)
        slices["", task] = Slice(task, masks, values)
    return Held(slices, choice)


@pytest.fixture(scope="module")
def gate(model):
    seen = {t: TaskMean.of(pooled_prompts(model, {"input_ids": prompts(t, 60, seed=9)})) for t in ("weather", "light")}
    return TaskGate(seen, reach=1.3)


def scale(task):
    return GRAPH.scale_of(task) if task in GRAPH.names else 2.0


@contextmanager
def by_hand(model, held, gates, k):
    """y = W x + s B topk(g . A x), token by token, through forward hooks on a plain model."""
    hooks = []

    def adapt(layer):
        def hook(_, args, y):
            out = y.clone()
            for sample, g in enumerate(gates):
                ranks = [
                    (g[i] * a, scale(t) * b)
                    for i, (_, t) in enumerate(held.slices)
                    for a, b in zip(project(t, layer), held.slices["", t].dense(layer), strict=True)
                ]
                for token, x in enumerate(args[0][sample].numpy()):
                    z = [float(a @ x) for a, _ in ranks]
                    best = sorted(range(len(z)), key=lambda r: (-abs(z[r]), r))[:k]
                    out[sample, token] += torch.tensor(sum(z[r] * ranks[r][1] for r in best))
            return out

        return hook

    for layer, linear in sizes(model).items():
        hooks.append(linear.register_forward_hook(adapt(layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_top_k_keeps_the_largest_and_of_equal_ones_the_first(rows, ranks, data):
    z = torch.tensor(data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=ranks, max_size=ranks), min_size=rows,
                                        max_size=rows)), dtype=torch.float32)  # fmt: skip
    k = data.draw(st.integers(1, ranks + 1))
    expected = torch.zeros_like(z)
    for row in range(rows):
        for r in sorted(range(ranks), key=lambda r: (-abs(z[row, r].item()), r))[:k]:
            expected[row, r] = z[row, r]
    assert torch.equal(top_k(z, k), expected)


@torch.no_grad()
def test_each_prompt_is_answered_by_its_gate_and_the_foreign_bit_for_bit_by_the_base(model, gate):
    held = held_on(model, ["light", "weather"])
    ids = torch.cat([prompts("weather", 2), prompts("foreign", 2), prompts("light", 1)])
    base = model(ids).logits
    g = gate.gates(pooled_prompts(model, {"input_ids": ids}))[:, ::-1]  # held is sorted otherwise than the gate
    assert g[:2, 1].min() > 0.5 < g[4, 0]
    assert not g[2:4].any()
    with routed(model, GRAPH, held, project, gate=gate) as router:
        got = model(ids).logits
        np.testing.assert_allclose(router.gates, g, rtol=1e-5)
    assert torch.equal(got[2:4], base[2:4])
    with by_hand(model, held, g.astype(np.float32), 4):
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (got[[0, 1, 4]] - base[[0, 1, 4]]).abs().amax((1, 2)).min() > 0.01
    assert not adapted_layers(model)
    assert torch.equal(model(ids).logits, base)


@torch.no_grad()
@pytest.mark.parametrize("task", ["weather", "light"])
def test_an_adapter_that_answers_alone_is_the_right_one(model, gate, task):
    held = held_on(model, ["light", "weather"])
    ids = prompts(task, 2)
    g = gate.gates(pooled_prompts(model, {"input_ids": ids}))[:, ::-1]
    assert (g.any(0) == [task == "light", task == "weather"]).all()
    with routed(model, GRAPH, held, project, gate=gate):
        got = model(ids).logits
    with by_hand(model, held, g.astype(np.float32), 4):
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_gate_reads_the_base_model_though_adapters_lie_below(model):
    seen = {
        t: TaskMean.of(pooled_prompts(model, {"input_ids": prompts(t, 60, seed=9)}, depth=2))
        for t in ("weather", "light")
    }
    gate, ids = TaskGate(seen), torch.cat([prompts("weather", 1), prompts("light", 1)])
    expected = gate.gates(pooled_prompts(model, {"input_ids": ids}, depth=2))
    assert not np.allclose(
        pooled_prompts(model, {"input_ids": ids}), pooled_prompts(model, {"input_ids": ids}, depth=2)
    )
    with routed(model, GRAPH, held_on(model, ["weather", "light"]), project, gate=gate, depth=2) as router:
        for _ in range(2):
            model(ids)
            np.testing.assert_allclose(router.gates, expected, rtol=1e-5)


@torch.no_grad()
def test_only_foreign_prompts_leave_the_whole_batch_as_it_was(model, gate):
    ids = prompts("foreign", 3)
    base = model(ids).logits
    with routed(model, GRAPH, held_on(model, ["weather"]), project, gate=gate):
        assert torch.equal(model(ids).logits, base)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 7])
def test_k_ranks_of_all_adapters_together_answer(model, gate, k, monkeypatch):
    held = held_on(model, ["light", "weather"])
    ids = prompts("weather", 2)
    both = np.array([[0.7, 0.9], [0.4, 1.2]], np.float32)
    monkeypatch.setattr(gate, "gates", lambda _: both[:, ::-1])  # whose columns are the other way round than held's
    with routed(model, GRAPH, held, project, gate=gate, k=k):
        got = model(ids).logits
    with by_hand(model, held, both, k):
        torch.testing.assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pass_that_goes_on_keeps_the_gates_of_its_prompts(model, gate):
    held = held_on(model, ["weather", "light"])
    asked = torch.cat([prompts("weather", 1), prompts("foreign", 1), prompts("light", 1)])
    answers = prompts("foreign", 3, seed=5, length=3)
    whole = torch.cat([asked, answers], 1)
    mask = torch.zeros(whole.shape, dtype=torch.bool)
    mask[:, :6] = True
    with routed(model, GRAPH, held, project, gate=gate):
        with model.tasks("action", prompt=mask):  # routed by the prompt alone, whatever the task is called
            at_once = model(whole).logits[:, 6:]
        cache = model(asked, use_cache=True).past_key_values
        one_by_one = []
        for token in answers.T:
            out = model(token[:, None], past_key_values=cache, use_cache=True)
            one_by_one.append(out.logits)
        torch.testing.assert_close(torch.cat(one_by_one, 1), at_once, rtol=1e-4, atol=1e-4)

        with model.tasks("weather"):
            cache = model(asked, use_cache=True).past_key_values
            picked = torch.tensor([2, 0])
            cache.batch_select_indices(picked)
            with going_on(model, picked):
                out = model(answers[picked], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits, at_once[picked], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_is_the_greedy_loop(model, gate):
    ids = prompts("weather", 1)
    with routed(model, GRAPH, held_on(model, ["weather", "light"]), project, gate=gate):
        told = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        beams = model.generate(ids, max_new_tokens=2, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        looped = ids
        for _ in range(4):
            mask = torch.zeros(looped.shape, dtype=torch.bool)
            mask[:, :6] = True
            with model.tasks("weather", prompt=mask):
                looped = torch.cat([looped, model(looped).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(told, looped)
    assert beams.shape == (1, 8)


@torch.no_grad()
def test_padding_does_not_turn_a_route(model, gate):
    ids = prompts("weather", 2)
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1)
    mask = (torch.arange(11) < 6).long().expand(2, -1)
    plain = pooled_prompts(model, {"input_ids": ids})
    np.testing.assert_allclose(
        pooled_prompts(model, {"input_ids": padded, "attention_mask": mask}), plain, rtol=1e-4, atol=1e-5
    )
    with routed(model, GRAPH, held_on(model, ["weather"]), project, gate=gate) as router:
        model(padded, attention_mask=mask)
        np.testing.assert_allclose(router.gates[:, 0], gate.gates(plain)[:, 0], rtol=1e-4)


@torch.no_grad()
def test_the_oracle_is_the_gated_layer_along_the_graph(model):
    held = held_on(model, ["weather", "light", "action"], "oracle")
    ids, tasks = prompts("foreign", 3), ["light", "action", "weather"]
    with routed(model, GRAPH, held, project):
        base = model(ids).logits
        with model.tasks(tasks):
            got = model(ids).logits
    assert torch.equal(model(ids).logits, base)
    blocks = attach(tiny.llama()[0], GRAPH)
    for path, layer in gated_layers(blocks).items():
        for t in GRAPH.names:
            a, b = layer.block(t)
            a.copy_(torch.as_tensor(project(t, path)))
            b.copy_(torch.as_tensor(held.slices["", t].dense(path)))
    with blocks.tasks(tasks):
        torch.testing.assert_close(got, blocks(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sum_is_merged_weights_whatever_is_asked(model):
    tasks = ["weather", "light"]
    held = held_on(model, tasks, "sum")
    ids = prompts("foreign", 2)
    with routed(model, GRAPH, held, project):
        got = model(ids).logits
    merged = tiny.llama()[0]
    for path, linear in sizes(merged).items():
        for t in tasks:
            linear.weight += scale(t) * torch.as_tensor(held.slices["", t].dense(path).T @ project(t, path))
    torch.testing.assert_close(got, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_layers_without_an_adapter_are_left_alone(model, gate):
    layer = next(name for name in sizes(model) if name.endswith("v_proj"))
    whole = held_on(model, ["weather"]).slices["", "weather"]
    one = Held({("", "weather"): Slice("weather", {layer: whole.masks[layer]}, {layer: whole.values[layer]})})
    with routed(model, GRAPH, one, project, gate=gate):
        assert list(adapted_layers(model)) == [layer]
        assert type(adapted_layers(model)[layer]) is RoutedLinear


def test_what_cannot_be_routed_is_refused_and_leaves_the_model_plain(model, gate):
    held = held_on(model, ["weather", "action"])
    for given_gate in (None, gate):
        with (
            pytest.raises(PeerError, match="E618 no mean of the prompts of"),
            routed(model, GRAPH, held, project, gate=given_gate),
        ):
            pass
    odd = Slice("weather", {"no.such": Mask((4, 2), np.array([0]))}, {"no.such": np.ones(1, np.float32)})
    with (
        pytest.raises(PeerError, match=r"E619 no\.such"),
        routed(model, GRAPH, Held({("", "weather"): odd}), project, gate=gate),
    ):
        pass
    assert not adapted_layers(model)
    assert attached_state(model) is None


@torch.no_grad()
def test_a_batch_that_goes_on_from_other_prompts_is_refused(model, gate):
    with routed(model, GRAPH, held_on(model, ["weather"]), project, gate=gate):
        cache = model(prompts("weather", 2), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 1, 1]))
        with pytest.raises(RunError, match="E501 a batch of 3 samples goes on from 2"):
            model(prompts("weather", 3, length=1), past_key_values=cache)


def test_a_picture_s_tokens_do_not_count(tmp_path):
    """Only words are averaged, and a pass within `routed` reads the very same."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(save_tiny_llava(tmp_path)).eval()
    words = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    ids = torch.cat([torch.full((2, 4), model.config.image_token_id), words], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model.model.language_model.layers[0].input_layernorm(model.get_input_embeddings()(words))
    pooled = pooled_prompts(model, {**inputs, "pixel_values": pictures})
    np.testing.assert_allclose(pooled, first.mean(1).numpy(), rtol=1e-5, atol=1e-6)

    names = ("weather", "light")
    gate = TaskGate({t: TaskMean.of(np.stack([p, p + 0.01])) for t, p in zip(names, pooled, strict=True)})
    layer = f"{decoder_layers(model)[0]}.0.self_attn.q_proj"
    slices = {
        ("", t): Slice(t, {layer: Mask((4, 16), np.arange(4))}, {layer: np.ones(4, np.float32)}) for t in sorted(names)
    }
    with routed(model, GRAPH, Held(slices, "gate"), lambda task, _: np.ones((4, 16), np.float32), gate=gate) as router:
        model(**inputs, pixel_values=pictures)
        columns = [gate.tasks.index(t) for t in router.tasks]
        np.testing.assert_allclose(router.gates.numpy(), gate.gates(pooled)[:, columns], rtol=1e-5, atol=1e-6)
