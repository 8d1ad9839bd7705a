"""Gate rows: who is active, who learns, for how large a batch; and whose gate a recompute may read."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch

from contextlora.errors import ConfigError, RunError
from contextlora.graph import TaskGraph
from contextlora.lora.attach import attach, attached_state
from contextlora.lora.gates import Gate, GateState
from contextlora.lora.sharing import along_graph, trainable_ranks


def test_trainable_ranks(chain):
    assert trainable_ranks(chain, "child") == {"child": 3}
    assert trainable_ranks(chain, "child", 0.5) == {"root": 2, "child": 3}
    assert trainable_ranks(chain, "child", 0.0) == {"root": 4, "child": 3}
    assert trainable_ranks(chain, "root", 0.0) == {"root": 4}
    half = TaskGraph(chain.tasks, frozen_ratio=0.5)
    assert trainable_ranks(half, "child") == {"root": 2, "child": 3}
    assert trainable_ranks(half, "child", 1.0) == {"child": 3}


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_ratio_is_a_share(chain, ratio):
    with pytest.raises(ConfigError, match="E110"):
        trainable_ranks(chain, "child", ratio)


def test_rows_equal_the_definition(random_graph):
    for seed in range(100):
        graph = random_graph(seed)
        ratio = (1.0, 0.5, 0.0)[seed % 3]
        tasks = [graph.names[i % len(graph.names)] for i in range(seed % 4 + 1)]
        gate = Gate(graph, tasks, along_graph(graph, ratio))
        active, learns = torch.zeros(2, len(tasks), graph.total_rank, dtype=torch.float64)
        for row, t in enumerate(tasks):
            for n in {t, *graph.prerequisites(t)}:
                rows = graph.block(n)
                active[row, rows.start : rows.stop] = graph.tasks[n].alpha / len(rows)
                count = len(rows) if n == t else round((1 - ratio) * len(rows))
                learns[row, rows.start : rows.start + count] = 1
        on = active.any(0).nonzero().flatten()
        assert torch.equal(torch.arange(graph.total_rank)[gate.ranks], on)
        assert torch.equal(gate.active, active[:, on])
        assert torch.equal(gate.learns, learns[:, on])
        assert set(gate.teaches) == {n for n in graph.names if learns[:, list(graph.block(n))].any()}
        for n, columns in gate.columns.items():
            assert on[list(columns)].tolist() == list(graph.block(n))


def test_contiguous_blocks_are_views(chain):
    assert isinstance(Gate(chain, ["root"]).ranks, slice)
    assert isinstance(Gate(chain, ["child", "stranger"]).ranks, slice)
    assert isinstance(Gate(chain, ["child"]).ranks, torch.Tensor)


class TestBatch:
    def test_one_row_serves_any_batch(self, chain):
        for shape in [(5, 7, 2), (9, 2), (3, 4, 5, 2), (0, 7, 2)]:
            _, active, _ = Gate(chain, ["root"]).rows_for(torch.zeros(shape))
            assert torch.broadcast_shapes(active.shape, (*shape[:-1], 4)) == (*shape[:-1], 4)

    def test_beams_repeat_each_sample_in_place(self, chain):
        gate = Gate(chain, ["root", "child"])
        _, active, learns = gate.rows_for(torch.zeros(6, 4, 2))
        assert torch.equal(active[:, 0], gate.active[[0, 0, 0, 1, 1, 1]].float())
        assert torch.equal(learns[:, 0], gate.learns[[0, 0, 0, 1, 1, 1]].float())

    @pytest.mark.parametrize("shape", [(3, 4, 2), (1, 4, 2), (8, 2)])
    def test_a_batch_that_does_not_fit(self, chain, shape):
        with pytest.raises(RunError, match=r"E501 a batch of \d samples under tasks for 2: \('root', 'child'\)"):
            Gate(chain, ["root", "child"]).rows_for(torch.zeros(shape))

    def test_rows_made_under_inference_mode_are_not_given_to_training(self, chain):
        gate, x = Gate(chain, ["root"]), torch.zeros(1, 1, 2)
        with torch.inference_mode():
            assert gate.rows_for(x)[1].is_inference()
        assert not gate.rows_for(x)[1].is_inference()


class TestState:
    def test_names(self, chain):
        state = GateState(chain)
        assert state.gate("root").tasks == ("root",)
        assert state.gate(iter(["root", "child"])).tasks == ("root", "child")
        with pytest.raises(ConfigError, match=r"E104 no task 'chidl' .*Did you mean 'child'\?"):
            state.gate(["root", "chidl"])
        with pytest.raises(RunError, match="E501 no task named"):
            state.gate([])

    def test_blocks_nest_and_end_with_an_error(self, chain):
        state = GateState(chain)
        a, b = state.gate("root"), state.gate("child")
        with state.use(a):
            with contextlib.suppress(KeyError), state.use(b):
                assert state.read() is b
                raise KeyError
            assert state.read() is a
            with state.use(None):
                assert state.read() is None
            assert copy.deepcopy(state).read() is None
        assert state.read() is None

    def test_alike_gates_share_a_stamp(self, chain):
        state = GateState(chain)
        state.gate(["root", "child"]).check(state.gate(["root", "child"]).stamp)
        for other in (["child", "root"], ["root"], ["stranger"]):
            with pytest.raises(RunError, match="E502"):
                state.gate(["root", "child"]).check(state.gate(other).stamp)
        before = state.gate("child")
        state.sharing = along_graph(state.graph, 0.5)
        with pytest.raises(RunError, match="E502"):
            before.check(state.gate("child").stamp)


def test_with_every_block_masked_a_gate_has_no_rank_and_the_base_answers(chain, tiny_llama, fill):
    plain, ids = tiny_llama(), torch.arange(6)[None]
    model = attach(tiny_llama(), chain)
    fill(model)
    state = attached_state(model)
    none = replace(state.sharing, active={**state.sharing.active, "root": ()})
    gate = Gate(chain, ["root"], none)
    assert gate.active.shape == gate.learns.shape == (1, 0)
    assert gate.teaches == ()
    with state.use(gate):
        assert torch.equal(model(ids).logits, plain(ids).logits)
