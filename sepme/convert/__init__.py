"""Deltas to and from the formats of others: LoRA files, whole or partial checkpoints; and along new directions."""

from .checkpoint import export_checkpoint, model_weights
from .lora import export_lora
from .refit import import_eraser, known_to, order_gap, reproject

__all__ = ["export_checkpoint", "export_lora", "import_eraser", "known_to", "model_weights", "order_gap", "reproject"]
