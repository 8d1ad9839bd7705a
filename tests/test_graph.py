"""graph.yaml: what is refused, and that the refusal names the culprit."""

import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

import pytest

from contextlora.errors import ConfigError
from contextlora.graph import Task, TaskGraph
from contextlora.strict import parse_yaml

IOV = """
name: iov
tasks:
  strategy: {question: "What now?", options: [stop, go], after: [weather, road], rank: 4, alpha: 6}
  weather: {question: "Weather?", options: [yes, no, on]}
  road: {question: "Road?"}
"""


def graph(text=IOV):
    return TaskGraph.from_dict(parse_yaml(textwrap.dedent(text)), where="graph.yaml")


def refused(code, *says, text=None, data=None):
    with pytest.raises(ConfigError) as e:
        graph(text) if text else TaskGraph.from_dict(data, where="graph.yaml")
    assert e.value.code == code
    assert e.value.where == "graph.yaml"
    for s in says:
        assert s in e.value.message


def one(**task):
    return {"tasks": {"a": {"question": "?", **task}, "b": {"question": "?"}}}


def test_the_page_of_the_design():
    g = graph()
    assert g.levels() == [["weather", "road"], ["strategy"]]
    assert g.prerequisites("strategy") == ("weather", "road")
    assert g.tasks["weather"].options == ("yes", "no", "on")
    assert g.tasks["road"].options is None
    assert (g.rank_of("strategy"), g.scale_of("strategy"), g.block("strategy")) == (4, 1.5, range(4))
    assert (g.rank_of("road"), g.scale_of("road"), g.block("road")) == (8, 2.0, range(12, 20))
    assert g.total_rank == 20
    assert g.to_dict()["name"] == "iov"


def test_adding_a_task_rescales_no_other():
    g = graph()
    wider = TaskGraph({**g.tasks, "new": Task(question="?", rank=64)})
    assert all(wider.scale_of(n) == g.scale_of(n) and wider.block(n) == g.block(n) for n in g.names)
    assert all(wider.fingerprint(n) == g.fingerprint(n) for n in g.names)


def test_a_fingerprint_moves_with_all_that_shapes_training():
    g, prints = graph(), set()
    for change in [
        {},
        {"question": "x"},
        {"options": ("p", "q")},
        {"after": ("road",)},
        {"rank": 5},
        {"alpha": 7.0},
        {"choose": 2},
    ]:
        changed = {**g.tasks, "strategy": g.tasks["strategy"].model_copy(update=change)}
        prints.add(TaskGraph(changed).fingerprint("strategy"))
    assert len(prints) == 7


@pytest.mark.parametrize(
    "call", ["task", "rank_of", "scale_of", "block", "prerequisites", "children", "active", "fingerprint"]
)
def test_an_unknown_task_is_named_with_the_nearest(call):
    with pytest.raises(ConfigError, match=r"E104 no task 'wether' in graph 'iov'. Did you mean 'weather'\?"):
        getattr(graph(), call)("wether")


def test_unknown_names_in_subgraph():
    with pytest.raises(ConfigError, match="E104"):
        graph().subgraph(["weather", "rod"])


def test_cycles():
    refused("E106", "a -> a", data=one(after=["a"]))
    ring = {"tasks": {n: {"question": "?", "after": [p]} for n, p in [("a", "c"), ("b", "a"), ("c", "b")]}}
    refused("E106", "the tasks form a cycle: a -> b -> c -> a", data=ring)


@pytest.mark.parametrize(
    ("code", "says", "data"),
    [
        ("E104", "tasks.a.after: no task 'bb'. Did you mean 'b'?", one(after=["bb"])),
        ("E103", "tasks.a.after: 'b' appears twice", one(after=["b", "b"])),
        ("E103", "tasks.a.after: should be a list, got 'b'", one(after="b")),
        ("E103", "tasks.a.options: is empty", one(options=None)),
        ("E103", "tasks.a.options: needs 2 to 64 options, got 0", one(options=[])),
        ("E103", "tasks.a.options: needs 2 to 64 options, got 1", one(options=["x"])),
        ("E103", "tasks.a.options: needs 2 to 64 options, got 65", one(options=[str(i) for i in range(65)])),
        ("E103", "tasks.a.options: 'x' appears twice", one(options=["x", "y", "x"])),
        ("E103", "tasks.a.options: True is not text; put it in quotes", one(options=[True, "x"])),
        ("E103", "tasks.a.options: 3 is not text", one(options=["x", 3])),
        ("E103", "tasks.a.options.0: should have at least 1 character", one(options=["", "x"])),
        ("E103", "tasks.a.options: an option may not", one(options=["x ", "y"])),
        ("E103", "tasks.a.options: an option may not", one(options=["x\u2028z", "y"])),
        ("E103", "tasks.a.question: should have at least 1 character", one(question="")),
        ("E103", "tasks.a.question: should be a valid string, got 3", one(question=3)),
        ("E103", "tasks.a.rank: should be greater than or equal to 1, got 0", one(rank=0)),
        ("E103", "tasks.a.rank: should be less than or equal to 1024", one(rank=1025)),
        ("E103", "tasks.a.rank: should be a valid integer, got 8.0", one(rank=8.0)),
        ("E103", "tasks.a.rank: should be a valid integer, got True", one(rank=True)),
        ("E103", "tasks.a.alpha: should be greater than 0", one(alpha=0)),
        ("E103", "tasks.a.alpha: should be a finite number", one(alpha=float("inf"))),
        ("E103", "tasks.a.quetsion: unknown key. Did you mean 'question'?", one(quetsion="?")),
        ("E105", "tasks.a.choose: more than there are options", one(options=["x", "y"], choose=3)),
        ("E105", "tasks.a.choose: more than there are options", one(choose=2)),
        ("E105", "may not hold ', '", one(options=["x, y", "z"], choose=2)),
        ("E103", "tasks: should have at least 1 item", {"tasks": {}}),
        ("E103", "tasks: is missing", {"name": "x"}),
        ("E103", "tasks: should be a valid dictionary, got None", {"tasks": None}),
        ("E103", "tasks.a: should be a valid dictionary, got 'x'", {"tasks": {"a": "x"}}),
        ("E103", "tasks.1", {"tasks": {1: {"question": "?"}}}),
        ("E103", "rank: should be less than or equal to 1024", {**one(), "rank": 2000}),
        ("E103", "frozen_ratio: should be less than or equal to 1", {**one(), "frozen_ratio": 1.5}),
        ("E103", "frozen_ratio: should be a valid number", {**one(), "frozen_ratio": "0.5"}),
        ("E103", "frozen_ratio: should be a finite number", {**one(), "frozen_ratio": float("nan")}),
        ("E103", "prerequisites: should be 'direct' or 'all'", {**one(), "prerequisites": "some"}),
        ("E103", "expected keys and values, got []", []),
    ],
)
def test_refused_naming_the_culprit(code, says, data):
    refused(code, says, data=data)


@pytest.mark.parametrize("name", ["a b", "", "-a", "ä", "a/b", "a.b", "..", "a" * 65, "a\n"])
def test_names_that_could_not_be_folders_or_module_names(name):
    refused("E105", "task name", data={"tasks": {name: {"question": "?"}}})


def test_names_apart_only_in_case_are_one_folder_on_some_disks():
    refused(
        "E105",
        "'Road' and 'road' differ only in case",
        data={"tasks": {n: {"question": "?"} for n in ("Road", "road")}},
    )


def test_duplicate_task_in_the_file():
    with pytest.raises(ConfigError, match=r"E101 .*duplicate key 'a'"):
        graph("tasks:\n  a: {question: x}\n  a: {question: y}\n")


def test_integers_where_a_number_is_meant():
    g = TaskGraph.from_dict({**one(alpha=16), "frozen_ratio": 0})
    assert (g.scale_of("a"), g.frozen_ratio) == (2.0, 0)


@pytest.mark.parametrize(
    "change", [{"rank": 0}, {"frozen_ratio": 2.0}, {"prerequisite_rule": "x"}, {"tasks": {}}, {"name": ""}]
)
def test_a_graph_built_by_hand_is_held_to_the_same_rules(change):
    with pytest.raises(ConfigError, match="E103"):
        TaskGraph(**{"tasks": graph().tasks, **change})


def test_load_names_the_file(tmp_path):
    path = tmp_path / "graph.yaml"
    path.write_text("tasks: {a: {question: x, after: [b]}}")
    with pytest.raises(ConfigError, match=r"E104 .*graph\.yaml: tasks\.a\.after: no task 'b'"):
        TaskGraph.load(path)


def test_the_picture_escapes_and_holds_long_names():
    long = "n" * 64
    svg = TaskGraph.from_dict({"name": "<&\x07{x}>", "tasks": {long: {"question": "?"}}}).to_svg()
    root = ET.fromstring(svg)
    assert root.find("{http://www.w3.org/2000/svg}title").text == "<&{x}>"
    assert float(root.get("width")) > 64 * 8
    assert long in svg


@pytest.mark.parametrize("module", ["graph", "strict", "errors"])
def test_importing_it_leaves_torch_alone(module):
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, contextlora, contextlora.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
