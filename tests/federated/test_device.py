"""Real devices: processes of their own that talk over mTLS, against a simulation of the same YAML."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import tiny
from contextlora.federated.federation import load_federation
from contextlora.federated.identity import enroll_here
from contextlora.federated.simulate import simulate
from federated.worker import fingerprint, tiny_reader

TESTS = Path(__file__).parents[1]
DEVICES = {"ant": "weather", "bee": "light", "cat": "action"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A federation's YAML and data, and three devices that are enrolled."""
    folder = tmp_path_factory.mktemp("home")
    data = tiny.write_data(folder / "data", train=16, test=4)
    (data / "graph.yaml").write_text(json.dumps(tiny.graph().to_dict()))
    settings = {
        "name": "three",
        "rounds": 4,
        "updates": 2,
        "exchange_every": 2,
        "train": {"lr": 0.02, "batch_size": 2},
        "slices": {"share": 0.3, "calibration": 2},
        "limits": {"collision": 1.0, "deadline": "20 s"},
        "radio": {"radius": "20 m", "outage": 0.001},
        "wait": "20 s",
        "devices": DEVICES,
    }
    (folder / "federation.yaml").write_text(yaml.safe_dump(settings))
    enroll_here(folder, DEVICES)
    return folder


def start(home, name, *more):
    path = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, str(TESTS / "federated" / "worker.py"), name, str(home), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process, seconds=90):
    said = process.communicate(timeout=seconds)[1]
    assert process.returncode == 0, said[-3000:]


def lines(home, name, run="three"):
    file = home / run / name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def there(home, name, run="three"):
    """Devices in each round, as one of them saw it."""
    return [sum(map(len, r["clusters"])) for r in lines(home, name, run)]


def test_three_processes_end_with_the_bytes_of_the_simulation(home):
    workers = [start(home, name) for name in DEVICES]
    for w in workers:
        finished(w)
    peers = simulate(load_federation(home / "federation.yaml"), silent=True, reader=tiny_reader())
    assert there(home, "ant") == [3] * 4
    rounds = lines(home, "ant")
    for r in rounds:
        assert r["arrived"] == r["awaited"] > 0
        assert r["received"]["slices"] > 300, "a signed message at least"
    sent = sum(sum(r["bytes"].values()) for r in rounds)  # what goes out late is told in a later slot
    assert sent > 300 * len(rounds)
    for name, peer in peers.items():
        real = json.loads((home / f"{name}.json").read_text())
        assert real["held"] == fingerprint(peer.held), name
        assert real["heard"] == sorted(DEVICES)
        assert not real["refused"]
        assert (home / "three" / name / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_device_is_done_without_and_rejoins(home):
    text = (home / "federation.yaml").read_text()
    changed = {**yaml.safe_load(text), "name": "killed", "rounds": 40}
    (home / "federation.yaml").write_text(yaml.safe_dump(changed))
    try:
        ant, bee, cat = (start(home, name) for name in DEVICES)
        while len(lines(home, "cat", "killed")) < 3:
            time.sleep(0.05)
        cat.send_signal(signal.SIGKILL)
        cat.wait()
        kept = len(lines(home, "cat", "killed"))
        while len(lines(home, "ant", "killed")) < kept + 4:
            assert ant.poll() is None
            time.sleep(0.05)
        finished(start(home, "cat", "--resume"))
        finished(ant)
        finished(bee)
    finally:
        (home / "federation.yaml").write_text(text)
    seen = there(home, "ant", "killed")
    assert 2 in seen, "a round was held without it"
    assert seen[-1] == 3, "it is back"
    again = lines(home, "cat", "killed")[kept:]
    assert again[0]["step"] >= kept, "in the others' round"
    assert json.loads((home / "cat.json").read_text())["heard"] == sorted(DEVICES)


@pytest.mark.slow
def test_clusters_follow_the_rates_that_real_devices_measure(home):
    """On the map nobody reaches anybody; what the exchange between clusters then measures lets all three meet."""
    text = (home / "federation.yaml").read_text()
    far = {"radius": "2000 km", "outage": 0.001, "measured": True, "control": "full"}
    (home / "federation.yaml").write_text(yaml.safe_dump({**yaml.safe_load(text), "name": "far", "radio": far}))
    try:
        workers = [start(home, name, "--small-chunks") for name in DEVICES]
        for w in workers:
            finished(w)
    finally:
        (home / "federation.yaml").write_text(text)
    seen = [[r["clusters"] for r in lines(home, name, "far")] for name in DEVICES]
    assert seen[0] == seen[1] == seen[2], "all plan over the same told rates"
    alone, *_, last = seen[0]
    assert sorted(alone) == [["ant"], ["bee"], ["cat"]]
    assert sorted(last) == [["ant", "bee", "cat"]]
