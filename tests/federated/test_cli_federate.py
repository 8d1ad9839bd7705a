"""`contextlora federate`: what is refused before anything long begins."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

import tiny
from contextlora.cli import app


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A federation whose model would not even open: nothing that is tested here comes so far."""
    data = tiny.write_data(tmp_path / "data", train=12, test=2)
    (data / "graph.yaml").write_text(json.dumps(tiny.graph().to_dict()))
    path = tmp_path / "federation.yaml"
    settings = {"model": "no-such-model", "out": "run", "devices": {"ant": "weather", "bee": "light"}}
    path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("contextlora.federated.simulate.open_reader", lambda *_: pytest.fail("the model was opened"))
    return path


def told(*args):
    found = CliRunner().invoke(app, ["federate", *map(str, args)])
    return found.exit_code, found.stderr


def test_a_split_that_the_data_lacks_is_told_before_the_first_round(config):
    code, said = told(config, "--eval", "valid")
    assert code == 2
    assert "E230" in said
    assert "split 'valid' has no record of weather, light" in said
    code, said = told(config, "--eval", "dev")
    assert code == 2
    assert "E107" in said
    assert "'dev' is not one of" in said


def test_a_task_in_the_data_that_is_misspelled_is_told_before_the_first_round(config):
    file = config.parent / "data" / "data.jsonl"
    file.write_text(file.read_text().replace('"weather": ["', '"wether": ["', 1))
    code, said = told(config, "--eval", "test")
    assert code == 2
    assert "wether" in said


@pytest.mark.parametrize(("left", "error"), [("kept/002-0000000", "E522"), ("adapters/ant", "E521")])
def test_an_old_run_is_not_thrown_away_unasked(config, left, error):
    folder = config.parent / "run" / left
    folder.mkdir(parents=True)
    code, said = told(config)
    assert code == 2
    assert error in said
    assert "--force" in said
    assert folder.is_dir()


def test_nor_is_that_of_a_real_device(config, monkeypatch):
    from contextlora.federated.identity import enroll_here

    enroll_here(config.parent, ["ant", "bee"])
    monkeypatch.setattr("contextlora.federated.device.open_reader", lambda *_: pytest.fail("the model was opened"))
    (config.parent / "run" / "ant" / "kept" / "001-0000000").mkdir(parents=True)
    peers = config.parent / "peers.yaml"
    code, said = told("peer", config, "--identity", config.parent / "ant", "--peers", peers)
    assert code == 2
    assert "E522" in said
    assert "--resume" in said
