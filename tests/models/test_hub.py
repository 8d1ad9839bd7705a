"""Folders made here from tiny random configurations, and every way in which a name can be wrong."""

from __future__ import annotations

import json
import socket
import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from contextlora.errors import AdapterError
from contextlora.models import fingerprint, load_model, vision_fingerprint

WORDS = ["<pad>", "<end>", "<image>", "what", "is", "it", "a", "road"]


def tokenizer(**special):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "<end>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", **special)


def text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
    )


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(text_config()).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def llava(tmp_path):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config(), image_token_index=2, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer(pad_token="<pad>"),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(tmp_path)
    return tmp_path


def test_a_text_folder_gives_a_causal_model_and_its_tokenizer(llama):
    model, processor = load_model(str(llama), dtype=torch.float32)
    plain = LlamaForCausalLM.from_pretrained(llama, attn_implementation="eager")
    ids = processor("what is a road", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, 4, 6, 7]]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert processor.pad_token_id == processor.eos_token_id == model.config.pad_token_id == 1


def test_an_image_text_folder_gives_model_and_processor(llava):
    model, processor = load_model(llava)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.dtype == torch.bfloat16
    assert processor.tokenizer.pad_token_id == 0
    batch = processor(text="<image> what is it", images=torch.zeros(3, 28, 28), return_tensors="pt")
    assert (batch["input_ids"] == 2).sum() == 4
    assert model(**batch).logits.shape[-1] == 8


def test_fingerprint_names_the_weights_not_the_dtype(llama):
    one, _ = load_model(llama, dtype="float32")
    two, _ = load_model(llama)
    assert fingerprint(one) == fingerprint(two)
    assert fingerprint(one).startswith("sha256:")
    fine_tuned = LlamaForCausalLM.from_pretrained(llama)
    assert fingerprint(fine_tuned) == fingerprint(one)
    with torch.no_grad():
        fine_tuned.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert fingerprint(fine_tuned) != fingerprint(one)


def test_vision_fingerprint_covers_tower_and_projector_alone(llava):
    model, _ = load_model(llava)
    before = vision_fingerprint(model)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(2)
        model.lm_head.weight.mul_(2)
    assert vision_fingerprint(model) == before
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.add_(1)
    changed = vision_fingerprint(model)
    assert changed != before
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1)
    assert vision_fingerprint(model) not in (before, changed)


def test_no_such_folder(tmp_path):
    for name in (tmp_path / "none", "./none", "a/b/c", "~/surely/not/there"):
        with pytest.raises(AdapterError, match=r"E332 .*no such folder"):
            load_model(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(AdapterError, match=r"E332 .*no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", '{"model_type": "no-such-type"}', '{"model_type": "llama", "hidden_size": "wide"}'],
)
def test_damaged_config(llama, config):
    (llama / "config.json").write_text(config)
    with pytest.raises(AdapterError, match="E332"):
        load_model(llama)


def test_damaged_weights(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="E332"):
        load_model(llama)


def test_pickled_weights_are_never_read(llama):
    (llama / "model.safetensors").unlink()
    torch.save({}, llama / "pytorch_model.bin")
    with pytest.raises(AdapterError, match="E332"):
        load_model(llama)


def test_code_that_comes_with_a_model_is_never_run(llama):
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "evil.py").write_text(f"open({str(llama / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(AdapterError, match="E332"):
        load_model(llama)
    assert not (llama / "ran").exists()


def test_without_a_network_an_unknown_id_is_one_clear_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub tries again, slower every time
    with pytest.raises(AdapterError, match=r"E332 smoll: .*Did you mean 'smol'\?.*Known without a network") as caught:
        load_model("smoll")
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)
