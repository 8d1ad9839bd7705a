"""The graph's order equals networkx on 500 random graphs, and what is written reads back the same."""

import random
import xml.etree.ElementTree as ET
from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contextlora.errors import ConfigError
from contextlora.graph import TaskGraph

SVG = "{http://www.w3.org/2000/svg}"


def reference(graph):
    other = nx.DiGraph()
    other.add_nodes_from(graph.names)
    other.add_edges_from((p, n) for n, t in graph.tasks.items() for p in t.after)
    return other


@pytest.mark.parametrize("first", range(0, 500, 100))
def test_order_equals_networkx(random_graph, first):
    for seed in range(first, first + 100):
        graph = random_graph(seed, most=14)
        other, declared = reference(graph), graph.names.index
        assert graph.levels() == [sorted(level, key=declared) for level in nx.topological_generations(other)]
        assert graph.adjacency() == nx.to_numpy_array(other, graph.names, dtype=int).tolist()
        everything = TaskGraph(graph.tasks, prerequisite_rule="all")
        for n in graph.names:
            direct = tuple(sorted(other.predecessors(n), key=declared))
            ancestors = tuple(sorted(nx.ancestors(other, n), key=declared))
            assert graph.prerequisites(n) == graph.prerequisites(n, "direct") == direct
            assert everything.prerequisites(n) == graph.prerequisites(n, "all") == ancestors
            assert graph.children(n) == tuple(sorted(other.successors(n), key=declared))
            assert everything.children(n) == tuple(sorted(nx.descendants(other, n), key=declared))
            assert graph.active(n) == tuple(sorted({n, *direct}, key=declared))


def test_blocks_tile_the_ranks(random_graph):
    for seed in range(200):
        graph = random_graph(seed)
        assert [r for n in graph.names for r in graph.block(n)] == list(range(graph.total_rank))
        assert [len(graph.block(n)) for n in graph.names] == [graph.tasks[n].rank for n in graph.names]
        assert all(graph.scale_of(n) * graph.rank_of(n) == graph.tasks[n].alpha for n in graph.names)


def test_every_cycle_is_refused_and_the_one_named_is_real():
    cyclic = 0
    for seed in range(500):
        rng = random.Random(seed)
        names = [f"t{i}" for i in range(rng.randint(1, 9))]
        share = rng.random() * 0.4
        tasks = {n: {"question": "?", "after": [p for p in names if rng.random() < share]} for n in names}
        edges = {(p, n) for n, t in tasks.items() for p in t["after"]}
        acyclic = nx.is_directed_acyclic_graph(nx.DiGraph(edges)) if edges else True
        if acyclic:
            TaskGraph.from_dict({"tasks": tasks})
            continue
        cyclic += 1
        with pytest.raises(ConfigError) as e:
            TaskGraph.from_dict({"tasks": tasks})
        assert e.value.code == "E106"
        path = e.value.message.partition("cycle: ")[2].split(" -> ")
        assert path[0] == path[-1]
        assert len(path) == len(set(path)) + 1 >= 2
        assert set(pairwise(path)) <= edges
    assert cyclic > 100


def test_subgraph_drops_outside_edges_and_keeps_blocks(random_graph):
    for seed in range(100):
        graph = random_graph(seed)
        keep = random.Random(seed).sample(graph.names, random.Random(seed).randint(1, len(graph.names)))
        sub = graph.subgraph(keep)
        assert sub.adjacency() == nx.to_numpy_array(reference(graph).subgraph(keep), sub.names, dtype=int).tolist()
        assert sub.names == tuple(n for n in graph.names if n in keep)
        assert all(sub.scale_of(n) == graph.scale_of(n) and sub.rank_of(n) == graph.rank_of(n) for n in keep)


printable = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
option = printable.filter(lambda o: o == o.strip() and len(o.splitlines()) == 1 and ", " not in o)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,11}", fullmatch=True)


@st.composite
def graphs(draw):
    called = draw(st.lists(names, min_size=1, max_size=5, unique_by=str.lower))
    tasks = {}
    for i, n in enumerate(called):
        tasks[n] = {
            "question": draw(printable),
            "after": draw(st.lists(st.sampled_from(called[:i]), unique=True)) if i else [],
        }
        if draw(st.booleans()):
            tasks[n]["options"] = draw(st.lists(option, min_size=2, max_size=4, unique=True))
            tasks[n]["choose"] = draw(st.integers(1, 2))
        if draw(st.booleans()):
            tasks[n]["rank"] = draw(st.integers(1, 1024))
            tasks[n]["alpha"] = draw(st.floats(0.001, 4096))
    order = draw(st.permutations(called))
    return {
        "name": draw(printable),
        "rank": draw(st.integers(1, 1024)),
        "prerequisites": draw(st.sampled_from(["direct", "all"])),
        "frozen_ratio": draw(st.floats(0, 1)),
        "tasks": {n: tasks[n] for n in order},
    }


@settings(max_examples=150, deadline=None)
@given(data=graphs())
def test_what_is_written_reads_back(tmp_path_factory, data):
    graph = TaskGraph.from_dict(data)
    assert TaskGraph.from_dict(graph.to_dict()) == graph
    path = tmp_path_factory.getbasetemp() / "graph.yaml"
    graph.save(path)
    again = TaskGraph.load(path)
    assert again == graph
    assert again.names == graph.names
    assert again.levels() == graph.levels()
    assert [again.fingerprint(n) for n in graph.names] == [graph.fingerprint(n) for n in graph.names]


@settings(max_examples=60, deadline=None)
@given(data=graphs())
def test_the_picture_is_xml_that_shows_every_task(data):
    graph = TaskGraph.from_dict(data)
    root = ET.fromstring(graph.to_svg())
    assert [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "name"] == [
        n for s in graph.levels() for n in s
    ]
    assert len(root.findall(f"{SVG}path")) == sum(map(sum, graph.adjacency()))
    assert (root.find(f"{SVG}title").text or "") == "".join(c for c in graph.name if c.isprintable())
