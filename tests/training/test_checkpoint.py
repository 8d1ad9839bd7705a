"""Checkpoints: every byte counts, a kill leaves the older one, nothing grows."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from contextlora.errors import RunError
from contextlora.training import checkpoint
from contextlora.training.checkpoint import Checkpoint, load_latest, save

FILES = ("tensors.safetensors", "checkpoint.json")


def made(update, stage=0, run="r"):
    tensors = {"A|x": torch.full((3, 5), float(update)), "optimizer|t|0|step": torch.tensor(float(update))}
    return Checkpoint(stage, update, run, tensors, {"t": {"id": ("a", "b")}, "empty": {"id": ()}})


def same(one, other):
    assert (one.stage, one.update, one.run, one.given) == (other.stage, other.update, other.run, other.given)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(v, other.tensors[k]) and v.dtype == other.tensors[k].dtype for k, v in one.tensors.items())


def test_round_trip_and_newest(tmp_path):
    assert load_latest(tmp_path / "none", "r") is None
    for stage, update in ((0, 2), (0, 10), (1, 1)):
        save(tmp_path, made(update, stage))
        same(load_latest(tmp_path, "r"), made(update, stage))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-0000010", "001-0000001"]


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_found_and_the_one_before_is_used(tmp_path, name):
    for update in (1, 2):
        save(tmp_path, made(update))
    path = tmp_path / "000-0000002" / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        same(load_latest(tmp_path, "r"), made(1))
    for cut in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        same(load_latest(tmp_path, "r"), made(1))
    path.write_bytes(whole + b"\n")
    if name == "tensors.safetensors":
        same(load_latest(tmp_path, "r"), made(1))
    path.unlink()
    same(load_latest(tmp_path, "r"), made(1))
    path.write_bytes(whole)
    same(load_latest(tmp_path, "r"), made(2))


@pytest.mark.parametrize("text", ["[]", "null", "{}", '"self"', '{"self": 1}', "[" * 2000, "\xff"])
def test_nonsense_instead_of_a_checkpoint(tmp_path, text):
    save(tmp_path, made(1))
    (tmp_path / "000-0000001" / "checkpoint.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "000-0000009").mkdir()
    (tmp_path / "5-5").write_text("a file")
    assert load_latest(tmp_path, "r") is None


def test_damaged_later_ones_do_not_push_out_valid_ones(tmp_path):
    for update in (1, 2, 9):
        save(tmp_path, made(update))
    (tmp_path / "000-0000009" / FILES[0]).write_bytes(b"")
    same(load_latest(tmp_path, "r"), made(2))
    save(tmp_path, made(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-0000002", "000-0000003"]


def test_the_thousandth_stage_comes_after_the_one_before(tmp_path):
    """Federations have many rounds; as names 1000 would come before 999."""
    for stage in (998, 999, 1000, 1001):
        save(tmp_path, made(0, stage=stage))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1000-0000000", "1001-0000000"]
    assert load_latest(tmp_path, "r").stage == 1001


def test_another_run_is_refused_even_behind_a_damaged_one(tmp_path):
    save(tmp_path, made(1))
    save(tmp_path, made(2))
    (tmp_path / "000-0000002" / FILES[0]).write_bytes(b"")
    with pytest.raises(RunError, match="E520"):
        load_latest(tmp_path, "other")


class Killed(BaseException):
    """Stands for a kill: no handler of the code may run. (tests/faults does it for real.)"""


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_at_any_call_within_save_leaves_a_valid_one(tmp_path, monkeypatch, seed):
    names = [(checkpoint, "save_file"), (checkpoint, "_sha256"), (checkpoint, "_seal"), (checkpoint, "sync")]
    names += [(shutil, "rmtree"), (type(tmp_path), "rename")]
    calls = []

    def wrap(original, when):
        def stopped(*args, **kwargs):
            calls.append(1)
            if len(calls) == when:
                raise Killed
            return original(*args, **kwargs)

        return stopped

    def count(when, update):
        calls.clear()
        with monkeypatch.context() as m:
            for where, name in names:
                m.setattr(where, name, wrap(getattr(where, name), when))
            try:
                save(tmp_path, made(update))
            except Killed:
                return None
        return len(calls)

    rng, update = random.Random(seed), 3
    save(tmp_path, made(1))
    save(tmp_path, made(2))
    total = count(-1, 3)
    for when in rng.sample(range(1, total + 1), total):
        count(when, update + 1)
        found = load_latest(tmp_path, "r")
        assert found.update in (update, update + 1)
        same(found, made(found.update))
        update = found.update
    save(tmp_path, made(update + 1))
    assert len(list(tmp_path.iterdir())) == checkpoint.KEEP  # no leftovers of the stopped ones


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    save(tmp_path, made(1))
    monkeypatch.setattr(checkpoint, "sync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RunError, match=r"E523 .*No space left"):
        save(tmp_path, made(2))
    same(load_latest(tmp_path, "r"), made(1))
    assert len(list(tmp_path.iterdir())) == 1
