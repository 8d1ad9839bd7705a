"""What a device starts from: the tasks, the base model, its data, the air. The same for simulated and for real ones."""

from __future__ import annotations

import random

from contextlora.data.collate import Encoder
from contextlora.data.examples import Example, load_examples
from contextlora.errors import ConfigError, did_you_mean
from contextlora.federated.channel import Channel, RadioChannel
from contextlora.federated.federation import Federation
from contextlora.federated.methods import put_on
from contextlora.federated.trace import MeasuredChannel
from contextlora.graph import TaskGraph
from contextlora.models import load_model
from contextlora.models.inputs import ImageFeatures
from contextlora.training.session import feature_folder


def graph_of_devices(settings: Federation) -> TaskGraph:
    """The tasks. Raises ConfigError E104 for a device with another one."""
    graph = TaskGraph.load(settings.graph_path)
    for name, device in settings.devices.items():
        if device.task not in graph.names:
            text = f"no task '{device.task}'.{did_you_mean(device.task, graph.names)}"
            raise ConfigError("E104", text, where=f"devices.{name}")
    return graph


def open_reader(settings: Federation, graph: TaskGraph) -> ImageFeatures:
    """The base model with the layers that the method trains: the same on every device."""
    model, processor = load_model(settings.model, dtype=settings.dtype)
    put_on(model, graph, settings)
    encoder = Encoder(processor, graph)
    return ImageFeatures(model, encoder, feature_folder(model) if encoder.sees_images else None)


def channel_of(settings: Federation) -> Channel:
    """The model of the air, or a trace in its place; the same numbers on every device."""
    names = sorted(settings.devices)
    if settings.trace:
        return MeasuredChannel.load(settings.trace, names, settings.limits, settings.radio.cast)
    return RadioChannel(names, settings.radio, settings.limits, (settings.name, settings.seed))


def shares(settings: Federation, only: str | None = None) -> dict[str, list[Example]]:
    """Each device's training data: its own folder's, or an equal share of what the common one has of its task.

    `only` leaves out all other devices, whose folders need not be here.
    """
    graph = graph_of_devices(settings)
    common: list[Example] | None = None
    found: dict[str, list[Example]] = {}
    for name, device in settings.devices.items():
        if only not in (None, name):
            continue
        if device.data is not None:
            mine = load_examples(device.data, graph, split="train")
            found[name] = _drawn([e for e in mine if device.task in e.answers], settings, name)
            continue
        common = load_examples(settings.data, graph, split="train") if common is None else common
        among = [n for n, d in settings.devices.items() if d.task == device.task and d.data is None]
        mine = [e for e in common if device.task in e.answers][among.index(name) :: len(among)]
        found[name] = _drawn(mine, settings, name)
    return found


def _drawn(mine: list[Example], settings: Federation, name: str) -> list[Example]:
    """`max_samples` of a device's examples, in their order; the same under every seed."""
    if settings.max_samples is None or settings.max_samples >= len(mine):
        return mine
    drawn = random.Random(f"{settings.name}|{name}").sample(range(len(mine)), settings.max_samples)
    return [mine[i] for i in sorted(drawn)]
