"""The adapter and its folder: exact, atomic, checked, and honest about what is out of date."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from contextlora.errors import AdapterError, ContextLoRAError
from contextlora.graph import TaskGraph
from contextlora.lora import folder as folders
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import attach, gated_layers
from contextlora.lora.plug import compose, drop, plug

torch.set_num_threads(1)


def graph_of(**changes: Any) -> TaskGraph:
    tasks: dict[str, Any] = {
        "weather": {"question": "What is\u0085 the \u5929\u6c14?", "options": ["clear", "rain"]},
        "road": {"question": "How is the road?", "rank": 2, "after": ["weather"]},
        "strategy": {"question": "What to do?", "after": ["weather", "road"], "rank": 3},
    }
    for name, value in changes.items():
        if value is None:
            del tasks[name]
        else:
            tasks[name] = {**tasks.get(name, {}), **value}
    return TaskGraph.from_dict({"name": "iov", "rank": 4, "tasks": tasks})


def llama(layers: int = 2, hidden: int = 16, name: str = "base-1") -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=hidden,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()
    model.contextlora_fingerprint = f"sha256:{name}"
    return model


@torch.no_grad()
def train(model: Any, *tasks: str, seed: int = 1) -> None:
    """Stands for training: other values in these tasks' blocks."""
    generator = torch.Generator().manual_seed(seed)
    for layer in gated_layers(model).values():
        for task in tasks or layer.graph.names:
            for matrix in layer.block(task):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.1)


def trained(graph: TaskGraph | None = None, *, seed: int = 1, **kwargs: Any) -> Adapter:
    model = attach(llama(**kwargs), graph or graph_of())
    train(model, seed=seed)
    return Adapter.of(model, base="tiny", seed=7, data="d" * 64, metrics={"road": {"accuracy": 0.9}})


@torch.no_grad()
def logits(model: Any, task: str) -> torch.Tensor:
    ids = torch.arange(20).view(2, 10)
    with model.tasks(task):
        return model(ids).logits


def same(one: Adapter, other: Adapter, tasks: Any = None) -> bool:
    """Whether the blocks are equal byte for byte."""
    names = list(tasks or one.blocks)
    return all(
        torch.equal(m, n) and m.dtype == n.dtype
        for t in names
        for path in one.layers
        for m, n in zip(one.blocks[t][path], other.blocks[t][path], strict=True)
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- round trip ----------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    layers=st.sampled_from(["all", "top 1/2", "0-0"]),
    targets=st.sampled_from([None, ["q_proj", "down_proj"]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_save_and_load_give_back_every_byte(
    tmp_path_factory: pytest.TempPathFactory, ranks: list[int], layers: str, targets: Any, dtype: Any, seed: int
) -> None:
    tasks = {f"t{i}": {"question": "?", "rank": r, "after": [f"t{i - 1}"] * (i > 0)} for i, r in enumerate(ranks)}
    model = attach(llama(), TaskGraph.from_dict({"tasks": tasks}), layers=layers, targets=targets, dtype=dtype)
    train(model, seed=seed)
    adapter = Adapter.of(model)
    again = Adapter.load(adapter.save(tmp_path_factory.mktemp("a") / "x"))
    assert same(adapter, again)
    assert again.digest() == adapter.digest()
    assert (again.graph, dict(again.records), dict(again.layers)) == (adapter.graph, adapter.records, adapter.layers)
    other = again.apply(llama())
    if dtype is torch.float32:
        assert Adapter.of(other).digest() == adapter.digest()
    assert torch.allclose(logits(other, "t0"), logits(model, "t0"), atol=1e-6)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    adapter = trained()
    one, two = tree(adapter.save(tmp_path / "1")), tree(Adapter.load(tmp_path / "1").save(tmp_path / "2"))
    assert one == two
    assert set(one) == {
        "README.md",
        "graph.svg",
        "graph.yaml",
        "manifest.json",
        *(f"tasks/{t}/{f}" for t in adapter.graph.names for f in ("adapter_config.json", "adapter_model.safetensors")),
    }
    assert trained(seed=2).digest() != adapter.digest()


def test_blocks_of_a_saved_adapter_do_not_follow_the_model() -> None:
    model = attach(llama(), graph_of())
    train(model)
    adapter = Adapter.of(model)
    before = adapter.digest()
    train(model, seed=2)
    assert adapter.digest() == before


def test_the_card_tells_what_a_reader_asks(tmp_path: Path) -> None:
    card = (trained().save(tmp_path / "a") / "README.md").read_text()
    assert "graph.svg" in card
    assert "| road | weather | 2 | 4 | dddddddddddddddd | 7 | accuracy 0.9 |" in card
    assert 'base_model: "tiny"' in card


def test_apply_names_what_does_not_fit() -> None:
    adapter = trained()
    with pytest.raises(AdapterError, match=r"E314.*fingerprint"):
        adapter.apply(llama(name="base-2"))
    adapter.apply(llama(name="base-2"), any_base=True)
    narrow = llama(hidden=8)
    with pytest.raises(
        AdapterError, match=r"E315 model\.layers\.0\.mlp\.down_proj: got 32 in, 8 out, wanted 32 in, 16"
    ):
        adapter.apply(narrow)
    assert not gated_layers(narrow)
    with pytest.raises(AdapterError, match=r"E315.*too few layers"):
        adapter.apply(llama(layers=1))
    with pytest.raises(AdapterError, match=r"E315 model\.layers\.0.*got no blocks"):
        adapter.apply(attach(llama(), graph_of(), layers="1-1"))
    with pytest.raises(AdapterError, match=r"E315.*'road'.*rank"):
        adapter.apply(attach(llama(), graph_of(road={"rank": 5})))


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncate", [False, True], ids=["flip", "truncate"])
def test_damage_is_detected_at_fifty_places(tmp_path: Path, truncate: bool) -> None:
    folder = trained().save(tmp_path / "a")
    rng = random.Random(5)
    names = [n for n in tree(folder) if n == "manifest.json" or n.startswith("tasks/")]
    for i in range(50):
        path = folder / names[i % len(names)]
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        damaged = whole[:at] if truncate else whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"E31[012]") as e:
            Adapter.load(folder)
        assert path.name in str(e.value)
        path.write_bytes(whole)
    assert Adapter.load(folder).digest()


def test_a_damaged_graph_is_an_error_or_an_edit_that_touches_no_block(tmp_path: Path) -> None:
    adapter = trained()
    folder = adapter.save(tmp_path / "a")
    path, rng = folder / "graph.yaml", random.Random(6)
    whole = path.read_bytes()
    for _ in range(50):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] if rng.random() < 0.5 else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            again = Adapter.load(folder)
        except ContextLoRAError:
            continue
        assert same(again, adapter, again.blocks)


def test_what_is_missing_or_newer_is_one_clear_error(tmp_path: Path) -> None:
    folder = trained().save(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"E310.*no such adapter folder"):
        Adapter.load(tmp_path / "b")
    for name in (
        "manifest.json",
        "graph.yaml",
        "tasks/road/adapter_model.safetensors",
        "tasks/road/adapter_config.json",
    ):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(AdapterError, match=r"E310"):
            Adapter.load(folder)
        (folder / name).write_bytes(data)
    shutil.copytree(folder / "tasks" / "road", folder / "tasks" / "road2")
    (folder / "graph.yaml").write_text((folder / "graph.yaml").read_text() + "  road2: {question: why}\n")
    with pytest.raises(AdapterError, match=r"E310.*road2.*contextlora plug"):
        Adapter.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(AdapterError, match=r"E312.*format 99.*upgrade"):
        Adapter.load(folder)


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as one who can compute a sha256 would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = folders._own_sha256(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


HOSTILE = ["../../etc", "/etc/passwd", "..", "a/../../b", "..\\x", "C:\\x", "C:x", "a/b/c/d"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["files", "tasks"])
def test_a_manifest_cannot_lead_out_of_the_folder(tmp_path: Path, name: str, key: str) -> None:
    folder = trained().save(tmp_path / "a")
    reseal(folder, lambda m: m[key].update({name: next(iter(m[key].values()))}))
    with pytest.raises(AdapterError, match=r"E313"):
        Adapter.load(folder)


def test_a_link_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = trained().save(tmp_path / "a")
    shutil.move(folder / "tasks" / "road", tmp_path / "elsewhere")
    (folder / "tasks" / "road").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=r"E313.*link"):
        Adapter.load(folder)


def test_a_resealed_manifest_of_the_wrong_shape_is_one_clear_error(tmp_path: Path) -> None:
    folder = trained().save(tmp_path / "a")
    whole = (folder / "manifest.json").read_text()
    values: list[Any] = [
        None,
        3,
        "x",
        [],
        {},
        {"road": 3},
        {"model.layers.0.self_attn.q_proj": ["16", 16]},
        float("nan"),
    ]
    codes: set[str] = set()
    for key in ("base", "fingerprint", "seed", "layers", "targets", "tasks", "files", "extra"):
        for value in values:
            reseal(folder, lambda m, key=key, value=value: m.update({key: value}))  # type: ignore[misc]
            try:
                Adapter.load(folder)
            except AdapterError as e:
                codes.add(e.code)
            (folder / "manifest.json").write_text(whole)
    assert codes <= {"E310", "E311", "E315"}


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for write in (trained().save, lambda out: trained().export("road", out)):
        with pytest.raises(AdapterError, match=r"E319"):
            write(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_saving_again_keeps_a_users_files_and_comments(tmp_path: Path) -> None:
    folder = trained().save(tmp_path / "a")
    text = "# our workflow\n" + (folder / "graph.yaml").read_text()
    (folder / "graph.yaml").write_text(text)
    (folder / "notes.txt").write_text("mine")
    Adapter.load(folder).save(folder)
    assert (folder / "graph.yaml").read_text() == text
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# --- kill -9 ---------------------------------------------------------------------------------------------------------

SAVER = """
import itertools, os, sys
from contextlora.lora.adapter import Adapter
a, b = Adapter.load(sys.argv[1]), Adapter.load(sys.argv[2])
while True:
    pid = os.fork()
    if not pid:
        for adapter in itertools.cycle([a, b]):
            adapter.save(sys.argv[3])
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


def test_kill_during_save_leaves_the_old_or_the_new_whole(tmp_path: Path) -> None:
    one, two = trained(seed=1), trained(seed=2)
    args = [str(one.save(tmp_path / "1")), str(two.save(tmp_path / "2")), str(tmp_path / "out")]
    one.save(tmp_path / "out")
    rng = random.Random(0)
    with subprocess.Popen([sys.executable, "-c", SAVER, *args], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            for _ in range(20):
                time.sleep(rng.uniform(0, 0.1))
                os.kill(pid, signal.SIGKILL)
                pid = int(parent.stdout.readline())  # the killed one is gone, the next one may have begun
                os.kill(pid, signal.SIGSTOP)
                assert Adapter.load(tmp_path / "out").digest() in (one.digest(), two.digest())
                os.kill(pid, signal.SIGCONT)
        finally:
            parent.kill()
            os.kill(pid, signal.SIGKILL)
    assert Adapter.load(tmp_path / "out").digest() in (one.digest(), two.digest())


def test_a_death_at_any_step_of_a_save_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without luck: stops before each single rename and removal in turn, as a kill would."""
    old, new = trained(seed=1), trained(seed=2)

    class Killed(BaseException):
        pass

    for stop in range(20):
        shutil.rmtree(tmp_path, ignore_errors=True)
        old.save(tmp_path / "out")
        steps = 0

        def guard(function: Any, stop: int = stop) -> Any:
            def stepping(*args: Any, **kwargs: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps > stop:
                    raise Killed
                return function(*args, **kwargs)

            return stepping

        with monkeypatch.context() as m:
            m.setattr(Path, "rename", guard(Path.rename))
            m.setattr(folders.shutil, "rmtree", guard(shutil.rmtree))
            try:
                new.save(tmp_path / "out")
            except Killed:
                finished = False
            else:
                finished = True
        assert Adapter.load(tmp_path / "out").digest() in (old.digest(), new.digest())
        new.save(tmp_path / "out")  # and the next save repairs what is left
        assert Adapter.load(tmp_path / "out").digest() == new.digest()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        if finished:
            assert stop >= 4
            return
    pytest.fail("a save has more steps than were tried")


# --- growing, plugging, pulling out ----------------------------------------------------------------------------------


def test_growing_the_graph_leaves_trained_blocks_byte_identical(tmp_path: Path) -> None:
    adapter = trained()
    folder = adapter.save(tmp_path / "a")
    before = tree(folder)
    graph_of(crash={"question": "Is there a crash?", "after": ["road"]}).save(folder / "graph.yaml")
    grown = Adapter.load(folder)
    assert grown.stale() == {"crash": "not trained yet"}
    assert same(adapter, grown)
    model = grown.apply(llama())
    fresh = attach(llama(), grown.graph, seed=7)
    for path, layer in gated_layers(model).items():
        assert torch.equal(layer.block("crash")[0], gated_layers(fresh)[path].block("crash")[0])
    train(model, "crash")
    done = Adapter.of(model)
    assert done.stale() == {}
    assert done.records["road"] == adapter.records["road"]
    assert done.base == "tiny"
    after = tree(done.save(folder))
    assert all(after[n] == data for n, data in before.items() if n.startswith("tasks/"))


def test_stale_says_why(tmp_path: Path) -> None:
    adapter = trained()
    assert adapter.stale() == {}
    edits = {
        "question": graph_of(road={"question": "And the road?"}),
        "options": graph_of(road={"options": ["dry", "wet"]}),
        "prerequisites": graph_of(road={"after": []}),
    }
    for what, graph in edits.items():
        edited = adapter.with_graph(graph)
        assert edited.stale() == {"road": f"{what} changed in graph.yaml"}
        assert edited.digest() == adapter.digest()
    wider = adapter.with_graph(graph_of(road={"rank": 5}))
    assert wider.stale()["road"] == "rank changed in graph.yaml, so its block does not fit"
    assert wider.stale()["strategy"] == "prerequisite 'road' was removed"
    assert set(wider.blocks) == {"weather", "strategy"}
    assert Adapter.of(attach(llama(), graph_of())).stale() == dict.fromkeys(graph_of().names, "not trained yet")


def test_retraining_a_prerequisite_makes_its_children_stale(tmp_path: Path) -> None:
    folder = trained().save(tmp_path / "a")
    model = Adapter.load(folder).apply(llama())
    train(model, "weather", seed=9)
    Adapter.of(model).save(folder)
    why = "prerequisite 'weather' was retrained after this task"
    assert Adapter.load(folder).stale() == {"road": why, "strategy": why}
    train(model, "road", "strategy", seed=10)
    assert Adapter.of(model).stale() == {}


def test_a_model_remembers_what_it_was_saved_as() -> None:
    model = attach(llama(), graph_of())
    train(model)
    first = Adapter.of(model, data="one")
    train(model, "road", seed=4)
    second = Adapter.of(model, data="two", metrics={"weather": {"accuracy": 1.0}})
    assert second.stale() == {"strategy": "prerequisite 'road' was retrained after this task"}
    assert second.records["weather"].data == "one"
    assert second.records["weather"].metrics == {"accuracy": 1.0}
    assert second.records["road"].data == "two"
    assert first.records["weather"].metrics == {}


def test_pulling_a_folder_out_leaves_the_rest_working(tmp_path: Path) -> None:
    adapter = trained()
    folder = adapter.save(tmp_path / "a")
    shutil.rmtree(folder / "tasks" / "weather")
    rest = Adapter.load(folder)
    assert same(rest, adapter, ["road", "strategy"])
    assert rest.missing("strategy") == ("weather",)
    assert rest.stale() == {
        "weather": "its block was removed",
        "road": "prerequisite 'weather' was removed",
        "strategy": "prerequisite 'weather' was removed",
    }
    assert torch.isfinite(logits(rest.apply(llama()), "strategy")).all()
    with pytest.raises(AdapterError, match=r"E317.*'weather', a prerequisite of 'strategy', has no block"):
        rest.export("strategy", tmp_path / "out")
    alone = Adapter.load(folder, tasks=["road"])
    assert set(alone.blocks) == {"road"}
    assert alone.graph.names == ("weather", "road")


def test_drop_and_plug_back(tmp_path: Path) -> None:
    adapter = trained()
    source, folder = adapter.save(tmp_path / "source"), adapter.save(tmp_path / "a")
    dropped = drop(folder, "weather")
    assert dropped.graph.names == ("road", "strategy")
    assert not (folder / "tasks" / "weather").exists()
    assert Adapter.load(folder).stale()["strategy"] == "prerequisite 'weather' was removed"
    assert torch.isfinite(logits(Adapter.load(folder).apply(llama()), "strategy")).all()
    back = plug(folder, source / "tasks" / "weather")
    assert back.stale() == {}
    assert back.digest() == Adapter.load(folder).digest() == adapter.digest()
    for task in adapter.graph.names:
        expected = logits(adapter.apply(llama()), task)
        torch.testing.assert_close(logits(Adapter.load(folder).apply(llama()), task), expected, atol=1e-6, rtol=0)


def test_plug_brings_a_task_from_another_graph(tmp_path: Path) -> None:
    folder = trained().save(tmp_path / "a")
    other = TaskGraph.from_dict(
        {
            "rank": 6,
            "tasks": {"light": {"question": "Light?"}, "crash": {"question": "Crash?", "after": ["light"]}},
        }
    )
    source = trained(other, seed=3).save(tmp_path / "b")
    with pytest.raises(AdapterError, match=r"E316.*light, crash"):
        plug(folder, source)
    with pytest.raises(AdapterError, match=r"E316.*no trained task 'crush'.*crash"):
        plug(folder, source, "crush")
    plugged = plug(folder, source, "crash")
    assert plugged.graph.rank_of("crash") == 6
    assert plugged.stale() == {"crash": "prerequisite 'light' was removed"}
    with pytest.raises(AdapterError, match=r"E316.*here already"):
        plug(folder, source, "crash")
    whole = plug(folder, source)
    assert whole.graph.prerequisites("crash") == ("light",)
    assert whole.stale() == {}


def test_plug_refuses_another_base(tmp_path: Path) -> None:
    folder = trained(graph_of(strategy=None)).save(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"E314"):
        plug(folder, trained(name="base-2").save(tmp_path / "b"), "strategy")
    with pytest.raises(AdapterError, match=r"E315 model\.layers\.2"):
        plug(folder, trained(layers=3).save(tmp_path / "c"), "strategy")


def test_compose_puts_the_parts_together(tmp_path: Path) -> None:
    adapter = trained()
    parts = [adapter.subset([t]) for t in ("strategy", "weather", "road")]
    whole = compose(*parts)
    assert whole.digest() == adapter.digest()
    assert whole.stale() == {}
    for task in adapter.graph.names:
        assert set(whole.graph.prerequisites(task)) == set(adapter.graph.prerequisites(task))
        one, two = (logits(a.apply(llama()), task) for a in (whole, adapter))
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert same(Adapter.load(whole.save(tmp_path / "x")), adapter, adapter.blocks)
    with pytest.raises(AdapterError, match=r"E316.*different blocks of task 'weather'"):
        compose(adapter, trained(seed=2))
    with pytest.raises(AdapterError, match=r"E316.*'road' with different question"):
        compose(adapter, trained(graph_of(road={"question": "Else?"})))


def test_dropping_keeps_ancestors_under_prerequisites_all() -> None:
    tasks = {f"t{i}": {"question": "?", "after": [f"t{i - 1}"] * (i > 0)} for i in range(3)}
    adapter = trained(TaskGraph.from_dict({"prerequisites": "all", "tasks": tasks}))
    less = adapter.without("t1")
    assert less.graph.prerequisites("t2") == ("t0",)
    assert less.stale() == {"t2": "prerequisite 't1' was removed"}
    assert compose(less, adapter.subset(["t1"])).stale() == {}


def test_export_of_several_tasks_is_an_adapter_of_what_they_need(tmp_path: Path) -> None:
    adapter = trained()
    folder = adapter.export(["road"], tmp_path / "out")
    part = Adapter.load(folder)
    assert set(part.blocks) == {"weather", "road"}
    assert part.stale() == {}
    assert same(part, adapter, part.blocks)
    torch.testing.assert_close(logits(part.apply(llama()), "road"), logits(adapter.apply(llama()), "road"))
    with pytest.raises(AdapterError, match=r"E317.*'road' has no block"):
        adapter.with_graph(graph_of(road={"rank": 5})).export("road", tmp_path / "x")
