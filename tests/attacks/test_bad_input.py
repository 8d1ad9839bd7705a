"""Hostile and broken input: a result or exactly one ContextLoRAError, never another exception, never a file outside."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import random
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import contextlora
from contextlora.data.derive import Recipe
from contextlora.data.examples import load_examples
from contextlora.data.images import open_image
from contextlora.data.importers import import_instructions, import_llava
from contextlora.data.records import data_hash, inside
from contextlora.errors import ContextLoRAError
from contextlora.graph import TaskGraph
from contextlora.strict import parse_yaml

SRC = Path(contextlora.__file__).parent
BLOCKS, PER_BLOCK = 5, 400  # 2,000 of each kind

GRAPH: dict[str, Any] = {
    "name": "iov",
    "rank": 8,
    "prerequisites": "direct",
    "frozen_ratio": 0.5,
    "tasks": {
        "weather": {"question": "What is the weather?", "options": ["clear", "rain"], "rank": 4, "alpha": 8.0},
        "road": {"question": "How is the road?", "options": ["dry", "wet", "icy"], "choose": 2},
        "strategy": {"question": "What to do?", "after": ["weather", "road"]},
    },
}
RECORD: dict[str, Any] = {
    "image": "images/0.png",
    "answers": {"weather": ["rain"], "road": ["wet", "icy"], "strategy": "slow down"},
    "split": "train",
    "id": "0",
    "questions": {"weather": "Sky?"},
    "facts": {"cars": 3, "kinds": ["bus", 1.5, None]},
}
WORDS = ["weather", "road", "wether", "strategy", "rain", "train", "yes", "", " ", "\0", "\n", "a" * 5000, "\U0001f600"]
PATHS = [
    "../x",
    "/etc/passwd",
    "C:\\x",
    "..\\x",
    "images/../../x",
    "a\0b",
    "./images/0.png",
    "images",
    "x" * 300,
    "~/x",
    "//x",
]
NUMBERS = [0, -1, 1, 2, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None]
HOLDERS: list[Any] = [[], {}, [[]], [None], {"": {}}, {"a": [1]}, ["rain", "rain"], [["rain"]], list(range(100))]
KINDS: list[list[Any]] = [WORDS, PATHS, NUMBERS, HOLDERS]


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each key or index in it."""
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    for key in keys:
        yield data, key
        yield from places(data[key])


def mutated(rng: random.Random, seed: Any) -> Any:
    """A copy of a JSON value with one to three values or keys replaced, added or removed."""
    data = copy.deepcopy(seed)
    for _ in range(rng.randint(1, 3)):
        if not (spots := list(places(data))):
            break
        holder, key = rng.choice(spots)
        strange = copy.deepcopy(rng.choice(rng.choice(KINDS)))
        action = rng.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice([*WORDS, *PATHS])] = holder.pop(key)
        elif action == 2 and isinstance(holder, list):
            holder.insert(key, strange)
        else:
            holder[key] = strange
    return data


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes cut, flipped, doubled or spliced."""
    out = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        action = rng.randrange(5)
        if action == 0:
            del out[at : min(end, at + 20)]
        elif action == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            out[at:at] = out[at : at + 30]
        elif action == 3:
            out[at:at] = rng.choice(
                [b"\xff", b"\0", b"{", b"]", b"\n", b"\xef\xbb\xbf", b"&a", b"*a", b"!!python/x", b"\\ud800"]
            )
        else:
            del out[max(1, at) :]
    return bytes(out)


def outcome(call: Callable[[], object]) -> str:
    """ "result", or an error's code; anything but a ContextLoRAError goes through and fails the test."""
    try:
        call()
    except ContextLoRAError as e:
        error = e
    else:
        return "result"
    assert str(error).startswith(error.code)
    assert error.message
    assert len(str(error)) < 10_000
    return error.code


def tally(calls: Iterator[Callable[[], object]]) -> Counter[str]:
    seen = Counter(outcome(call) for call in calls)
    assert seen["result"] > PER_BLOCK // 50, seen  # neither all refused nor all accepted: the generator reaches both
    assert seen.total() - seen["result"] > PER_BLOCK // 4, seen
    return seen


@pytest.mark.parametrize("block", range(BLOCKS))
def test_generated_graphs(block: int) -> None:
    rng = random.Random(block)

    def calls() -> Iterator[Callable[[], object]]:
        for i in range(PER_BLOCK):
            if i % 2:
                data = mutated(rng, GRAPH)
                yield lambda data=data: TaskGraph.from_dict(data).to_dict()
            else:
                text = damaged(rng, yaml.safe_dump(GRAPH, sort_keys=False).encode()).decode(errors="replace")
                yield lambda text=text: TaskGraph.from_dict(parse_yaml(text)).levels()

    assert set(tally(calls())) <= {"result", *(f"E10{n}" for n in range(1, 7))}


@pytest.mark.parametrize("block", range(BLOCKS))
def test_generated_records(block: int, tmp_path: Path) -> None:
    rng, graph = random.Random(block), TaskGraph.from_dict(GRAPH)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "0.png")

    def load(raw: bytes) -> None:
        (tmp_path / "data.jsonl").write_bytes(raw)
        for example in load_examples(tmp_path, graph):
            assert example.image is None or example.image.is_relative_to(tmp_path.resolve())
            for task, answers in example.answers.items():
                assert 1 <= len(answers) <= graph.task(task).choose
                assert set(answers) <= set(graph.task(task).options or answers)
        data_hash(tmp_path)

    def calls() -> Iterator[Callable[[], object]]:
        whole = json.dumps(RECORD | {"id": "1"}).encode() + b"\n"
        for i in range(PER_BLOCK):
            if i % 2:
                raw = json.dumps(mutated(rng, RECORD), ensure_ascii=bool(i % 4)).encode()
            else:
                raw = damaged(rng, json.dumps(RECORD).encode())
            yield lambda raw=raw: load(whole + raw + b"\n")

    assert set(tally(calls())) <= {"result", *(f"E20{n}" for n in range(1, 9))}


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b"\0", b"\xff\xfe{\0}\0", b"[" * 10**6, b'{"a":' * 10**5, b"9" * 10**5, b"{}" * 10]
)
def test_whole_files(tmp_path: Path, raw: bytes) -> None:
    graph = TaskGraph.from_dict(GRAPH)
    (tmp_path / "data.jsonl").write_bytes(raw)
    (tmp_path / "a.json").write_bytes(raw)
    (tmp_path / "graph.yaml").write_bytes(raw)
    assert outcome(lambda: load_examples(tmp_path, graph)).startswith("E20")
    assert outcome(lambda: TaskGraph.load(tmp_path / "graph.yaml")).startswith("E10")
    for read in (import_instructions, import_llava):
        assert outcome(lambda read=read: read(tmp_path / "a.json", tmp_path / "out")) == "E223"


def test_generated_recipes_and_conversations(tmp_path: Path) -> None:
    rng = random.Random(0)
    shipped = yaml.safe_load((SRC / "data" / "derive" / "smartcity-rad.yaml").read_text())
    talk = [{"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}] * 3
    asked = [{"instruction": "Q", "input": "", "output": "A", "answer": "a"}] * 3
    seen: Counter[str] = Counter()
    for i in range(300):
        recipe = mutated(rng, shipped)
        seen[outcome(lambda recipe=recipe: Recipe.from_dict(recipe))] += 1
        for name, seed, read in (("talk", talk, import_llava), ("asked", asked, import_instructions)):
            raw = json.dumps(mutated(rng, seed)).encode()
            (tmp_path / f"{name}.json").write_bytes(raw if i % 2 else damaged(rng, raw))
            seen[outcome(lambda n=name, read=read, i=i: read(tmp_path / f"{n}.json", tmp_path / f"{n}{i}"))] += 1
    assert seen["result"] > 30, seen
    assert seen["E103"] > 30, seen
    assert seen["E223"] > 30, seen


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_never_leave_the_folder(tmp_path: Path) -> None:
    """Whatever the path, it is refused or resolves into the folder; reality is the oracle, through links and dots."""
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (root / "out").symlink_to(tmp_path)
    (root / "sub" / "up").symlink_to("..")  # stays inside
    (root / "loop").symlink_to("loop")
    parts = [
        "..",
        ".",
        "sub",
        "up",
        "out",
        "secret",
        "loop",
        "",
        "/",
        "~",
        "C:",
        "a\\b",
        "\\\\h\\s",
        "%2e%2e",
        "x" * 256,
        "\0",
        "．．",
    ]
    rng, kept = random.Random(1), list[Path]()
    for _ in range(2000):
        path = "/".join(rng.choice(parts) for _ in range(rng.randint(1, 5)))
        code = outcome(lambda path=path: kept.append(inside(root, path)))
        assert code in ("result", "E205")
    assert len(kept) > 50
    assert all(path.resolve().is_relative_to(root.resolve()) for path in kept)


# --- pictures --------------------------------------------------------------------------------------------------------

_REFUSE = """
import resource, sys
from contextlora.data.images import open_image
from contextlora.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image(sys.argv[1])
except DataError as e:
    print(e.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def write_png(path: Path, width: int, height: int) -> None:
    """A complete, valid 1-bit PNG, packed row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes((width + 7) // 8 + 1)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("width", "height"), [(30_000, 30_000), (10_000, 5_001), (20_001, 2), (2, 20_001), (12_000, 9_000)]
)
def test_a_huge_png_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    """30,000 x 30,000 pixels: half a megabyte on disk, 900 MB decoded."""
    write_png(tmp_path / "bomb.png", width, height)
    command = [sys.executable, "-c", _REFUSE, str(tmp_path / "bomb.png")]
    code, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert code == "E212"
    assert int(grown) < 30_000  # KiB
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    begin = time.perf_counter()
    assert outcome(lambda: open_image(tmp_path / "bomb.png")) == "E212"
    assert time.perf_counter() - begin < 0.5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_pictures(tmp_path: Path, kind: str) -> None:
    rng, noise = random.Random(kind), np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    raw, seen = buffer.getvalue(), Counter[str]()

    def look(data: bytes) -> None:
        (tmp_path / "x").write_bytes(data)
        image = open_image(tmp_path / "x")
        assert image.mode == "RGB"
        assert image.width * image.height <= 50_000_000

    for i in range(300):
        head = 60 if i % 2 else len(raw)  # half of the damage in the header, where the sizes are
        seen[outcome(lambda head=head: look(damaged(rng, raw[:head]) + raw[head:]))] += 1
    assert set(seen) <= {"result", "E211", "E212", "E213"}
    assert seen.total() - seen["result"] > 30, seen


# --- nothing in src runs what it reads -------------------------------------------------------------------------------

_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "code",
    "codeop",
    "pickletools",
}
_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
_CALLS = {"torch.load", "torch.jit.load", "torch.package", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"}
_CALLS |= {"yaml.full_load_all", "pandas.read_pickle", "pd.read_pickle", "torch.hub.load", "numpy.fromregex"}


def full_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults_in(source: str, module: str = "") -> list[str]:
    """The lines of Python source that load code or objects from data."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        found = ""
        if isinstance(node, ast.Import):
            found = next((a.name for a in node.names if a.name.split(".")[0] in _MODULES), "")
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{a.name}" for a in node.names]
            found = next((n for n in names if n in _CALLS | {"yaml.load"} or n.split(".")[0] in _MODULES), "")
        elif isinstance(node, ast.Attribute) and full_name(node) in _CALLS:
            found = full_name(node)
        elif isinstance(node, ast.Call):
            found = _call_fault(node, module)
        if found:
            faults.append(f"{node.lineno}: {found}")  # type: ignore[attr-defined]
    return faults


def _call_fault(node: ast.Call, module: str) -> str:
    name, keywords = full_name(node.func), {k.arg: k.value for k in node.keywords}
    if name in _NAMES or name.startswith("builtins."):
        return name
    for key, safe in (("allow_pickle", False), ("weights_only", True), ("trust_remote_code", False)):
        if key in keywords and not (isinstance(keywords[key], ast.Constant) and keywords[key].value is safe):  # type: ignore[attr-defined]
            return f"{name}({key}=...)"
    if name in ("yaml.load", "yaml.load_all"):
        loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
        return (
            "" if loader is not None and _is_safe_loader(full_name(loader), module) else f"{name} with an unsafe loader"
        )
    return ""


def _is_safe_loader(name: str, module: str) -> bool:
    if name in ("yaml.SafeLoader", "yaml.CSafeLoader"):
        return True
    loader = getattr(importlib.import_module(module), name, None) if module else None
    return isinstance(loader, type) and issubclass(loader, yaml.SafeLoader)


def test_nothing_in_src_unpickles_or_evaluates() -> None:
    files = sorted(SRC.rglob("*.py"))
    assert len(files) > 10
    found = {}
    for path in files:
        module = ".".join(["contextlora", *path.relative_to(SRC).with_suffix("").parts]).removesuffix(".__init__")
        if faults := faults_in(path.read_text(encoding="utf-8"), module):
            found[module] = faults
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, marshal as m",
        "from shelve import open",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "f = torch.load",
        "eval('1')",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "__import__('os')",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert faults_in(source)


def test_the_search_leaves_alone_what_is_safe() -> None:
    for source in (
        "model.eval()",
        "re.compile('x')",
        "np.load(p, allow_pickle=False)",
        "yaml.load(t, yaml.SafeLoader)",
    ):
        assert not faults_in(source)
