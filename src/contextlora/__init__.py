"""contextlora: one small multimodal LLM for a graph of dependent tasks, each of which owns a slice of one LoRA.

Names load on first use: importing this package imports neither torch nor anything else that is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlora.errors import ContextLoRAError
    from contextlora.evaluation.evaluate import evaluate
    from contextlora.graph import TaskGraph
    from contextlora.lora.adapter import Adapter
    from contextlora.lora.attach import attach, detach, trainable_parameters
    from contextlora.models import load_model
    from contextlora.training.loop import train

    __version__: str

__all__ = [
    "Adapter",
    "ContextLoRAError",
    "TaskGraph",
    "__version__",
    "attach",
    "detach",
    "evaluate",
    "load_model",
    "train",
    "trainable_parameters",
]

_HOME = {
    "Adapter": "lora.adapter",
    "ContextLoRAError": "errors",
    "TaskGraph": "graph",
    "attach": "lora.attach",
    "detach": "lora.attach",
    "evaluate": "evaluation.evaluate",
    "load_model": "models",
    "train": "training.loop",
    "trainable_parameters": "lora.attach",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("contextlora")
    elif name in _HOME:
        value = getattr(import_module(f"contextlora.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'contextlora' has no attribute '{name}'")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
