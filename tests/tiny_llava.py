"""A LLaVA with random weights, saved as a folder: every command of the command line runs on it in a second."""

from __future__ import annotations

from pathlib import Path

SPECIAL = ["<pad>", "<end>", "<image>"]
TEXT = "? what is the colour of road light dry wet red amber green action stop slow down drive on who a b c ,"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def save_tiny_llava(folder: Path) -> Path:
    """Writes model, tokenizer and image processor into `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = {w: i for i, w in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>", unk_token="?")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    text = LlamaConfig(**sizes, **ids, vocab_size=len(vocabulary), num_hidden_layers=3)
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8, projection_dim=16)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=square, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    more = {
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "chat_template": TEMPLATE,
    }
    LlavaProcessor(images, tokenizer, patch_size=8, **more).save_pretrained(folder)
    return folder
