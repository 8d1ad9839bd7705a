"""Importers: YOLO folders with a recipe, LLaVA conversations, instruction JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from contextlora.data.derive import Box, Recipe
from contextlora.data.examples import Example, load_examples
from contextlora.data.importers import import_instructions, import_llava, import_yolo
from contextlora.data.records import read_records
from contextlora.errors import ConfigError, ContextLoRAError, DataError
from contextlora.graph import TaskGraph

RAD_CLASSES = "Accident\nFighting\nPotholes\nSnatching\nVehicles_Fire\n"


def save_picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def loaded(folder: Path) -> tuple[TaskGraph, list[Example]]:
    graph = TaskGraph.load(folder / "graph.yaml")
    return graph, load_examples(folder, graph)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# --- YOLO ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    folder = tmp_path / "yolo"
    labels = {
        "train/a b": "0 0.1 0.5 0.2 0.2\n1 0.9 0.5 0.5 0.5\n",  # the second is larger: Fighting, .25, right
        "train/c": "4 0.3333 0.5 0.2 0.39\n\n",  # .078: small, left
        "valid/c": "2 0.3334 0.5 0.4 0.2\n3 0.9 0.5 0.2 0.4",  # equally large: the first; .08 is medium
    }
    for i, (name, boxes) in enumerate(labels.items()):
        save_picture(folder / f"{name}.jpg", 40 * i)
        (folder / f"{name}.txt").write_text(boxes)
    (folder / "classes.txt").write_text(RAD_CLASSES)
    return folder


def test_smartcity_rad_by_name(yolo: Path, tmp_path: Path) -> None:
    out = import_yolo(yolo, "smartcity-rad", tmp_path / "out")
    graph, examples = loaded(out)
    assert graph.levels() == [["event", "extent", "place"], ["response"]]
    assert [len(graph.task(n).options or ()) for n in graph.names] == [5, 3, 3, 15]
    got = [(e.split, *(e.answers[n][0] for n in graph.names)) for e in examples]
    assert got == [
        ("train", "street fight", "large", "right", "send riot police"),
        ("train", "vehicle on fire", "small", "left", "send one fire engine"),
        ("valid", "road pothole", "medium", "center", "repair it this week"),
    ]
    sources = [(yolo / n).read_bytes() for n in ("train/a b.jpg", "train/c.jpg", "valid/c.jpg")]
    assert [e.image.read_bytes() for e in examples if e.image] == sources
    assert all(e.image and e.image.name.isascii() and " " not in e.image.name for e in examples)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "yolo"]  # no scratch left behind


def test_the_same_import_again_changes_nothing_and_another_is_refused(yolo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    import_yolo(yolo, "smartcity-rad", out)
    before = snapshot(out)
    assert import_yolo(yolo, "smartcity-rad", out) == out
    assert snapshot(out) == before
    (yolo / "train" / "c.txt").write_text("0 0.5 0.5 0.2 0.39\n")
    with pytest.raises(DataError, match="E222"):
        import_yolo(yolo, "smartcity-rad", out)
    assert snapshot(out) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="E222"):
        import_yolo(yolo, "smartcity-rad", tmp_path / "file")


@pytest.mark.parametrize("layout", ["train/images/{}.jpg train/labels/{}.txt", "images/val/{}.jpg labels/val/{}.txt"])
def test_the_other_usual_layouts(tmp_path: Path, layout: str) -> None:
    image, label = (tmp_path / "yolo" / part.format("x") for part in layout.split())
    save_picture(image)
    label.parent.mkdir(parents=True)
    label.write_text("0 .5 .5 .1 .1")
    (tmp_path / "yolo" / "data.yaml").write_text(
        yaml.safe_dump({"names": dict(enumerate(RAD_CLASSES.split())), "nc": 5})
    )
    _, examples = loaded(import_yolo(tmp_path / "yolo", "smartcity-rad", tmp_path / "out"))
    assert [(e.split, e.answers["event"]) for e in examples] == [
        ("train" if "train" in layout else "valid", ("traffic accident",))
    ]


def test_a_flat_folder_has_no_split(tmp_path: Path) -> None:
    save_picture(tmp_path / "yolo" / "x.png")
    (tmp_path / "yolo" / "x.txt").write_text("0 .5 .5 .1 .1")
    (tmp_path / "yolo" / "classes.txt").write_text(RAD_CLASSES)
    assert read_records(import_yolo(tmp_path / "yolo", "smartcity-rad", tmp_path / "out"))[0].split is None


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("5 .5 .5 .1 .1", "class 5, but there are 5 names"),
        ("-1 .5 .5 .1 .1", "class -1"),
        ("0 .5 .5 .1", "expected `class cx cy w h`"),
        ("0 .1 .1 .2 .1 .2 .2 .1 .2", "boxes only"),
        ("0 120 64 30 30", "outside the picture"),
        ("0 nan .5 .1 .1", "outside the picture"),
        ("0 .5 .5 0 .1", "outside the picture"),
        ("Accident .5 .5 .1 .1", "expected `class cx cy w h`"),
        ("\xff", "not UTF-8"),
        ("", "1 pictures have no boxes (c.jpg)"),
    ],
)
def test_labels_that_cannot_be(yolo: Path, tmp_path: Path, label: str, says: str) -> None:
    (yolo / "train" / "c.txt").write_bytes(label.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        import_yolo(yolo, "smartcity-rad", tmp_path / "out")
    assert caught.value.code == "E223"
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_yolo_sources_that_cannot_be(yolo: Path, tmp_path: Path) -> None:
    def refused(text: str) -> None:
        with pytest.raises(DataError) as caught:
            import_yolo(yolo, "smartcity-rad", tmp_path / "out")
        assert text in str(caught.value)

    (yolo / "classes.txt").write_text(RAD_CLASSES + "Acident\n")
    refused("class 'Acident' has no answer in the recipe's answers.event.classes. Did you mean 'Accident'?")
    (yolo / "classes.txt").unlink()
    refused("no class names")
    (yolo / "classes.txt").write_text(RAD_CLASSES)
    (yolo / "train" / "z.jpg").write_text("not a picture")
    (yolo / "train" / "z.txt").write_text("0 .5 .5 .1 .1")
    refused("E211")
    (yolo / "train" / "z.jpg").unlink()
    save_picture(tmp_path / "secret.jpg")
    (yolo / "train" / "z.jpg").symlink_to(tmp_path / "secret.jpg")
    refused("E205")
    with pytest.raises(DataError, match="no class names"):
        import_yolo(tmp_path / "absent", "smartcity-rad", tmp_path / "out")


# --- recipes ---------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "graph": {
        "tasks": {"what": {"question": "?"}, "many": {"question": "?"}, "act": {"question": "?", "after": ["what"]}}
    },
    "answers": {
        "what": {"classes": {"cat": "animal", "dog": "animal", "car": "thing"}},
        "many": {"measure": "count", "below": {"one": 2, "few": 4}, "otherwise": "many"},
        "act": {
            "table": ["what", "many"],
            "rows": {n: {"one": f"look at {n}", "few": "wait", "many": "wait"} for n in ("animal", "thing")},
        },
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """RECIPE with one value replaced (None: removed), at a path such as answers/what."""
    data = json.loads(json.dumps(RECIPE))
    *steps, last = path.split("/")
    at = data
    for step in steps:
        at = at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return data


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(RECIPE)
    assert recipe.graph.task("what").options == ("animal", "thing")
    assert recipe.graph.task("act").options == ("look at animal", "wait", "look at thing")
    cat, car = Box("cat", 0.5, 0.5, 0.1, 0.1), Box("car", 0.5, 0.5, 0.3, 0.1)
    assert recipe.answers([cat]) == {"what": "animal", "many": "one", "act": "look at animal"}
    assert recipe.answers([cat, car]) == {"what": "thing", "many": "few", "act": "wait"}
    assert recipe.answers([cat] * 4) == {"what": "animal", "many": "many", "act": "wait"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    assert Recipe.load(tmp_path / "r.yaml").graph.to_dict() == recipe.graph.to_dict()


def test_pictures_without_boxes(yolo: Path, tmp_path: Path) -> None:
    (yolo / "train" / "c.txt").unlink()
    (yolo / "classes.txt").write_text("cat\ndog\ncar\ncar2\ncar3\n")
    classes = {"cat": "animal", "dog": "animal", "car": "thing", "car2": "thing", "car3": "thing"}
    skip = changed("answers/what/classes", classes) | {"without_boxes": "skip"}
    (tmp_path / "skip.yaml").write_text(yaml.safe_dump(skip, sort_keys=False))
    assert len(loaded(import_yolo(yolo, tmp_path / "skip.yaml", tmp_path / "skipped"))[1]) == 2
    instead = skip | {"without_boxes": {"what": "nothing", "many": "none", "act": "wait"}}
    (tmp_path / "instead.yaml").write_text(yaml.safe_dump(instead, sort_keys=False))
    graph, examples = loaded(import_yolo(yolo, tmp_path / "instead.yaml", tmp_path / "kept"))
    assert graph.task("many").options == ("one", "few", "many", "none")
    assert dict(examples[1].answers) == {"what": ("nothing",), "many": ("none",), "act": ("wait",)}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed("answers/what", None), "no task 'what' before this one"),
        (changed("answers/what/clases", {}), "Did you mean 'classes'?"),
        (changed("answers/many/otherwise", None), "measure with below and otherwise"),
        (changed("answers/many/classes", {"cat": "x"}), "give either"),
        (changed("answers/many/below", {"one": 4, "few": 4}), "should rise"),
        (changed("answers/many/measure", "__class__"), "answers.many.measure"),
        (changed("answers/act/table", ["what", "mani"]), "Did you mean 'many'?"),
        (changed("answers/act/table", ["act"]), "no task 'act' before this one"),
        (changed("answers/act/rows/thing/few", None), "answers.act.rows.thing: no row for few"),
        (changed("answers/act/rows/thing/feww", "x"), "unknown row 'feww'"),
        (changed("answers/act/rows/thing", "x"), "should have a row for each of one, few, many"),
        (changed("answers/act/rows/thing/few", ["x"]), "should be an answer"),
        (changed("graph/tasks/act", None), "the same tasks"),
        (changed("graph/tasks/act/options", ["x", "y"]), "its options follow from answers"),
        (changed("graph/tasks/act/after", ["wat"]), "Did you mean 'what'?"),
        (changed("graph", {}), "the same tasks"),
        (changed("without_boxes", {"what": "x"}), "give an answer for each of what, many, act"),
        (changed("without_boxes", "ignore"), "without_boxes"),
    ],
)
def test_faulty_recipes(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data, where="r.yaml")
    assert says in str(caught.value)
    assert caught.value.where == "r.yaml"


def test_recipe_names() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'smartcity-rad'"):
        Recipe.load("smart-city-rad")
    with pytest.raises(ConfigError, match="no such file"):
        Recipe.load("absent.yaml")


# --- LLaVA -----------------------------------------------------------------------------------------------------------


def talk(*turns: str, image: str | None = "p/0.png", **more: object) -> dict[str, Any]:
    said = [{"from": "human" if i % 2 == 0 else "gpt", "value": t} for i, t in enumerate(turns)]
    return {"conversations": said, **({"image": image} if image else {}), **more}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    save_picture(tmp_path / "in" / "p" / "0.png")
    items = [talk("<image>\nWhat colour?", "red", "Describe it.", f"A long text {i}.", id=i) for i in range(10)] + [
        talk("Say the colour!\n<image>", "blue", image=None, id=10)
    ]
    (tmp_path / "in" / "talk.json").write_text(json.dumps(items))
    return tmp_path / "in" / "talk.json"


def test_llava_by_turn(llava: Path, tmp_path: Path) -> None:
    graph, examples = loaded(import_llava(llava, tmp_path / "out"))
    assert graph.to_dict()["tasks"] == {
        "task1": {"question": "What colour?", "options": ["blue", "red"]},
        "task2": {"question": "Describe it."},  # ten different answers: free
    }
    assert (examples[3].id, examples[3].answers["task2"], dict(examples[3].questions)) == ("3", ("A long text 3.",), {})
    assert examples[3].image
    assert examples[3].image.parent == (tmp_path / "out" / "images").resolve()
    assert (examples[10].image, dict(examples[10].questions)) == (None, {"task1": "Say the colour!"})


def test_llava_by_question_and_by_names(llava: Path, tmp_path: Path) -> None:
    by_question = {"What colour?": "colour", "Say the colour!": "colour", "Describe it.": "text"}
    graph, _ = loaded(import_llava(llava, tmp_path / "a", tasks=by_question))
    assert graph.names == ("colour", "text")
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(by_question))
    import_llava(llava, tmp_path / "b", tasks=tmp_path / "tasks.yaml")
    assert (tmp_path / "a/data.jsonl").read_bytes() == (tmp_path / "b/data.jsonl").read_bytes()
    assert loaded(import_llava(llava, tmp_path / "c", tasks=["x", "y"]))[0].names == ("x", "y")


@pytest.mark.parametrize(
    ("item", "tasks", "says"),
    [
        (talk("Q", "A", image="../0.png"), None, "E205"),
        (talk("Q", "A", image="/etc/passwd"), None, "E205"),
        (talk("Q", "A", image="p/9.png"), None, "E206"),
        (talk("Q", "A", image=7), None, "image should be one path"),  # type: ignore[arg-type]
        (talk("Q"), None, "by turns"),
        (talk(), None, "by turns"),
        (talk("Q", " "), None, "an empty turn of gpt"),
        ({"conversations": [{"from": "gpt", "value": "A"}] * 2}, None, 'expected {"from": "human"'),
        ({"conversations": "Q A"}, None, "by turns"),
        (talk("What colour", "A"), {"What colour?": "colour"}, "Did you mean 'What colour?'"),
        (talk("Q", "A", "Q", "B"), {"Q": "q"}, "two questions belong to task 'q'"),
        (talk("Q", "A", "R", "B"), ["q"], "more than the 1 turns"),
        (talk("Q", "A"), ["no good name"], "E105"),
        (talk("Q", "A" * 5000), None, "E223"),
    ],
)
def test_llava_that_cannot_be(llava: Path, tmp_path: Path, item: Any, tasks: Any, says: str) -> None:
    llava.write_text(json.dumps([item]))
    with pytest.raises(ContextLoRAError) as caught:
        import_llava(llava, tmp_path / "out", tasks=tasks)
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_llava_folder_of_splits_with_images_elsewhere(llava: Path, tmp_path: Path) -> None:
    text = llava.read_text()
    (tmp_path / "splits").mkdir()
    for name in ("train", "val"):
        (tmp_path / "splits" / f"{name}.json").write_text(text)
    _, examples = loaded(import_llava(tmp_path / "splits", tmp_path / "out", images=llava.parent))
    assert [e.split for e in examples] == ["train"] * 11 + ["valid"] * 11
    assert len({e.id for e in examples}) == 22


# --- instructions ----------------------------------------------------------------------------------------------------


def sets(root: Path) -> Path:
    for name, answers in {
        "boolq": ["true", "false"],
        "gsm 8k": [f"{n}.0" for n in range(30)],
        "big": ["answer10", "answer2"],
    }.items():
        for split in ("train", "valid"):
            rows = [
                {
                    "instruction": f"{name} {i}?",
                    "input": "more" if i == 1 else "",
                    "output": "so",
                    "answer": answers[i % len(answers)],
                }
                for i in range(30)
            ]
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{split}.json").write_text(json.dumps(rows))
    return root


def test_instruction_sets(tmp_path: Path) -> None:
    graph, examples = loaded(import_instructions(sets(tmp_path / "in"), tmp_path / "out"))
    assert {n: t.options for n, t in graph.tasks.items()} == {
        "big": ("answer2", "answer10"),
        "boolq": ("false", "true"),
        "gsm-8k": None,
    }
    assert len(examples) == 180
    by_id = {e.id: e for e in examples}
    one = by_id["boolq-valid-000001"]
    assert (one.split, dict(one.questions), dict(one.answers)) == (
        "valid",
        {"boolq": "boolq 1?\n\nmore"},
        {"boolq": ("false",)},
    )


def test_one_set_one_file_and_output_for_answer(tmp_path: Path) -> None:
    root = sets(tmp_path / "in")
    assert loaded(import_instructions(root / "boolq", tmp_path / "a"))[0].names == ("boolq",)
    assert loaded(import_instructions(root / "boolq" / "train.json", tmp_path / "b"))[0].names == ("boolq",)
    (tmp_path / "mine.json").write_text(
        json.dumps([{"instruction": "Hi", "output": "Ho"}, {"instruction": "1?", "answer": 1}])
    )
    graph, examples = loaded(import_instructions([tmp_path / "mine.json"], tmp_path / "c"))
    assert graph.task("mine").options == ("1", "Ho")
    assert [e.answers["mine"] for e in examples] == [("Ho",), ("1",)]


QUIZ = "Pick one: {q}?\n\nAnswer1: {a} Answer2: {b}\n\nAnswer format: answer1/answer2"


def test_labelled_options_spelled_out(tmp_path: Path) -> None:
    rows = [{"instruction": QUIZ.format(q=q, a=a, b=b), "answer": w} for q, a, b, w in [
        ("wet", "a frog", "a stone: dry", "answer1"), ("dry", "a newt", "sand", "answer2"),
    ]]  # fmt: skip
    (tmp_path / "quiz.json").write_text(json.dumps(rows))
    (tmp_path / "bool.json").write_text(json.dumps([{"instruction": "so?\n\nAnswer format: yes/no", "answer": "yes"}]))
    files = [tmp_path / "quiz.json", tmp_path / "bool.json"]
    graph, (wet, dry, plain) = loaded(import_instructions(files, tmp_path / "out", spell_out=True))
    assert graph.tasks["quiz"].options is None
    assert (wet.questions, wet.answers) == ({"quiz": "Pick one: wet?"}, {"quiz": ("a frog",)})
    assert wet.options == {"quiz": ("a frog", "a stone: dry")}
    assert dry.answers == {"quiz": ("sand",)}
    assert plain.answers == {"bool": ("yes",)}, "labels that stand for nothing else are the answers"
    assert not plain.options
    as_labels, _ = loaded(import_instructions(files, tmp_path / "labels"))
    assert as_labels.tasks["quiz"].options == ("answer1", "answer2")


@pytest.mark.parametrize("asked", [" " * 400_000 + "x", "answer format:" + " " * 400_000 + "x\ny"])
def test_a_question_of_blanks_hangs_nobody(tmp_path: Path, asked: str) -> None:
    rows = [{"instruction": i + asked, "answer": "a"} for i in "pq"]
    (tmp_path / "blank.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="4000"):
        import_instructions(tmp_path / "blank.json", tmp_path / "out", spell_out=True)


@pytest.mark.parametrize(("a", "b", "label", "left"), [("x", "x", "answer1", 1), ("", "y", "answer2", 2)])
def test_options_that_are_no_choice(tmp_path: Path, a: str, b: str, label: str, left: int) -> None:
    (tmp_path / "quiz.json").write_text(json.dumps([{"instruction": QUIZ.format(q="q", a=a, b=b), "answer": label}]))
    with pytest.raises(DataError, match=r"quiz\.json\[0\]") as caught:
        import_instructions(tmp_path / "quiz.json", tmp_path / "out", spell_out=True)
    assert ("got 1" in str(caught.value)) == (left == 1)


@pytest.mark.parametrize(
    "asked",
    [QUIZ.replace("Answer2:", "Other:"), QUIZ.replace("Answer1: {a} Answer2: {b}", "Answer2: {b} Answer1: {a}")],
)
@pytest.mark.parametrize("label", ["answer1", "answer3"])
def test_labels_that_do_not_fit_the_question(tmp_path: Path, asked: str, label: str) -> None:
    text = json.dumps([{"instruction": asked.format(q="q", a="a", b="b"), "answer": label}])
    (tmp_path / "quiz.json").write_text(text)
    with pytest.raises(DataError, match=f"answer '{label}' and format 'answer1/answer2'") as caught:
        import_instructions(tmp_path / "quiz.json", tmp_path / "out", spell_out=True)
    assert caught.value.code == "E223"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "a list of objects"),
        ("[]", "not empty"),
        ("[1]", "a list of objects"),
        ("[{]", "line 1, column"),
        ('[{"instruction": "x", "answer": NaN}]', "NaN"),
        ('[{"instruction": "", "answer": "y"}]', "instruction should be text"),
        ('[{"instruction": "x"}]', "answer should be text"),
        ('[{"instruction": "x", "answer": true}]', "got 'True'"),
        ('[{"instruction": "x", "answer": "y", "input": 3}]', "input text"),
        ('[{"instruction": "x", "answer": "\\udc00"}]', "surrogate"),
    ],
)
def test_instructions_that_cannot_be(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        import_instructions(tmp_path / "a.json", tmp_path / "out")
    assert caught.value.code == "E223"
    assert says in str(caught.value)


def test_instruction_sources_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.json files"):
        import_instructions(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="cannot be read"):
        import_instructions(tmp_path / "absent.json", tmp_path / "out")
    root = sets(tmp_path / "in")
    (root / "boolq" / "extra.json").write_text("[]")
    with pytest.raises(DataError, match="tells no split"):
        import_instructions(root, tmp_path / "out")
