"""The loop against independent oracles: what is trained, what is not, and that tasks do not disturb one another."""

from __future__ import annotations

import json
import signal

import pytest
import torch

import tiny
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.data.examples import load_examples
from contextlora.errors import ConfigError, DataError, RunError
from contextlora.evaluation.evaluate import evaluate
from contextlora.lora.attach import attach, attached_state, gated_layers, trainable_groups
from contextlora.lora.sharing import Phase, along_graph, stages
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training import loop
from contextlora.training.loop import Stage, training_examples
from contextlora.training.plan import planned
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.track import Tracker
from tiny import furthest


def stage_of(model, processor, data, tasks, *, graph=None, **config):
    settings = TrainConfig(**{"epochs": 1, **config})
    graph = graph or tiny.graph()
    reader = ImageFeatures(model, Encoder(processor, graph))
    examples = training_examples(data, graph, settings)
    phase = Phase(tuple((t,) for t in tasks), along_graph(graph, settings.frozen_ratio))
    return Stage(reader, FrozenPrefix(reader, 2**20), examples, phase, settings)


def changed(before, after):
    return {k for k in before if not torch.equal(before[k], after[k])}


# --- level-parallel and sequential -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (3, 2)])
def test_level_parallel_equals_sequential(runs, words, batch_size, accumulate):
    """Equal to 1e-10 in fp64, not to the bit.

    A mixed batch pads to another width and its matrix products have other rows, so that sums round in another order:
    about 1e-16 a product, which Adam's division by |g| carries into the weights.
    """
    how = {"fill": 0.1, "weight_decay": 0.1, "batch_size": batch_size, "accumulate": accumulate}
    level = runs.trained(words, schedule="level", **how)
    sequential = runs.trained(words, schedule="sequential", **how)
    assert furthest(level, sequential) < 1e-10
    start = runs.blocks(runs.attached(fill=0.1)[0])
    assert changed(start, level) == set(start)


def test_a_task_with_huge_gradients_leaves_its_neighbour_alone(runs, words):
    tasks = json.loads(json.dumps(tiny.graph().to_dict()["tasks"]))
    wild = json.loads(json.dumps(tasks))
    wild["weather"]["alpha"] = 4000.0
    calm, wild = (tiny.graph(tasks=t) for t in (tasks, wild))
    one = runs.trained(words, graph=calm, tasks=["weather", "light"], max_grad_norm=0.1, epochs=3)
    two = runs.trained(words, graph=wild, tasks=["weather", "light"], max_grad_norm=0.1, epochs=3)
    same = {k for k in one if k[1] == "light"}
    assert furthest({k: one[k] for k in same}, {k: two[k] for k in same}) < 1e-10
    assert changed(one, two) == {k for k in one if k[1] == "weather"}


def test_the_order_of_a_task_does_not_depend_on_who_trains_beside_it(runs, words):
    alone = runs.trained(words, tasks=["light"])
    together = runs.trained(words, tasks=["weather", "light"])
    mine = [k for k in alone if k[1] == "light"]
    assert furthest({k: alone[k] for k in mine}, {k: together[k] for k in mine}) < 1e-10


def test_stages_of_a_graph():
    g = tiny.graph()
    config = TrainConfig()
    assert stages(g, g.names, config) == [["weather", "light"], ["action"]]
    assert stages(g, ["action", "light"], config) == [["light"], ["action"]]
    assert stages(g, g.names, TrainConfig(schedule="sequential")) == [["weather"], ["light"], ["action"]]
    tasks = g.to_dict()["tasks"]
    tasks["again"] = {"question": "?", "after": ["weather"], "options": ["a", "b"]}
    shared = tiny.graph(tasks=tasks)
    assert stages(shared, shared.names, config) == [["weather", "light"], ["action", "again"]]
    one_at_a_time = [["weather", "light"], ["action"], ["again"]]  # both would tune ranks of `weather`
    assert stages(shared, shared.names, TrainConfig(frozen_ratio=0.5)) == one_at_a_time
    tasks["again"]["after"] = []
    with pytest.raises(Exception, match="E104"):
        planned(g, ["wether"], config)


def test_a_shared_prerequisite_with_delta_trains_one_after_another(runs, words):
    tasks = tiny.graph().to_dict()["tasks"]
    tasks["light"]["after"] = ["weather"]
    tasks["action"]["after"] = ["weather"]
    g = tiny.graph(tasks=tasks, frozen_ratio=0.5)
    level = runs.trained(words, graph=g, schedule="level")
    sequential = runs.trained(words, graph=g, schedule="sequential")
    assert furthest(level, sequential) == 0


# --- what may change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "partly"), [(None, {}), (0.5, {"weather": 2, "light": 2}), (0.0, {"weather": 4, "light": 3})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_ranks_that_may_learn_change(runs, words, ratio, partly, dtype):
    model, processor = tiny.llama(dtype)
    attach(model, tiny.graph())
    generator = torch.Generator().manual_seed(1)
    for layer in gated_layers(model).values():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
    base = {n: p.clone() for n, p in model.named_parameters()}
    before = runs.blocks(model)
    runs.train(model, processor, words, tasks=["action"], frozen_ratio=ratio, weight_decay=0.1, epochs=1)
    after = runs.blocks(model)
    for (name, task, side), old in before.items():
        moved = (old != after[name, task, side]).any(1).tolist()
        count = len(moved) if task == "action" else partly.get(task, 0)
        assert moved == [True] * count + [False] * (len(moved) - count), (name, task, side)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())
    assert base.keys() == dict(model.named_parameters()).keys()
    assert not any(p.requires_grad for p in model.parameters())
    assert attached_state(model).sharing == along_graph(tiny.graph())


def test_a_model_with_another_graphs_blocks_is_refused(runs, words):
    model, processor = runs.attached(graph=tiny.graph(rank=2))
    with pytest.raises(RunError, match="E516"):
        runs.train(model, processor, words)


def test_a_task_or_a_folder_without_samples(runs, words, tmp_path):
    lines = (words / "data.jsonl").read_text().splitlines()
    few = [json.loads(line) for line in lines]
    for r in few:
        r["answers"].pop("light", None)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, few)))
    model, processor = runs.attached()
    with pytest.raises(RunError, match=r"E510 .*'light'"):
        runs.train(model, processor, tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(line for line in lines if '"test"' in line))
    with pytest.raises(DataError, match="E231"):
        runs.train(model, processor, tmp_path)


# --- the loss --------------------------------------------------------------------------------------------------------


def hf_loss(model, reader, samples):
    """The mean over all answer tokens of one big batch, from all logits; transformers' own is the same in fp32."""
    batch = collate(samples, reader.encoder.pad)
    labels = torch.full_like(batch.input_ids, -100)
    for row, s in enumerate(samples):
        labels[row, len(s.prompt) : len(s)] = torch.tensor(s.answer)
    with model.tasks([s.task for s in samples]):
        out = model(**reader.inputs(batch), labels=labels)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    return loss


def test_max_train_draws_from_the_whole_file_by_the_seed(words):
    everything = training_examples(words, tiny.graph(), TrainConfig())

    def drawn(count, seed=0):
        return [e.id for e in training_examples(words, tiny.graph(), TrainConfig(max_train=count, seed=seed))]

    order = [e.id for e in everything]
    assert drawn(len(order)) == drawn(10**6) == order
    few = drawn(4)
    assert len(set(few)) == 4
    assert few == [i for i in order if i in few] == drawn(4)
    assert any(drawn(4, seed) != few for seed in range(1, 5))
    assert any(set(drawn(4, seed)) & set(order[len(order) // 2 :]) for seed in range(5)), "not only the first"


@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 1), (2, 3), (4, 2), (1, 6)])
def test_loss_and_gradients_equal_transformers_own_whatever_the_micro_batches(runs, words, batch_size, accumulate):
    model, processor = runs.attached(fill=0.1)
    stage = stage_of(
        model, processor, words, ["action"], batch_size=batch_size, accumulate=accumulate, max_train=6, epochs=1
    )
    (run,) = stage.runs
    assert run.total == 1
    lengths = {len(s.answer) for s in run.samples}
    assert len(lengths) > 1, "a mean of means would be right by accident"
    loss = hf_loss(model, stage.reader, run.samples)
    expected = torch.autograd.grad(loss, run.parameters)
    losses = stage._gradients(stage.runs, 0)
    assert losses["action"] == pytest.approx(loss.item(), rel=1e-12)
    for p, g in zip(run.parameters, expected, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-13)


def test_each_task_of_a_mixed_batch_has_its_own_mean(runs, words):
    model, processor = runs.attached(fill=0.1)
    stage = stage_of(model, processor, words, ["weather", "light"], batch_size=12)
    losses = stage._gradients(stage.runs, 0)
    for run in stage.runs:
        loss = hf_loss(model, stage.reader, run.samples)
        assert losses[run.name] == pytest.approx(loss.item(), rel=1e-12)
        for p, g in zip(run.parameters, torch.autograd.grad(loss, run.parameters), strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-9, atol=1e-13)


# --- non-finite ------------------------------------------------------------------------------------------------------


def expect_stop(runs, model, processor, data, message):
    before = runs.blocks(model)
    with pytest.raises(RunError, match=message):
        runs.train(model, processor, data)
    assert not changed(before, runs.blocks(model))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("culprit", ["weather", "light"])
@pytest.mark.parametrize("value", [1e200, torch.inf])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(runs, words, culprit, value):
    model, processor = runs.attached()
    layer = next(iter(gated_layers(model).values()))
    layer.B[layer.graph.block(culprit).start] = value
    expect_stop(runs, model, processor, words, f"E51[15] .*'{culprit}' is (nan|inf) at update 0")


@pytest.mark.parametrize("culprit", ["weather", "light"])
def test_a_gradient_that_is_not_finite_names_its_task(runs, words, monkeypatch, culprit):
    """In a mixed batch 0 x inf spoils every task's gradient; the error still names the one at fault."""

    def poisoned(model, inputs, batch):
        nll = answer_nll(model, inputs, batch)
        bad = torch.tensor([batch.tasks[i] == culprit for i in batch.owner])
        nll.register_hook(lambda g: torch.where(bad, torch.inf, g))
        return nll

    monkeypatch.setattr(loop, "answer_nll", poisoned)
    expect_stop(runs, *runs.attached(fill=0.1), words, f"E511 .*'{culprit}' is nan at update 0")


def test_no_checkpoint_of_a_failed_update(runs, words, tmp_path, monkeypatch):
    calls = []

    def later(model, inputs, batch):
        calls.append(1)
        return answer_nll(model, inputs, batch) * (torch.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(loop, "answer_nll", later)
    model, processor = runs.attached()
    with pytest.raises(RunError, match=r"E515 .* at update 3"):
        runs.train(model, processor, words, out=tmp_path / "run", checkpoint_every=1)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["000-0000002", "000-0000003"]


# --- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", "top 1/3"])
def test_activation_checkpointing_gives_the_same_weights(runs, words, layers):
    """Also with dropout in the model's configuration, which frozen models do not use, and above a frozen prefix."""
    found = []
    for on in (False, True):
        model, processor = runs.attached(layers=layers, attention_dropout=0.5)
        modes = [m.training for m in model.modules()]
        runs.train(model, processor, words, layers=layers, activation_checkpointing=on, epochs=1)
        assert [m.training for m in model.modules()] == modes
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        found.append(runs.blocks(model))
    assert furthest(*found) < 1e-13


def test_activation_checkpointing_really_recomputes(runs, words):
    model, processor = runs.attached()
    calls = []
    model.model.layers[1].mlp.register_forward_pre_hook(
        lambda *_: calls.append(torch._C._current_graph_task_id() != -1)
    )
    runs.train(model, processor, words, activation_checkpointing=True, epochs=1, tasks=["light"])
    assert sum(calls) == len(calls) / 2 > 0


# --- context ---------------------------------------------------------------------------------------------------------


def prompts(stage, task):
    (run,) = [r for r in stage.runs if r.name == task]
    return {tuple(s.prompt) for s in run.samples}


def test_gold_and_predicted_context_enter_the_prompt(runs, words):
    g = tiny.graph()
    examples = load_examples(words, g, split="train")
    model, processor = runs.attached(fill=0.3)
    encoder = Encoder(processor, g)
    answered = evaluate(model, processor, g, data=words, split="train", context="predicted").answers
    assert len(set(answered["weather"].values())) > 1
    for context in ("none", "gold", "predicted"):
        stage = stage_of(model, processor, words, ["action"], context=context)
        expected = set()
        for e in examples:
            said = {
                "none": {},
                "gold": {p: e.answers[p] for p in ("weather", "light") if p in e.answers},
                "predicted": {p: answered[p][e.id] for p in ("weather", "light") if e.id in answered[p]},
            }[context]
            if context == "predicted" and "light" not in said:  # not asked in evaluation, where it has no label
                said["light"] = stage.given["light"][e.id]
            known = "; ".join(f"{p}: {', '.join(a)}" for p, a in said.items())
            text = f"USER: {f'Known: {known}. ' if said else ''}{e.questions['action']} BOT:"
            expected.add(tuple(processor(text, add_special_tokens=False).input_ids))
        assert prompts(stage, "action") == expected
        assert encoder.end == tiny.END


def test_predicted_context_of_three_levels_uses_each_levels_own_answers(runs, words):
    tasks = tiny.graph().to_dict()["tasks"]
    tasks["light"]["after"], tasks["action"]["after"] = ["weather"], ["light"]
    g = tiny.graph(tasks=tasks)
    model, processor = runs.attached(graph=g, fill=0.3)
    stage = stage_of(model, processor, words, ["action"], graph=g, context="predicted")
    assert set(stage.given) == {"weather", "light"}
    e = load_examples(words, g, split="train")[1]
    reader = ImageFeatures(model, Encoder(processor, g))
    weather = loop.context_for(reader, [e], "light", dict.fromkeys(g.names, "predicted"), {})[e.id]["weather"]
    assert stage.given["weather"][e.id] == weather
    from contextlora.evaluation.evaluate import answer

    light = answer(reader, [e], "light", known={e.id: {"weather": weather}})[e.id]
    assert stage.given["light"][e.id] == light


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["gold", "none"])
def test_a_tiny_model_learns(runs, tmp_path, context):
    data = tiny.write_data(tmp_path / "data", train=36, test=36)
    model, processor = tiny.llama()
    before = evaluate(model, processor, tiny.graph(), data=data, context=context)
    runs.train(model, processor, data, context=context, epochs=26, batch_size=9, lr=1e-2, out=tmp_path / "run")
    after = evaluate(model, processor, tiny.graph(), data=data, context=context)
    for task in tiny.graph().names:
        assert before.accuracy[task].mean < 0.7
        assert after.accuracy[task].mean > 0.9, task
    generated = evaluate(model, processor, tiny.graph(), data=data, context=context, method="generate")
    assert all(a.mean > 0.9 for a in generated.accuracy.values())
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [*range(104), *range(104)]
    assert set(lines[0]["loss"]) == {"weather", "light"}
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- interrupted runs ------------------------------------------------------------------------------------------------


class Interrupting(Tracker):
    """Does something at one update."""

    def __init__(self, folder, at, what):
        super().__init__(folder, quiet=True)
        self.at, self.what = at, what

    def log(self, step, values):
        super().log(step, values)
        if (values["stage"], step) == self.at:
            self.what()


def stop():
    raise OSError("the machine is gone")


SETTINGS = {
    "plain": {},
    "sequential, delta": {"schedule": "sequential", "frozen_ratio": 0.5},
    "predicted": {"context": "predicted", "frozen_ratio": 0.5},
    "prefix": {"layers": "top 1/3"},
    "small prefix": {"layers": "top 1/3", "prefix_cache_gb": 12e-6},
    "accumulate": {"accumulate": 2, "batch_size": 2, "weight_decay": 0.1, "activation_checkpointing": True},
}


CASES = [(name, at) for name in SETTINGS for at in ((0, 4), (1, 3))] + [("plain", (1, 0)), ("prefix", (1, 0))]


@pytest.mark.parametrize(("name", "at"), CASES)
def test_resume_is_bit_exact(runs, words, tmp_path, name, at):
    settings = SETTINGS[name]
    layers = settings.get("layers", "all")
    start = {"dtype": torch.float32, "layers": layers, "fill": 0.1}
    how = {**settings, "checkpoint_every": 2}
    straight = runs.trained(words, **{**start, **how})
    out = tmp_path / "run"
    with pytest.raises(OSError, match="gone"):
        runs.train(*runs.attached(**start), words, out=out, tracker=lambda f: Interrupting(f, at, stop), **how)
    model, processor = runs.attached(**{**start, "fill": 0.3})  # what is in the model does not matter
    assert furthest(runs.blocks(runs.train(model, processor, words, out=out, resume=True, **how)), straight) == 0


def test_ctrl_c_leaves_a_resumable_run(runs, words, tmp_path):
    straight = runs.trained(words, dtype=torch.float32)
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    press = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    model, processor = runs.attached(dtype=torch.float32)
    with pytest.raises(RunError, match=r"E514 .*run: stopped after update 3; go on with --resume"):
        runs.train(model, processor, words, out=out, tracker=lambda f: Interrupting(f, (0, 2), press))
    assert signal.getsignal(signal.SIGINT) is before
    assert not any(p.requires_grad for p in model.parameters())
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    (out / "metrics.jsonl").write_text("\n".join(lines)[:-9])  # as a kill while writing would leave it
    model, processor = runs.attached(dtype=torch.float32)
    assert furthest(runs.blocks(runs.train(model, processor, words, out=out, resume=True)), straight) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in (*lines[:2], *lines[3:])] == [0, 1, 3, 4, 5, 0, 1, 2, 3, 4, 5]


def test_a_second_ctrl_c_interrupts_at_once(runs, words):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell starts with & ignore it
    try:
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            runs.train(*runs.attached(), words, tracker=lambda f: Interrupting(f, (0, 1), twice))
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, found)


def test_checkpoints_of_another_run_are_refused(runs, words, tmp_path):
    out = tmp_path / "run"
    how = {"checkpoint_every": 1, "epochs": 1}
    interrupted = {"tracker": lambda f: Interrupting(f, (0, 1), stop), "out": out}
    with pytest.raises(OSError, match="gone"):
        runs.train(*runs.attached(), words, **how, **interrupted)
    other = tiny.write_data(tmp_path / "other", train=6)
    cases = [
        (runs.attached(), words, {**how, "lr": 1e-3}),
        (runs.attached(), words, {**how, "seed": 1}),
        (runs.attached(), words, {**how, "tasks": ["weather"]}),
        (runs.attached(), words, {**how, "graph": tiny.graph(frozen_ratio=0.5)}),
        (runs.attached(), other, how),
        (runs.attached(initializer_range=0.2), words, how),
        (runs.attached(dtype=torch.float32), words, how),
        (runs.attached(layers="top 1/3"), words, how),
    ]
    for (model, processor), data, config in cases:
        before = runs.blocks(model)
        with pytest.raises(RunError, match=r"E520 .*checkpoints: "):
            runs.train(model, processor, data, out=out, resume=True, **config)
        assert not changed(before, runs.blocks(model))
    runs.train(*runs.attached(), words, out=out, resume=True, **{**how, "checkpoint_every": 7})


def test_training_without_resume_starts_anew(runs, words, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(OSError, match="gone"):
        runs.train(
            *runs.attached(), words, out=out, checkpoint_every=1, tracker=lambda f: Interrupting(f, (0, 2), stop)
        )
    assert furthest(runs.trained(words), runs.blocks(runs.train(*runs.attached(), words, out=out))) == 0
    trainable_groups(runs.attached()[0], [])


def test_label_noise_reaches_the_named_tasks_alone(words):
    clean = training_examples(words, tiny.graph(), TrainConfig())
    config = TrainConfig(label_noise=1.0, noise_tasks=("action",))
    noisy = training_examples(words, tiny.graph(), config)
    moved = {t for e, n in zip(clean, noisy, strict=True) for t in e.answers if e.answers[t] != n.answers[t]}
    assert moved == {"action"}
    with pytest.raises(ConfigError, match="E104 no task 'acton'"):
        training_examples(words, tiny.graph(), TrainConfig(noise_tasks=("acton",)))
    assert training_examples(words, tiny.graph(), TrainConfig(noise_tasks=("action",))) == clean, "a share of none"
