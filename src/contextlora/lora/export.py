"""Blocks as plain PEFT LoRA files, and as merged weights: nothing here needs contextlora, or PEFT, to be read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from contextlora.errors import AdapterError
from contextlora.graph import TaskGraph
from contextlora.lora.attach import gated_layers

Block = Mapping[str, tuple[Tensor, Tensor]]
"""A low-rank block by layer path: A (r, d_in) and B transposed (r, d_out)."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def peft_files(block: Block, alpha: float, base: str, targets: Mapping[str, Any]) -> dict[str, bytes]:
    """A block as the two files of a PEFT LoRA, the same bytes for the same weights.

    Args:
        block: the same rank r in every layer.
        alpha: LoRA alpha; PEFT scales by alpha / r.
        base: name or path of the base model.
        targets: `target_modules` and `layers_to_transform`, as `peft_targets` finds them.
    """
    rank = len(next(iter(block.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
        "init_lora_weights": True,
        **targets,
    }
    tensors = {}
    for path, (a, b) in block.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.detach().cpu().T.contiguous()
    # one metadata key only: safetensors writes several in random order
    return {CONFIG: json.dumps(config, indent=1).encode(), WEIGHTS: save(tensors, {"format": "pt"})}


def read_block(data: bytes, where: object = "") -> dict[str, tuple[Tensor, Tensor]]:
    """The block in the bytes of an adapter_model.safetensors. Raises AdapterError E311."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as e:
        raise AdapterError("E311", f"not a safetensors file: {e}", where=where) from None
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        m = _KEY.fullmatch(key)
        if m is None or tensor.dim() != 2:
            raise AdapterError("E311", f"'{key}' is not a LoRA matrix", where=where)
        sides.setdefault(m[1], {})[m[2]] = tensor
    for path, found in sides.items():
        if len(found) != 2 or found["A"].shape[0] != found["B"].shape[1]:
            raise AdapterError("E311", f"{path}: A and B do not belong together", where=where)
    return {path: (found["A"], found["B"].T.contiguous()) for path, found in sides.items()}


def node(graph: TaskGraph, blocks: Mapping[str, Block], task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """W[v] and W[P(v)] stacked into one block whose scale is 1: each block's own scale is folded into its B."""
    active = graph.active(task)
    return {
        path: (
            torch.cat([blocks[t][path][0] for t in active]),
            torch.cat([blocks[t][path][1] * graph.scale_of(t) for t in active]),
        )
        for path in blocks[task]
    }


def peft_targets(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """How to name `paths`, and no other module of the model, to PEFT.

    Returns:
        `target_modules` as plain suffixes ("q_proj"), which is all that vLLM takes, where these are unambiguous; with
        `layers_to_transform` if only some decoder layers are meant; else (a vision tower with a q_proj of its own) the
        full paths.
    """
    wanted = set(paths)
    inside = tuple(f"{p}." for p in gated_layers(model))
    names = [n for n, _ in model.named_modules() if not n.startswith(inside)]
    suffixes = sorted({p.rpartition(".")[2] for p in wanted})
    hit = {n for n in names if n.rpartition(".")[2] in suffixes}
    if hit == wanted:
        return {"target_modules": suffixes, "layers_to_transform": None}
    layers = {_layer_index(n) for n in wanted}
    if None not in layers and {n for n in hit if _layer_index(n) in layers} == wanted:
        return {"target_modules": suffixes, "layers_to_transform": sorted(layers)}
    return {"target_modules": sorted(wanted), "layers_to_transform": None}


def _layer_index(name: str) -> int | None:
    """The number PEFT compares to `layers_to_transform`: the first one in a module's path."""
    m = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(m[1]) if m else None


@contextmanager
def merged(model: nn.Module, block: Block) -> Iterator[nn.Module]:
    """The model as a plain one, W + B A in place of W, inside the block; afterwards as it was, bit for bit.

    The sum is taken in float32 and rounded to the base's dtype.

    Raises:
        AdapterError: E318 for a quantised base, whose weights cannot take a sum.
    """
    layers, bases = gated_layers(model), dict[str, nn.Linear]()
    for path in block:
        base = layers[path].base if path in layers else model.get_submodule(path)
        if type(base) is not nn.Linear or not base.weight.is_floating_point():
            raise AdapterError(
                "E318",
                f"is a {type(base).__name__}; only plain linear weights can be merged. Load the model unquantised, "
                "or export the node as a LoRA",
                where=path,
            )
        bases[path] = base
    before = {path: base.weight.data for path, base in bases.items()}
    try:
        for path, base in bases.items():
            a, b = (m.to(before[path].device, torch.float32) for m in block[path])
            base.weight.data = torch.addmm(before[path].float(), b.T, a).to(before[path])
        for path, layer in layers.items():
            model.set_submodule(path, layer.base)
        yield model
    finally:
        for path, base in bases.items():
            base.weight.data = before[path]
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def block_hash(block: Block) -> str:
    """SHA-256 over a block's layer paths, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for path in sorted(block):
        for m in block[path]:
            total.update(f"{path} {m.dtype} {tuple(m.shape)}\n".encode())
            total.update(m.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
