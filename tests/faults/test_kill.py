"""kill -9 and Ctrl-C on real processes: a resumed run ends with the same adapter bytes as one left in peace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}


def run_script(folder: Path, kills: int, seed: int) -> dict:
    tiny.write_data(folder / "data", train=12, test=2)
    command = [sys.executable, str(HERE / "training_script.py"), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    error = folder / "error"
    assert not error.exists(), error.read_text()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_three_kills_two_of_them_inside_a_save(tmp_path):
    report = run_script(tmp_path, 3, seed=1)
    assert (report["inside"], report["outside"], report["wrong"]) == (2, 1, 0), report


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills(tmp_path, seed):
    """Five within a save, two around the saving of the adapter, thirteen at random moments."""
    report = run_script(tmp_path, 20, seed=seed)
    assert (report["inside"], report["outside"], report["wrong"]) == (7, 13, 0), report
    assert set(report["by point"].values()) == {1}


def test_ctrl_c_on_a_process_leaves_a_resumable_run(tmp_path):
    """SIGINT to a fresh process in mid-run: E514 and a checkpoint; this process resumes it, to the same bytes."""
    import training_script as script

    tiny.write_data(tmp_path / "data", train=12, test=2)
    code = (
        "import sys, torch, pathlib, training_script as s; torch.set_num_threads(1)\n"
        "s.CONFIG['epochs'] = 200\n"
        "try: s.work(pathlib.Path(sys.argv[1]))\n"
        "except Exception as e: print(e.code)"
    )
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", code, str(run)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=60)[0].strip() == "E514"
    updates = len(metrics.read_text().splitlines())
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names[-1] == f"000-{updates:07d}"
    with pytest.MonkeyPatch.context() as m:
        m.setitem(script.CONFIG, "epochs", 200)
        m.setattr(script.Tracker, "advance", stop_after(updates + 4))
        for out in (run, tmp_path / "straight"):
            with pytest.raises(InterruptedError):
                script.work(out)
    checkpoints = [sorted((tmp_path / k / "checkpoints").iterdir())[-1] for k in ("run", "straight")]
    one, other = ((c / "tensors.safetensors").read_bytes() for c in checkpoints)
    assert checkpoints[0].name == checkpoints[1].name
    assert one == other


def stop_after(updates: int):
    def advance(self, done, note=""):
        if done == updates + updates % 2 + 1:  # one after a checkpoint
            raise InterruptedError

    return advance


sys.path.insert(0, str(HERE))
