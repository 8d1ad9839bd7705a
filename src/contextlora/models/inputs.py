"""Running a model on batches: image features computed once per image, logits only where an answer is predicted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from contextlora.data.collate import Batch, Encoder
from contextlora.data.images import image_hash, open_image
from contextlora.models.prompts import KnownPrompts

SEAL = 32  # bytes of sha256 before the kept tensors
FEATURES = "features"  # every other tensor kept beside an image's features goes to the model by its own name
TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


class ImageFeatures:
    """What the language model sees of each image, (tokens, d), computed once and kept in memory and on disk.

    Args:
        model: an image-text model, or a text model (then only text batches may come).
        encoder: its encoder.
        folder: where features are kept by the image's content hash; None keeps them in memory only. The folder must
            be this vision tower's and projector's own: see `models.fingerprint`.
        memory_bytes: at most this much is held in memory; the rest is read from disk again.

    Attributes:
        prompts: for comparisons, what is known of prompts asked before; None forgets them.
    """

    prompts: KnownPrompts | None = None

    def __init__(self, model: nn.Module, encoder: Encoder, folder: Path | None = None, memory_bytes: int = 2 << 30):
        self.model, self.encoder, self.folder = model, encoder, folder
        self._held: dict[Path, dict[str, Tensor]] = {}
        self._left = memory_bytes

    def get(self, image: Path) -> dict[str, Tensor]:
        """The tensors of one image: its features and what positions need (e.g. image_grid_thw)."""
        if image in self._held:
            return self._held[image]
        found = self._read(image)
        if found is None:
            found = self._compute(image)
            self._write(image, found)
        size = sum(t.nbytes for t in found.values())
        if size <= self._left or self.folder is None:
            self._left -= size
            self._held[image] = found
        return found

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments that run the model on a batch; features stand in for pixels."""
        device = next(self.model.parameters()).device
        ids = batch.input_ids.to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": batch.attention_mask.to(device)}
        found = [self.get(s.image) for s in batch.samples if s.image is not None]
        names = list(found[0]) if found else []
        if FEATURES in names:
            features = [f[FEATURES].to(device) for f in found]
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        if extra := {k: torch.cat([f[k] for f in found]).to(device) for k in names if k != FEATURES}:
            # models with image positions want to know which tokens are image tokens
            inputs |= extra
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()  # type: ignore[union-attr]
        return inputs

    @torch.no_grad()
    def _compute(self, image: Path) -> dict[str, Tensor]:
        first = next(self.model.parameters())
        tensors = self.encoder.image_inputs(self.encoder.image_prompt, open_image(image))
        given = {k: v.to(first.device) for k, v in tensors.items() if k not in TOKEN_INPUTS}
        given["pixel_values"] = given["pixel_values"].to(first.dtype)
        out = self.model.get_image_features(**given)  # type: ignore[operator]
        features = torch.cat([f.reshape(-1, f.shape[-1]) for f in out.pooler_output]).cpu()
        small = {k: v.cpu() for k, v in given.items() if not k.startswith("pixel")}
        return {FEATURES: features.contiguous(), **small}

    def _path(self, image: Path) -> Path | None:
        return None if self.folder is None else self.folder / f"{image_hash(image)}.features"

    def _read(self, image: Path) -> dict[str, Tensor] | None:
        """What is kept of an image; None if that is nothing, or not what was written (then it is computed again)."""
        path = self._path(image)
        try:
            raw = path.read_bytes() if path is not None else b""
            seal, body = raw[:SEAL], raw[SEAL:]
            return load(body) if raw and seal == hashlib.sha256(body).digest() else None
        except (SafetensorError, OSError):
            return None

    def _write(self, image: Path, tensors: dict[str, Tensor]) -> None:
        if (path := self._path(image)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            body = save(tensors)
            part.write_bytes(hashlib.sha256(body).digest() + body)
            part.replace(path)


@contextmanager
def logits_at(model: nn.Module, where: Tensor) -> Iterator[None]:
    """Inside, the output head sees only the positions `where` (samples, tokens) and gives (n, vocabulary).

    They are gathered before the head: a vocabulary of logits at every position is most of a small model's work, and
    a slice that is not contiguous runs a hundred times slower.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][where.to(args[0].device)],))
    try:
        yield
    finally:
        hook.remove()


def log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target token, (n,), from logits (n, vocabulary), without gradient.

    A few rows at a time, which stay in the processor's cache: three times as fast as cross_entropy on a CPU.
    """
    parts = []
    for some, wanted in zip(logits.split(32), targets.split(32), strict=True):  # type: ignore[no-untyped-call]
        exact = at_least_float32(some)
        parts.append(exact.gather(1, wanted[:, None]).squeeze(1) - exact.logsumexp(1))
    return torch.cat(parts)


def answer_nll(model: nn.Module, inputs: dict[str, Any], batch: Batch) -> Tensor:
    """Negative log-likelihood of each answer token, (n,), at least float32, in the batch's row order."""
    with logits_at(model, batch.predicts):
        logits = model(**inputs, use_cache=False).logits
    return nn.functional.cross_entropy(at_least_float32(logits), batch.targets.to(logits.device), reduction="none")


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, half precisions as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
