"""data.jsonl: what is read, what is refused and how it is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from contextlora.data.examples import Example, load_examples
from contextlora.data.records import Record, data_hash, inside, read_records, write_records
from contextlora.errors import DataError
from contextlora.graph import TaskGraph

GRAPH = TaskGraph.from_dict(
    {
        "tasks": {
            "weather": {"question": "What is the weather?", "options": ["clear", "rain", "snow"]},
            "road": {"question": "How is the road?", "options": ["dry", "wet", "icy"], "choose": 2},
            "note": {"question": "Say something.", "after": ["weather"]},
        }
    }
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def put(folder: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "data.jsonl").write_text(text, encoding="utf-8")
    return folder


def refused(folder: Path, graph: TaskGraph = GRAPH, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        load_examples(folder, graph, **options)  # type: ignore[arg-type]
    return caught.value


def test_a_full_record(folder: Path) -> None:
    put(
        folder,
        {
            "image": "images/0.png",
            "answers": {"road": ["icy", "dry"], "weather": "snow"},
            "split": "valid",
            "id": "a",
            "questions": {"weather": "Sky?"},
            "facts": {"cars": 3, "kinds": ["bus", None, 1.5]},
        },
    )
    expected = Example(
        "a",
        (folder / "images/0.png").resolve(),
        {"weather": ("snow",), "road": ("dry", "icy")},  # the graph's order of tasks and of options
        {"weather": "Sky?"},
        "valid",
    )
    assert load_examples(folder, GRAPH) == [expected]
    assert load_examples(folder, GRAPH, split="train") == []


def test_options_of_a_records_own_are_kept_in_its_order(folder: Path) -> None:
    free = TaskGraph.from_dict({"tasks": {"note": {"question": "Which?"}}})
    line = {"answers": {"note": "c", "gone": "p"}, "options": {"note": ["a", "b", "c"], "gone": ["p", "q"]}}
    (example,) = load_examples(put(folder, line), free)
    assert example.options == {"note": ("a", "b", "c")}
    assert example.answers == {"note": ("c",)}
    (record,) = read_records(folder)
    write_records(folder, [record])
    assert load_examples(folder, free) == [example]


def test_bom_crlf_blank_lines_and_line_separators_inside_text(folder: Path) -> None:
    raw = '\ufeff\r\n{"answers": {"note": "one\u2028two"}}\r\n\r\n{"answers": {"note": "x"}}'
    (folder / "data.jsonl").write_bytes(raw.encode())
    assert [e.answers["note"] for e in load_examples(folder, GRAPH)] == [("one\u2028two",), ("x",)]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ('{"answers": {"weather": NaN}}', "E202", "NaN is not a JSON number"),
        ('{"facts": {"a": 1e999}, "answers": {"note": "x"}}', "E202", "1e999 is not a JSON number"),
        ('{"answers": {"note": "x", "note": "y"}}', "E202", "key 'note' appears twice"),
        ('{"answers": {"note": "\\ud800"}}', "E202", "surrogate"),
        ('{"answers": {"note": "x"}', "E202", "column"),
        ("[" * 100_000, "E202", "nested too deeply"),
        ("7" * 5000, "E202", "not valid JSON"),
        ("[]", "E203", "expected keys and values"),
        ("{}", "E203", "answers: is missing"),
        ('{"answers": {}}', "E203", "answers"),
        ('{"answers": ["rain"]}', "E203", "should be an object"),
        ('{"answers": {"note": []}}', "E203", "at least one text"),
        ('{"answers": {"note": 3}}', "E203", "'note' should be text"),
        ('{"answers": {"note": [" "]}}', "E203", "1 to 4000 characters"),
        ('{"answers": {"road": ["wet", "wet"]}}', "E203", "'wet' twice"),
        ('{"answer": {"weather": "rain"}}', "E203", "Did you mean 'answers'?"),
        ('{"answers": {"note": "x"}, "split": "trian"}', "E203", "'train', 'valid' or 'test', got 'trian'"),
        ('{"answers": {"note": "x"}, "id": 7}', "E203", "id: should be"),
        ('{"answers": {"note": "x"}, "facts": {"a": {"b": 1}}}', "E203", "'a' should be"),
        ('{"answers": {"weather": "rian"}}', "E204", "Did you mean 'rain'?"),
        ('{"answers": {"weather": ["rain", "snow"]}}', "E204", "at most 1"),
        ('{"answers": {"wether": "rain"}}', "E204", "Did you mean 'weather'?"),
        ('{"answers": {"colour": "red"}}', "E204", "it answers: colour"),
        ('{"answers": {"note": "x"}, "options": ["x", "y"]}', "E203", 'such as {"quiz": ["a frog", "a newt"]}'),
        ('{"answers": {"note": "x"}, "options": {"note": "x"}}', "E203", "'note' needs 2 to 64 options, got 1"),
        ('{"answers": {"note": "x"}, "options": {"note": ["x", " y"]}}', "E203", "begin or end with a space"),
        ('{"answers": {"note": "x"}, "options": {"note": ["x", "x"]}}', "E203", "'x' twice"),
        ('{"answers": {"note": "frig"}, "options": {"note": ["a", "frog"]}}', "E204", "Did you mean 'frog'?"),
        ('{"answers": {"weather": "rain"}, "options": {"weather": ["rain", "b"]}}', "E204", "leave one of the two out"),
        ('{"answers": {"note": "x"}, "options": {"road": ["x", "y"]}}', "E204", "no answer to this task"),
        ('{"answers": {"note": "x"}, "image": "images/9.png"}', "E206", "1 image is missing: images/9.png"),
        ('{"answers": {"note": "x"}, "image": "images"}', "E206", "missing"),
        (f'{{"answers": {{"note": "x"}}, "image": "{"a" * 600}"}}', "E206", "missing"),
        (f'{{"answers": {{"note": "{"x" * (1 << 20)}"}}}}', "E202", "longer than 1 MiB"),
    ],
)
def test_one_fault_names_file_line_and_remedy(folder: Path, line: str, code: str, says: str) -> None:
    error = refused(put(folder, "", line))
    assert error.code == code
    assert says in str(error)
    assert "data.jsonl" in error.where
    assert error.where.endswith(":2") or "it answers" in says
    assert len(str(error)) < 600


def test_all_faults_at_once_and_no_more_than_twenty(folder: Path) -> None:
    error = refused(put(folder, '{"answers": {"weather": "rian"}}', "[]", '{"answers": {"note": "x"}, "imag": 1}'))
    assert error.message.startswith("3 faults:")
    assert [f"line {n}:" in error.message for n in (1, 2, 3)] == [True] * 3
    error = refused(put(folder, *["[]"] * 57))
    assert error.message.startswith("57 faults, 20 of them:")
    assert error.message.count("\n") == 20


def test_not_utf8_empty_and_absent(folder: Path, tmp_path: Path) -> None:
    (folder / "data.jsonl").write_bytes('{"answers": {"note": "é"}}'.encode("latin-1"))
    assert "not UTF-8" in str(refused(folder))
    (folder / "data.jsonl").write_bytes(b"\n \r\n")
    assert refused(folder).code == "E201"
    (folder / "data.jsonl").unlink()
    assert "no such file" in str(refused(folder))
    assert "no such folder" in str(refused(tmp_path / "absent"))


def test_missing_images_are_one_fault(folder: Path) -> None:
    error = refused(put(folder, *[{"image": f"images/x{i}.png", "answers": {"note": "a"}} for i in range(40)]))
    assert error.code == "E206"
    assert "40 images are missing: images/x0.png," in str(error)
    assert str(error).endswith(", ...")


def test_ids(folder: Path) -> None:
    error = refused(put(folder, *[{"id": "a", "answers": {"note": "x"}}] * 2))
    assert error.code == "E207"
    assert "taken by line 1" in str(error)
    put(folder, *[{"image": "images/0.png", "answers": {"note": n}} for n in "abc"], *[{"answers": {"note": "x"}}] * 2)
    ids = [e.id for e in load_examples(folder, GRAPH)]
    assert ids[:3] == ["images/0.png", "images/0.png#2", "images/0.png#3"]
    assert len(set(ids)) == 5


def test_an_id_that_looks_numbered_is_not_taken_twice(folder: Path) -> None:
    record = {"image": "images/0.png", "answers": {"note": "x"}}
    put(folder, record, record, {**record, "id": "images/0.png#2"})
    assert len({e.id for e in load_examples(folder, GRAPH)}) == 3


def test_hashed_splits(folder: Path) -> None:
    put(folder, *[{"id": f"r{i}", "answers": {"note": "x"}} for i in range(3000)])
    parts = {e.id: e.split for e in load_examples(folder, GRAPH)}
    counts = {s: list(parts.values()).count(s) for s in ("train", "valid", "test")}
    assert 2300 < counts["train"] < 2500
    assert 240 < counts["valid"] < 360
    put(folder, *[{"id": f"r{i}", "answers": {"note": "x"}} for i in range(3001, -1, -2)])
    assert all(parts.get(e.id, e.split) == e.split for e in load_examples(folder, GRAPH))
    put(folder, *[{"image": "images/0.png", "id": f"r{i}", "answers": {"note": "x"}} for i in range(50)])
    assert len({e.split for e in load_examples(folder, GRAPH)}) == 1  # one picture never in train and test
    put(folder, {"answers": {"note": "x"}, "split": "test"}, {"answers": {"note": "y"}})
    assert refused(folder).code == "E208"
    assert "Did you mean 'valid'?" in str(refused(folder, split="vaild"))


def test_a_task_may_leave_the_graph(folder: Path) -> None:
    """Removing a task from the workflow needs no change to the data, whatever its name looks like."""
    both = [{"answers": {"task_1": "a", "task_2": "b", "task_3": "c"}, "questions": {"task_2": "Or?"}}] * 3
    alone = [{"answers": {f"task_{i % 3 + 1}": "a"}} for i in range(9)]
    smaller = TaskGraph.from_dict({"tasks": {"task_1": {"question": "?"}}})
    loaded = load_examples(put(folder, *both), smaller)
    assert [(dict(e.answers), dict(e.questions)) for e in loaded] == [({"task_1": ("a",)}, {})] * 3
    assert len(load_examples(put(folder, *alone), smaller)) == 3


def test_a_misspelled_task_is_no_task_that_left(folder: Path) -> None:
    once = [{"answers": {"weather": "rain"}}] * 30 + [{"answers": {"wheather": "rain"}}]
    error = refused(put(folder, *once))
    assert error.where.endswith(":31")
    assert "Did you mean 'weather'?" in str(error)
    assert len(load_examples(folder, GRAPH, ignore_unknown_tasks=True)) == 30
    asked = [{"answers": {"weather": "rain"}, "questions": {"wether": "Sky?"}}]
    assert "questions: the graph has no task 'wether'" in str(refused(put(folder, *asked)))


@pytest.mark.parametrize(
    "path",
    [
        "../x.png",
        "images/../../x.png",
        "/etc/passwd",
        "C:\\x.png",
        "c:x.png",
        "images\\0.png",
        "a\0b",
        "",
        " ",
        "x" * 1025,
    ],
)
def test_paths_that_no_record_may_hold(folder: Path, path: str) -> None:
    with pytest.raises(ValidationError):
        Record(image=path, answers={"note": ("x",)})
    with pytest.raises(DataError) as caught:
        inside(folder, path)
    assert caught.value.code == "E205"
    assert refused(put(folder, {"image": path, "answers": {"note": "x"}})).code == "E203"


def test_links_may_not_lead_out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (2, 2)).save(other / "secret.png")
    (folder / "images" / "link.png").symlink_to(other / "secret.png")
    (folder / "elsewhere").symlink_to(other)
    (folder / "images" / "loop.png").symlink_to("loop.png")
    (folder / "images" / "same.png").symlink_to("0.png")
    for name, code in [("images/link.png", "E205"), ("elsewhere/secret.png", "E205"), ("images/loop.png", "E205")]:
        assert refused(put(folder, {"image": name, "answers": {"note": "x"}})).code == code
    put(folder, {"image": "images/same.png", "answers": {"note": "x"}})
    assert load_examples(folder, GRAPH)[0].image == (folder / "images/0.png").resolve()


def test_data_hash(folder: Path) -> None:
    put(folder, *[{"image": f"images/{i}.png", "answers": {"note": "x"}} for i in (2, 0, 2)])
    first = data_hash(folder)
    digest = hashlib.sha256((folder / "data.jsonl").read_bytes())
    for i in (0, 2):
        bytes_hash = hashlib.sha256((folder / f"images/{i}.png").read_bytes()).hexdigest()
        digest.update(f"\nimages/{i}.png\0{bytes_hash}".encode())
    assert first == digest.hexdigest()
    Image.new("RGB", (9, 9)).save(folder / "images" / "1.png")
    assert data_hash(folder) == first  # not part of the data
    Image.new("RGB", (9, 9)).save(folder / "images" / "0.png")
    assert data_hash(folder) != first
    (folder / "images" / "0.png").unlink()
    with pytest.raises(DataError, match="E206"):
        data_hash(folder)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
FACT = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT)
RECORDS = st.builds(
    Record,
    image=st.none() | st.sampled_from(["images/0.png", "a b/ü.jpg"]),
    answers=st.dictionaries(
        TEXT, st.lists(TEXT.filter(str.strip), min_size=1, max_size=3, unique=True).map(tuple), min_size=1, max_size=3
    ),
    split=st.sampled_from([None, "train", "valid", "test"]),
    id=st.none() | TEXT,
    questions=st.dictionaries(TEXT, TEXT, max_size=2),
    facts=st.dictionaries(TEXT, FACT | st.lists(FACT, max_size=3), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(records=st.lists(RECORDS, min_size=1, max_size=5))
def test_written_records_read_the_same(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("written")
    assert write_records(folder, records) == folder / "data.jsonl"
    assert read_records(folder) == records


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    old = Record(answers={"note": ("x",)})
    write_records(tmp_path, [old])

    def breaks():
        yield Record(answers={"note": ("y",)})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(tmp_path, breaks())
    assert read_records(tmp_path) == [old]
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]
