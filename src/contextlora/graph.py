"""The task graph: tasks, their order, and which ranks of the shared LoRA each of them owns. No torch here.

Notation of the ContextLoRA paper (section III): G = (V, E) is the graph, an edge (u, v) says that u comes before v,
A is its adjacency matrix, S_1..S_L its levels, P(v) the prerequisites of v. SEMANTICS: an edge comes from `after`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from contextlora.errors import ConfigError, did_you_mean
from contextlora.strict import Strict, parse_yaml, read_yaml, validate

MAX_OPTIONS = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
Rank = Annotated[int, Field(ge=1, le=1024)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]


def check_options(options: Sequence[str], whose: str = "") -> None:
    """Raises ValueError for what cannot be a list to choose from, a task's or a record's own (then `whose` is said)."""
    if not 2 <= len(options) <= MAX_OPTIONS:
        raise ValueError(f"{whose} needs 2 to {MAX_OPTIONS} options, got {len(options)}".lstrip())
    if any(o != o.strip() or len(o.splitlines()) > 1 for o in options):
        raise ValueError(
            f"{whose + ': ' * bool(whose)}an option may not begin or end with a space or hold a line break"
        )


class Task(Strict):
    """One task of the workflow.

    Attributes:
        question: what is asked about the input. A data record may ask in other words.
        options: the possible answers; None means a free answer.
        after: names of the tasks that come directly before this one, P(v).
        rank: r_v, the ranks of this task's block; None takes the graph's.
        alpha: LoRA alpha of the block, whose scale is alpha / rank; None means 2 x rank.
        choose: how many options may be correct at once.
    """

    question: Text
    options: tuple[Text, ...] | None = Field(default=None, strict=False)
    after: tuple[str, ...] = Field(default=(), strict=False)
    rank: Rank | None = None
    alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    choose: Annotated[int, Field(ge=1, le=8)] = 1

    @field_validator("options", "after", mode="before")
    @classmethod
    def _a_list(cls, value: Any, info: Any) -> Any:
        if value is None and info.field_name == "options":
            raise ValueError("is empty; list at least two options, or leave the key out for a free answer")
        if not isinstance(value, list | tuple):
            raise ValueError(f"should be a list, got {value!r}")
        wrong = [v for v in value if not isinstance(v, str)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not text; put it in quotes")
        twice = [v for v in value if value.count(v) > 1]
        if twice:
            raise ValueError(f"'{twice[0]}' appears twice")
        return value

    @field_validator("options")
    @classmethod
    def _some_options(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None:
            check_options(value)
        return value


class _GraphFile(Strict):
    """graph.yaml as written."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = "workflow"
    rank: Rank = 8
    prerequisites: Literal["direct", "all"] = "direct"
    frozen_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    tasks: Annotated[dict[str, Task], Field(min_length=1, max_length=256)]


@dataclass(frozen=True)
class TaskGraph:
    """A directed acyclic graph of tasks, each of which owns one block of ranks.

    Attributes:
        tasks: the tasks by name, in declared order, which is also the order of their blocks.
        rank: default r_v.
        prerequisite_rule: "direct" (P(v) = direct prerequisites) or "all" (every ancestor).
        frozen_ratio: 1 - delta, the part of each prerequisite block that stays frozen while a child trains.
    """

    tasks: Mapping[str, Task]
    name: str = "workflow"
    rank: int = 8
    prerequisite_rule: Literal["direct", "all"] = "direct"
    frozen_ratio: float = 1.0

    def __post_init__(self) -> None:
        self._as_file()
        self._check_names()
        self.levels()  # refuses cycles

    @classmethod
    def load(cls, path: str | Path) -> TaskGraph:
        """Reads graph.yaml. Raises ConfigError (E101 to E106) naming the culprit."""
        return cls.from_dict(read_yaml(path), where=path)

    @classmethod
    def from_dict(cls, data: Any, where: object = "") -> TaskGraph:
        """Builds a graph from the contents of graph.yaml."""
        f = validate(_GraphFile, data, where)
        try:
            return cls(f.tasks, f.name, f.rank, f.prerequisites, f.frozen_ratio)
        except ConfigError as e:
            raise ConfigError(e.code, e.message, where=where) from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of graph.yaml, without defaults."""
        data = json.loads(self._as_file().model_dump_json(exclude_defaults=True))
        return {"name": self.name, "rank": self.rank, **data}

    def _as_file(self) -> _GraphFile:
        """The validated contents of graph.yaml. Raises ConfigError E103 for a graph built by hand that is none."""
        fields = {"name": self.name, "rank": self.rank, "frozen_ratio": self.frozen_ratio}
        return validate(_GraphFile, fields | {"prerequisites": self.prerequisite_rule, "tasks": dict(self.tasks)})

    def save(self, path: str | Path) -> None:
        """Writes graph.yaml."""
        data = self.to_dict()
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        if parse_yaml(text) != data:  # PyYAML folds U+0085 and its like into spaces unless it escapes them
            text = yaml.safe_dump(data, sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")

    # --- order -------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Task names in declared order."""
        return tuple(self.tasks)

    def levels(self) -> list[list[str]]:
        """S_1..S_L: repeatedly the tasks with no remaining prerequisite (ContextLoRA eq. 3, by its text).

        Raises ConfigError E106, naming the cycle, if there is one.
        """
        done: set[str] = set()
        levels: list[list[str]] = []
        while len(done) < len(self.tasks):
            level = [n for n, t in self.tasks.items() if n not in done and done.issuperset(t.after)]
            if not level:
                raise ConfigError("E106", f"the tasks form a cycle: {' -> '.join(self._cycle(done))}")
            levels.append(level)
            done.update(level)
        return levels

    def prerequisites(self, task: str, rule: Literal["direct", "all"] | None = None) -> tuple[str, ...]:
        """P(v) in declared order: the direct prerequisites, or all ancestors, as the graph's rule says."""
        direct = self.task(task).after
        if (rule or self.prerequisite_rule) == "direct":
            return tuple(n for n in self.tasks if n in direct)
        found, todo = set[str](), list(direct)
        while todo:
            if (name := todo.pop()) not in found:
                found.add(name)
                todo += self.tasks[name].after
        return tuple(n for n in self.tasks if n in found)

    def children(self, task: str) -> tuple[str, ...]:
        """The tasks whose P(v) holds `task`."""
        self.task(task)
        return tuple(n for n in self.tasks if task in self.prerequisites(n))

    def adjacency(self) -> list[list[int]]:
        """A: row u, column v is 1 where u comes directly before v; rows and columns in declared order."""
        return [[int(u in t.after) for t in self.tasks.values()] for u in self.tasks]

    # --- blocks ------------------------------------------------------------------------------------------------------

    def task(self, name: str) -> Task:
        """The task called `name`. Raises ConfigError E104 with the nearest name."""
        if name not in self.tasks:
            raise ConfigError("E104", f"no task '{name}' in graph '{self.name}'.{did_you_mean(name, self.tasks)}")
        return self.tasks[name]

    def rank_of(self, task: str) -> int:
        """r_v, the number of ranks in a task's block."""
        return self.task(task).rank or self.rank

    def scale_of(self, task: str) -> float:
        """The block's fixed scale alpha / r_v: it belongs to the block, so that adding a task rescales no other."""
        t = self.task(task)
        return (t.alpha or 2.0 * self.rank_of(task)) / self.rank_of(task)

    @property
    def total_rank(self) -> int:
        """R, the sum of all r_v."""
        return sum(self.rank_of(n) for n in self.tasks)

    def block(self, task: str) -> range:
        """The ranks that `task` owns, as a range within 0..R."""
        self.task(task)
        start = 0
        for name in self.tasks:
            if name == task:
                break
            start += self.rank_of(name)
        return range(start, start + self.rank_of(task))

    def active(self, task: str) -> tuple[str, ...]:
        """The tasks whose blocks are active for `task`: itself and P(v), in declared order."""
        on = {task, *self.prerequisites(task)}
        return tuple(n for n in self.tasks if n in on)

    def subgraph(self, names: Iterable[str]) -> TaskGraph:
        """The graph of `names` alone; prerequisites outside it are dropped."""
        keep = {n for n in names if self.task(n)}
        tasks = {
            n: t.model_copy(update={"after": tuple(p for p in t.after if p in keep)})
            for n, t in self.tasks.items()
            if n in keep
        }
        return TaskGraph(tasks, self.name, self.rank, self.prerequisite_rule, self.frozen_ratio)

    def fingerprint(self, task: str) -> str:
        """A short hash of all that shapes a task's training: question, options, rank, alpha and prerequisites."""
        t = self.task(task)
        what = [t.question, t.options, t.choose, self.rank_of(task), self.scale_of(task), self.prerequisites(task)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    # --- a picture ---------------------------------------------------------------------------------------------------

    def to_svg(self) -> str:
        """The graph as an SVG picture: one column a level, roots on the left."""
        levels, width, step = self.levels(), max(170, 9 * max(map(len, self.tasks)) + 20), 70
        tall = max(len(level) for level in levels)
        at = {
            n: (20 + i * (width + 50), 20 + step * (j + (tall - len(level)) / 2))
            for i, level in enumerate(levels)
            for j, n in enumerate(level)
        }
        lines = [
            f'<path d="M{at[u][0] + width},{at[u][1] + 22} C{at[u][0] + width + 25},{at[u][1] + 22} '
            f'{at[v][0] - 25},{at[v][1] + 22} {at[v][0] - 4},{at[v][1] + 22}" class="edge" marker-end="url(#arrow)"/>'
            for v, t in self.tasks.items()
            for u in t.after
        ]
        boxes = [
            f'<rect x="{x}" y="{y}" width="{width}" height="44" rx="8" class="task"/>'
            f'<text x="{x + width / 2}" y="{y + 19}" class="name">{escape(n)}</text>'
            f'<text x="{x + width / 2}" y="{y + 35}" class="rank">rank {self.rank_of(n)}</text>'
            for n, (x, y) in at.items()
        ]
        w, h = len(levels) * (width + 50) - 10, tall * step + 14
        title = "".join(c for c in self.name if c.isprintable())  # XML knows no escape for control characters
        return _SVG.format(w=w, h=h, title=escape(title), body="\n".join(lines + boxes))

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_names(self) -> None:
        folded: dict[str, str] = {}
        for name, task in self.tasks.items():
            if not _NAME.fullmatch(name):
                raise ConfigError("E105", f"task name '{name}': use letters, digits, '_' and '-', at most 64")
            if other := folded.get(name.lower()):
                raise ConfigError("E105", f"task names '{other}' and '{name}' differ only in case")
            folded[name.lower()] = name
            for p in task.after:
                if p not in self.tasks:
                    raise ConfigError("E104", f"tasks.{name}.after: no task '{p}'.{did_you_mean(p, self.tasks)}")
            if task.choose > 1 and any(", " in o for o in task.options or ()):
                raise ConfigError("E105", f"tasks.{name}.options: with choose > 1 an option may not hold ', '")
            if task.choose > len(task.options or ()) and task.choose > 1:
                raise ConfigError("E105", f"tasks.{name}.choose: more than there are options")

    def _cycle(self, done: set[str]) -> list[str]:
        """One cycle among the tasks that are not `done`, in the order of the edges."""
        path = [next(n for n in self.tasks if n not in done)]
        while True:
            before = next(p for p in self.tasks[path[-1]].after if p not in done)
            if before in path:
                return [before, *reversed(path[path.index(before) :])]
            path.append(before)


_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">
<title>{title}</title>
<style>.task{{fill:#eef4fb;stroke:#2f6db3;stroke-width:1.5}}.edge{{fill:none;stroke:#667;stroke-width:1.5}}
text{{font-family:sans-serif;text-anchor:middle}}.name{{font-size:14px;fill:#123}}.rank{{font-size:11px;fill:#567}}</style>
<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0,0 L8,4 L0,8 z" fill="#667"/></marker></defs>
{body}
</svg>
"""
