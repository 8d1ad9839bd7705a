"""Makes the projector that ships with "smol":

    python benchmarks/align_smol.py --out src/contextlora/models/projector.safetensors

Aligns on rendered pictures of the three scenarios: split train, from a seed that no benchmark uses, so that no
test picture of any build is among them. Needs no other data. Prints the losses and, last, the file's sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from contextlora.data.examples import Example, load_examples
from contextlora.data.scenes import build
from contextlora.graph import TaskGraph
from contextlora.models import load_model
from contextlora.models.projector import save_projector
from contextlora.training.align import align

SEED = 20_240_607
SCENARIOS = ("iov-eight", "iov-weak", "factory", "city")  # the first two show the same pictures with other questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="where to keep the pictures; a temporary folder unless given")
    parser.add_argument("--train", type=int, default=1200, help="pictures a scenario")
    parser.add_argument("--epochs", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        examples = pictures(args.data or Path(scratch), args.train)
        model, processor = load_model("smol")
        done = align(model, processor, examples, epochs=args.epochs, seed=SEED, progress=show)
    for i in range(0, len(done.losses), 25):
        part = done.losses[i : i + 25]
        print(f"steps {i + 1:4} to {i + len(part):4}: loss {sum(part) / len(part):.3f}")
    print(f"{done.images} images, {done.seconds:.0f} s")
    save_projector(model, args.out)
    print(f"{args.out} sha256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}")


def pictures(folder: Path, train: int) -> list[Example]:
    """Renders the scenarios and returns their training examples, one an image."""
    by_image: dict[str, Example] = {}
    for scenario in SCENARIOS:
        built = build(scenario, folder / scenario, train=train, valid=0, test=0, seed=SEED)
        for example in load_examples(built, TaskGraph.load(built / "graph.yaml"), split="train"):
            key = f"{scenario.split('-')[0]}/{example.id}"
            before = by_image.get(key)
            answers = {**example.answers, **(before.answers if before else {})}
            by_image[key] = replace(before or example, answers=answers)
    return list(by_image.values())


def show(stage: str, done: int, total: int) -> None:
    """One line on stderr that moves."""
    print(f"\r{stage} {done}/{total}", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
