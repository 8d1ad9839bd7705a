"""Doing a recipe's jobs: one process, or several that take jobs from the same folder until none is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from contextlora.errors import ContextLoRAError, RunError
from contextlora.reports.jobs import Job, expand, unique
from contextlora.reports.recipe import Recipe
from contextlora.reports.store import Store
from contextlora.strict import validate

PAUSE = 0.5  # seconds between two looks at what other processes do
PATIENCE = 20.0  # seconds for a worker that was asked to stop to end its update and keep a checkpoint
Told = Callable[[str], None]


def work(recipe: Recipe, jobs: Sequence[Job], store: Store, told: Told = lambda _: None) -> None:
    """Does all jobs that are neither done nor being done by another process, and waits for those that are.

    A job whose process dies is taken over at once; its checkpoints make it go on where it was.

    Raises:
        RunError: E514 if stopped by Ctrl-C. Whatever else a job raises.
    """
    from contextlora.reports.bench import Bench
    from contextlora.reports.measures import do

    bench = Bench(recipe, store, told)
    left = unique(jobs)
    while left := [job for job in left if store.result(job.id) is None]:
        did = False
        for job in left:
            with store.claim(job.id) as mine:
                if mine and store.result(job.id) is None:  # it may have been done since we looked
                    bench.told = _prefixed(told, job.title)
                    store.begun(job.id)
                    with _named(job):
                        store.write(job.id, do(bench, job))
                    shutil.rmtree(store.work(job.id), ignore_errors=True)
                    did = True
        if not did:
            told("waiting for another process")
            time.sleep(PAUSE)


@contextmanager
def _named(job: Job) -> Iterator[None]:
    """Puts the job's name on errors: which of a hundred trainings was it?"""
    try:
        yield
    except ContextLoRAError as e:
        if e.code == "E514":
            raise
        raise type(e)(e.code, e.message, where=f"{job.title}, {e.where}" if e.where else job.title) from None


def _prefixed(told: Told, title: str) -> Told:
    return lambda what: told(f"{title}: {what}")


# --- several processes -----------------------------------------------------------------------------------------------


def spread(recipe: Recipe, only: Sequence[str], store: Store, processes: int, told: Told = lambda _: None) -> None:
    """Does the jobs in `processes` new ones, each with its share of the cores, until all are done.

    One that is killed is done without: the others take its job over. An error in one stops all.

    Raises:
        RunError: E527 if all were killed or one broke down. KeyboardInterrupt after all have stopped, resumable.
        Whatever error a worker met.
    """
    share = max(1, (os.cpu_count() or 1) // processes)
    order = {
        "recipe": recipe.model_dump(mode="json", exclude_unset=True),
        "only": list(only),
        "out": str(store.path),
        "threads": share,
    }
    workers = [_start(order, share) for _ in range(processes)]
    try:
        while any(w.poll() is None for w in workers):
            failed = [w for w in workers if (w.poll() or 0) > 0]
            if failed:
                break
            told(f"{sum(w.poll() is None for w in workers)} processes at work")
            time.sleep(PAUSE)
    finally:
        for w in workers:
            assert w.stdin is not None
            w.stdin.close()  # which tells it to stop
        for w in workers:
            w.wait()
    for w in workers:
        _raise_its_error(w)
    if all(w.returncode for w in workers):
        raise RunError("E527", "all processes were killed; run the same command again to go on", where=store.path)


def _start(order: dict[str, Any], threads: int) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "contextlora.reports.work"]
    pipe = subprocess.PIPE
    # a session of its own: Ctrl-C on the terminal reaches us alone, and we stop it in good order
    worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True)
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(order) + "\n")
    worker.stdin.flush()
    return worker


def _raise_its_error(worker: subprocess.Popen[str]) -> None:
    """Raises what a worker wrote down before it ended, here."""
    assert worker.stdout is not None
    said = worker.stdout.read().strip()
    if worker.returncode <= 0:
        return
    if not said:
        raise RunError("E527", f"a process ended with exit code {worker.returncode}; see above")
    fault = json.loads(said)
    for kind in (k for k in ContextLoRAError.__subclasses__() if fault["code"].startswith(k.family)):
        raise kind(fault["code"], fault["message"], where=fault["where"])


def main() -> int:
    """A worker: reads its order from stdin, and stops when stdin ends, because then whoever started it has."""
    order = json.loads(_first_line())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(order["threads"])
    try:
        recipe = validate(Recipe, order["recipe"])
        work(recipe, chosen(expand(recipe), order["only"]), Store(order["out"]))
    except KeyboardInterrupt:
        return 0
    except ContextLoRAError as e:
        if e.code == "E514":
            return 0
        print(json.dumps({"code": e.code, "message": e.message, "where": e.where}), flush=True)
        return 2
    return 0


def _first_line() -> bytes:
    found = b""
    while not found.endswith(b"\n"):  # not sys.stdin: its buffer would swallow the end that the thread waits for
        found += os.read(0, 1) or b"\n"
    return found


def _stop_with_parent() -> None:
    while os.read(0, 1):
        pass
    while True:  # one signal can be lost: a KeyboardInterrupt that rises in a callback or a finaliser is only printed
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)


def chosen(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    """The jobs of the scenarios `only`; of all, if it is empty."""
    return [j for j in jobs if not only or j.data.scenario in only]


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def watched(jobs: Sequence[Job], store: Store, quiet: bool) -> Iterator[Told]:
    """A bar over jobs with time left, or in a log file a line a job; what it gives is told what is going on."""
    ids = [j.id for j in unique(jobs)]
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    day = 86400.0  # over which the speed is taken: jobs may be long
    console, logged = Console(stderr=True), -1
    with Progress(*columns, console=console, disable=quiet, speed_estimate_period=day) as bar:
        row = bar.add_task("", total=len(ids), completed=_done(ids, store))

        def told(what: str) -> None:
            nonlocal logged
            if quiet:
                return
            done = _done(ids, store)
            bar.update(row, completed=done, description=what)
            if not console.is_terminal and done != logged:
                typer.echo(f"{done} of {len(ids)} jobs done. {what}", err=True)
                logged = done

        yield told
        told("")


def _done(ids: Sequence[str], store: Store) -> int:
    return sum(store.result(i) is not None for i in ids)


def default_folder(recipe: Recipe) -> Path:
    """Where a comparison goes unless told otherwise."""
    return Path("reports") / f"{recipe.name}-{recipe.preset}"


if __name__ == "__main__":
    sys.exit(main())
