"""Loading a base model by name: the embedded default, a Hugging Face hub id or a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contextlora.errors import AdapterError, ConfigError, did_you_mean

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_SAMPLES = 4096

EMBEDDED = {"smol": None, "smol-half": 15}  # decoder layers, counted from below; None means all


def load_model(
    name: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """Loads a frozen base model and what prepares its inputs.

    Nothing that is loaded can run code: safetensors only, never ``trust_remote_code``.

    Args:
        name: ``"smol"`` (embedded, never touches the network) or ``"smol-half"`` (the lower 15 of its 30 layers), a hub
            id, or a folder written by ``save_pretrained``.
        dtype: bfloat16 unless told otherwise; a torch dtype or its name.
        device: where the model goes. On a CPU attention is "eager": the backward pass of SDPA is slow there in bf16.

    Returns:
        ``(model, processor)``: a transformers image-text-to-text or causal language model in eval mode with
        ``requires_grad`` False everywhere, and its processor (for a text-only model its tokenizer), pad token set.

    Raises:
        ConfigError: E112 for an unknown dtype or device.
        AdapterError: E331 if the embedded model's packages are missing, E332 if the model cannot be found or read.
    """
    kind, place = _dtype(dtype), _device(device)
    with quiet():
        if str(name) in EMBEDDED:
            from contextlora.models import smol

            model, processor = smol.load(kind, place, layers=EMBEDDED[str(name)])
        else:
            model, processor = _from_pretrained(str(name), kind, place)
    _set_pad(model, getattr(processor, "tokenizer", processor))
    model.eval().requires_grad_(False)
    model.config.name_or_path = str(name)  # what an adapter calls its base
    stamp(model)
    return model, processor


def attention(device: torch.device) -> dict[str, str]:
    """The attention argument of ``from_pretrained`` for a device."""
    return {"attn_implementation": "eager"} if device.type == "cpu" else {}


def _from_pretrained(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    import contextlora.models.vision  # noqa: F401  a saved copy of "smol" names this tower in its config

    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AdapterError("E332", "no config.json here; expected a folder written by save_pretrained", where=path)
        name = str(path)
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise AdapterError("E332", "no such folder", where=path)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        seeing = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        model_class = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
        processor = (AutoProcessor if seeing else AutoTokenizer).from_pretrained(name, trust_remote_code=False)
        model = model_class.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, **attention(device)
        )
    except AdapterError:
        raise
    except Exception as e:  # transformers, huggingface_hub, httpx, safetensors, json: each has a tree of its own
        raise AdapterError("E332", _why(name, e), where=name) from None
    return model.to(device), processor


def _why(name: str, error: Exception) -> str:
    """One sentence for the many ways in which a model cannot be loaded."""
    if Path(name).is_dir():
        return f"cannot be loaded as a model: {_first_line(error)}"
    if isinstance(error, ImportError):
        return f"needs a package that is not installed: {_first_line(error)}"
    hint = did_you_mean(name, EMBEDDED)
    return (
        f"neither a local folder nor a model that could be fetched from the hub.{hint} "
        f'Known without a network: "smol". The cause: {_first_line(error)}'
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16
    if dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    try:
        return DTYPES[str(dtype)]
    except KeyError:
        hint = did_you_mean(dtype, DTYPES)
        raise ConfigError(
            "E112", f"unknown dtype '{dtype}'; known: {', '.join(DTYPES)}.{hint}", where="dtype"
        ) from None


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError("E112", f"device '{device}' cannot be used: {_first_line(e)}", where="device") from None
    return found


def _set_pad(model: Any, tokenizer: Any) -> None:
    """Every batch needs padding; a tokenizer without a pad token pads with its end token, masked as always."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise AdapterError("E335", "its tokenizer has neither a pad nor an end token", where=tokenizer.name_or_path)
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' warnings and progress bars inside, and puts its settings back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def fingerprint(model: nn.Module) -> str:
    """Says which base this is: the same for the same weights in any dtype, different after any fine-tuning.

    Hashes name, shape and up to 4096 evenly spaced values of every parameter, rounded to bfloat16. A model from
    `load_model` keeps the value of its loading, so that adapters attached since do not count.

    Returns:
        ``"sha256:"`` and 64 hexadecimal digits.
    """
    known: str | None = getattr(model, "contextlora_fingerprint", None)
    return known or _digest(_spaced(model.named_parameters()))


def stamp(model: Any) -> None:
    """Keeps the fingerprint of the base as it is now, before adapters change its modules."""
    model.contextlora_fingerprint = None
    model.contextlora_fingerprint = fingerprint(model)


def vision_fingerprint(model: Any) -> str:
    """Hash over all that stands between an image and the language model: the key of cached vision features.

    Covers every parameter and buffer outside the language model (tower, normalisation, projector) in full.
    """
    decoder = model.get_decoder()
    inside = {id(t) for m in (decoder, model.get_output_embeddings()) for t in (*m.parameters(), *m.buffers())}
    return _digest((n, t) for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) not in inside)


def _spaced(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        step = max(1, tensor.numel() // _SAMPLES)
        yield f"{name}{list(tensor.shape)}", tensor.detach().reshape(-1)[::step].to(torch.bfloat16)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{total.hexdigest()}"
