"""Base models: a hub id, a local folder, or the embedded default "smol"."""

from contextlora.models.hub import fingerprint, load_model, vision_fingerprint

__all__ = ["fingerprint", "load_model", "vision_fingerprint"]
