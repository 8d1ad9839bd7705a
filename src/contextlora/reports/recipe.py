"""A recipe: one YAML from which a published comparison is made again, and its presets for machines of three sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from contextlora.config import AlignConfig, Number, TrainConfig, override
from contextlora.data.scenes import SCENARIOS
from contextlora.errors import ConfigError, did_you_mean
from contextlora.graph import Rank
from contextlora.reports.kinds import KINDS
from contextlora.strict import Strict, read_yaml, validate

SHIPPED = resources.files("contextlora") / "recipes"
SHARED = "_shared.yaml"
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Measure = Literal["accuracy", "inference", "masks", "repair", "mechanism", "federated", "layers", "collisions", "radio"]
FEDERATIONS = ("federated", "layers", "collisions", "radio")  # measures of federations
Names = Annotated[tuple[str, ...], Field(strict=False)]


class DataSizes(Strict):
    """Pictures of a drawn scenario by split, and the seed they are drawn from."""

    train: Count = 400
    valid: Count = 100
    test: Count = 400
    seed: Count = 7


class Arm(TrainConfig):
    """One side of a comparison: what it changes of the training, or an answerer that is not trained at all.

    Attributes:
        model: the base model, where it is not the recipe's.
        zero_shot: the base model answers as it is.
        answers: a file of answers that an outside model gave, one object a line:
            {"id": example's id, "answers": {task: [options]}}; "{scenario}" in its path is the scenario's name.
        ranks: r_v of tasks, where they are not the graph's.
        prerequisites: which of its ancestors a task builds on, where it is not the graph's rule.
        federation: keys of a federation that it changes, as in its YAML; `aggregate` is the method.
        alone: each task is trained by a device that hears of nobody, and asked of it.
    """

    model: str | None = None
    zero_shot: bool = False
    answers: str | None = None
    ranks: dict[str, Rank] = Field(default_factory=dict)
    prerequisites: Literal["direct", "all"] | None = None
    federation: dict[str, Any] = Field(default_factory=dict)
    alone: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Arm:
        if "seed" in self.model_fields_set:
            raise ValueError("seed: the recipe's `seeds` counts them")
        others = self.model_fields_set - {"model"}
        if self.kind != "trained" and len(others) > 1:
            extra = ", ".join(sorted(others - {"zero_shot", "answers"}) or ("answers",))
            raise ValueError(f"{self.kind} stands alone; leave out {extra}")
        return self

    @property
    def kind(self) -> Literal["trained", "zero_shot", "answers"]:
        """How it comes to its answers."""
        return "zero_shot" if self.zero_shot else "trained" if self.answers is None else "answers"

    def overrides(self) -> dict[str, Any]:
        """The keys of TrainConfig that it sets."""
        return self.model_dump(exclude_unset=True, include=set(TrainConfig.model_fields))


class Published(Strict):
    """The paper's own numbers, shown beside ours. What it does not print as a number is null, never a guess."""

    note: str = ""
    rows: dict[str, dict[str, Number | None]] = Field(default_factory=dict)


class Preset(Strict):
    """What depends on the machine; a preset sets some of it, and the rest stays as the recipe says.

    Attributes:
        model, dtype, device, align: as in a run's configuration. The projector is aligned on what the arms train on.
        data: sizes of drawn scenarios; a data folder is used as it is.
        train: overrides of TrainConfig that all arms share.
        scenarios: names of drawn scenarios, or data folders.
        federation: of measures of federations: keys of their YAML. Data, model, training and devices come from here.
        devices: how many there are; the i-th has task i modulo the number of tasks.
        split: what is measured on.
        questions: of each task that are asked, drawn once; None asks all.
        sweep: keys of TrainConfig, each with the values it takes; all combinations are run. Of federations, `devices`.
        seeds: how many; they are 0, 1, ...
        arms: what is compared, by the name it is shown under. The first is ours: differences are ours minus each other.
            A list takes arms from recipes/_shared.yaml by name; a preset changes keys of those that are there.
        without: names of arms that are left out, as too large, unless `arms` is overridden by a list.
    """

    model: str = "smol"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"
    data: DataSizes = DataSizes()
    align: AlignConfig = AlignConfig(epochs=0)
    train: TrainConfig = TrainConfig()
    scenarios: Names = ()
    federation: dict[str, Any] = Field(default_factory=dict)
    devices: Annotated[int, Field(ge=1, le=1000)] = 4
    split: Literal["test", "valid"] = "test"
    questions: Annotated[int, Field(ge=1)] | None = None
    sweep: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(default_factory=dict)
    seeds: Annotated[int, Field(ge=1, le=100)] = 5
    arms: dict[str, Arm] = Field(default_factory=dict)
    without: Names = ()

    @field_validator("train")
    @classmethod
    def _no_seed(cls, value: TrainConfig) -> TrainConfig:
        if "seed" in value.model_fields_set:
            raise ValueError("seed: the recipe's `seeds` counts them")
        return value

    @field_validator("sweep")
    @classmethod
    def _trainable(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, points in value.items():
            if key == "seed":
                raise ValueError("seed: the recipe's `seeds` counts them")
            for point in points:
                if key == "devices" and isinstance(point, int) and point > 0:
                    continue
                try:
                    validate(TrainConfig, {key: point})
                except ConfigError as e:
                    raise ValueError(e.message) from None
        return value


class _Comparison(Preset):
    """What is compared.

    Attributes:
        title: in a few words.
        paper: which figure or table of the paper it makes again.
        measure: "accuracy" (share of right answers), "inference" (seconds for one batch), "masks" (accuracy with one
            block masked), "repair" (accuracy before, with and after one task's poisoned answers) or "mechanism" (losses
            and gradients that explain a result). Of federations: "federated" (share of right answers), "layers"
            (entropy and budget of every layer), "collisions" (rates by number of devices) or "radio".
        poisoned: of `repair`, the task whose training answers are shuffled, by scenario or by a data folder's name.
        read: the tasks that tables and figure show: all, or the last of the graph. results.csv has all of them.
        figure: bars by task, or lines over the sweep.
        published: the paper's numbers.
    """

    title: str
    paper: str
    measure: Measure = "accuracy"
    poisoned: dict[str, str] = Field(default_factory=dict)
    read: Literal["all", "last"] = "all"
    figure: Literal["bars", "lines"] = "bars"
    published: Published = Published()

    @model_validator(mode="after")
    def _lines_need_a_sweep(self) -> _Comparison:
        if self.figure == "lines" and not self.sweep:
            raise ValueError("figure: lines run over a sweep, and there is none; use bars")
        return self

    @model_validator(mode="after")
    def _federations_are_measured_as_such(self) -> _Comparison:
        given = bool(self.federation) or "devices" in self.sweep or any(a.federation for a in self.arms.values())
        if given and self.measure not in FEDERATIONS:
            raise ValueError(f"federation, devices: only for measure {', '.join(FEDERATIONS)}")
        return self

    @model_validator(mode="after")
    def _arms_can_be_measured(self) -> _Comparison:
        for name, arm in self.arms.items():
            if arm.kind not in (allowed := KINDS[self.measure].arms):
                text = f"arms.{name}: {self.measure} is not taken of {arm.kind} arms, only of {', '.join(allowed)}"
                raise ValueError(text)
        return self

    @model_validator(mode="after")
    def _poison_is_for_repair(self) -> _Comparison:
        if self.poisoned and self.measure != "repair":
            raise ValueError("poisoned: only `measure: repair` poisons a task; for other noise, sweep label_noise")
        return self


class RecipeFile(_Comparison):
    """A recipe as written, with its presets. `like: NAME` on top takes over what it does not say itself."""

    presets: dict[str, Preset] = Field(default_factory=dict)


class Recipe(_Comparison):
    """A recipe with one preset put in: all that says what is run.

    Attributes:
        name: of the recipe.
        preset: that was put in.
    """

    name: str
    preset: str

    @property
    def ours(self) -> str:
        """The name of the first arm."""
        return next(iter(self.arms))


def load_recipe(name: str | Path, preset: str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe and puts a preset in.

    Args:
        name: a shipped recipe's name, or a YAML file. Relative paths in a file count from its folder.
        preset: "smoke" (seconds), "laptop" or "gpu"; whatever the recipe has.
        overrides: "a.b=value" strings, set last; paths in them count from here. "arms=[A, B]" keeps these arms alone.

    Raises:
        ConfigError: E101 to E103, E107; E115 an unknown recipe or preset, E116 an unknown scenario.
    """
    path = _find(str(name))
    raw = _with_shared(_read(path), path)
    written = validate(RecipeFile, raw, path)
    if preset not in written.presets:
        text = f"no preset '{preset}'.{did_you_mean(preset, written.presets)} There are: {', '.join(written.presets)}"
        raise ConfigError("E115", text, where=path)
    home = path.parent if str(path) == str(name) else Path()
    data: Any = _at_home(merged(raw, raw.pop("presets")[preset]), home)
    arms = data["arms"]
    for text in overrides:
        data = override(data, text)
    if isinstance(data["arms"], list):  # who asks for an arm by name gets it, however large
        data |= {"arms": {n: _arm(arms, n, path) for n in data["arms"]}, "without": []}
    recipe = validate(Recipe, {**data, "name": path.stem, "preset": preset}, path)
    for name in recipe.without:
        _arm(recipe.arms, name, path)
        del recipe.arms[name]
    if not recipe.arms:
        raise ConfigError("E115", "compares nothing; name `arms`", where=path)
    if not recipe.scenarios:
        raise ConfigError("E116", "names no data; add --set scenarios=[FOLDER], made by contextlora init", where=path)
    for scenario in recipe.scenarios:
        if scenario not in SCENARIOS and not (Path(scenario) / "data.jsonl").is_file():
            hint = did_you_mean(scenario, SCENARIOS) or f" Drawn scenarios: {', '.join(SCENARIOS)}"
            raise ConfigError("E116", f"'{scenario}' is no scenario and no data folder.{hint}", where=path)
    return recipe


def recipes() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(Path(f.name).stem for f in SHIPPED.iterdir() if f.name.endswith(".yaml") and f.name != SHARED)


def _find(name: str) -> Path:
    """The file that `name` means. Raises ConfigError E115."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in (known := recipes()):
        text = f"no recipe and no run's folder '{name}'.{did_you_mean(name, known)} Recipes: {', '.join(known)}"
        raise ConfigError("E115", text, where="report")
    return Path(str(SHIPPED / f"{name}.yaml"))


def _read(path: Path) -> Any:
    """A recipe's YAML, on top of that of the shipped recipe it is `like`; arms and published numbers are never mixed.

    Raises ConfigError E115 for one that is not shipped.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or "like" not in raw:
        return raw
    other = raw.pop("like")
    if other not in (known := recipes()):
        text = f"like: no recipe '{other}' is shipped.{did_you_mean(str(other), known)} There are: {', '.join(known)}"
        raise ConfigError("E115", text, where=path)
    base = _read(_find(other))
    if "arms" in raw:
        for preset in base["presets"].values():
            preset.pop("without", None)
    return merged(base, raw) | {k: raw[k] for k in ("arms", "published") if k in raw}


def _with_shared(raw: Any, path: Path) -> Any:
    """A recipe's YAML on top of the shared one; only the arms that it names.

    Raises ConfigError E115 for an arm that is not among the shared ones.
    """
    if not isinstance(raw, dict):
        return raw
    shared = read_yaml(Path(str(SHIPPED / SHARED)))
    named, known = raw.get("arms"), shared["arms"]
    if isinstance(named, list):
        raw = {**raw, "arms": {n: _arm(known, n, path) for n in named}}
    mine = raw.get("presets", {})
    if not isinstance(mine, dict):
        return raw
    presets = {p: merged(shared["presets"].get(p, {}), mine.get(p) or {}) for p in {**shared["presets"], **mine}}
    for p in presets.values():
        p["arms"] = {n: arm for n, arm in p.get("arms", {}).items() if n in raw.get("arms", {})}
    return {**raw, "presets": presets}


def _arm(known: Mapping[str, Any], name: Any, path: Path) -> Any:
    """The arm of that name. Raises ConfigError E115."""
    if name not in known:
        text = f"no arm '{name}'.{did_you_mean(name, known)} There are: {', '.join(known)}"
        raise ConfigError("E115", text, where=path)
    return known[name]


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`one` with what `other` sets, mappings key by key; a sweep or a set of arms is replaced as a whole."""
    found = dict(one)
    for key, value in other.items():
        deep = isinstance(value, dict) and isinstance(found.get(key), dict) and key != "sweep"
        found[key] = merged(found[key], value) if deep else value
    return found


def _at_home(data: dict[str, Any], home: Path) -> dict[str, Any]:
    """Paths in a recipe's file, from where the command is run."""
    scenarios = [s if s in SCENARIOS else str(home / s) for s in data.get("scenarios", ())]
    arms = {
        name: {**arm, "answers": str(home / arm["answers"])} if arm.get("answers") else arm
        for name, arm in data["arms"].items()
    }
    return {**data, "arms": arms, **({"scenarios": scenarios} if scenarios else {})}
