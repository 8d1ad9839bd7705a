"""Features instead of pixels, and logits only where they are needed: the same numbers as the plain way."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import tiny
from contextlora.config import TrainConfig
from contextlora.data.collate import Encoder, collate
from contextlora.data.examples import load_examples
from contextlora.data.images import open_image
from contextlora.models.inputs import FEATURES, ImageFeatures, answer_nll, logits_at
from contextlora.training.loop import task_samples, training_examples

SEEING = [tiny.llava, tiny.idefics3, tiny.qwen25vl]
every_seeing = pytest.mark.parametrize("family", SEEING, ids=lambda f: f.__name__)


def reader_of(family, folder=None, **more):
    model, processor = family(torch.float64)
    return ImageFeatures(model, Encoder(processor, tiny.graph()), folder, **more)


def counted(reader):
    calls, original = [], reader.model.get_image_features

    def count(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    reader.model.get_image_features = count
    return calls


def samples_of(reader, data, task="weather"):
    return task_samples(reader, training_examples(data, tiny.graph(), TrainConfig()), task, "none", {})


@every_seeing
def test_logits_equal_those_from_pixels(pictures, family):
    reader = reader_of(family)
    model, processor = reader.model, reader.encoder.processor
    for s in samples_of(reader, pictures)[:6]:
        with torch.no_grad():
            ours = model(**reader.inputs(collate([s], 0))).logits
        question = next(e for e in load_examples(pictures, tiny.graph()) if e.image == s.image).questions["weather"]
        text = reader.encoder._template(question, True) + " " + " ".join(tiny.WORDS[i] for i in s.answer)
        plain = dict(processor(text=[text], images=[open_image(s.image)], return_tensors="pt"))
        plain["pixel_values"] = plain["pixel_values"].double()
        if family is tiny.qwen25vl:
            plain["mm_token_type_ids"] = (plain["input_ids"] == model.config.image_token_id).int()
        assert plain["input_ids"][0].tolist() == [*s.prompt, *s.answer]
        with torch.no_grad():
            expected = model(**plain).logits
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


@every_seeing
def test_a_batch_gives_what_its_samples_give_alone(pictures, family):
    """Different sizes of image (and of Idefics3's tiles, Qwen's grids) and a sample without one, in one batch."""
    reader = reader_of(family)
    samples = samples_of(reader, pictures)[:5]
    g = tiny.graph()
    from dataclasses import replace

    blind = replace(load_examples(pictures, g)[0], image=None)
    samples.insert(2, reader.encoder.sample(blind, "weather", answer=["rain"]))
    if family is not tiny.llava:
        assert len({s.prompt.count(reader.model.config.image_token_id) for s in samples}) > 2
    batch = collate(samples, 0)
    with torch.no_grad():
        together = answer_nll(reader.model, reader.inputs(batch), batch)
        alone = [answer_nll(reader.model, reader.inputs(b), b) for b in (collate([s], 0) for s in samples)]
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-11)


@every_seeing
def test_features_are_computed_once_and_kept_on_disk(pictures, tmp_path, family):
    reader = reader_of(family, tmp_path / "features")
    calls = counted(reader)
    samples = samples_of(reader, pictures)
    for _ in range(2):
        for s in samples:
            reader.inputs(collate([s], 0))
    images = {s.image for s in samples}
    contents = {image.read_bytes() for image in images}
    assert len(calls) == len(contents)
    second = reader_of(family, tmp_path / "features")
    calls = counted(second)
    for image in images:
        found, known = second.get(image), reader.get(image)
        assert found.keys() == known.keys()
        assert all(torch.equal(v, known[k]) and v.dtype == known[k].dtype for k, v in found.items())
    assert not calls
    assert len(list((tmp_path / "features").iterdir())) == len(contents)


def test_the_same_picture_under_two_names_is_computed_once(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / name)
    reader = reader_of(tiny.llava, tmp_path / "features")
    calls = counted(reader)
    for name in ("a.png", "b.png"):
        reader.get(tmp_path / name)
    assert len(calls) == 1


def test_a_damaged_cache_file_is_computed_again(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(image)
    right = reader_of(tiny.llava, tmp_path / "features").get(image)[FEATURES]
    (path,) = (tmp_path / "features").iterdir()
    whole = path.read_bytes()
    broken = [whole[:n] for n in (0, 1, 31, 32, 33, 60, len(whole) // 2, len(whole) - 1)]
    broken += [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in (0, 31, 32, 40, 60, len(whole) - 1)]
    broken += [whole + b"x", b"not tensors"]
    reader = reader_of(tiny.llava)
    for raw in broken:
        path.write_bytes(raw)
        again = ImageFeatures(reader.model, reader.encoder, tmp_path / "features")
        assert torch.equal(again.get(image)[FEATURES], right)
        assert path.read_bytes() == whole


def test_memory_is_bounded_where_there_is_a_disk(pictures, tmp_path):
    reader = reader_of(tiny.llava, tmp_path / "features", memory_bytes=3 * 4 * 32 * 8)
    images = sorted({s.image for s in samples_of(reader, pictures)})
    calls = counted(reader)
    for image in images:
        reader.get(image)
    assert len(reader._held) == 3
    count = len(calls)
    for image in images:
        reader.get(image)
    assert len(calls) == count


def test_logits_at_equals_full_logits_there_and_leaves_no_hook(pictures):
    reader = reader_of(tiny.llava)
    batch = collate(samples_of(reader, pictures), 0)
    inputs = reader.inputs(batch)
    with torch.no_grad():
        full = reader.model(**inputs).logits
        with logits_at(reader.model, batch.predicts):
            some = reader.model(**inputs).logits
    assert some.shape == (batch.predicts.sum(), full.shape[-1])
    assert torch.allclose(some, full[batch.predicts], rtol=0, atol=1e-12)
    with pytest.raises(ZeroDivisionError), logits_at(reader.model, batch.predicts):
        1 / 0  # noqa: B018
    assert not reader.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_answer_nll_equals_log_softmax_at_the_answers_alone(words, dtype):
    model, processor = tiny.llama(dtype)
    reader = ImageFeatures(model, Encoder(processor, tiny.graph()))
    samples = samples_of(reader, words)
    batch = collate(samples, reader.encoder.pad)
    with torch.no_grad():
        nll = answer_nll(model, reader.inputs(batch), batch)
        full = model(**reader.inputs(batch)).logits
    assert nll.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    at = 0
    for row, s in enumerate(samples):
        for k, token in enumerate(s.answer):
            expected = -full[row, len(s.prompt) + k - 1].to(nll.dtype).log_softmax(-1)[token]
            assert nll[at].item() == pytest.approx(expected.item(), rel=1e-9 if dtype is torch.float64 else 2e-2)
            assert batch.owner[at] == row
            assert batch.targets[at] == token
            at += 1
    assert at == len(nll)
    assert {s.answer[-1] for s in samples} == {tiny.END}
