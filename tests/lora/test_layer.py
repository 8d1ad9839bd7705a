"""The gated layer against the plain formula y = W x + B (s * g * (A x)), written with ordinary torch operations."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contextlora.errors import RunError
from contextlora.graph import TaskGraph
from contextlora.lora.gates import GateState
from contextlora.lora.layer import GatedLinear, _Gated
from contextlora.lora.sharing import along_graph, trainable_ranks

D_IN, D_OUT, TOKENS = 5, 6, 4


def layer_of(graph, *, base=None, dtype=torch.float64, bias=True, seed=0):
    torch.manual_seed(seed)
    base = base or nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)
    layer = GatedLinear(base.requires_grad_(False), GateState(graph), "some.layer", seed=seed, dtype=dtype)
    layer.B.copy_(torch.randn_like(layer.B))
    return layer


def gated(layer, x, tasks):
    with layer._state.use(layer._state.gate(tasks)):
        return layer(x)


def plain(layer, x, tasks, A, B):
    """Sample by sample, block by block; ranks that may not learn enter detached."""
    state, graph, rows = layer._state, layer.graph, []
    for sample, task in zip(x, tasks, strict=True):
        y = F.linear(sample, layer.base.weight, layer.base.bias)
        learning = state.sharing.learns[task]
        for n in {task, *graph.prerequisites(task)}:
            for i, r in enumerate(graph.block(n)):
                free = i < learning.get(n, 0)
                a, b = (A[r], B[r]) if free else (A[r].detach(), B[r].detach())
                y = y + graph.tasks[n].alpha / graph.tasks[n].rank * torch.outer(sample @ a, b)
        rows.append(y)
    return torch.stack(rows)


def mixed_tasks(graph, seed, batch):
    return random.Random(seed).choices(graph.names, k=batch)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.0])
def test_output_and_every_gradient_equal_autograd_of_the_formula(random_graph, ratio):
    for seed in range(40):
        graph = random_graph(seed)
        layer, tasks = layer_of(graph, bias=bool(seed % 2), seed=seed), mixed_tasks(graph, seed, 3)
        layer._state.sharing = along_graph(layer.graph, ratio)
        opened = {}
        for t in reversed(tasks):  # an order of its own: gradients must find their block by name, not by place
            for n, count in trainable_ranks(graph, t, ratio).items():
                opened[n] = max(count, opened.get(n, 0))
        layer.open(opened)
        x, weights = torch.randn(3, TOKENS, D_IN).double().requires_grad_(), torch.randn(3, TOKENS, D_OUT).double()
        y = gated(layer, x, tasks)
        (y * weights).sum().backward()

        x2, A, B = (t.detach().clone().requires_grad_() for t in (x, layer.A, layer.B))
        want = plain(layer, x2, tasks, A, B)
        (want * weights).sum().backward()
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
        for n, count in opened.items():
            start = graph.block(n).start
            for side, whole in (("A", A), ("B", B)):
                got = layer.learning[f"{n}_{side}"].grad
                torch.testing.assert_close(got, whole.grad[start : start + count], rtol=1e-12, atol=1e-12)
                assert not whole.grad[start + count : graph.block(n).stop].any()  # the formula agrees on what is frozen


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("tasks", [["child"], ["child", "root"], ["stranger", "root"]])
def test_gradcheck(chain, with_base, tasks):
    layer = layer_of(chain)
    layer._state.sharing = along_graph(layer.graph, 0.5)
    gate = layer._state.gate(tasks)
    counts = {n: trainable_ranks(chain, t, 0.5)[n] for t in tasks for n in trainable_ranks(chain, t, 0.5)}
    counts = {n: c for n, c in counts.items() if not (n == "root" and "child" in tasks and "root" in tasks)}
    weight, bias = (layer.base.weight, layer.base.bias) if with_base else (None, None)
    columns = [gate.columns[n][:c] for n, c in counts.items()]

    def run(x, *learning):
        A, B = layer.A.clone(), layer.B.clone()
        for (n, c), a, b in zip(counts.items(), learning[::2], learning[1::2], strict=True):
            start = chain.block(n).start
            A[start : start + c], B[start : start + c] = a.detach(), b.detach()
        return _Gated.apply(x, weight, bias, A, B, gate, columns, *learning)

    learning = []
    for n, c in counts.items():
        start = chain.block(n).start
        learning += [m[start : start + c].clone().requires_grad_() for m in (layer.A, layer.B)]
    x = torch.randn(len(tasks), 2, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *learning))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_mixed_batch_equals_one_at_a_time(random_graph, dtype, tolerance):
    for seed in range(60):
        graph = random_graph(seed)
        layer, tasks = layer_of(graph, dtype=dtype, seed=seed), mixed_tasks(graph, seed, 4)
        x = torch.randn(4, TOKENS, D_IN, dtype=dtype)
        alone = torch.cat([gated(layer, x[i : i + 1], t) for i, t in enumerate(tasks)])
        torch.testing.assert_close(gated(layer, x, tasks), alone, rtol=tolerance, atol=tolerance)


class TestMasked:
    """ "Exactly 0" means bits, not small numbers."""

    def passes(self, layer, x, tasks):
        x = x.clone().requires_grad_()
        layer.open({t: layer.graph.rank_of(t) for t in tasks})
        y = gated(layer, x, tasks)
        y.backward(torch.ones_like(y))
        grads = [p.grad for p in layer.learning.parameters()]
        assert all(torch.isfinite(t).all() for t in (y, x.grad, *grads))
        return [t.detach().clone() for t in (y, x.grad, *grads)]

    @pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
    def test_a_block_that_no_sample_uses_is_not_even_read(self, chain, value):
        layer, x = layer_of(chain, dtype=torch.float32), torch.randn(2, TOKENS, D_IN)
        before = self.passes(layer, x, ["child", "root"])
        for m in layer.block("stranger"):
            m.fill_(value)
        for a, b in zip(before, self.passes(layer, x, ["child", "root"]), strict=True):
            assert torch.equal(a, b)

    def test_a_block_that_another_sample_uses_adds_exactly_zero(self, chain):
        """Any finite value. An infinite one is 0 * inf in the shared product: a run stops on a bad loss before that."""
        layer, x = layer_of(chain, dtype=torch.float32), torch.randn(2, TOKENS, D_IN)
        out, grads = [], []
        for value in (0.0, 1e30, -1e25):
            for m in layer.block("stranger"):
                m.fill_(value)
            z = x.clone().requires_grad_()
            layer.open({"child": 3})
            y = gated(layer, z, ["child", "stranger"])
            y[0].sum().backward()
            out.append(y[0].detach().clone())
            grads.append([z.grad[0].clone(), *(p.grad.clone() for p in layer.learning.parameters())])
        for y, g in zip(out[1:], grads[1:], strict=True):
            assert torch.equal(y, out[0])
            assert all(torch.equal(a, b) for a, b in zip(g, grads[0], strict=True))

    def test_a_block_without_a_sample_to_learn_from_gets_no_gradient_at_all(self, chain):
        """None, not zeros: an optimizer moves a parameter with a zero gradient, by momentum and by decay."""
        layer = layer_of(chain)
        layer.open({"root": 4, "child": 3, "stranger": 2})
        gated(layer, torch.randn(1, TOKENS, D_IN).double(), "child").sum().backward()
        assert {n for n, p in layer.learning.items() if p.grad is not None} == {"child_A", "child_B"}


def test_first_values(chain):
    layer = GatedLinear(nn.Linear(64, 8), GateState(chain), "a", seed=3)
    assert not layer.B.any()
    assert layer.A.abs().max() <= 1 / 8
    assert layer.A.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)  # as LoRA: Kaiming uniform with a = sqrt 5
    alone = TaskGraph({"root": chain.tasks["root"]})
    other = GatedLinear(nn.Linear(64, 8), GateState(alone), "a", seed=3)
    assert torch.equal(other.A, layer.block("root")[0])
    for name, seed in (("b", 3), ("a", 4)):
        assert not torch.equal(GatedLinear(nn.Linear(64, 8), GateState(alone), name, seed=seed).A, other.A)


@pytest.mark.parametrize("shape", [(D_IN,), (3, D_IN), (2, 3, D_IN), (2, 3, 4, D_IN), (0, 3, D_IN), (2, 0, D_IN)])
def test_any_shape(chain, shape):
    layer = layer_of(chain)
    layer.open({"child": 3})
    x = torch.randn(shape).double().requires_grad_()
    y = gated(layer, x, "child")
    want = plain(layer, x.reshape(-1, D_IN)[None], ["child"], layer.A, layer.B).reshape(*shape[:-1], D_OUT)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_non_contiguous_input(chain):
    layer, x = layer_of(chain), torch.randn(TOKENS, 2, D_IN).double().transpose(0, 1)
    torch.testing.assert_close(gated(layer, x, ["child", "root"]), gated(layer, x.contiguous(), ["child", "root"]))


def test_gradients_add_up(chain):
    layer, x = layer_of(chain), torch.randn(2, TOKENS, D_IN).double()
    layer.open({"child": 3, "root": 4})
    gated(layer, x[:1], "child").sum().backward()
    gated(layer, x[1:], "root").sum().backward()
    apart = {n: p.grad.clone() for n, p in layer.learning.items()}
    layer.zero_grad()
    (gated(layer, x[:1], "child").sum() + gated(layer, x[1:], "root").sum()).backward()
    for n, p in layer.learning.items():
        torch.testing.assert_close(p.grad, apart[n])


class Int8Linear(nn.Module):
    """As bitsandbytes has it: int8 weights, one scale a row, a forward and a backward of its own."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class TestOtherBases:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_quantised_base_is_called_never_copied(self, chain, dtype):
        base = Int8Linear(nn.Linear(D_IN, D_OUT, bias=False))
        storage, frozen = base.weight.data_ptr(), base.weight.clone()
        layer = layer_of(chain, base=base, dtype=torch.float32)
        layer.open({"child": 3})
        x = torch.randn(2, TOKENS, D_IN).to(dtype).requires_grad_()
        y = gated(layer, x, "child")
        y.sum().backward()
        assert layer.base is base
        assert base.calls == 1
        assert base.weight.data_ptr() == storage
        assert torch.equal(base.weight, frozen)
        assert base.weight.dtype == torch.int8
        assert base.weight.grad is None
        bytes_of_base = base.weight.numel()
        assert all(p.dtype == torch.float32 for p in layer.learning.parameters())
        assert sum(t.numel() for t in layer.state_dict().values() if t.dtype == torch.int8) == bytes_of_base

        dense = nn.Linear(D_IN, D_OUT, bias=False)
        dense.weight.data = base.weight.float() * base.scale
        like = layer_of(chain, base=dense, dtype=torch.float32)
        like.A.copy_(layer.A)
        like.B.copy_(layer.B)
        like.open({"child": 3})
        x2 = x.detach().float().requires_grad_()
        want = gated(like, x2, "child")
        want.sum().backward()
        tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(y.float(), want, **tolerance)
        torch.testing.assert_close(x.grad.float(), x2.grad, **tolerance)
        for n, p in layer.learning.items():
            torch.testing.assert_close(p.grad, like.learning[n].grad, **tolerance)

    @pytest.mark.parametrize(
        "how", ["hook", "pre_hook", "replaced forward", "tensor subclass", "trainable bias", "subclass"]
    )
    def test_a_base_with_ways_of_its_own_is_called(self, chain, how):
        base, called = nn.Linear(D_IN, D_OUT), []
        if how == "subclass":

            class Own(nn.Linear):
                def forward(self, x):
                    called.append(1)
                    return super().forward(x)

            base = Own(D_IN, D_OUT)
        layer = layer_of(chain, base=base, dtype=torch.float32)
        layer.open({"child": 3})
        if how == "hook":
            base.register_forward_hook(lambda *_: called.append(1))
        elif how == "pre_hook":
            base.register_forward_pre_hook(lambda *_: called.append(1))
        elif how == "replaced forward":
            own = base.forward
            base.forward = lambda x: called.append(1) or own(x)  # what offloading does
        elif how == "tensor subclass":

            class Packed(torch.Tensor):
                @classmethod
                def __torch_function__(cls, func, types, args=(), kwargs=None):
                    called.append(func is F.linear)
                    return super().__torch_function__(func, types, args, kwargs or {})

            base.weight = nn.Parameter(base.weight.detach().as_subclass(Packed), requires_grad=False)
        elif how == "trainable bias":
            base.bias.requires_grad_()
        x = torch.randn(1, TOKENS, D_IN, requires_grad=True)
        assert layer_of(chain, dtype=torch.float32)._plain(x)
        assert not layer._plain(x)  # else the backward would multiply by a weight that only the base understands
        gated(layer, x, "child").sum().backward()
        if how == "trainable bias":
            assert base.bias.grad.eq(TOKENS).all()
        else:
            assert any(called)


class TestViews:
    """Learning parameters are the rows of A and B, whatever happens to the module."""

    def tied(self, layer):
        for t, rows in layer._rows.items():
            for side in "AB":
                matrix, p = getattr(layer, side), layer.learning[f"{t}_{side}"]
                if (p.data_ptr(), p.dtype) != (matrix[rows.start :].data_ptr(), matrix.dtype):
                    return False
        return bool(layer._rows)

    @pytest.mark.parametrize(
        "move",
        [
            lambda m: m.to(torch.bfloat16),
            lambda m: m.double(),
            lambda m: nn.Sequential(m).half()[0],
            lambda m: m.to("cpu"),
            copy.deepcopy,
            lambda m: copy.deepcopy(nn.Sequential(m))[0],
            lambda m: pickle.loads(pickle.dumps(m)),
        ],
    )
    def test_moves_and_copies(self, chain, move):
        layer = layer_of(chain, dtype=torch.float32)
        layer.open({"child": 3, "root": 2})
        moved = move(layer)
        assert self.tied(moved)
        with torch.no_grad():
            moved.learning["root_A"].add_(1)
        assert torch.equal(moved.learning["root_A"], moved.block("root")[0][:2])
        if moved is not layer:
            assert self.tied(layer)
            assert not torch.equal(moved.A, layer.A)

    def test_an_optimizer_step_is_seen_by_the_next_forward(self, chain):
        layer, x = layer_of(chain), torch.randn(1, TOKENS, D_IN).double()
        layer.open({"child": 3})
        before = gated(layer, x, "child")
        before.sum().backward()
        torch.optim.SGD(layer.learning.parameters(), lr=1.0).step()
        assert not torch.equal(gated(layer, x, "child"), before)

    def test_opening_again_keeps_the_values(self, chain):
        layer = layer_of(chain)
        A, B = layer.A.clone(), layer.B.clone()
        layer.open({"child": 3})
        layer.open({"root": 1})
        layer.open({})
        assert not list(layer.learning.parameters())
        assert torch.equal(layer.A, A)
        assert torch.equal(layer.B, B)


def test_outside_any_gate_it_is_the_base(chain):
    layer, x = layer_of(chain), torch.randn(2, TOKENS, D_IN).double()
    assert torch.equal(layer(x), layer.base(x))


def test_a_wrong_batch(chain):
    with pytest.raises(RunError, match="E501"):
        gated(layer_of(chain), torch.zeros(3, TOKENS, D_IN).double(), ["child", "root"])


def test_changing_weights_between_forward_and_backward_is_an_error_not_a_wrong_gradient(chain):
    layer, x = layer_of(chain), torch.randn(1, TOKENS, D_IN).double().requires_grad_()
    layer.open({"root": 4})
    y = gated(layer, x, "root")
    with torch.no_grad():
        layer.learning["root_A"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
