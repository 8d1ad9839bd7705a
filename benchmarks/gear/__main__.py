"""ContextGear beside what people use today, on emulated fleets: one run, the same samples, bytes counted.

    python benchmarks/gear [--quick] [--only NAME ...] [--methods NAME ...] [--scale 20] [--csv FILE]
    python benchmarks/gear --summary FILE [FILE ...]

Every method's gradients are compared with a single process's before anything is timed. See docs/gear.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from configurations import CONFIGURATIONS, QUICK, Configuration
from methods import METHODS, Row, compared, run
from model import BYTES, reference, thin
from report import markdown, read, summary
from testbed import goodput, isolate


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is asked for and prints tables."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gear", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two devices, three methods, under a minute")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(CONFIGURATIONS), help=f"some of: {', '.join(CONFIGURATIONS)}"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", choices=list(METHODS), help=f"some of: {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--scale", type=float, default=20.0, help="seconds of the real model that pass in one (default 20)"
    )
    parser.add_argument("--csv", type=Path, help="also write a row for each method here")
    parser.add_argument(
        "--no-namespaces", action="store_true", help="the degraded network, even where a better one is possible"
    )
    parser.add_argument(
        "--summary", nargs="+", type=Path, metavar="FILE", help="run nothing: sum up what --csv wrote earlier"
    )
    asked = parser.parse_args(arguments)
    if asked.summary:
        print(summary([row for path in asked.summary for row in read(path)]))
        return
    why = "asked not to" if asked.no_namespaces else isolate()
    if why:
        print(f"No network namespaces ({why}): loopback with paced sockets, a link for each pair and direction.")
    torch.set_num_threads(1)
    todo = [QUICK] if asked.quick else [c for n, c in CONFIGURATIONS.items() if not asked.only or n in asked.only]
    rows: list[Row] = []
    for configuration in todo:
        found = measured(configuration, asked.methods or configuration.methods or list(METHODS), asked.scale)
        print(markdown(configuration, found), flush=True)
        rows += found
        if asked.csv:
            with asked.csv.open("w", newline="") as f:
                table = csv.DictWriter(f, list(asdict(rows[0])))
                table.writeheader()
                table.writerows(asdict(r) for r in rows)
    if len(todo) > 1:
        print(summary(rows))


def measured(configuration: Configuration, methods: Sequence[str], scale: float) -> list[Row]:
    """All methods on one configuration."""
    with configuration.network(scale) as net:
        rate = goodput(net) * BYTES / scale
        setting = configuration.setting(net, rate, scale)
        reader = thin(setting)
        wanted = reference(setting, reader)
        rows = []
        for name in methods:
            print(f"{configuration.name}: {name} ...", file=sys.stderr, flush=True)
            rows.append(run(name, net, setting, reader, wanted, configuration))
        return compared(rows)


if __name__ == "__main__":
    main()
