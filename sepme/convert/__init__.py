"""Deltas to and from the formats of others: LoRA files, whole or partial checkpoints."""

from .lora import export_lora

__all__ = ["export_lora"]
