"""One data folder of words and one of pictures for all tests of training, and a way to run `train` quietly."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from contextlora.config import TrainConfig
from contextlora.lora.attach import attach, gated_layers
from contextlora.training.loop import train
from contextlora.training.track import Tracker


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """Records of which a third does not answer `light`, so that the tasks of a level have different sizes."""
    folder = tiny.write_data(tmp_path_factory.mktemp("words"), train=12, test=6)
    records = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for r in records[::3]:
        del r["answers"]["light"], r["questions"]["light"]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("pictures"), train=12, test=6, images=True)


class Runs:
    """Trains a family of tiny models; blocks are made in the model's dtype and, if asked, filled."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def attached(self, family=tiny.llama, *, graph=None, dtype=torch.float64, layers="all", fill=0.0, **model):
        model, processor = family(dtype, **model)
        attach(model, graph or tiny.graph(), layers=layers, dtype=dtype)
        if fill:
            generator = torch.Generator().manual_seed(1)
            for layer in gated_layers(model).values():
                layer.B.copy_(torch.randn(layer.B.shape, generator=generator, dtype=torch.float64) * fill)
        return model, processor

    def train(self, model, processor, data, *, graph=None, out=None, tasks=None, resume=False, tracker=None, **config):
        self.count += 1
        out = out or self.folder / str(self.count)
        settings = TrainConfig(**{"epochs": 2, "lr": 1e-2, "layers": "all", **config})
        watch = tracker(out) if tracker else Tracker(out, quiet=True)
        graph = graph or tiny.graph()
        return train(
            model, processor, graph, data=data, out=out, config=settings, tasks=tasks, resume=resume, tracker=watch
        )

    def blocks(self, model):
        layers = gated_layers(model).items()
        return {(n, t, s): layer.block(t)[s].clone() for n, layer in layers for t in layer.graph.names for s in (0, 1)}

    def trained(self, data, family=tiny.llama, *, graph=None, dtype=torch.float64, layers="all", fill=0.0, **more):
        """The blocks after training, from the same beginnings every time."""
        model, processor = self.attached(family, graph=graph, dtype=dtype, layers=layers, fill=fill)
        return self.blocks(self.train(model, processor, data, graph=graph, layers=layers, **more))


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)
