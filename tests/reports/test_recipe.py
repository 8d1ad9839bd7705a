"""Recipes: those that are shipped are whole, and every fault in one is told at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from contextlora.cli import app
from contextlora.errors import ConfigError
from contextlora.reports.jobs import expand, unique
from contextlora.reports.recipe import SHIPPED, load_recipe, recipes
from contextlora.reports.work import default_folder

SMALL = {
    "title": "t",
    "paper": "p",
    "scenarios": ["iov"],
    "arms": {"ours": {"method": "paper"}, "other": {"method": "lora", "lr": 2e-3}},
    "presets": {"smoke": {"seeds": 2, "train": {"epochs": 1}, "align": {"epochs": 0}}},
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_are_whole(name: str, tmp_path: Path):
    first = Path(str(SHIPPED / f"{name}.yaml")).read_text().splitlines()[0]
    assert first.startswith(f"# contextlora report {name} --preset laptop")
    for preset in ("smoke", "laptop", "gpu"):
        given = ["scenarios=[city]"] if name == "rad" or name.startswith("so-lora") else []
        recipe = load_recipe(name, preset, given)
        jobs = expand(recipe)
        cells = math.prod(map(len, recipe.sweep.values()))
        assert len(jobs) == recipe.seeds * len(recipe.scenarios) * len(recipe.arms) * cells
        assert [j.seed for j in jobs] == sorted(j.seed for j in jobs)
        assert recipe.published.note
    assert default_folder(recipe) == Path("reports") / f"{name}-gpu"


def test_a_preset_and_overrides_are_put_in(tmp_path: Path):
    recipe = load_recipe(written(tmp_path), "smoke", ["train.lr=0.01", "arms.other.lr=1e-3", "data.test=8"])
    assert (recipe.name, recipe.preset, recipe.seeds, recipe.ours) == ("mine", "smoke", 2, "ours")
    jobs = {j.arm: j.config for j in expand(recipe)}
    assert (jobs["ours"].epochs, jobs["ours"].lr, jobs["other"].lr) == (1, 0.01, 0.001)
    assert (recipe.data.test, recipe.data.train) == (8, 24)  # what the recipe does not say, the shared preset does


def test_a_preset_leaves_arms_out(tmp_path: Path):
    small = SMALL["presets"]["smoke"]
    recipe = load_recipe(written(tmp_path, presets={"smoke": {**small, "without": ["other"]}}), "smoke")
    assert list(recipe.arms) == ["ours"]
    assert list(load_recipe(written(tmp_path), "smoke", ["without=[other]"]).arms) == ["ours"]
    asked = written(tmp_path, presets={"smoke": {**small, "without": ["other"]}})
    assert list(load_recipe(asked, "smoke", ["arms=[other]"]).arms) == ["other"]
    with pytest.raises(ConfigError, match=r"E115.*othr.*other"):
        load_recipe(written(tmp_path, presets={"smoke": {**small, "without": ["othr"]}}), "smoke")


def test_an_arm_may_have_a_model_of_its_own(tmp_path: Path):
    arms = {"ours": {}, "small": {"model": "smol-half"}, "untaught": {"model": "smol-half", "zero_shot": True}}
    ours, small, untaught = expand(load_recipe(written(tmp_path, arms=arms), "smoke"))[:3]
    assert (ours.model, small.model) == ("smol", "smol-half")
    assert ours.base != small.base == untaught.base
    assert ours.id != small.id


def test_arms_are_taken_by_name(tmp_path: Path):
    recipe = load_recipe(written(tmp_path, arms=["LoRA", "ContextLoRA"]), "laptop", ["arms.LoRA.lr=1e-3"])
    assert [(n, a.method, a.batch_size) for n, a in recipe.arms.items()] == [
        ("LoRA", "lora", 4),
        ("ContextLoRA", "paper", 1),
    ]
    assert recipe.arms["LoRA"].lr == 1e-3
    with pytest.raises(ConfigError, match=r"E115 .*no arm 'LORA'\. Did you mean 'LoRA'\?"):
        load_recipe(written(tmp_path, arms=["LORA"]), "smoke")
    with pytest.raises(ConfigError, match=r"E115 .*compares nothing"):
        load_recipe(written(tmp_path, arms={}), "smoke")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"titel": "x"}, "Did you mean 'title'?"),
        ({"arms": {"a": {"metod": "lora"}}}, "Did you mean 'method'?"),
        ({"arms": {"a": {"method": "dora"}}}, "'lora'"),
        ({"arms": {"a": {"zero_shot": True, "lr": 1.0}}}, "leave out lr"),
        ({"arms": {"a": {"seed": 1}}}, "`seeds` counts them"),
        ({"sweep": {"frozen_rato": [1.0]}}, "Did you mean 'frozen_ratio'?"),
        ({"sweep": {"frozen_ratio": [2.0]}}, "less than or equal to 1"),
        ({"train": {"seed": 1}}, "`seeds` counts them"),
        ({"figure": "lines"}, "there is none"),
        ({"seeds": "five"}, "seeds: should be a valid integer"),
        ({"presets": {"smoke": {"modle": "x"}}}, "Did you mean 'model'?"),
    ],
)
def test_faults(tmp_path: Path, changes: dict[str, object], said: str):
    with pytest.raises(ConfigError, match="E103") as e:
        load_recipe(written(tmp_path, **changes), "smoke")
    assert said in str(e.value)


def test_all_faults_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as e:
        load_recipe(written(tmp_path, titel="x", seeds=0, figure="pie"), "smoke")
    assert str(e.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("name", "preset", "given", "code"),
    [
        ("acuracy", "smoke", [], "E115"),
        ("accuracy", "smok", [], "E115"),
        ("accuracy", "smoke", ["scenarios=[iow]"], "E116"),
        ("rad", "smoke", [], "E116"),
        ("accuracy", "smoke", ["seeds"], "E107"),
        ("accuracy", "smoke", ["arms.LoRA.ranks={strategi: 4}"], "E104"),
    ],
)
def test_what_is_not_there(name: str, preset: str, given: list[str], code: str):
    with pytest.raises(ConfigError, match=code):
        expand(load_recipe(name, preset, given))


def test_ids_say_what_decides_a_result_and_nothing_else(tmp_path: Path):
    path = written(tmp_path, arms={**SMALL["arms"], "base": {"zero_shot": True}})
    first = {j.id for j in expand(load_recipe(path, "smoke"))}
    assert first == {j.id for j in expand(load_recipe(path, "smoke", ["title=x", "figure=bars", "read=last"]))}
    assert first == {j.id for j in expand(load_recipe(path, "smoke", ["train.checkpoint_every=3"]))}
    assert len(first & {j.id for j in expand(load_recipe(path, "smoke", ["train.lr=0.1"]))}) == 3  # not those of ours
    for change in ("model=x", "data.train=9", "split=valid", "dtype=float32", "align.epochs=1"):
        assert not first & {j.id for j in expand(load_recipe(path, "smoke", [change]))}, change
    renamed = load_recipe(path, "smoke", ["arms={mine: {method: paper}}"])
    assert {j.id for j in expand(renamed)} < first


def test_a_comparison_can_be_cut_down_to_some_arms():
    """They keep what recipe and preset say of them, and their jobs are the very ones of the whole comparison."""
    whole, some = load_recipe("accuracy", "laptop"), load_recipe("accuracy", "laptop", ["arms=[LoRI-D, ContextLoRA]"])
    assert list(some.arms) == ["LoRI-D", "ContextLoRA"]
    assert all(some.arms[a] == whole.arms[a] for a in some.arms)
    assert {j.id for j in expand(some)} < {j.id for j in expand(whole)}
    with pytest.raises(ConfigError, match=r"E115 .*no arm 'HydraLORA'\. Did you mean 'HydraLoRA'\?"):
        load_recipe("accuracy", "laptop", ["arms=[HydraLORA]"])


def test_an_untrained_arm_is_measured_once_unless_the_seed_changes_its_base(tmp_path: Path):
    path = written(tmp_path, arms={"ours": {}, "base": {"zero_shot": True}})
    assert len(unique(expand(load_recipe(path, "smoke")))) == 3
    assert len(unique(expand(load_recipe(path, "smoke", ["sweep={label_noise: [0.5]}"])))) == 4
    assert len({j.base for j in expand(load_recipe(path, "smoke"))}) == 1


def test_ranks_and_prerequisites_are_an_arms_own(tmp_path: Path):
    arms = {"ours": {}, "wide": {"ranks": {"strategy": 3}, "prerequisites": "all"}}
    ours, wide = expand(load_recipe(written(tmp_path, arms=arms), "smoke"))[:2]
    assert (ours.graph.rank_of("strategy"), wide.graph.rank_of("strategy")) == (8, 3)
    assert wide.graph.prerequisite_rule == "all"


def test_a_folder_that_has_a_recipes_name_is_not_in_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accuracy").mkdir()
    said = CliRunner().invoke(app, ["report", "accuracy", "--preset", "huge"])
    assert said.exit_code == 2
    assert "no preset 'huge'" in said.stderr
    (tmp_path / "accuracy" / "config.yaml").write_text("data: d\n")
    assert "not a run's folder" in CliRunner().invoke(app, ["report", "accuracy"]).stderr


def test_a_recipe_like_another(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: noise\ntitle: mine\nseeds: 2\npresets: {laptop: {data: {test: 9}}}\n")
    mine, noise = load_recipe(path, "laptop"), load_recipe("noise", "laptop")
    assert (mine.title, mine.name, mine.seeds, mine.data.test) == ("mine", "mine", 2, 9)
    assert (mine.arms, mine.sweep, mine.read, mine.published) == (noise.arms, noise.sweep, "last", noise.published)
    assert mine.scenarios == ("iov",)  # of the other's preset

    path.write_text("like: so-lora-scenes\narms: {a: {federation: {aggregate: ffa}}}\npublished: {note: none}\n")
    mine = load_recipe(path, "laptop")  # what the other's presets say of arms that are not here does not matter
    assert list(mine.arms) == ["a"]
    assert (mine.published.note, mine.published.rows) == ("none", {})

    path.write_text("like: nois\n")
    with pytest.raises(ConfigError, match=r"E115 .*no recipe 'nois' is shipped\. Did you mean 'noise'\?"):
        load_recipe(path, "laptop")


def test_a_frozen_ratio_that_is_the_graphs_is_the_same_job():
    main = load_recipe("accuracy", "laptop", ["arms=[ContextLoRA]", "seeds=1"])
    swept = load_recipe("frozen-ratio", "laptop", ["seeds=1"])
    assert {j.id for j in expand(main)} < {j.id for j in expand(swept)}
    assert len({j.id for j in expand(swept)}) == 5
