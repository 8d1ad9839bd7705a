"""attach on five families of models with random weights: where the blocks go, and that nothing else changes."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from contextlora.config import select_layers
from contextlora.errors import AdapterError, ConfigError, RunError
from contextlora.lora.attach import (
    attach,
    attached_state,
    detach,
    detached,
    gated_layers,
    graph_of,
    trainable_groups,
    trainable_parameters,
)
from contextlora.lora.sharing import along_graph

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE, START, END = 60, 62, 63
LINEARS = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]


def words(image_at, batch=2, length=9):
    ids = torch.randint(3, 60, (batch, length))
    ids[:, image_at] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT)), "model.layers", words([])


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**TEXT)), "model.layers", words([])


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, image_seq_length=4
    )
    batch = {**words([1, 2, 3, 4]), "pixel_values": torch.randn(2, 3, 8, 8)}
    return LlavaForConditionalGeneration(config), "model.language_model.layers", batch


def _idefics(config, model):
    from transformers import LlamaConfig

    text = LlamaConfig(**TEXT)
    built = model(config(vision_config=VISION, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0))
    return built, "model.text_model.layers", {**words([1]), "pixel_values": torch.randn(2, 1, 3, 8, 8)}


def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration)


def smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration)


def qwen25vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 16,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    batch = words([2])
    batch["input_ids"][:, 1], batch["input_ids"][:, 3] = START, END
    batch |= {"pixel_values": torch.randn(8, 48), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])}
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return Qwen2_5_VLForConditionalGeneration(config), "model.language_model.layers", batch


FAMILIES = [llama, qwen2, llava, idefics3, smolvlm, qwen25vl]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


def build(family):
    torch.manual_seed(0)
    model, prefix, batch = family()
    return model.eval(), prefix, batch


def cast(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def gradients(model, batch, tasks):
    opened = trainable_parameters(model, set(tasks), frozen_ratio=0.5)
    with model.tasks(tasks):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return [p.grad.clone() for p in opened]


def checkpoint_activations(model, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 calls it activation_checkpointing_enable
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
class TestFamilies:
    @every_family
    def test_language_linears_only(self, family, chain):
        model, prefix, _ = build(family)
        before = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        attach(model, chain)
        want = {f"{prefix}.{i}.{n}" for i in range(3) for n in LINEARS}
        assert set(gated_layers(model)) == want
        for n, m in before.items():
            now = model.get_submodule(n)
            assert (now.base if n in want else now) is m
        untouched = set(before) - want
        assert any("lm_head" in n for n in untouched)
        assert "pixel_values" not in build(family)[2] or any("vis" in n for n in untouched)

    @every_family
    def test_outside_the_block_it_is_the_base_model_and_detach_gives_it_back(self, family, chain, fill):
        model, _, batch = build(family)
        modules, base = dict(model.named_modules()), logits(model, batch)
        keys = list(model.state_dict())
        attach(model, chain)
        with model.tasks(["child", "root"]):
            torch.testing.assert_close(logits(model, batch), base, rtol=1e-4, atol=1e-5)  # B is zero
        fill(model)
        with model.tasks(["child", "root"]):
            assert not torch.allclose(logits(model, batch), base, atol=1e-3)
        assert torch.equal(logits(model, batch), base)
        assert detach(model) is model
        assert torch.equal(logits(model, batch), base)
        assert dict(model.named_modules()) == modules
        assert list(model.state_dict()) == keys
        assert attached_state(model) is None
        assert not hasattr(model, "tasks")
        assert detach(model) is model
        attach(model, chain)

    @every_family
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_forward_and_backward_in_either_precision(self, family, dtype, chain, fill):
        model, _, batch = build(family)
        model, batch = model.to(dtype), cast(batch, dtype)
        attach(model, chain)
        fill(model)
        grads = gradients(model, batch, ["child", "root"])
        assert all(p.dtype == torch.float32 for m in gated_layers(model).values() for p in m.learning.parameters())
        assert all(g.isfinite().all() and g.any() for g in grads)
        assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)

    @every_family
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_gives_the_same_gradients(self, family, reentrant, chain, fill):
        """backward() runs outside every block, after forwards of two different tasks."""
        model, _, batch = build(family)
        attach(model, chain)
        fill(model)
        model.train()

        def two_forwards():
            opened = trainable_parameters(model, ["child", "root", "stranger"], frozen_ratio=0.5)
            loss = 0
            for tasks in (["child", "root"], ["stranger", "child"]):
                with model.tasks(tasks):
                    loss = loss + model(**batch, labels=batch["input_ids"]).loss
            with torch.no_grad():
                model(**batch)  # a base forward in between must not be mistaken for what is recomputed
            loss.backward()
            return [p.grad.clone() for p in opened]

        want = two_forwards()
        checkpoint_activations(model, reentrant)
        if reentrant:
            model.enable_input_require_grads()
        runs = []
        next(iter(gated_layers(model).values())).register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
        got = two_forwards()
        assert len(runs) == 5  # two forwards, the base one, two recomputes
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    @every_family
    @pytest.mark.parametrize("beams", [1, 2])
    def test_generation_of_mixed_tasks_equals_each_alone(self, family, beams, chain, fill):
        model, _, batch = build(family)
        attach(model, chain)
        fill(model, 1.0)
        tasks, rules = (
            ["child", "root"],
            {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams},
        )
        with model.tasks(tasks):
            mixed = model.generate(**batch, **rules)
        for i, t in enumerate(tasks):
            half = len(batch["pixel_values"]) // 2 if "pixel_values" in batch else 0
            one = {k: v[i * half : (i + 1) * half] if k == "pixel_values" else v[i : i + 1] for k, v in batch.items()}
            with model.tasks(t):
                assert torch.equal(model.generate(**one, **rules)[0], mixed[i])
        assert not torch.equal(model.generate(**batch, **rules), mixed)


class TestSelection:
    @pytest.mark.parametrize(
        ("layers", "count", "want"),
        [
            ("all", 3, range(3)),
            ("top 1/3", 3, range(2, 3)),
            ("top 1/3", 30, range(20, 30)),
            ("top 1/3", 2, range(1, 2)),
            ("top 1/9", 3, range(2, 3)),
            ("bottom 1/2", 4, range(2)),
            ("top 2/2", 4, range(4)),
            ("20-29", 30, range(20, 30)),
            ("0-0", 1, range(1)),
        ],
    )
    def test_layers(self, layers, count, want):
        assert select_layers(layers, count) == want

    @pytest.mark.parametrize(
        "layers", ["", "top", "top 0/3", "top 4/3", "top 1/0", "3-2", "0-3", "-1", "1", "top 1/3 ", "٣-٣"]
    )
    def test_layers_that_are_none(self, layers):
        with pytest.raises(ConfigError, match="E111"):
            select_layers(layers, 3)

    def test_range_and_targets(self, chain):
        model = attach(build(llama)[0], chain, layers="top 1/3", targets=["q_proj", "down_proj"])
        assert list(gated_layers(model)) == ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj"]

    def test_a_target_that_is_not_there(self, chain):
        model = build(llama)[0]
        with pytest.raises(
            AdapterError, match=r"E302 no linear layer 'q_prj'. Did you mean 'q_proj'\? There are: q_proj,"
        ):
            attach(model, chain, targets=["v_proj", "q_prj"])
        assert not gated_layers(model)
        assert all(p.requires_grad for p in model.parameters())

    def test_a_stack_of_another_name(self, chain):
        from transformers import FalconConfig, FalconForCausalLM

        model = FalconForCausalLM(
            FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        )
        assert len(gated_layers(attach(model, chain))) == 8

    def test_twice_or_on_nothing(self, chain):
        with pytest.raises(AdapterError, match=r"E302 .*Linear"):
            attach(nn.Linear(2, 2), chain)
        with pytest.raises(AdapterError, match=r"E301"):
            attach(attach(build(llama)[0], chain), chain)
        with pytest.raises(AdapterError, match="E303"):
            graph_of(nn.Linear(2, 2))
        with pytest.raises(AdapterError, match="E303"):
            trainable_parameters(nn.Linear(2, 2), ["child"])


class TestTasks:
    @pytest.fixture
    def model(self, chain, fill):
        model = attach(build(llama)[0], chain)
        fill(model)
        return model

    def test_a_wrong_batch(self, model):
        with (
            model.tasks(["child", "root"]),
            pytest.raises(RunError, match="E501 a batch of 3 samples under tasks for 2"),
        ):
            model(torch.ones(3, 4, dtype=torch.long))

    @pytest.mark.parametrize(
        "call", [lambda m: m.tasks(["child", "rot"]).__enter__(), lambda m: trainable_parameters(m, ["rot"])]
    )
    def test_an_unknown_task(self, model, call):
        with pytest.raises(ConfigError, match=r"E104 no task 'rot' in graph 'chain'. Did you mean 'root'\?"):
            call(model)

    def test_one_name_is_not_a_list_of_letters(self, model):
        assert len(trainable_parameters(model, "child")) == 2 * len(gated_layers(model))

    def test_groups_by_owner(self, model):
        groups = trainable_groups(model, ["child"], along_graph(graph_of(model), 0.5))
        assert {n: sum(p.shape[0] for p in g) for n, g in groups.items()} == {"root": 84, "child": 126}
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f"{path}.learning.{n}_{side}" for path in gated_layers(model) for n in groups for side in "AB"
        }

    def test_a_mixed_batch_equals_one_at_a_time(self, model):
        ids, tasks = torch.randint(3, 60, (3, 6)), ["root", "child", "stranger"]
        with model.tasks(tasks):
            mixed = logits(model, {"input_ids": ids})
        for i, t in enumerate(tasks):
            with model.tasks(t):
                torch.testing.assert_close(
                    logits(model, {"input_ids": ids[i : i + 1]})[0], mixed[i], rtol=1e-5, atol=1e-5
                )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast(self, model, chain, dtype):
        model, batch = model.to(dtype), words([])
        want = gradients(model, batch, ["child", "root"])
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(model, batch, ["child", "root"])
        far = torch.cat([(a - b).float().flatten() for a, b in zip(got, want, strict=True)]).norm()
        assert far < 0.05 * torch.cat([g.float().flatten() for g in want]).norm()
        assert [g.dtype for g in got] == [g.dtype for g in want]

    @pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), copy.deepcopy])
    def test_learning_parameters_stay_views(self, model, move):
        trainable_parameters(model, ["child"])
        moved = move(model)
        for layer in gated_layers(moved).values():
            layer.learning["child_A"].data.fill_(3)
            assert layer.block("child")[0].eq(3).all()
            assert layer.learning["child_A"].dtype == layer.A.dtype

    def test_a_deep_copy_is_independent(self, model):
        ids = {"input_ids": torch.randint(3, 60, (2, 6))}
        trainable_parameters(model, ["child"])
        with model.tasks("child"):
            before = logits(model, ids)
            other = copy.deepcopy(model)
        base = logits(model, ids)
        assert torch.equal(logits(other, ids), base)  # copied inside a block, but not itself inside one
        with other.tasks("child"):
            assert torch.equal(logits(other, ids), before)
            assert torch.equal(logits(model, ids), base)  # the copy's gate is not the model's
        opened = trainable_parameters(other, ["child"])
        with torch.no_grad():
            for p in opened:
                p.add_(1)
        with model.tasks("child"), other.tasks("child"):
            assert torch.equal(logits(model, ids), before)
            assert not torch.equal(logits(other, ids), before)
        detach(other)
        assert gated_layers(model)
        assert attached_state(model) is not None

    def test_a_copy_and_a_second_attach_checkpoint_under_their_own_gate(self, model, chain, fill):
        batch, tasks = words([]), ["child", "root"]
        want = gradients(model, batch, tasks)
        checkpoint_activations(model.train(), False)
        gradients(model, batch, tasks)
        other = copy.deepcopy(model)
        assert all(torch.equal(a, b) for a, b in zip(gradients(other, batch, tasks), want, strict=True))
        again = attach(detach(model), chain)
        fill(again)
        assert all(torch.equal(a, b) for a, b in zip(gradients(again, batch, tasks), want, strict=True))


class TestOwnCheckpointing:
    """torch.utils.checkpoint called by the user: right inside the block, a clear error outside it."""

    @pytest.fixture
    def layer(self, chain, fill):
        model = attach(build(llama)[0], chain, targets=["q_proj"])
        fill(model)
        trainable_parameters(model, ["child", "root"])
        self.model = model
        return next(iter(gated_layers(model).values()))

    def run(self, layer, reentrant, x=None):
        x = torch.ones(1, 2, 16, requires_grad=True) if x is None else x
        return checkpoint(layer, x, use_reentrant=reentrant).sum()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_inside(self, layer, reentrant):
        with self.model.tasks("child"):
            layer(torch.ones(1, 2, 16)).sum().backward()
            want = layer.learning["child_A"].grad.clone()
            layer.zero_grad()
            self.run(layer, reentrant).backward()
        assert torch.equal(layer.learning["child_A"].grad, want)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_outside(self, layer, reentrant):
        with self.model.tasks("child"):
            loss = self.run(layer, reentrant)
        layer(torch.ones(1, 2, 16))  # not even a base forward since makes it right
        with pytest.raises(RunError, match=r"E502 .*outside any block: call backward"):
            loss.backward()

    def test_inside_the_block_of_another_task(self, layer):
        with self.model.tasks("stranger"):
            loss = self.run(layer, False)
        with self.model.tasks("root"), pytest.raises(Exception, match=r"E502|different metadata|number of tensors"):
            loss.backward()

    def test_inside_the_block_of_another_task_with_blocks_alike(self, layer):
        with self.model.tasks(["child", "root"]):
            loss = self.run(layer, False, torch.ones(2, 2, 16, requires_grad=True))
        with self.model.tasks(["root", "child"]), pytest.raises(RunError, match=r"E502 .*was recomputed for others"):
            loss.backward()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_of_the_base_model(self, layer, reentrant):
        x = torch.ones(1, 2, 16, requires_grad=True)
        self.run(layer, reentrant, x).backward()
        torch.testing.assert_close(x.grad[0, 0], layer.base.weight.sum(0))


def test_for_a_while_the_base_model_is_back(chain):
    """Its own layers, so its own speed; and then the very blocks again."""
    model, _, batch = build(llama)
    base = logits(model, batch)
    attach(model, chain)
    before, state, tasks = gated_layers(model), attached_state(model), model.tasks
    with detached(model):
        assert not gated_layers(model)
        assert attached_state(model) is None
        assert torch.equal(logits(model, batch), base)
    assert gated_layers(model) == before
    assert attached_state(model) is state
    assert model.tasks is tasks
    with detached(detach(model)):
        assert torch.equal(logits(model, batch), base)
