"""The alignment stage on a tiny language model behind the real (randomly weighted) vision tower."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from contextlora.data.examples import Example
from contextlora.errors import ConfigError, RunError
from contextlora.models import fingerprint, vision_fingerprint
from contextlora.models.projector import point_at_words
from contextlora.models.smol import CHAT_TEMPLATE, build_processor
from contextlora.models.vision import Lite0Config
from contextlora.training.align import MAX_TASKS, _pad, _targets, align, caption, projector_input

pytest.importorskip("efficientnet_lite_pytorch", reason='needs the extra "smol"')
SPECIAL = ["<pad>", "<|im_end|>", "<image>", "<|im_start|>"]
_FIRST = "model.multi_modal_projector.linear_1.weight"
WORDS = [*SPECIAL, "?", "user", "assistant", "colour:", "red", "blue", "size:", "big", "small"]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr("contextlora.training.align.MIN_WORD_STEPS", 10)


def tiny():
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<pad>", unk_token="?", chat_template=CHAT_TEMPLATE
    )
    text = LlamaConfig(
        initializer_range=0.5,  # loud enough for the image to move the logits
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config=Lite0Config(),
        text_config=text,
        image_token_index=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    return model, build_processor(tokenizer)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    folder: Path = tmp_path_factory.mktemp("pictures")
    made = []
    for i in range(16):
        colour = ("red", "blue")[i % 2]
        path = folder / f"{i}.png"
        rgb = (200 + i, 20, 20) if colour == "red" else (20, 20, 200 + i)
        Image.new("RGB", (32, 32), rgb).save(path)
        made.append(Example(str(i), path, {"colour": (colour,), "size": ("big",)}, {}, "train"))
    return made


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_the_loss_falls_and_only_projector_and_statistics_change(examples):
    model, processor = tiny()
    before, base, seeing = snapshot(model), fingerprint(model), vision_fingerprint(model)
    done = align(model, processor, examples, epochs=20, batch_size=8, lr=3e-3)
    assert len(done.losses) == 40
    assert done.images == 16
    assert sum(done.losses[-5:]) < 0.8 * sum(done.losses[:5])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        *(f"model.multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")),
        "model.vision_tower.channel_mean",
        "model.vision_tower.channel_std",
    }
    assert fingerprint(model) != base
    assert vision_fingerprint(model) != seeing
    assert not any(p.requires_grad for p in model.parameters())


def test_same_seed_same_projector_whatever_the_global_generator_says(examples):
    found = []
    for seed, noise in ((1, 10), (1, 20), (2, 10)):
        model, processor = tiny()
        torch.manual_seed(noise)
        align(model, processor, examples[:4], epochs=1, batch_size=2, seed=seed)
        assert torch.equal(torch.rand(1), torch.manual_seed(noise) and torch.rand(1))  # and leaves it alone
        found.append(model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_statistics_are_those_of_the_images(examples):
    model, processor = tiny()
    raw = projector_input(model, processor, examples)  # the tower starts with mean 0 and deviation 1
    align(model, processor, examples, epochs=0.1)
    tower = model.model.vision_tower
    assert torch.allclose(tower.channel_mean, raw.mean((0, 1)), rtol=1e-4, atol=1e-5)
    true = raw.flatten(0, 1).std(0)
    assert torch.allclose(tower.channel_std, true.clamp_min(0.1 * true.median()), rtol=1e-3, atol=1e-5)
    again = projector_input(model, processor, examples)
    assert torch.allclose(again, (raw - tower.channel_mean) / tower.channel_std, atol=1e-3)


def test_no_epochs_leave_out_the_language_model(examples, monkeypatch):
    model, processor = tiny()
    before = snapshot(model)
    monkeypatch.setattr("contextlora.training.align._loss", None)
    assert align(model, processor, examples[:4], epochs=0).losses == ()
    assert not torch.equal(model.model.multi_modal_projector.linear_1.weight, before[_FIRST])


def test_going_on_from_the_present_projector(examples):
    model, processor = tiny()
    before = snapshot(model)
    align(model, processor, examples[:4], epochs=0.25, batch_size=1, lr=1e-9, fresh=False)
    assert all(torch.allclose(v, before[k], atol=1e-6) for k, v in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_and_leaves_the_projector(examples):
    model, processor = tiny()
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    before = snapshot(model)
    with pytest.raises(RunError, match="E518 align: the loss became nan in step 1"):
        align(model, processor, examples[:4])
    assert all(torch.equal(v, before[k]) or k == "lm_head.weight" for k, v in model.state_dict().items())


def test_what_cannot_be_aligned(examples):
    model, processor = tiny()
    with pytest.raises(ConfigError, match="E113 align: no example"):
        align(model, processor, [Example("a", None, {"colour": ("red",)}, {}, "train")])
    with pytest.raises(ConfigError, match="E113 LlamaModel: only LLaVA"):
        align(model.model.language_model, processor, examples)


def test_pointing_at_words_separates_what_a_linear_reader_can_separate():
    torch.manual_seed(0)
    label = torch.arange(200) % 3
    tokens = torch.randn(200, 4, 12) + 2 * torch.eye(12)[label][:, None]
    projector = torch.nn.Linear(12, 8)
    losses = point_at_words(
        projector,
        tokens,
        [torch.randn(3, 8), torch.randn(2, 8)],
        [torch.eye(3)[label], torch.zeros(200, 2)],
        steps=150,
        lr=1e-2,
    )
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])


ANSWERS = st.dictionaries(
    st.text("abc_", min_size=1, max_size=6),
    st.lists(st.sampled_from(["x", "y z", "w"]), min_size=1, unique=True),
    min_size=1,
    max_size=8,
)


@given(ANSWERS, st.integers(0, 99))
def test_captions_name_up_to_four_tasks_with_all_their_answers(answers, seed):
    example = Example("a", None, {t: tuple(a) for t, a in answers.items()}, {}, "train")
    parts = caption(example, random.Random(seed)).split("; ")
    assert len(parts) == len(set(parts)) == min(len(answers), MAX_TASKS)
    assert set(parts) <= {f"{t.replace('_', ' ')}: {', '.join(a)}" for t, a in answers.items()}


def test_targets_share_between_correct_answers_and_skip_what_is_not_asked():
    made = [
        Example(str(i), None, a, {}, "train") for i, a in enumerate([{"t": ("a", "b")}, {"t": ("c",)}, {"u": ("a",)}])
    ]
    assert _targets(made, "t", ["a", "b", "c"]).tolist() == [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 0]]


def test_padding_marks_exactly_the_answer():
    _, processor = tiny()
    ids, mask, answer = _pad(
        processor.tokenizer, [("user red", "big"), ("user", "small blue big")], torch.device("cpu")
    )
    words = [[WORDS[i] for i in row[m]] for row, m in zip(ids, answer, strict=True)]
    assert words == [["big", "<|im_end|>"], ["small", "blue", "big", "<|im_end|>"]]
    assert mask.sum(1).tolist() == [4, 5]
    assert (ids[mask == 0] == 0).all()
