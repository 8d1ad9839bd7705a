"""Small federations for tests: random slices of a few tasks on two layers, and devices with the tiny model."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

import tiny
from contextlora.federated.aggregate import Update
from contextlora.federated.federation import Federation
from contextlora.federated.slices import A_SIDE, Mask, Slice
from contextlora.strict import validate

SHAPES = {"l.0": (2, 5), "l.1": (2, 3)}
D_IN = {"l.0": 4, "l.1": 6}


def write_words(folder, train=16):
    """A data folder of the tiny graph's tasks, with the graph."""
    tiny.write_data(folder, train=train, test=4)
    (folder / "graph.yaml").write_text(json.dumps(tiny.graph().to_dict()))  # JSON is YAML
    return folder


def small(data, out, devices, **more):
    """The settings of a few devices that train for moments, and may all be one cluster."""
    given = {
        "data": str(data),
        "out": str(out),
        "rounds": 4,
        "updates": 2,
        "exchange_every": 2,
        "train": {"lr": 0.02, "batch_size": 2},
        "slices": {"share": 0.3, "calibration": 2},
        "limits": {"collision": 1.0},
        "devices": devices,
    }
    return validate(Federation, {**given, **more}, "test")


def sparse(task, rng, rate=0.5, shapes=SHAPES):
    """A slice with each entry active with probability `rate`."""
    dense = {k: np.where(rng.random(s) < rate, rng.standard_normal(s), 0).astype(np.float32) for k, s in shapes.items()}
    return of_dense(task, dense)


def of_dense(task, dense):
    """The slice whose entries are the non-zero ones."""
    masks = {k: Mask(b.shape, np.flatnonzero(b).astype(np.int64)) for k, b in dense.items()}
    return Slice(task, masks, {k: b.ravel()[masks[k].indices].astype(np.float32) for k, b in dense.items()})


def projections(rng, d_in=D_IN, shapes=SHAPES):
    return {k: rng.standard_normal((shapes[k][0], d_in[k])).astype(np.float32) for k in shapes}


@st.composite
def updates(draw, tasks="ab", least=1, most=6, with_a=False, same_task=False):
    """A round's updates, the device's own first; senders are not in order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(least, most))
    names = draw(st.permutations([f"d{i}" for i in range(count)]))
    made = []
    for name in names:
        task = tasks[0] if same_task else draw(st.sampled_from(tasks))
        samples, rate = draw(st.integers(1, 1000)), draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
        shapes = {**SHAPES, **{k + A_SIDE: (s[0], D_IN[k]) for k, s in SHAPES.items()}} if with_a else SHAPES
        made.append(Update(name, sparse(task, rng, rate, shapes), samples, 1, draw(st.sampled_from("xy"))))
    return made


def content(held):
    """All that a device holds, to the bit."""
    slices = {
        key: (s.task, {k: (m.indices.tobytes(), s.values[k].tobytes()) for k, m in s.masks.items()})
        for key, s in held.slices.items()
    }
    return held.choice, list(slices), slices
