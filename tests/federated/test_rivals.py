"""What rivals train: one device is plain training of that kind, two are averages by hand, messages say all of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

import tiny
from contextlora.data.collate import Encoder
from contextlora.data.examples import load_examples
from contextlora.errors import ConfigError
from contextlora.federated.aggregate import EVERYONE, Held
from contextlora.federated.keep import restore, tensors_of
from contextlora.federated.layer import learning_parts, load_slice
from contextlora.federated.local import Local, first_batches, local_run
from contextlora.federated.measure import measure
from contextlora.federated.methods import first_local, put_on, whole_slice, with_everyone
from contextlora.federated.peer import Peer
from contextlora.federated.projection import independent, projection
from contextlora.federated.setup import shares
from contextlora.federated.simulate import simulate
from contextlora.federated.slices import A_SIDE
from contextlora.lora.layer import AdaptedLinear
from contextlora.models.inputs import ImageFeatures, answer_nll
from contextlora.training.prefix import FrozenPrefix
from federated.federation import content, small, write_words

EXACT = {"full": "bf16", "delta": None}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("words"), train=18)


def settings(words, out, name, **more):
    given = {"rounds": 2, "updates": 3, "train": {"lr": 0.01, "batch_size": 2}, "limits": {}, "wire": EXACT}
    return small(words, out, **{"devices": {"a": "weather"}, "aggregate": name, **given, **more})


def reader(s):
    model, processor = tiny.llama(torch.float32)
    graph = tiny.graph()
    put_on(model, graph, s)
    return ImageFeatures(model, Encoder(processor, graph))


def run(words, out, name, **more):
    s = settings(words, out, name, **more)
    return simulate(s, silent=True, reader=reader(s))


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def trained_plainly(s, words, name, updates):
    """Oracle: stock autograd, stock AdamW and schedule on a plain model; returns A, B or weights by layer."""
    base, processor = tiny.llama(torch.float32)
    graph, found = with_everyone(tiny.graph()), linears(base)
    examples = shares(s)["a"]
    plain = ImageFeatures(base, Encoder(processor, tiny.graph()))
    batches = first_batches(plain, examples, "weather", s.train, updates)
    parameters, names = [], []
    for path, linear in found.items():
        if name == "full":
            parameters.append(linear.weight.requires_grad_(True))
            names.append(path)
            continue
        rows = graph.block(EVERYONE)
        a = projection(graph, path, linear.in_features, s.seed)[rows.start : rows.stop].float().clone()
        b = torch.zeros(4, linear.out_features, requires_grad=True)
        a.requires_grad_(name == "fedavg_lora")
        linear.register_forward_hook(lambda _, args, out, a=a, b=b: out + 2.0 * (args[0] @ a.T) @ b)
        parameters += [a, b] if a.requires_grad else [b]
        names += [path + A_SIDE, path] if a.requires_grad else [path]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=s.train.lr, weight_decay=0.0)
    rate = get_cosine_schedule_with_warmup(optimizer, 1, updates).lr_lambdas[0]
    for update, batch in enumerate(batches):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        answer_nll(base, inputs, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, s.train.max_grad_norm)
        optimizer.param_groups[0]["lr"] = s.train.lr * (1.0 if update == 0 else rate(update))  # one update of warm-up
        optimizer.step()
        optimizer.zero_grad()
    return {n: (p.detach() - q).numpy() for n, p, q in zip(names, parameters, start, strict=True)}


@pytest.mark.parametrize("name", ["ffa", "fedavg_lora", "full"])
def test_one_device_is_plain_training(words, tmp_path, name):
    peer = run(words, tmp_path / "run", name)["a"]
    want = trained_plainly(peer.settings, words, name, 6)
    assert want.keys() == peer.local.own.masks.keys()
    for layer, moved in want.items():
        assert np.abs(moved).max() > 1e-3
        got = peer.local.own.dense(layer)
        np.testing.assert_allclose(got, moved, atol=2e-4, rtol=1e-2)
        assert np.linalg.norm(got - moved) < 2e-3 * np.linalg.norm(moved)


@pytest.mark.parametrize("name", ["ffa", "fedavg_lora", "full"])
def test_two_devices_of_two_tasks_hold_the_average_of_what_they_trained(words, tmp_path, monkeypatch, name):
    own, aggregate = {}, Peer.aggregate

    def kept(self):
        own[self.name] = self.local.own, len(self.examples)
        aggregate(self)

    monkeypatch.setattr(Peer, "aggregate", kept)
    devices = {"a": "weather", "b": "weather", "c": "light"}
    peers = run(words, tmp_path / "run", name, rounds=1, devices=devices)
    total = sum(n for _, n in own.values())
    for peer in peers.values():
        (place,) = peer.held.slices
        assert place == ("", EVERYONE)
        for layer in peer.layers:
            want = sum(n / total * s.dense(layer).astype(np.float64) for s, n in own.values())
            got = peer.held.slices[place].dense(layer)
            assert np.abs(want).max() > 1e-3
            largest = max(np.abs(s.dense(layer)).max() for s, _ in own.values())
            np.testing.assert_allclose(got, want, atol=2**-8 * largest)
            assert np.array_equal(peer.local.block.dense(layer), got)  # the next round goes on from there


def test_what_is_trained_is_what_travels_and_is_counted(words, tmp_path):
    """a.rank (d_in + d_out) of LoRA, B alone of FFA, every weight of full fine-tuning; at least a byte each by int8."""
    wire = {"full": "int8", "delta": None}
    model, _ = tiny.llama()
    shapes = [m.weight.shape for m in linears(model).values()]
    wanted = {
        "fedavg_lora": sum(4 * (o + i) for o, i in shapes),
        "ffa": sum(4 * o for o, _ in shapes),
        "full": sum(o * i for o, i in shapes),
    }
    sent = {}
    for name, count in wanted.items():
        peers = run(words, tmp_path / name, name, rounds=1, devices={"a": "weather", "b": "light"}, wire=wire)
        assert all(p.local.own.active == count for p in peers.values())
        (line,) = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        sent[name] = json.loads(line)["bytes"]["slices"]
        assert 2 * 0.7 * count < sent[name] < 2 * (1.2 * count + 2000)
    assert sent["ffa"] < sent["fedavg_lora"] < sent["full"]


@pytest.mark.parametrize("name", ["ffa", "fedavg_lora", "full", "lori", "single_cluster", "hard_routing"])
def test_two_runs_and_a_resumed_one_hold_what_they_should(words, tmp_path, name):
    devices = {"a": "weather", "b": "light", "c": "action"}
    if name == "single_cluster":  # one mean of all B: ranks must be alike, and light has another one
        devices.pop("b")
    one, other = (run(words, tmp_path / x, name, devices=devices) for x in "xy")
    for key, slice_ in one["a"].held.slices.items():
        for layer, values in slice_.values.items():
            assert values.tobytes() == other["a"].held.slices[key].values[layer].tobytes()
    s = settings(words, tmp_path / "x", name, devices=devices)
    again = simulate(s, silent=True, resume=True, reader=reader(s))
    found = [measure(p["a"], "test").data() for p in (one, again)]
    assert found[0] == found[1]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "wire",
    [pytest.param(EXACT, marks=pytest.mark.slow), {"full": "int8", "delta": "int4"}],
    ids=["values", "differences"],
)
@pytest.mark.parametrize("name", ["ffa", "fedavg_lora", "full", "single_cluster", "lori"])
def test_a_resumed_run_is_the_uninterrupted_one(words, tmp_path, monkeypatch, name, wire):
    """Stopped between two devices in the third of four rounds, after an exchange that all of them were in."""
    how = {"devices": dict.fromkeys("abc", "weather") | {"d": "action"}, "rounds": 4, "updates": 1, "wire": wire}
    how["limits"] = {"collision": 1.0}  # else two of a task would not meet again once masks are counted
    one, train, count = run(words, tmp_path / "whole", name, **how), Peer.train, []

    def stops(self):
        count.append(self.name)
        if len(count) > 10:
            raise Stopped
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(Peer, "train", stops)
        with pytest.raises(Stopped):
            run(words, tmp_path / "cut", name, **how)
    s = settings(words, tmp_path / "cut", name, **how)
    again = simulate(s, silent=True, resume=True, reader=reader(s))
    lines = [(tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in ("whole", "cut")]
    told = [[{k: v for k, v in json.loads(line).items() if k != "time"} for line in of] for of in lines]
    assert told[0] == told[1]
    assert told[0][-1]["clusters"] == [["a", "b", "c", "d"]]
    for who, peer in one.items():
        assert content(again[who].held) == content(peer.held)
        assert content(Held({("", ""): again[who].local.block})) == content(Held({("", ""): peer.local.block}))
        files = sorted((tmp_path / "whole" / "adapters" / who).glob("*.safetensors"))
        assert files
        assert all(f.read_bytes() == (tmp_path / "cut" / "adapters" / who / f.name).read_bytes() for f in files)


def test_whole_masks_cost_a_checkpoint_nothing(words, tmp_path):
    """Values in what is held, in the device's own block and with two moments, float32: no bit for a place more."""
    peer = run(words, tmp_path / "run", "ffa")["a"]
    active = peer.local.own.active
    assert all(mask.whole for s in peer.held.slices.values() for mask in s.masks.values())
    kept = tensors_of(peer)
    assert sum(t.nbytes for t in kept.values()) < 4 * 4 * active + 12000
    fresh = Peer("a", peer.settings, peer.reader, peer.examples, peer.key, {}, peer.planner)
    restore(fresh, kept)
    assert content(fresh.held) == content(peer.held)
    assert fresh.local.block.task == EVERYONE


@pytest.mark.parametrize(("name", "most"), [("ours", 2), ("ffa", 1)])
def test_a_run_that_keeps_nothing_ends_as_one_that_does(words, tmp_path, name, most):
    """Also the device that was killed comes back; and activations of an earlier run serve another one."""
    how = {"devices": {"a": "weather", "b": "action"}, "rounds": 3, "limits": {"collision": 1.0}}
    how["faults"] = [{"what": "kill", "who": ["b"], "rounds": [1, 1]}]
    one = run(words, tmp_path / "kept", name, **how)
    s = settings(words, tmp_path / "bare", name, **how)
    here = reader(s)
    below = FrozenPrefix(here, 2**24)
    other = simulate(s, silent=True, reader=here, prefix=below, keep=False)
    assert {p.name for p in (tmp_path / "bare").iterdir()} == {"metrics.jsonl", "federation.yaml"}
    for who, peer in one.items():
        assert other[who].prefix is below
        assert content(other[who].held) == content(peer.held)
        assert len(peer.held.slices) == most


def test_a_run_that_keeps_nothing_packs_all_the_same(words, tmp_path):
    """Two tasks of one rank whose masks meet: the packed device answers with means, not with what it was sent."""
    how = {"devices": {"a": "weather", "b": "action"}, "rounds": 1, "limits": {"collision": 1.0}}
    plain, packed = (run(words, tmp_path / str(pack), "ours", **how, pack=pack) for pack in (False, True))
    s = settings(words, tmp_path / "bare", "ours", **how, pack=True)
    bare = simulate(s, silent=True, reader=reader(s), keep=False)
    assert not (tmp_path / "bare" / "packed").exists()
    assert content(bare["a"].held) == content(packed["a"].held) != content(plain["a"].held)


@pytest.mark.parametrize("name", ["ffa", "fedavg_lora", "full"])
def test_it_answers_with_the_average_on_the_plain_model(words, tmp_path, name):
    train = {"lr": 0.05, "batch_size": 2}
    peers = run(words, tmp_path / "run", name, devices={"a": "weather", "b": "light"}, train=train)
    peer = peers["b"]
    held, graph = peer.held.slices["", EVERYONE], with_everyone(tiny.graph())
    merged, processor = tiny.llama(torch.float32)
    with torch.no_grad():
        for path, linear in linears(merged).items():
            if name == "full":
                linear.weight += torch.from_numpy(held.dense(path))
                continue
            rows = graph.block(EVERYONE)
            a = projection(graph, path, linear.in_features, 0)[rows.start : rows.stop].float()
            if name == "fedavg_lora":
                a = a + torch.from_numpy(held.dense(path + A_SIDE))
            linear.weight += 2.0 * torch.from_numpy(held.dense(path)).T @ a
    plain = ImageFeatures(merged, Encoder(processor, tiny.graph()))
    examples = load_examples(words, tiny.graph(), split="test")
    batch = first_batches(plain, examples, "light", peer.settings.train, 1)[0]
    inputs = plain.inputs(batch)
    load_slice(peer.reader.model, whole_slice(peer.reader.model, EVERYONE))  # whatever is there is replaced
    measure(peer, "test")
    with torch.no_grad(), peer.reader.model.tasks(batch.tasks):
        got = answer_nll(peer.reader.model, inputs, batch)
    torch.testing.assert_close(got, answer_nll(merged, inputs, batch).detach(), rtol=1e-4, atol=1e-4)
    assert measure(peer, "test").accuracy.keys() == {"weather", "light"}


def test_lori_keeps_the_largest_entries_of_a_trial_over_all_layers(words, tmp_path):
    s = settings(words, tmp_path, "lori")
    here, examples = reader(s), shares(s)["a"]
    start = first_local(here, examples, "weather", s, None)
    parts = learning_parts(here.model)
    sizes = {layer: part.shape("weather") for layer, part in parts.items()}
    total = sum(r * d for r, d in sizes.values())
    assert start.own.active == round(0.3 * total)
    assert not any(v.any() for v in start.own.values.values())
    tried, _ = local_run(here, examples, Local.first(whole_slice(here.model, "weather")), s.train, updates=6, total=6)
    flat = np.concatenate([np.abs(tried.block.dense(layer)).ravel() for layer in sizes])
    before = np.cumsum([0, *(r * d for r, d in sizes.values())])[:-1]
    kept = np.concatenate([m.indices + at for m, at in zip(start.own.masks.values(), before, strict=True)])
    assert flat[kept].min() >= np.delete(flat, kept).max()
    rates = [m.rate for m in start.own.masks.values()]
    assert max(rates) > 1.2 * min(rates), "one threshold for all layers"


def test_loris_projections_are_independent_gaussians_and_ours_are_orthogonal():
    graph = tiny.graph()
    apart = independent(graph, "l", 512, 0)
    first, second = apart[:4], apart[4:7]
    assert 0 < (first @ second.T).abs().max() < 6 / np.sqrt(512)
    assert apart.std() == pytest.approx(1 / np.sqrt(512), rel=0.05)
    ours = projection(graph, "l", 512, 0)
    assert (ours[:4] @ ours[4:7].T).abs().max() < 1e-12


def test_exports_say_what_was_trained(words, tmp_path):
    devices = {"a": "weather", "b": "light"}
    full = run(words, tmp_path / "full", "full", devices=devices)["a"]
    moved = load_file(tmp_path / "full" / "adapters" / "a" / "difference.safetensors")
    assert {f"{layer}.weight" for layer in full.layers} == moved.keys()
    pair = run(words, tmp_path / "pair", "fedavg_lora", devices=devices)["a"]
    sides = load_file(tmp_path / "pair" / "adapters" / "a" / "adapter_model.safetensors")
    layer = next(iter(linears(tiny.llama()[0])))
    graph, block = with_everyone(tiny.graph()), pair.local.block
    rows = graph.block(EVERYONE)
    a = projection(graph, layer, 32, 0)[rows.start : rows.stop].float().numpy() + block.dense(layer + A_SIDE)
    got = {k.rpartition("lora_")[2]: v.numpy() for k, v in sides.items() if f"{layer}." in k}
    np.testing.assert_allclose(got["B.weight"] @ got["A.weight"], 2.0 * block.dense(layer).T @ a, atol=1e-6)


def test_a_task_may_not_be_called_everyone(tmp_path):
    graph = tiny.graph(tasks={"everyone": {"question": "?", "options": ["a", "b"]}})
    with pytest.raises(ConfigError, match="E105 tiny: a task is called 'everyone'"):
        put_on(tiny.llama()[0], graph, settings(tmp_path, tmp_path, "ffa"))


def test_clusters_of_rivals_without_masks_know_no_collision_limit(words, tmp_path):
    for name, most in [("ours", 0.5), ("lori_cat", 0.5), ("lori", 1), ("full", 1), ("single_cluster", 1)]:
        assert settings(words, tmp_path, name).planned.collision == most


def test_layers_of_rivals_are_plain_outside_of_tasks(words, tmp_path):
    ids = torch.randint(3, 20, (2, 7))
    want = tiny.llama()[0](ids).logits
    for name in ("fedavg_lora", "full", "lori"):
        model = tiny.llama()[0]
        put_on(model, tiny.graph(), settings(words, tmp_path, name))
        assert torch.equal(model(ids).logits, want)
        assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == len(linears(tiny.llama()[0]))
