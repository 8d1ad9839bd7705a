"""The demonstration on a tiny model: every step of it, an interruption, and a second look at a finished one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contextlora.errors import ContextLoRAError, RunError
from contextlora.reports import demo as module
from contextlora.reports.demo import demo
from tiny_llava import save_tiny_llava


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "QUICK_PICTURES", {"train": 12, "valid": 1, "test": 4})
    monkeypatch.setitem(module.QUICK_TRAIN, "layers", "all")
    monkeypatch.setitem(module.QUICK_TRAIN, "batch_size", 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llava(tmp_path_factory.mktemp("tiny")))


def test_the_whole_of_it(tmp_path: Path, tiny: str):
    said: list[str] = []
    made = demo(tmp_path / "d", quick=True, model=tiny, silent=True, say=said.append)
    assert made.before.keys() == made.after.keys() == {"vehicles", "weather", "road", "strategy"}
    assert json.loads((made.node / "adapter_config.json").read_text())["r"] == 32
    assert made.report.read_text().count("<figure>") == 4
    assert {"draw pictures", "load and align", "evaluate before", "train", "evaluate after", "export"} < set(
        made.phases
    )
    assert made.peak_memory_mb > 50
    assert sum(line.startswith("   ") for line in said) == 4
    again = demo(tmp_path / "d", quick=True, model=tiny, silent=True, say=said.append)
    assert again.after == made.after
    assert again.phases["train"] == made.phases["train"]  # nothing was trained twice


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch):
    straight = demo(tmp_path / "a", quick=True, model=tiny, silent=True, say=lambda _: None)
    from contextlora.training import loop

    def stop(self: loop.Stage, update: int) -> dict[str, float]:
        if update == 2 and not stopped:
            stopped.append(update)
            raise RunError("E514", "stopped")
        return real(self, update)

    stopped: list[int] = []
    real = loop.Stage.update
    monkeypatch.setattr(loop.Stage, "update", stop)
    monkeypatch.setitem(module.QUICK_TRAIN, "checkpoint_every", 1)
    with pytest.raises(RunError, match="E514"):
        demo(tmp_path / "b", quick=True, model=tiny, silent=True, say=lambda _: None)
    assert not (tmp_path / "b/adapter").exists()
    made = demo(tmp_path / "b", quick=True, model=tiny, silent=True, say=lambda _: None)
    assert made.after == straight.after
    tasks = [(tmp_path / name / "adapter/tasks") for name in "ab"]
    for path in tasks[0].rglob("*.safetensors"):
        assert path.read_bytes() == (tasks[1] / path.relative_to(tasks[0])).read_bytes()


def test_another_scene_in_the_same_folder_is_refused(tmp_path: Path, tiny: str):
    demo(tmp_path / "d", scene="city", quick=True, model=tiny, silent=True, say=lambda _: None)
    with pytest.raises(ContextLoRAError, match="E222"):
        demo(tmp_path / "d", scene="factory", quick=True, model=tiny, silent=True, say=lambda _: None)
