"""What we write is plain PEFT: it loads, and gives the same logits, where contextlora cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from contextlora.errors import AdapterError
from contextlora.graph import TaskGraph
from contextlora.lora.adapter import Adapter
from contextlora.lora.attach import attach, gated_layers

pytest.importorskip("peft")
torch.set_num_threads(1)

GRAPH = TaskGraph.from_dict(
    {
        "name": "iov",
        "rank": 4,
        "tasks": {
            "weather": {"question": "What is the weather?"},
            "road": {"question": "How is the road?", "rank": 2, "alpha": 3.0},
            "strategy": {"question": "What to do?", "after": ["weather", "road"], "rank": 3, "alpha": 7.5},
        },
    }
)
SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
)

# Runs with -I (no PYTHONPATH, no working directory) and refuses our package even where it is installed.
ALONE = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "contextlora":
            raise ImportError("refused " + name)
sys.meta_path.insert(0, Refuse())
try:
    import contextlora
except ImportError as e:
    assert "refused" in str(e)
else:
    raise SystemExit("contextlora could be imported")
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
answers, hits = {}, {}
for job in json.load(open(sys.argv[1])):
    base = getattr(transformers, job["class"]).from_pretrained(job["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, job["adapters"][0], adapter_name="0")
    for i, more in enumerate(job["adapters"][1:], 1):
        model.load_adapter(more, adapter_name=str(i))
    model.base_model.set_adapter([str(i) for i in range(len(job["adapters"]))])
    hits[job["name"]] = sorted(n for n, m in base.named_modules() if hasattr(m, "lora_A"))
    with torch.no_grad():
        answers[job["name"]] = model.eval()(**load_file(job["inputs"])).logits.contiguous()
assert not [m for m in sys.modules if m.startswith("contextlora")]
save_file(answers, sys.argv[2])
json.dump(hits, open(sys.argv[2] + ".json", "w"))
"""


def build(family: str) -> Any:
    """A tiny random model of a family, with non-zero biases where it has them."""
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZE)).eval()
    text = LlamaConfig(**SIZE)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=VISION, text_config=text, image_token_index=127, image_seq_length=4)
    ).eval()


def inputs_for(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 120, (2, 10), generator=torch.Generator().manual_seed(1))
    if family != "llava":
        return {"input_ids": ids}
    ids[:, 1:5] = 127
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}


def fill(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in gated_layers(model).values():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor], task: str) -> torch.Tensor:
    with model.tasks(task):
        return model(**inputs).logits


CASES = [("llama", "all"), ("llama", "top 1/3"), ("qwen2", "1-2"), ("llava", "all"), ("llava", "top 2/3")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case saved here and run by PEFT in one other process: our logits, theirs, and the modules they touched."""
    root = tmp_path_factory.mktemp("peft")
    jobs, ours, paths = [], {}, {}
    for family, layers in CASES:
        place = root / f"{family}-{layers.replace('/', '')}".replace(" ", "")
        base, inputs = build(family), inputs_for(family)
        base.save_pretrained(place / "base")
        save_file(inputs, place / "inputs.safetensors")
        attach(base, GRAPH, layers=layers)
        fill(base)
        adapter = Adapter.of(base, base=str(place / "base"))
        folders = {t: [adapter.save(place / "adapter") / "tasks" / t] for t in GRAPH.names}
        folders["node"] = [adapter.export("strategy", place / "node")]
        folders["several"] = [place / "adapter" / "tasks" / t for t in GRAPH.names]
        for what, found in folders.items():
            name = f"{family} {layers} {what}"
            jobs.append(
                {
                    "name": name,
                    "class": type(base).__name__,
                    "base": str(place / "base"),
                    "inputs": str(place / "inputs.safetensors"),
                    "adapters": [str(f) for f in found],
                }
            )
            paths[name] = sorted(gated_layers(base))
            if what in GRAPH.names:
                alone = adapter.subset([what]).apply(build(family))
                ours[name] = logits(alone, inputs, what)
            else:
                ours[name] = logits(base, inputs, "strategy")
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = [sys.executable, "-I", "-c", ALONE, str(root / "jobs.json"), str(root / "theirs")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        "ours": ours,
        "theirs": load_file(root / "theirs"),
        "paths": paths,
        "hits": json.loads((root / "theirs.json").read_text()),
    }


@pytest.mark.parametrize("what", [*GRAPH.names, "node", "several"])
@pytest.mark.parametrize(("family", "layers"), CASES)
def test_peft_alone_gives_the_same_logits(measured: dict[str, Any], family: str, layers: str, what: str) -> None:
    name = f"{family} {layers} {what}"
    torch.testing.assert_close(measured["theirs"][name], measured["ours"][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "layers"), CASES)
def test_peft_touches_our_layers_and_no_others(measured: dict[str, Any], family: str, layers: str) -> None:
    name = f"{family} {layers} node"
    assert [h.split("base_model.model.")[-1] for h in measured["hits"][name]] == measured["paths"][name]


@pytest.mark.parametrize(("family", "layers"), CASES)
def test_the_blocks_change_the_answers(measured: dict[str, Any], family: str, layers: str) -> None:
    ours = measured["ours"]
    assert (ours[f"{family} {layers} node"] - ours[f"{family} {layers} strategy"]).abs().max() > 1e-3


def test_an_exported_node_has_scale_one_and_plain_names(tmp_path: Path) -> None:
    model = attach(build("llama"), GRAPH)
    fill(model)
    Adapter.of(model, base="tiny").export("strategy", tmp_path / "node")
    config = json.loads((tmp_path / "node" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["layers_to_transform"] is None
    tensors = load_file(tmp_path / "node" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (9, 32)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (32, 9)
    assert len(tensors) == 2 * 7 * 3


@pytest.mark.parametrize("family", ["llama", "qwen2", "llava"])
def test_merged_weights_give_the_same_logits_and_leave_the_model_alone(tmp_path: Path, family: str) -> None:
    model, inputs = attach(build(family), GRAPH), inputs_for(family)
    fill(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = Adapter.of(model)
    adapter.export_merged(model, "strategy", tmp_path / "merged")
    auto = AutoModelForImageTextToText if family == "llava" else AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, logits(model, inputs, "strategy"), atol=1e-5, rtol=0)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert {m.name for m in gated_layers(model).values()} == set(adapter.layers)


def test_a_plain_model_can_be_merged_into(tmp_path: Path) -> None:
    model = attach(build("llama"), GRAPH)
    fill(model)
    adapter, plain = Adapter.of(model), build("llama")
    adapter.export_merged(plain, "weather", tmp_path / "out")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    inputs = inputs_for("llama")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, logits(model, inputs, "weather"), atol=1e-5, rtol=0)
    assert not gated_layers(plain)


def test_a_quantised_base_is_not_merged(tmp_path: Path) -> None:
    class Linear4bit(torch.nn.Linear):
        pass

    model = build("llama")
    model.model.layers[1].mlp.up_proj.__class__ = Linear4bit
    attach(model, GRAPH)
    fill(model)
    with pytest.raises(AdapterError, match=r"E318 model\.layers\.1\.mlp\.up_proj: is a Linear4bit"):
        Adapter.of(model).export_merged(model, "strategy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
