"""Bytes per round between peers on Qwen2.5-1.5B's shapes, beside LoRA in bf16 and the entropy bound of what is sent.

python benchmarks/wire.py [--draws normal student]

28 layers, seven linears each, rank 32, one entry of B in ten active in each linear. Values are drawn, not trained:
normal, or Student's t with 4 degrees of freedom (heavy tails), each linear with a standard deviation of its own
(log-normal, sigma 0.5); a round moves them by a tenth of such a draw. Masks are drawn uniformly, which is what the
bound assumes. Every number of bytes is that of whole messages as an outbox sends them, and an inbox has opened each.

The bound is for the values as quantised: zero-order entropy of the levels and of the blocks' scales (of the words, for
bf16), pooled over the linears; and log2 C(n, k) for each linear's mask, once. Deflate's tables follow the linears' own
spreads, so bf16 may come out a little under the pooled figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contextlora.federated.bitmaps import mask_bound
from contextlora.federated.codec import BLOCK, Codec, unpack
from contextlora.federated.mailbox import Inbox, Outbox
from contextlora.federated.wire import OVERHEAD, public_key

HIDDEN, INNER, KEYS, LAYERS, RANK, ACTIVE = 1536, 8960, 256, 28, 32, 0.1
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]  # q, k, v, o: inputs, outputs
LINEARS += [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]  # gate, up, down
LORA_BYTES = 2 * RANK * LAYERS * sum(i + o for i, o in LINEARS)
SIZES = [RANK * o for _ in range(LAYERS) for _, o in LINEARS]
COUNTS = [round(ACTIVE * n) for n in SIZES]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def entropy_bytes(symbols: np.ndarray) -> float:
    """Zero-order entropy of all symbols together."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def values_bound(message: bytes, codec: Codec) -> float:
    """Bytes that the values in a message take at their zero-order entropy."""
    n, blocks = sum(COUNTS), sum(-(-k // BLOCK) for k in COUNTS)
    words = n if codec is Codec.BF16 else blocks
    high, rest = unpack(memoryview(message)[OVERHEAD:], words)
    low, rest = unpack(rest, words)
    bound = entropy_bytes(np.frombuffer(high, np.uint8).astype(np.uint16) << 8 | np.frombuffer(low, np.uint8))
    if codec is Codec.INT8:
        bound += entropy_bytes(np.frombuffer(unpack(rest, n)[0], np.uint8))
    elif codec is Codec.INT4:
        pairs = np.frombuffer(unpack(rest, -(-n // 2))[0], np.uint8)
        bound += entropy_bytes(np.stack([pairs >> 4, pairs & 15], axis=1).ravel()[:n])
    return bound


def draw(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Active values of every linear, one after another."""
    spread = np.repeat(np.random.default_rng(1).lognormal(sigma=0.5, size=len(COUNTS)), COUNTS)
    unit = rng.standard_normal(sum(COUNTS)) if kind == "normal" else rng.standard_t(4, sum(COUNTS))
    return (1e-3 * spread * unit).astype(np.float32)


def draw_mask(rng: np.random.Generator) -> np.ndarray:
    """Exactly COUNTS[i] active entries in linear i."""
    mask = np.zeros(sum(SIZES), bool)
    for start, size, count in zip(np.cumsum([0, *SIZES[:-1]]), SIZES, COUNTS, strict=True):
        mask[start + rng.choice(size, count, replace=False, shuffle=False)] = True
    return mask


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def measure(kind: str, codec: Codec, delta: bool, mask: np.ndarray) -> tuple[str, bytes]:
    """One row of the table, and the mask's message."""
    rng = np.random.default_rng(0)
    out = Outbox(KEY, "bench", "task", full=Codec.INT8 if delta else codec, delta=codec if delta else None)
    box = Inbox("bench", {public_key(KEY): "peer"}, {"task": SIZES})
    announced = out.announce(mask, SIZES, version=1, round=0)
    box.open(announced)
    truth, best = draw(rng, kind), [np.inf, np.inf]
    for version in (1, 2, 3):
        message, sending = timed(lambda v=version, x=truth: out.send(x, version=v, round=v))
        got, opening = timed(lambda m=message: box.open(m).content)
        out.acknowledged(version)
        best = [min(best[0], sending), min(best[1], opening)]
        error = float(np.linalg.norm(got - truth) / np.linalg.norm(truth))
        truth = truth + np.float32(0.1) * draw(rng, kind)
    bound, speed = values_bound(message, codec), [truth.nbytes / 1e6 / s for s in best]
    name = f"{codec.name.lower()}{' delta' if delta else ''}, {kind}"
    columns = [
        name,
        f"{len(message) / 1e6:.3f}",
        f"{LORA_BYTES / len(message):.1f}",
        f"{8 * len(message) / truth.size:.2f}",
    ]
    columns += [f"{100 * (len(message) / bound - 1):.2f}", f"{error:.1e}", *(f"{s:.0f}" for s in speed)]
    return "| " + " | ".join(columns) + " |", announced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", nargs="+", choices=("normal", "student"), default=["normal", "student"])
    draws = parser.parse_args().draws
    mask = draw_mask(np.random.default_rng(0))
    print(f"`python benchmarks/wire.py --draws {' '.join(draws)}`\n")
    print(f"LoRA, A and B in bf16: {LORA_BYTES / 1e6:.1f} MB. B: {sum(SIZES):,} entries, {sum(COUNTS):,} active.\n")
    heads = ("a round's values", "MB", "x less than LoRA", "bits a value", "% over bound", "relative error")
    print("| " + " | ".join([*heads, "send MB/s", "open MB/s"]) + " |")
    print("|---" * (len(heads) + 2) + "|")
    for kind in draws:
        for codec, delta in ((Codec.BF16, False), (Codec.INT8, False), (Codec.INT4, True)):
            row, announced = measure(kind, codec, delta, mask)
            print(row, flush=True)
    bound = sum(map(mask_bound, SIZES, COUNTS)) / 8
    over = 100 * (len(announced) / bound - 1)
    print(f"\nThe mask, once: {len(announced) / 1e6:.3f} MB, {over:.2f} % over log2 C(n, k) summed over the linears.")
    print("MB/s are of float32 values: encoding, hashing and signing; checking, decoding and hashing; best of three.")


if __name__ == "__main__":
    main()
