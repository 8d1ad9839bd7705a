"""A project to start from: config.yaml beside a data folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from contextlora.data.importers import import_instructions, import_llava, import_yolo
from contextlora.data.records import Record, write_records
from contextlora.data.scenes import build
from contextlora.errors import ConfigError

CONFIG = """\
# A run of contextlora. Unknown keys are errors; `contextlora check config.yaml` says what they cost.
model: smol              # the embedded model, a hub id, or a folder
data: data               # holds data.jsonl, images/ and graph.yaml, the tasks and what each comes after
out: runs                # metrics, checkpoints, and at the end adapter/
train:
  epochs: 2
  batch_size: 4          # samples of one task in one update
  lr: 0.002              # for small models and few updates; the paper's 0.0002 for large ones
  layers: top 1/3        # everything below is computed only once; "all" can learn more and takes longer
  context: gold          # prompts name what comes before: the labels in training, the model's own answers ever after
  seed: 0
"""
ALIGN = """\
align:
  epochs: 0              # fits the embedded model's projector to these pictures first, in about a minute
"""

GRAPH = """\
# Tasks in any order; `after` names what a task builds on. Every task owns `rank` ranks of the shared LoRA.
name: crossing
rank: 8
tasks:
  light:
    question: What colour is the traffic light?
    options: [red, amber, green]
  road:
    question: Is the road dry or wet?
    options: [dry, wet]
  action:
    question: What should the driver do?
    options: [stop, slow down, drive on]
    after: [light, road]
"""

COUNT = 36


def start_project(
    folder: str | Path,
    *,
    scene: str | None = None,
    yolo: Path | None = None,
    recipe: str | None = None,
    llava: Path | None = None,
    instructions: Sequence[Path] | None = None,
    spell_out: bool = False,
    sizes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Makes `folder`/config.yaml and `folder`/data, and never overwrites anything.

    Args:
        folder: the project's folder.
        scene: draw this benchmark.
        yolo, recipe: import a YOLO folder by a recipe.
        llava: import LLaVA conversations.
        instructions, spell_out: import instruction JSON, its labelled options spelled out or not.
        sizes: of a scene: train, valid, test and seed.
        progress: called with (pictures drawn, of how many).

    Returns:
        The path of config.yaml.

    Raises:
        ConfigError: E108 for sources that do not go together, E109 if a project is here already. DataError: as the
            importers.
    """
    folder = Path(folder)
    given = [n for n, v in {"scene": scene, "yolo": yolo, "llava": llava, "instructions": instructions}.items() if v]
    if len(given) > 1:
        raise ConfigError("E108", f"give one source, not {' and '.join(given)}", where="init")
    if bool(yolo) != bool(recipe):
        raise ConfigError("E108", "--yolo and --recipe go together", where="init")
    if spell_out and not instructions:
        raise ConfigError("E108", "--spell-out goes with --instructions", where="init")
    config, data = folder / "config.yaml", folder / "data"
    if config.exists() or (not given and data.exists()):
        raise ConfigError("E109", "there is a project here already; name a new folder", where=folder)
    folder.mkdir(parents=True, exist_ok=True)
    if scene:
        build(scene, data, **(sizes or {}), progress=progress)
    elif yolo and recipe:
        import_yolo(yolo, recipe, data)
    elif llava:
        import_llava(llava, data)
    elif instructions:
        import_instructions(list(instructions), data, spell_out=spell_out)
    else:
        _example(data)
    many = bool(scene or yolo)
    config.write_text(CONFIG + ALIGN * many, encoding="utf-8")  # last: it says that the rest is whole
    return config


def _example(data: Path) -> None:
    """Draws a traffic light over a road, 36 times: small enough to read, enough to try every command on."""
    (data / "images").mkdir(parents=True)
    (data / "graph.yaml").write_text(GRAPH, encoding="utf-8")
    records = []
    for i in range(COUNT):
        light, road = ("red", "amber", "green")[i % 3], ("dry", "wet")[i // 3 % 2]
        action = "stop" if light == "red" else "slow down" if light == "amber" or road == "wet" else "drive on"
        name = f"images/{i:02}.png"
        _draw(i, light, road).save(data / name)
        split = "train" if i < COUNT * 2 // 3 else "valid" if i < COUNT * 5 // 6 else "test"
        answers = {"light": (light,), "road": (road,), "action": (action,)}
        records.append(Record(image=name, answers=answers, split=split))  # type: ignore[arg-type]
    write_records(data, records)


def _draw(i: int, light: str, road: str) -> Image.Image:
    picture = Image.new("RGB", (96, 96), (170 + i, 200, 225))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 60, 96, 96), fill="#8a8f96" if road == "dry" else "#2c3e58")
    x = 10 + 7 * (i % 9)
    pen.rectangle((x, 8, x + 18, 56), fill="#222222")
    for row, lamp in enumerate(("red", "amber", "green")):
        colour = {"red": "#ff2b20", "amber": "#ffb000", "green": "#12c04a"}[lamp] if lamp == light else "#444444"
        pen.ellipse((x + 3, 10 + 15 * row, x + 15, 22 + 15 * row), fill=colour)
    return picture
