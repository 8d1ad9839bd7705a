"""ContextGear's own runtime, carrying out a plan: what `launch` does on a device, one update at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping

from model import Setting
from padding import Device, emulate
from torch import Tensor

from contextlora.gear.pipeline import PipelineTeamStage
from contextlora.gear.plan import Plan
from contextlora.gear.runtime import TeamStage, exchange, prefix_of, stream, teams
from contextlora.lora.attach import gated_layers
from contextlora.models.inputs import ImageFeatures
from contextlora.training.loop import task_samples
from contextlora.training.prefix import FrozenPrefix
from contextlora.training.step import Order


class Planned:
    """One device of a plan."""

    def __init__(self, setting: Setting, reader: ImageFeatures, plan: Plan, device: Device):
        self.setting, self.reader, self.plan, self.device = setting, reader, plan, device
        team = teams(plan, device.name)[0]
        assert team is not None, "every device of a plan of one stage has a part in it"
        self.team, g = team, team.group
        runs = tuple(r for r in setting.phase.runs if set(r) <= set(g.tasks))
        self.phase = dataclasses.replace(setting.phase, runs=runs)
        part = next(p for p in (*g.prefix, *g.trainers) if p.device == device.name)
        emulate(reader.model, device, inputs=part.start == 0, remember=g.ahead == "local" and g.cut == 1)

    def check(self, reference: Mapping[str, Tensor]) -> float:
        """The largest difference to a single process's gradients of the first update, relative to the largest."""
        if not self.team.trains:
            stream(self.team, self.reader, self._orders(), 1, {})
            return 0.0
        stage, worst = self._stage(1), 0.0
        stage._gradients(stage.runs, 0)
        for path, layer in gated_layers(self.reader.model).items():
            for task in self.team.group.tasks:
                rows = self.setting.graph.block(task)
                for side in "AB":
                    mine, whole = layer.learning[f"{task}_{side}"].grad, reference[f"{path}.{side}"]
                    if (
                        mine is not None
                    ):  # else another device's layer; the runtime itself asserts that it has all of its own
                        wanted = whole[rows.start : rows.stop]
                        worst = max(worst, float((mine - wanted).abs().max() / whole.abs().max()))
        return worst

    def updates(self) -> Iterator[float]:
        """Trains to the end; gives the time after each update. A device of the prefix gives none."""
        if not self.team.trains:
            orders = self._orders()
            stream(self.team, self.reader, orders, max(o.total for o in orders), {})
            return
        stage = self._stage(None)
        for update in range(stage.total):
            stage.update(update)
            yield time.perf_counter()

    def exchange(self) -> None:
        """Gives all devices what was trained."""
        exchange(self.reader.model, self.plan, 0, self.phase.sharing)

    def _stage(self, total: int | None) -> TeamStage:
        make = PipelineTeamStage if self.team.group.form == "pipeline" else TeamStage
        none = FrozenPrefix(self.reader, 0)
        stage = make(self.team, self.reader, none, self.setting.examples, self.phase, self.setting.config)
        stage.prefix = prefix_of(self.team, self.reader, stage.runs, total or stage.total, {})
        return stage

    def _orders(self) -> list[Order]:
        s = self.setting
        samples = {t: task_samples(self.reader, s.examples, t, "none", {}) for t in self.phase.tasks}
        return [Order(run, [x for t in run for x in samples[t]], s.config) for run in self.phase.runs]
