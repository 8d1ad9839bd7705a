"""A device holds the weights of the units that it runs, as its plan counts them, and looks at no picture in vain.

Units are counted as in a profile: 0 is embedding, vision tower and projector, i the decoder layer i - 1, the last one
the output head. The blocks stay on every device, since each keeps all of them between two stages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from contextlora.data.images import open_image
from contextlora.gear.plan import Plan
from contextlora.lora.attach import decoder_layers
from contextlora.models.inputs import TOKEN_INPUTS, ImageFeatures


def units_left(plan: Plan, stage: int, me: str) -> set[int]:
    """The units that a device runs in a stage or in a later one."""
    return {
        unit
        for planned in plan.stages[stage:]
        for p in planned.groups
        for part in (*p.group.prefix, *p.group.trainers)
        if part.device == me
        for unit in range(part.start, part.stop)
    }


@torch.no_grad()
def release(model: nn.Module, keep: Iterable[int]) -> None:
    """Frees the frozen weights of all units but some, in place; what they would compute from then on is NaN.

    They keep shape, dtype and device, which others ask them for. A weight that a kept unit shares stays (an embedding
    tied to the head), as do quantised ones and the little that belongs to no unit, such as the last norm.
    """
    by_unit = _frozen(model)
    kept = {id(p) for unit in keep for p in by_unit[unit]}
    for p in {id(p): p for some in by_unit.values() for p in some}.values():
        if id(p) not in kept and p.is_floating_point():
            p.data = p.new_full((1,), torch.nan).expand(p.shape)
    with suppress(AttributeError, OSError):  # glibc's: it would keep what a layer of a few MB has freed
        ctypes.CDLL(None).malloc_trim(0)


def _frozen(model: nn.Module) -> dict[int, list[nn.Parameter]]:
    """The base's weights by unit."""
    stack = decoder_layers(model)[1]
    decoder, head = model.get_decoder(), model.get_output_embeddings()  # type: ignore[operator]
    beyond = {id(p) for module in (decoder, head) for p in module.parameters()}
    inputs = [*model.get_input_embeddings().parameters()]  # type: ignore[operator]
    found = {0: inputs + [p for p in model.parameters() if id(p) not in beyond]}
    for i, layer in enumerate(stack):  # what learns, or did, lies in A and B
        found[i + 1] = [p for name, p in layer.named_parameters() if "learning" not in name.split(".")]
    return {**found, len(stack) + 1: [*head.parameters()]}


def held_bytes(model: nn.Module) -> int:
    """Bytes of memory behind a model's weights; blocks are not among them."""
    storages = [p.untyped_storage() for p in model.parameters() if not p.requires_grad]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Unseeing(ImageFeatures):
    """Inputs for a device that does not run unit 0: of pictures only what positions follow from, and no features.

    What enters the first of its layers comes from elsewhere, and what the model makes below it of these inputs is
    thrown away.
    """

    def get(self, image: Path) -> dict[str, Tensor]:
        return super().get(image) if self._positions else {}

    @cached_property
    def _positions(self) -> list[str]:
        """What the model is told of a picture beside its pixels; often nothing, and then none is opened."""
        return [*self._beside(Image.new("RGB", (64, 64)))]

    def _compute(self, image: Path) -> dict[str, Tensor]:
        return self._beside(open_image(image))

    def _beside(self, picture: Image.Image) -> dict[str, Tensor]:
        tensors = self.encoder.image_inputs(self.encoder.image_prompt, picture)
        return {k: v for k, v in tensors.items() if k not in TOKEN_INPUTS and not k.startswith("pixel")}
