"""What importing contextlora gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import contextlora

NAMES = [
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


def test_public_names_are_these():
    assert contextlora.__all__ == NAMES
    for name in NAMES:
        assert getattr(contextlora, name) is not None
    assert set(NAMES) <= set(dir(contextlora))


def test_names_are_what_they_are_at_home():
    from contextlora.graph import TaskGraph
    from contextlora.lora.attach import attach
    from contextlora.training.loop import train

    assert (contextlora.TaskGraph, contextlora.attach, contextlora.train) == (TaskGraph, attach, train)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        contextlora.atach  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import contextlora",
        "import contextlora as c; c.TaskGraph, c.ContextLoRAError, c.__version__, dir(c)",
        "import contextlora.cli",
        "import contextlora.config, contextlora.graph",
    ],
)
def test_importing_never_imports_torch(code: str):
    heavy = "print([m for m in ('torch', 'transformers', 'matplotlib', 'PIL', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}; {heavy}"], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
