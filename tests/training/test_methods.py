"""Rivals on the same layer: each against an oracle of its own, and all through one conformance test."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import tiny
from contextlora.baselines import copies, lora
from contextlora.baselines.beside import even_ranks
from contextlora.baselines.lori import keep_largest
from contextlora.baselines.mole import balance
from contextlora.baselines.olora import orthogonality
from contextlora.baselines.scales import SPEED
from contextlora.config import Method, RunConfig, TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.errors import ConfigError, RunError
from contextlora.evaluation.evaluate import evaluate, option_sets, same_length, score_options
from contextlora.lora.attach import adapted_layers, attached_state, detach, gated_layers
from contextlora.lora.gates import GateState
from contextlora.lora.layer import GatedLinear
from contextlora.lora.sharing import along_graph, own_alone
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training.check import check_run
from contextlora.training.loop import Stage, training_examples
from contextlora.training.plan import LAYERS, RIVALS, count_trained, planned, prepare
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.whole import run_training

ALIKE = tiny.graph(tasks={t: {**v, "rank": 4} for t, v in tiny.graph().to_dict()["tasks"].items()})


def first_stage(model, processor, data, graph, at=0, **config):
    settings = TrainConfig(epochs=1, **config)
    reader = ImageFeatures(model, Encoder(processor, graph))
    plan = planned(graph, None, settings)
    examples = training_examples(data, graph, settings)
    return Stage(reader, FrozenPrefix(reader, 0), examples, plan.phases[at], settings)


METHODS = ["paper", *RIVALS]


def test_the_configuration_knows_every_method():
    assert get_args(Method) == tuple(METHODS)
    assert set(LAYERS) <= set(RIVALS)


def prepared(method, graph=ALIKE, seed=0, dtype=torch.float64):
    model, processor = tiny.llama(dtype)
    prepare(model, graph, TrainConfig(method=method, seed=seed))
    return model, processor


def everything(model):
    return {(path, n): t.clone() for path, m in adapted_layers(model).items() for n, t in m.tensors().items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_many_parameters_and_learns(runs, words, method):
    """The conformance test: one interface, one budget, nothing left learning, and answers better than chance."""
    model, processor = prepared(method)
    config = TrainConfig(method=method)
    plan, start = planned(ALIKE, None, config), everything(model)
    blocks = sum(12 * (m.in_features + m.out_features) for m in adapted_layers(model).values())
    placed = 5 / 9 if method == "by-depth" else 1  # of three layers, two have 8 of the 12 ranks and one the other 4
    assert count_trained(model, plan) == pytest.approx(placed * blocks, rel=0.02)
    assert {t for phase in plan.phases for t in phase.tasks} == set(ALIKE.names)
    runs.train(model, processor, words, graph=ALIKE, method=method, epochs=40, out=runs.folder / "run")
    after = everything(model)
    assert all(k[1] == "mask" or not torch.equal(start[k], after[k]) for k in start), "all of it has learned"
    assert not any(p.requires_grad for p in model.parameters())
    answers = evaluate(model, processor, ALIKE, data=words, split="train").accuracy
    last = plan.phases[-1].runs[-1][-1]  # earlier ones may be forgotten: with O-LoRA they are
    assert answers[last].mean > (0.4 if method == "by-depth" else 0.6)  # a third of the layers learns it there
    assert (runs.folder / "run" / "adapter").exists() == (method == "paper")
    assert attached_state(model).sharing == plan.answering


@pytest.mark.parametrize("method", METHODS)
def test_untrained_or_outside_any_task_a_model_is_its_base(words, method):
    model, processor = prepared(method)
    base, _ = tiny.llama(torch.float64)
    reader = ImageFeatures(model, Encoder(processor, ALIKE))
    examples = training_examples(words, ALIKE, TrainConfig())[:3]
    batch = collate([reader.encoder.sample(e, "weather", answer=e.answers["weather"]) for e in examples], 0)
    inputs = reader.inputs(batch)
    plain = answer_nll(base, inputs, batch)
    assert torch.equal(answer_nll(model, inputs, batch), plain)
    with model.tasks("weather"):
        assert torch.allclose(answer_nll(model, inputs, batch), plain, rtol=1e-12)
    detach(model)
    assert not adapted_layers(model)
    assert torch.equal(answer_nll(model, inputs, batch), plain)


@pytest.mark.parametrize("method", RIVALS)
def test_a_rival_resumes_bit_for_bit(runs, words, method, monkeypatch):
    more = {"graph": ALIKE, "method": method, "checkpoint_every": 1}
    model, processor = prepared(method)
    whole = everything(runs.train(model, processor, words, **more))
    model, processor = prepared(method)
    out, update, count = runs.folder / "cut", Stage.update, []

    def stops(self, number):
        count.append(1)
        if len(count) == (9 if method == "lori-s" else 5):  # once the mask stands
            raise KeyboardInterrupt
        return update(self, number)

    monkeypatch.setattr(Stage, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        runs.train(model, processor, words, out=out, **more)
    model, processor = prepared(method)
    again = everything(runs.train(model, processor, words, out=out, resume=True, **more))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize("how", [*({"method": m} for m in RIVALS), {"schedule": "together"}])
def test_untrained_prerequisites_cannot_be_asked(how):
    with pytest.raises(ConfigError, match=r"E119 train.context: .* use gold or none"):
        planned(ALIKE, None, TrainConfig(context="predicted", **how))


def test_joint_lora_is_one_peft_lora_of_the_same_rank(runs, words):
    """Loss and every gradient of a mixed batch equal stock PEFT's with r = R."""
    model, processor = runs.attached(graph=ALIKE, fill=0.1)
    stage = first_stage(model, processor, words, ALIKE, method="lora", batch_size=9)
    (run,) = stage.runs
    losses = stage._gradients([run], 0)
    base, _ = tiny.llama(torch.float64)
    targets = r".*\.(q|k|v|o|gate|up|down)_proj"
    twin = get_peft_model(base, LoraConfig(r=12, lora_alpha=24, target_modules=targets))
    layers = gated_layers(model)
    for path, layer in layers.items():
        other = twin.base_model.model.get_submodule(path)
        other.lora_A.default.weight.data = layer.A.clone()
        other.lora_B.default.weight.data = layer.B.T.clone()
    batch = collate(run.micro_batches(0)[0], stage.reader.encoder.pad)
    assert len(set(batch.tasks)) > 1
    loss = answer_nll(twin.base_model.model, stage.reader.inputs(batch), batch).mean()
    loss.backward()
    assert losses[run.name] == pytest.approx(loss.item(), rel=1e-9)
    for path, layer in layers.items():
        other = twin.base_model.model.get_submodule(path)
        mine = [torch.cat([layer.learning[f"{t}_{s}"].grad for t in ALIKE.names]) for s in "AB"]
        assert torch.allclose(mine[0], other.lora_A.default.weight.grad, rtol=1e-8, atol=1e-12)
        assert torch.allclose(mine[1], other.lora_B.default.weight.grad.T, rtol=1e-8, atol=1e-12)


def test_lora_per_task_is_the_paper_without_edges(runs, words):
    tasks = {t: {k: x for k, x in v.items() if k != "after"} for t, v in ALIKE.to_dict()["tasks"].items()}
    alone = runs.trained(words, graph=tiny.graph(tasks=tasks))
    rival = runs.trained(words, graph=ALIKE, method="lora-per-task")
    assert tiny.furthest(alone, rival) == 0


def test_o_lora_adds_its_penalty_and_leaves_old_blocks(runs, words):
    model, processor = runs.attached(graph=ALIKE, fill=0.1)
    stage = first_stage(model, processor, words, ALIKE, at=1, method="o-lora")
    layers = gated_layers(model).values()
    value = orthogonality(layers, ("light",))
    expected = sum((la.block("weather")[0] @ la.block("light")[0].T).abs().sum().item() for la in layers)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    for layer in layers:
        old = layer.block("weather")[0]
        closed = torch.sign(layer.block("light")[0] @ old.T) @ old
        assert torch.allclose(layer.learning["light_A"].grad, closed)
    before = runs.blocks(model)
    stage.update(0)
    after = runs.blocks(model)
    assert {k[1] for k in before if not torch.equal(before[k], after[k])} == {"light"}
    assert planned(ALIKE, None, TrainConfig(method="o-lora")).answering.active["weather"] == ALIKE.names


@pytest.mark.parametrize("start", [run_training, check_run])
def test_a_rival_is_not_deployed(start, tmp_path):
    with pytest.raises(ConfigError, match=r"E114 train.method: 'lora' makes no adapter"):
        start(RunConfig(out=str(tmp_path), train=TrainConfig(method="lora")))


@pytest.mark.parametrize(("ratio", "moved"), [(1.0, {"action"}), (0.5, {"action", "weather", "light"})])
def test_together_is_one_run_along_the_graph(runs, words, ratio, moved):
    """Gates are the graph's; a child's samples tune its prerequisites only as far as the frozen ratio lets them."""
    how = {"schedule": "together", "frozen_ratio": ratio}
    plan = planned(ALIKE, None, TrainConfig(**how))
    assert [phase.runs for phase in plan.phases] == [(ALIKE.names,)]
    assert plan.answering == along_graph(ALIKE)
    model, processor = runs.attached(graph=ALIKE, fill=0.1)
    before = runs.blocks(model)
    runs.train(model, processor, words, graph=ALIKE, tasks=["action"], **how)
    after = runs.blocks(model)
    assert {k[1] for k in before if not torch.equal(before[k], after[k])} == moved
    model, processor = runs.attached(graph=ALIKE)
    runs.train(model, processor, words, graph=ALIKE, epochs=40, **how)
    accuracy = evaluate(model, processor, ALIKE, data=words, split="train").accuracy
    assert min(a.mean for a in accuracy.values()) > 0.6


@pytest.mark.parametrize(("method", "at"), [("o-lora", 1), ("mole-joint", 0)])
def test_a_rivals_own_loss_term_has_the_configured_weight(words, method, at):
    """Gradients are linear in the weight: at 2 they are one plus the difference of 1 and 0 further on."""

    def gradients(weight):
        model, processor = prepared(method)
        for m in adapted_layers(model).values():
            for i, t in enumerate(m.tensors().values()):
                t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 0.1)
        stage = first_stage(model, processor, words, ALIKE, at=at, method=method, penalty=weight)
        stage._gradients(stage.runs, 0)
        return torch.cat([p.grad.flatten() for r in stage.runs for p in r.parameters])

    none, once, twice = (gradients(w) for w in (0.0, 1.0, 2.0))
    assert (once - none).norm() > 1e-3
    assert (twice - once - (once - none)).norm() < 1e-3 * (once - none).norm()  # these layers are float32


@pytest.mark.parametrize(("rank", "exact"), [(9, True), (8, True), (3, False)])
def test_a_child_starts_from_what_its_prerequisites_add_together(rank, exact):
    """Exact where the ranks suffice, else the closest by SVD of the dense sum; prerequisites are left as they are."""
    tasks = ALIKE.to_dict()["tasks"]
    graph = tiny.graph(tasks={**tasks, "action": {**tasks["action"], "rank": rank}})
    base = torch.nn.Linear(20, 24, dtype=torch.float64).requires_grad_(False)
    layer = GatedLinear(base, GateState(graph), "a.layer", dtype=torch.float64)
    layer.B.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))

    def adds(task):
        a, b = layer.block(task)
        return graph.scale_of(task) * b.T @ a

    action, before = layer.block("action"), [adds("weather"), adds("light")]
    first = action[0].clone()
    action[1].zero_()
    copies.copy([layer], ["action", "light"])
    u, s, vh = torch.linalg.svd(sum(before))
    want = sum(before) if exact else u[:, :rank] * s[:rank] @ vh[:rank]
    assert torch.allclose(adds("action"), want, atol=1e-10)
    assert torch.equal(action[0][8:], first[8:]), "ranks to spare keep their first values"
    assert [torch.equal(adds(t), b) for t, b in zip(("weather", "light"), before, strict=True)] == [True, True]


def test_copies_train_and_answer_in_the_childs_own_block(runs, words):
    plan = planned(ALIKE, None, TrainConfig(method="copies"))
    assert [p.runs for p in plan.phases] == [(("weather",), ("light",)), (("action",),)]
    assert plan.answering == own_alone(ALIKE)
    mine = runs.trained(words, graph=ALIKE, method="copies")
    others = runs.trained(words, graph=ALIKE, method="lora-per-task")
    moved = {k[1] for k in mine if not torch.allclose(mine[k], others[k], rtol=0, atol=1e-9)}
    assert moved == {"action"}, "its prerequisites train as they would alone"


# --- rivals with layers of their own ---------------------------------------------------------------------------------


def filled(layer, scale=0.3):
    generator = torch.Generator().manual_seed(3)
    for weight in layer.weights.values():
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return layer


def one_layer(method, graph=ALIKE, d_in=48, d_out=40):
    torch.manual_seed(0)
    base = torch.nn.Linear(d_in, d_out).requires_grad_(False)
    state = GateState(graph)
    (layer,) = LAYERS[method](0)({"a.layer": base}, state).values()
    return filled(layer), state, torch.randn(3, 5, d_in)


def test_hydralora_by_hand():
    layer, state, x = one_layer("hydralora")
    a, b, router = (layer.weights[f"hydra_{n}"] for n in ("A", "B", "router"))
    rank = len(a)
    with state.use(state.gate("weather")):
        got = layer(x)
    for i in range(3):
        for t in range(5):
            w = torch.softmax(router @ x[i, t], 0)
            heads = [b[n * rank : (n + 1) * rank].T @ (a @ x[i, t]) for n in range(3)]
            want = layer.base(x[i, t]) + 2 * sum(w[n] * heads[n] for n in range(3))
            assert torch.allclose(got[i, t], want, atol=1e-5)


def test_mole_mixes_its_experts_by_hand_and_trains_each_alone():
    layer, state, x = one_layer("mole")
    said = [2 * (x @ layer.weights[f"{t}_A"].T @ layer.weights[f"{t}_B"]) for t in ALIKE.names]
    layer.open(dict.fromkeys(ALIKE.names, 4))
    with state.use(state.gate(["weather", "action", "light"])):
        alone = layer(x) - layer.base(x)
    want = torch.stack([said[0][0], said[2][1], said[1][2]])
    assert torch.allclose(alone, want, atol=1e-5)
    layer.open({"gate": 1})
    assert {id(p) for p in layer.owned("gate")} == {id(layer.weights["gate_e"]), id(layer.weights["gate_tau"])}
    assert not layer.owned("weather")
    with state.use(state.gate("weather")):
        mixed = layer(x) - layer.base(x)
    asked = torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True] * 4 + [False]])
    gate = state.gate("weather")
    gate.prompt = asked
    with state.use(gate):
        mixed = layer(x) - layer.base(x)
    every = torch.cat(said, -1)
    pooled = torch.stack([every[i][asked[i]][-1] for i in range(3)])
    g = torch.softmax(
        pooled / pooled.norm(dim=-1, keepdim=True) @ layer.weights["gate_e"] / layer.weights["gate_tau"], -1
    )
    assert torch.allclose(mixed, sum(g[:, None, n : n + 1] * said[n] for n in range(3)), atol=1e-4)
    assert balance([layer, layer], ()).item() == pytest.approx(-g.mean(0).log().sum().item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_answers_read_one_by_one_are_as_likely_as_in_training(words, method):
    """Scoring runs the prompt once and then the rest of each answer: whatever routes must go on as it began."""
    model, processor = prepared(method)
    generator = torch.Generator().manual_seed(5)
    for m in adapted_layers(model).values():
        for t in m.tensors().values():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64) * 0.1)
    reader = ImageFeatures(model, Encoder(processor, ALIKE))
    examples = training_examples(words, ALIKE, TrainConfig())[:4]
    candidates = option_sets(ALIKE, "action")
    for part in same_length(asked := [reader.encoder.sample(e, "action") for e in examples], 3):
        with torch.no_grad(), model.tasks("action"):
            found = score_options(reader, collate([asked[i] for i in part], 0), candidates)
        for row, i in zip(found, part, strict=True):
            batch = collate([reader.encoder.sample(examples[i], "action", answer=c) for c in candidates], 0)
            prompt = torch.arange(batch.input_ids.shape[1]) < len(asked[i].prompt)
            with torch.no_grad(), model.tasks("action", prompt.expand(len(candidates), -1)):
                nll = answer_nll(model, reader.inputs(batch), batch)
            whole = torch.zeros(len(candidates), dtype=nll.dtype).index_add(0, batch.owner, -nll)
            assert torch.allclose(row, whole, atol=1e-9)


def test_moles_experts_and_gate_take_as_many_updates(words):
    model, processor = prepared("mole")
    settings = TrainConfig(method="mole", epochs=1, batch_size=3)
    reader, examples = ImageFeatures(model, Encoder(processor, ALIKE)), training_examples(words, ALIKE, settings)
    experts, gate = (
        Stage(reader, FrozenPrefix(reader, 0), examples, phase, settings)
        for phase in planned(ALIKE, None, settings).phases
    )
    assert [len(r.micro_batches(0)[0]) for r in experts.runs] == [1, 1, 1]
    assert len(gate.runs[0].micro_batches(0)[0]) == 3
    assert abs(gate.total - sum(r.total for r in experts.runs) / 3) <= 1


def test_moles_gate_has_a_learning_rate_of_its_own(words):
    model, processor = prepared("mole")
    how = {"method": "mole", "lr": 1e-2, "gate_lr": 1e-4}
    rates = []
    for at in (0, 1):
        stage = first_stage(model, processor, words, ALIKE, at=at, **how)
        stage.update(0)
        rates.append({group["lr"] for run in stage.runs for group in run.optimizer.param_groups})
    assert [len(r) for r in rates] == [1, 1]
    assert max(rates[0]) == pytest.approx(100 * max(rates[1]))


def test_mole_leaves_its_experts_alone_while_the_gate_learns(runs, words):
    model, processor = prepared("mole")
    plan = planned(ALIKE, None, TrainConfig(method="mole"))
    runs.train(model, processor, words, graph=ALIKE, method="mole")
    trained = everything(model)
    reader = ImageFeatures(model, Encoder(processor, ALIKE))
    settings = TrainConfig(method="mole", epochs=1)
    examples = training_examples(words, ALIKE, settings)
    stage = Stage(reader, FrozenPrefix(reader, 0), examples, plan.phases[1], settings)
    stage.update(0)
    moved = {n for (path, n), t in everything(model).items() if not torch.equal(t, trained[path, n])}
    assert moved == {"gate_e", "gate_tau"}


def test_lori_s_keeps_the_largest_entries_over_all_layers():
    made = LAYERS["lori-s"](0)
    bases = {f"l{i}": torch.nn.Linear(24, d).requires_grad_(False) for i, d in enumerate((20, 30))}
    layers = [filled(m) for m in made(bases, GateState(ALIKE)).values()]
    layers[0].weights["lori_B"].data *= 0.1  # a threshold for each layer alone would keep half of these
    every = torch.cat([m.weights["lori_B"].abs().flatten() for m in layers])
    keep_largest(layers)
    mask = torch.cat([m.mask.flatten() for m in layers])
    assert mask.sum() == round(0.5 * len(every))
    assert every[mask].min() >= every[~mask].max()
    assert layers[0].mask.float().mean() < 0.2
    assert not any(m.weights["lori_B"].any() for m in layers)


def test_lori_s_never_moves_a_masked_entry(runs, words):
    model, processor = prepared("lori-s")
    start = {path: m.A.clone() for path, m in adapted_layers(model).items()}
    runs.train(model, processor, words, graph=ALIKE, method="lori-s", weight_decay=0.1)
    for path, m in adapted_layers(model).items():
        assert torch.equal(m.A, start[path])
        assert not m.weights["lori_B"][~m.mask].any()
        assert m.weights["lori_B"][m.mask].any()


def test_hard_routing_needs_questions_that_differ():
    same = tiny.graph(tasks={t: {**v, "question": "what ?"} for t, v in ALIKE.to_dict()["tasks"].items()})
    with pytest.raises(ConfigError, match=r"E118 'weather' and 'light' ask the same question"):
        planned(same, None, TrainConfig(method="hard-routing"))
    assert planned(ALIKE, None, TrainConfig(method="hard-routing")) == lora.per_task(ALIKE, ALIKE.names)


@given(st.lists(st.integers(500, 2000), min_size=1, max_size=80), st.floats(4, 200))
def test_ranks_meet_the_budget_and_are_even(sizes, mean):
    costs = {str(i): n for i, n in enumerate(sizes)}
    ranks = even_ranks(costs, mean * sum(sizes))
    assert max(ranks.values()) - min(ranks.values()) <= 5  # what one layer cannot hold goes to the next, 4 x as thin
    assert abs(sum(ranks[k] * costs[k] for k in costs) - mean * sum(sizes)) <= sizes[-1] / 2 + 1


def test_too_small_a_budget_is_refused():
    with pytest.raises(ConfigError, match=r"E117 .* raise `rank`"):
        even_ranks({"a": 10, "b": 10}, 15)


def test_the_same_method_must_be_on_the_model(runs, words):
    model, processor = prepared("hydralora")
    with pytest.raises(RunError, match="E516"):
        runs.train(model, processor, words, graph=ALIKE, method="paper")


# --- variants of ours ------------------------------------------------------------------------------------------------


def chain_of_layers(method, graph=ALIKE, count=4):
    """One linear in each of `count` decoder layers, with blocks filled, and the gate that they share."""
    torch.manual_seed(0)
    bases = {f"m.layers.{i}.up": torch.nn.Linear(6, 5, dtype=torch.float64) for i in range(count)}
    state = GateState(graph)
    layers = list(LAYERS[method](0)({p: m.requires_grad_(False) for p, m in bases.items()}, state).values())
    for layer in layers:
        layer.double()
        for t in layer.tensors().values():
            t.copy_(torch.randn(t.shape, dtype=torch.float64))
    return layers, state, torch.randn(2, 3, 6, dtype=torch.float64)


def by_hand(layer, x, **scales):
    """The frozen layer and the named blocks, each times a number."""
    return layer.base(x) + sum(
        c * layer.graph.scale_of(t) * x @ layer.block(t)[0].T @ layer.block(t)[1] for t, c in scales.items()
    )


def test_low_prerequisites_are_on_in_the_lower_half_alone():
    layers, state, x = chain_of_layers("low-prerequisites")
    with state.use(state.gate(["action", "light"])):
        for i, layer in enumerate(layers):
            more = {"weather": 1, "light": 1} if i < 2 else {}
            want = torch.stack([by_hand(layer, x[0], action=1, **more), by_hand(layer, x[1], light=1)])
            assert torch.allclose(layer(x), want)


def test_by_depth_every_level_learns_in_its_own_layers(runs, words):
    before = everything(prepared("by-depth")[0])
    model, processor = prepared("by-depth")
    runs.train(model, processor, words, graph=ALIKE, method="by-depth")
    for path, layer in adapted_layers(model).items():
        moved = {t for t in ALIKE.names if layer.block(t)[1].any()}
        assert moved == ({"action"} if ".layers.2." in path else {"weather", "light"})
        assert torch.equal(before[path, "B"], torch.zeros_like(layer.B))


def test_learned_scales_by_hand():
    layers, state, x = chain_of_layers("learned-scales", count=1)
    (layer,) = layers
    state.sharing = planned(ALIKE, None, TrainConfig(method="learned-scales")).answering
    layer.theta["action"].data = torch.tensor([[0.01, -0.04]], dtype=torch.float64)
    layer.open({"action": 4, "scales of action": 1})
    with state.use(state.gate(["action", "light"])):
        y = layer(x)
    want = [by_hand(layer, x[0], action=1, weather=1.25, light=0.0), by_hand(layer, x[1], light=1)]
    assert torch.allclose(y, torch.stack(want))
    (y * torch.arange(5)).sum().backward()
    for k, p in enumerate(("weather", "light")):
        closed = SPEED * ((by_hand(layer, x[0], **{p: 1}) - layer.base(x[0])) * torch.arange(5)).sum()
        assert layer.theta["action"].grad[0, k].item() == pytest.approx(closed.item())
    assert len(layer.owned("scales of action")) == 1


def test_a_shared_block_by_hand():
    layers, state, x = chain_of_layers("shared-block", count=1)
    (layer,) = layers
    both = 2.0 * x[0] @ layer.shared["A"].T @ layer.shared["B"]
    with state.use(state.gate(["action", "light"])):
        assert torch.allclose(layer(x)[0], by_hand(layer, x[0], action=1, weather=1, light=1) + both)
    assert torch.equal(layer(x), layer.base(x))


def test_a_shared_block_learns_from_all_roots_then_rests(runs, words):
    """The gradient that the first run steps the shared block with is the sum over the samples of all roots."""
    model, processor = prepared("shared-block")
    stage = first_stage(model, processor, words, ALIKE, method="shared-block", batch_size=2)
    stage._gradients(stage.runs, 0)
    layer = next(iter(adapted_layers(model).values()))
    together = layer.shared["B"].grad.clone()
    alone = []
    for run in stage.runs:
        layer.shared["B"].grad = None
        stage._gradients([run], 0)
        alone.append(layer.shared["B"].grad.clone())
    assert torch.allclose(together, sum(alone))
    assert all(a.any() for a in alone)
    first_stage(model, processor, words, ALIKE, at=1, method="shared-block")
    assert not any(p.requires_grad for p in layer.shared.values())


def test_a_block_of_one_rank_has_none_to_share():
    with pytest.raises(ConfigError, match="E117 'weather' has one rank"):
        planned(tiny.graph(rank=1), None, TrainConfig(method="shared-block"))
