"""A published comparison from one recipe: what `contextlora report RECIPE` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contextlora.errors import ConfigError, RunError, did_you_mean
from contextlora.reports.comparison import write_comparison
from contextlora.reports.jobs import expand
from contextlora.reports.recipe import load_recipe
from contextlora.reports.store import Store
from contextlora.reports.tables import Findings
from contextlora.reports.work import chosen, default_folder, spread, watched, work


@dataclass(frozen=True)
class Reproduced:
    """What a comparison made.

    Attributes:
        findings: all numbers.
        page: report.html; results.csv lies beside it.
    """

    findings: Findings
    page: Path


def reproduce(
    name: str | Path,
    preset: str = "laptop",
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    out: str | Path | None = None,
    processes: int = 1,
    silent: bool = False,
) -> Reproduced:
    """Does what of a recipe is not done yet, and writes its page.

    Args:
        name: a shipped recipe, or a YAML file.
        preset: "smoke", "laptop" or "gpu".
        overrides: "a.b=value" on the recipe.
        only: scenarios to work on now; the page shows all.
        out: the comparison's folder; None takes reports/RECIPE-PRESET. Several of these calls may share one.
        processes: how many to work with.
        silent: no progress bar.

    Raises:
        ConfigError: E101 to E107, E115, E116. RunError: E514 if stopped by Ctrl-C: the page shows what is done, and the
            same call goes on; E523, E526, E527. Whatever a job raises.
    """
    recipe = load_recipe(name, preset, overrides)
    for scenario in only:
        if scenario not in recipe.scenarios:
            hint = did_you_mean(scenario, recipe.scenarios) or f" It has: {', '.join(recipe.scenarios)}"
            raise ConfigError("E116", f"the recipe has no scenario '{scenario}'.{hint}", where="--only")
    jobs = expand(recipe)
    store = Store(out or default_folder(recipe))
    command = ["contextlora", "report", str(name), "--preset", preset]
    command += [word for text in overrides for word in ("--set", text)]
    stopped = False
    try:
        with watched(chosen(jobs, only), store, silent) as told:
            if processes > 1:
                spread(recipe, only, store, processes, told)
            else:
                work(recipe, chosen(jobs, only), store, told)
    except KeyboardInterrupt:
        stopped = True
    except RunError as e:
        if e.code != "E514":
            raise
        stopped = True
    findings = Findings(recipe, jobs, store)
    page = write_comparison(findings, store.path, command)
    if stopped:
        text = f"stopped; {findings.done} of {findings.total} jobs are done; the same command goes on from here"
        raise RunError("E514", text, where=page)
    return Reproduced(findings, page)
