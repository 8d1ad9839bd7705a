"""Samples and batches: exactly the answer is learnt, prompts are what transformers itself would tokenise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tiny
from contextlora.data.collate import Encoder, Sample, collate, with_context
from contextlora.data.examples import Example
from contextlora.errors import AdapterError

ids = st.lists(st.integers(4, 60), min_size=1, max_size=9).map(tuple)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))
def test_exactly_the_answers_are_predicted(parts):
    samples = [Sample(str(i), f"t{i}", None, prompt, answer) for i, (prompt, answer) in enumerate(parts)]
    batch = collate(samples, 0)
    assert batch.tasks == [s.task for s in samples]
    expected = [(row, token) for row, s in enumerate(samples) for token in s.answer]
    assert list(zip(batch.owner.tolist(), batch.targets.tolist(), strict=True)) == expected
    for row, s in enumerate(samples):
        assert batch.input_ids[row, : len(s)].tolist() == [*s.prompt, *s.answer]
        assert batch.input_ids[row, len(s) :].eq(0).all()
        assert batch.attention_mask[row].tolist() == [1] * len(s) + [0] * (batch.input_ids.shape[1] - len(s))
        at = batch.predicts[row].nonzero().flatten().tolist()
        assert at == list(range(len(s.prompt) - 1, len(s) - 1))
    assert batch.input_ids.shape[1] == max(map(len, samples))


def test_a_sample_without_an_answer_predicts_nothing():
    batch = collate([Sample("a", "t", None, (5, 6)), Sample("b", "t", None, (5,), (7, 2))], 0)
    assert batch.owner.tolist() == [1, 1]
    assert not batch.predicts[0].any()


def example(image=None, **questions):
    return Example("id", image, {"weather": ("rain",)}, questions, "train")


def words(ids):
    return [tiny.WORDS[i] for i in ids]


def test_text_prompt_and_answer():
    encoder = Encoder(tiny.tokenizer(), tiny.graph())
    s = encoder.sample(example(), "weather", answer=["heavy snow"])
    assert words(s.prompt) == ["USER", ":", "weather", "?", "BOT", ":"]  # a tokenizer's template is complete: no <s>
    assert words(s.answer) == ["heavy", "snow", "</s>"]
    s = encoder.sample(example(weather="a1 ?"), "weather", known={"light": ("day", "night")})
    assert words(s.prompt) == ["USER", ":", "Known", ":", "light", ":", "day", ",", "night", ".", "a1", "?", "BOT", ":"]
    assert s.answer == ()


def test_a_tokenizer_without_a_template():
    encoder = Encoder(tiny.tokenizer(chat=False), tiny.graph())
    assert words(encoder.sample(example(), "weather").prompt) == ["<s>", "Question", ":", "weather", "?", "Answer", ":"]


def picture(folder: Path, size=(20, 10), name="a.png"):
    Image.new("RGB", size, (1, 2, 3)).save(folder / name)
    return folder / name


@pytest.mark.parametrize("family", [tiny.llava, tiny.idefics3], ids=lambda f: f.__name__)
@pytest.mark.parametrize("start", ["", "<s>"])
@pytest.mark.parametrize("size", [(20, 10), (10, 40), (8, 8)])
def test_image_prompts_equal_transformers_own(tmp_path, family, start, size):
    """Also where the template has the start token already: it must not come twice."""
    processor = family()[1]
    processor.chat_template = start + processor.chat_template
    path = picture(tmp_path, size)
    encoder = Encoder(processor, tiny.graph())
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "weather ?"}]
    chat = [{"role": "user", "content": content}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(chat, **how)["input_ids"][0].tolist()
    found = encoder.sample(example(path), "weather").prompt
    assert list(found) == expected
    assert words(found).count("<s>") == 1
    text_only = processor.apply_chat_template(
        [{"role": "user", "content": content[1:]}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert [list(encoder.sample(example(), "weather").prompt)] == text_only["input_ids"]


def test_images_are_only_opened_where_their_size_matters(tmp_path, monkeypatch):
    opened = []
    from contextlora.data import collate as module

    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda p: opened.append(p) or original(p))
    path = picture(tmp_path)
    for family, count in ((tiny.llava, 0), (tiny.idefics3, 1), (tiny.qwen25vl, 2)):
        Encoder(family()[1], tiny.graph()).sample(example(path), "weather")
        assert len(opened) == count


def test_a_processor_that_cuts_only_large_pictures_is_noticed():
    processor = tiny.QwenProcessor()
    original = QwenSmall(processor)
    assert not Encoder(original, tiny.graph())._same_tokens_for_any_image


class QwenSmall:
    """One token for any picture below 1000 pixels a side, two above."""

    def __init__(self, real):
        self.tokenizer, self.chat_template, self.apply_chat_template = real.tokenizer, real.chat_template, None
        self.apply_chat_template = real.apply_chat_template

    def __call__(self, *, text, images, **more):
        tiles = 1 + (max(images[0].size) > 1000)
        return self.tokenizer([t.replace("<|image_pad|>", "<|image_pad|>" * tiles) for t in text], **more)


def test_keys_tell_apart_what_differs():
    encoder = Encoder(tiny.tokenizer(), tiny.graph())

    def key(name, question, answer):
        e = Example(name, None, {}, {"weather": question}, "train")
        return encoder.sample(e, "weather", answer=answer).key

    keys = [key("a|b", "c", ["rain"]), key("a", "b|c", ["rain"]), key("a|b", "c", ["sun"]), key("a|b", "c", None)]
    assert len(set(keys)) == 4
    assert keys[0] == key("a|b", "c", ["rain"])


def test_no_end_token_no_pad_token():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    assert Encoder(tokenizer, tiny.graph()).pad == tiny.END
    tokenizer.eos_token = None
    with pytest.raises(AdapterError, match="E335"):
        Encoder(tokenizer, tiny.graph())


def test_with_context():
    assert with_context("Q?", {}) == "Q?"
    assert with_context("Q?", {"a": ["x", "y"], "b": ["z"]}) == "Known: a: x, y; b: z.\nQ?"
    assert torch.is_tensor(collate([Sample("a", "t", None, (5,), (7,))], 0).targets)
