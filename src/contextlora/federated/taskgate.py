"""The task-aware gate: which tasks' adapters answer a prompt, by its likeness to their prompts (SO-LoRA eq. 26, 27).

    g_i = relu(<h_i - h, x - h>) / ||h_i - h||^2        h the mean of all h_i

x is a prompt's input of one layer, averaged over its tokens, and h_i the mean of x over the task's prompts. So g_i is 1
at h_i, grows along the way from h to h_i and is 0 on the other side of h. Nothing is trained; h_i travels with the
task's adapter. (Scaling A's columns by h, as eq. 26 can be read, does not route.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from contextlora.errors import PeerError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TaskMean:
    """What a task's prompts look like to the base model: two vectors that travel with its adapter.

    Attributes:
        count: prompts seen, N.
        mean: h_i, (d,).
        squares: sum over the prompts of (x - h_i)^2, (d,).
    """

    count: int
    mean: Array
    squares: Array

    @classmethod
    def of(cls, pooled: NDArray[np.floating]) -> TaskMean:
        """Of some prompts' pooled inputs, (N, d)."""
        x = np.asarray(pooled, np.float64)
        if x.ndim != 2 or not len(x) or not np.isfinite(x).all():
            raise PeerError(
                "E617", f"a task's mean needs finite inputs (prompts, d) of a prompt or more, got {x.shape}"
            )
        mean = x.mean(0)
        return cls(len(x), mean, ((x - mean) ** 2).sum(0))

    def merged(self, other: TaskMean) -> TaskMean:
        """Of the prompts of both: a stream of batches, or of devices that share a task."""
        count = self.count + other.count
        step = other.mean - self.mean
        squares = self.squares + other.squares + step**2 * (self.count * other.count / count)
        return TaskMean(count, self.mean + step * (other.count / count), squares)


class TaskGate:
    """g of all tasks for a prompt, and the decision that none of them is meant.

    Args:
        means: by task.
        scaled: weigh each coordinate of <., .> by 1 / its variance within the tasks, so that those which are loud in
            every prompt no longer rule; g is still 1 at h_i. Better where tasks share their wording, else no better.
        sharpness: beta; above 0 the gates that are not 0 become softmax(beta g), which keeps close tasks' adapters from
            answering along.
        floor: a prompt none of whose g reaches it is foreign: all its gates are 0, the base model answers.
        reach: so is a prompt that is further from every h_i than `reach` times the root mean square distance of that
            task's own; beyond it, a task's gate is 0 whatever the direction.

    Attributes:
        tasks: in the order of `means`; columns of the gates.
    """

    def __init__(
        self,
        means: Mapping[str, TaskMean],
        *,
        scaled: bool = False,
        sharpness: float = 0.0,
        floor: float = 0.5,
        reach: float = 1.5,
    ):
        if not means or len({m.mean.shape for m in means.values()}) != 1:
            raise PeerError("E617", "a gate needs the means of a task or more, all of one layer's input")
        self.tasks = tuple(means)
        self.sharpness, self.floor, self.reach = sharpness, floor, reach
        self._h = np.stack([m.mean for m in means.values()])
        freedom = max(1, sum(m.count - 1 for m in means.values()))
        within = np.sum([m.squares for m in means.values()], axis=0) / freedom
        self._weight = np.ones_like(within)
        if scaled and within.any():
            self._weight = 1 / (within + 0.01 * within.mean())  # a coordinate that hardly moves must not rule alone
        self._radius = np.array([np.sqrt(m.squares @ self._weight / max(1, m.count - 1)) for m in means.values()])

    def gates(self, pooled: NDArray[np.floating]) -> Array:
        """g, (prompts, tasks), for pooled inputs (prompts, d). A foreign prompt's row is all 0."""
        x, centre = np.asarray(pooled, np.float64), self._h.mean(0)
        towards = (self._h - centre) * self._weight
        length = (towards * (self._h - centre)).sum(1)
        # one task alone, or one in the midst of the others, lies in no direction: then only distance tells
        g = np.where(length > 0, np.maximum((x - centre) @ towards.T, 0) / np.where(length > 0, length, 1), 1.0)
        far = np.sqrt(((x[:, None] - self._h) ** 2 * self._weight).sum(-1))
        g[far > self.reach * self._radius] = 0
        g[g.max(1) < self.floor] = 0
        if self.sharpness:
            raised = np.where(g > 0, np.exp(self.sharpness * (g - g.max(1, keepdims=True))), 0)
            g = raised / np.maximum(raised.sum(1, keepdims=True), 1e-300)
        return g

    def routes(self, pooled: NDArray[np.floating]) -> list[str | None]:
        """The task each prompt is likest, None where it is foreign."""
        g = self.gates(pooled)
        return [self.tasks[best] if row[best] > 0 else None for row, best in zip(g, g.argmax(1), strict=True)]


def confusion(tasks: Sequence[str], true: Sequence[str | None], routed: Sequence[str | None]) -> NDArray[np.int64]:
    """How often prompts of each task went to each, (tasks + 1, tasks + 1).

    Rows are true tasks, columns where they were routed; the last of both stands for no task of these. So the last row
    holds foreign prompts, and of it the last column those that the base model rightly answered.
    """
    place = {t: i for i, t in enumerate(tasks)}
    counts = np.zeros((len(tasks) + 1, len(tasks) + 1), np.int64)
    for t, r in zip(true, routed, strict=True):
        counts[place.get(t or "", -1), place.get(r or "", -1)] += 1
    return counts


def out_of_task(counts: NDArray[np.int64]) -> tuple[float, float]:
    """From a confusion matrix, the share of the tasks' own prompts and of foreign ones that no adapter answered.

    NaN where there was no such prompt.
    """
    own, foreign = counts[:-1].sum(), counts[-1].sum()
    return (
        float(counts[:-1, -1].sum() / own) if own else float("nan"),
        float(counts[-1, -1] / foreign) if foreign else float("nan"),
    )
