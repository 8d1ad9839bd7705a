"""A tiny world for tests of training and evaluation: words, a tokenizer, models with random weights, data to learn.

Each record says two content words; `weather` follows from the first, `light` from the second and `action` from both, so
that a child can be learnt from its prerequisites. Where a picture is wanted, its colour says the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from contextlora.graph import TaskGraph

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
SPECIAL += ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<unk>", "<row_1_col_1>"]
CONTENT = [[f"a{i}" for i in range(6)], [f"b{i}" for i in range(6)]]
WEATHER, LIGHT, ACTION = ["rain", "heavy snow", "sun"], ["day", "night"], ["stop", "go", "slow down", "go very fast"]
WORDS = [*SPECIAL, *CONTENT[0], *CONTENT[1], "rain", "heavy", "snow", "sun", "day", "night", "stop", "go", "slow"]
WORDS += ["down", "very", "fast", ",", ":", ";", ".", "?", "Known", "Question", "Answer", "weather", "light", "action"]
WORDS += ["USER", "BOT", "left", "right", "both"]
PAD, BOS, END, IMAGE = range(4)
TEMPLATE = (
    "{% for m in messages %}USER: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}MARK{% else %}{{ c['text'] }}{% endif %} {% endfor %}{% endif %}{% endfor %} BOT:"
)
COLOURS = [(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30), (220, 30, 220), (30, 220, 220)]


def graph(**more: Any) -> TaskGraph:
    tasks = {
        "weather": {"question": "weather ?", "options": WEATHER},
        "light": {"question": "light ?", "options": LIGHT, "rank": 3},
        "action": {"question": "action ?", "options": ACTION, "after": ["weather", "light"]},
    }
    return TaskGraph.from_dict({"name": "tiny", "rank": 4, "tasks": tasks, **more})


def truth(a: int, b: int) -> dict[str, str]:
    """The answers for content words a and b."""
    weather, light = a % 3, b % 2
    return {"weather": WEATHER[weather], "light": LIGHT[light], "action": ACTION[(weather + 2 * light) % 4]}


def tokenizer(mark: str = "<image>", chat: bool = True) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made.add_special_tokens(SPECIAL)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    template = TEMPLATE.replace("MARK", mark) if chat else None
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **special)


def text_config(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        **more,
    }


def frozen(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype).eval().requires_grad_(False)


def llama(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return frozen(LlamaForCausalLM(LlamaConfig(**text_config(**more))), dtype), tokenizer()


def llava(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_config(**more)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    pictures = CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
    words = tokenizer()
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=words.chat_template,
    )
    return frozen(LlavaForConditionalGeneration(config), dtype), processor


def idefics3(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        vision_config={**vision, "image_size": 8, "patch_size": 2},
        text_config=LlamaConfig(**text_config(**more)),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
    words = tokenizer()
    processor = Idefics3Processor(pictures, words, image_seq_len=4, chat_template=words.chat_template)
    return frozen(Idefics3ForConditionalGeneration(config), dtype), processor


class QwenProcessor:
    """Qwen2.5-VL's processor without its video part, which wants torchvision."""

    image_token = "<|image_pad|>"

    def __init__(self) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer("<|vision_start|><|image_pad|><|vision_end|>")
        self.chat_template = self.tokenizer.chat_template
        self.apply_chat_template = self.tokenizer.apply_chat_template
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
        )

    def __call__(self, *, text: list[str], images: list[Image.Image], **more: Any) -> dict[str, Any]:
        seen = self.image_processor(images, return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        for i, count in enumerate(counts):
            text = [t.replace(self.image_token, self.image_token * count) if i == k else t for k, t in enumerate(text)]
        return {**self.tokenizer(text, padding=True, **more), **seen}


def qwen25vl(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 16}
    at = WORDS.index
    config = Qwen2_5_VLConfig(
        text_config={**text_config(**more), "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        image_token_id=at("<|image_pad|>"),
        video_token_id=at("<row_1_col_1>"),
        vision_start_token_id=at("<|vision_start|>"),
        vision_end_token_id=at("<|vision_end|>"),
    )
    torch.manual_seed(0)
    return frozen(Qwen2_5_VLForConditionalGeneration(config), dtype), QwenProcessor()


def write_data(folder: Path, *, train: int = 36, test: int = 36, images: bool = False) -> Path:
    """A data folder over the 36 pairs of content words, in a fixed shuffled order; prompts differ in length."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for split, count in (("train", train), ("test", test)):
        for k in range(count):
            a, b = divmod((k * 23 + 5) % 36, 6)
            said = " ".join([CONTENT[0][a], CONTENT[1][b]])
            tail = " ?" * (1 + k % 3)
            record: dict[str, Any] = {"id": f"{split}-{k}", "split": split}
            record["answers"] = {t: [v] for t, v in truth(a, b).items()}
            if images:
                record["image"] = f"images/{k}.png"
                picture = Image.new("RGB", (8 + 8 * (k % 3), 16), COLOURS[a])
                picture.paste(COLOURS[b], (0, 8, picture.width, 16))
                picture.save(folder / record["image"])
                record["questions"] = {t: f"{t}{tail}" for t in truth(a, b)}
            else:
                record["questions"] = {t: f"{said} {t}{tail}" for t in truth(a, b)}
            lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def furthest(one, other):
    """The largest difference between two sets of blocks."""
    assert one.keys() == other.keys()
    return max((one[k] - other[k]).abs().max().item() for k in one)
