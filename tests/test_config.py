"""config.load: strict, all faults at once, overrides, and paths that count from the file."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contextlora.config import RunConfig, TrainConfig, load
from contextlora.errors import ConfigError

TABLE_II = {
    "batch_size": 4,
    "lr": 2e-4,
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "frozen_ratio": None,
    "schedule": "level",
}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def fails(path, *overrides) -> str:
    with pytest.raises(ConfigError) as e:
        load(path, overrides)
    return str(e.value)


def test_defaults_are_the_papers():
    config = load(None)
    assert config == RunConfig()
    assert {k: getattr(config.train, k) for k in TABLE_II} == TABLE_II
    assert config.graph_path == Path("data/graph.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "train: {}"])
def test_an_empty_file_is_the_defaults(tmp_path, text):
    assert load(write(tmp_path, text)).train == TrainConfig()


def test_values_and_overrides(tmp_path):
    path = write(tmp_path, "train: {epochs: 2, lr: 1e-3, targets: [q_proj]}\ntrackers: [wandb]\n")
    config = load(path, ["train.epochs=7", "train.layers=top 1/3", "align.epochs=0.5", "trackers=[]", "train.targets="])
    assert (config.train.epochs, config.train.layers, config.align.epochs, config.trackers) == (7, "top 1/3", 0.5, ())
    assert config.train.lr == 1e-3
    assert config.train.targets is None
    assert load(path).train.targets == ("q_proj",)
    assert load(None, ["train.noise_tasks=[weather]"]).train.noise_tasks == ("weather",)
    assert load(None, ["train.epochs=2", "train.epochs=3"]).train.epochs == 3
    assert load(None, ["out=a=b"]).out == "a=b"
    assert load(None, ["train={epochs: 9}", "train.lr=1"]).train.epochs == 9


def test_relative_paths_count_from_the_file(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "smol").mkdir()
    config = load(write(tmp_path, "data: d\nout: ../o\ngraph: /abs/g.yaml\nmodel: base\n"))
    assert Path(config.data) == tmp_path / "d"
    assert Path(config.out) == tmp_path / ".." / "o"
    assert config.graph == "/abs/g.yaml"
    assert Path(config.model) == tmp_path / "base"
    assert load(write(tmp_path, "data: d")).model == "smol"  # the embedded one, whatever lies beside the file
    assert load(write(tmp_path, "model: org/name")).model == "org/name"
    assert load(write(tmp_path, "data: d")).graph_path == tmp_path / "d" / "graph.yaml"


def test_all_faults_at_once(tmp_path):
    text = fails(
        write(tmp_path, "modle: x\ntrain: {epoch: 1, lr: -1, seed: 0.5}\ndtype: float8\n"), "align.batch_size=0"
    )
    for part in ("E103", "5 faults" if "5 faults" in text else "6 faults", "modle: unknown key. Did you mean 'model'?"):
        assert part in text
    for part in (
        "train.epoch: unknown key. Did you mean 'epochs'?",
        "train.lr:",
        "train.seed:",
        "dtype:",
        "align.batch_size:",
    ):
        assert part in text
    assert str(tmp_path) in text


@pytest.mark.parametrize(
    "value",
    [".nan", ".inf", "-.inf", "nan", "inf", "1e999", "-1", "[1]", "{}", "null", "x", "''", "true", "'0.5'", "1e"],
)
@pytest.mark.parametrize("key", ["lr", "max_grad_norm", "prefix_cache_gb", "warmup_ratio"])
def test_numbers_that_are_none(tmp_path, key, value):
    assert f"train.{key}" in fails(write(tmp_path, f"train: {{{key}: {value}}}"))
    assert f"train.{key}" in fails(None, f"train.{key}={value}")


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("train.epochs", "E107"),
        ("=3", "E107"),
        ("", "E107"),
        ("train.epohcs=3", "E103 .*Did you mean 'epochs'"),
        ("train=3", "E103 .*train"),
        ("train.epochs.x=3", "E103 .*train.epochs"),
        ("train.epochs=[", "E101 --set train.epochs"),
        ("train.epochs=0", "E103 .*train.epochs"),
        ("train.epochs='3'", "E103 .*train.epochs"),
        ("train.context=golden", "E103 .*train.context"),
        ("train.frozen_ratio=1.1", "E103 .*train.frozen_ratio"),
        ("..=1", "E103"),
    ],
)
def test_overrides_that_are_none(override, code):
    with pytest.raises(ConfigError, match=f"(?s){code}"):
        load(None, [override])


def test_what_is_no_configuration(tmp_path):
    assert "E102" in fails(tmp_path / "none.yaml")
    assert "E102" in fails(tmp_path)
    assert "E103" in fails(write(tmp_path, "- a\n"))
    assert "E103" in fails(write(tmp_path, "- a\n"), "out=x")
    assert "E101" in fails(write(tmp_path, "a: [\n"))
    assert "duplicate key" in fails(write(tmp_path, "out: a\nout: b\n"))


def test_overriding_does_not_change_what_was_read():
    first = load(None, ["train.epochs=9"])
    assert load(None).train.epochs == TrainConfig().epochs != first.train.epochs


@given(
    st.dictionaries(
        st.sampled_from([*TrainConfig.model_fields, "x"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-5, 10**10),
            st.floats(),
            st.text(max_size=6),
            st.lists(st.text(max_size=3)),
        ),
    )
)
def test_any_values_give_a_configuration_or_one_clear_error(values):
    from contextlora.strict import validate

    try:
        train = validate(RunConfig, {"train": values}).train
        good = all(math.isfinite(v) for v in train.model_dump().values() if isinstance(v, float))
    except ConfigError as e:
        good = e.code == "E103" and "train" in e.message
    assert good


def test_no_torch():
    code = "import sys, contextlora.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
