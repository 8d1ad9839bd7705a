"""The order in which a task's samples are seen: seeded, per task, so that it is the same whatever trains beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BUCKET = 16  # batches sorted by length together: little padding, still nearly a full shuffle


def epoch_batches(lengths: Sequence[int], batch_size: int, *, seed: int, task: str, epoch: int) -> list[list[int]]:
    """Splits one epoch into batches of similar length.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch; the last one may be smaller.
        seed, task, epoch: what the order depends on, and nothing else.

    Returns:
        Batches of sample indices; every sample exactly once.
    """
    digest = hashlib.sha256(f"{seed}|{task}|{epoch}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), BUCKET * batch_size):
        bucket = sorted(order[start : start + BUCKET * batch_size].tolist(), key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
