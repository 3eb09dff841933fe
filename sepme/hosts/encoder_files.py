"""Text encoders that are no CLIP, from their weights alone: a ``.safetensors`` file, or a folder of them in the transformers layout.

What a file's keys and shapes say it is; the few facts that weights do not hold (heads, rotary base) are those of the published models,
or of a ``config.json`` beside them. Parts that read pictures, decoders and heads are left where they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import SepMEError, out_of_memory
from ..files import check_precision, first_line, refuse_pickle

T5_FIRST, LLM_FIRST = "encoder.block.0.layer.0.SelfAttention.q.weight", "layers.0.self_attn.q_proj.weight"
SPIECE = "spiece_model"  # a tokenizer of SentencePiece as bytes, in files for ComfyUI
LLMS = {  # what config and class the transformers library has, and what weights do not say
    "qwen2": ("Qwen2", 1e6, 128),
    "qwen3": ("Qwen3", 1e6, 128),
    "qwen3_vl": ("Qwen3", 5e6, 128),  # with words alone it is Qwen3 of another rotary base
    "gemma2": ("Gemma2", 1e4, 256),
}


@dataclass(frozen=True)
class EncoderFiles:
    """Weights of a text encoder; nothing but headers has been read.

    Attributes:
        path: the file or folder.
        places: the file by key.
        shapes: by key.
        kind: as :class:`~sepme.model.families.Reading` has it.
        prefix: in front of a language model's keys.
    """

    path: Path
    places: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    kind: str
    prefix: str = ""

    @staticmethod
    def find(path: Path) -> EncoderFiles | None:
        """Those of a file or of a folder; None if it holds no encoder that can be read.

        Raises:
            SepMEError: a pickle, or a damaged file.
        """
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        variants = [f for f in files if ".fp16" not in f.name]
        places: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in variants or files:
            refuse_pickle(file)
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 (not a dict)
                        places[key], shapes[key] = file, tuple(opened.get_slice(key).get_shape())
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise SepMEError(f"{file} is no safetensors file or is cut short ({first_line(error)}); get it again.") from None
        found = _kind(shapes)
        return EncoderFiles(path, places, shapes, *found) if found else None

    @property
    def width(self) -> int:
        """Channels of its states."""
        return self.shapes[f"{self.prefix}embed_tokens.weight" if self.kind in LLMS else "shared.weight"][1]

    @property
    def vocabulary(self) -> int:
        """Tokens that it knows."""
        return self.shapes[f"{self.prefix}embed_tokens.weight" if self.kind in LLMS else "shared.weight"][0]

    @cached_property
    def spiece(self) -> bytes | None:
        """The tokenizer that stands among the weights."""
        if SPIECE not in self.places:
            return None
        with safe_open(self.places[SPIECE], framework="pt") as file:
            return bytes(file.get_tensor(SPIECE).numpy().tobytes())

    def load(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The encoder, frozen: a class of the transformers library that returns ``last_hidden_state`` and ``hidden_states``.

        Raises:
            SepMEError: quantised, damaged, or with parts missing.
        """
        try:
            name, config = self._config()
            state = {k: t.to(dtype) for k, t in self._tensors()}
            model = getattr(transformers, name).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        except SepMEError:
            raise
        except Exception as error:  # whatever damaged weights make the loaders raise
            if out_of_memory(error):
                raise
            raise SepMEError(f"{self.path} cannot be loaded ({type(error).__name__}: {first_line(error)}); get it again.") from None
        absent = set(model.state_dict()) - set(state) - {"encoder.embed_tokens.weight"}
        if absent:
            raise SepMEError(f"{self.path} lacks {sorted(absent)[0]} and {len(absent) - 1} more tensors; get it again.")
        loaded: nn.Module = model.to(device).eval().requires_grad_(False)
        return loaded

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The encoder's own by the class's names, copied: where a tensor lies in a file must not decide which kernels add it up."""
        wanted = ("layers.", "embed_tokens.", "norm.") if self.kind in LLMS else ("encoder.", "shared.")
        for file in dict.fromkeys(self.places.values()):
            with safe_open(file, framework="pt") as opened:
                for key in (k for k, place in self.places.items() if place == file and k.startswith(self.prefix)):
                    name = key.removeprefix(self.prefix)
                    if name.startswith(wanted):
                        tensor = opened.get_tensor(key)
                        check_precision(file, key, tensor.dtype)
                        yield name, tensor.clone()

    def _config(self) -> tuple[str, Any]:
        """The class's name and its configuration."""
        sizes: dict[str, Any]
        count = len({m[1] for m in map(re.compile(rf"{re.escape(self.prefix)}(?:encoder\.block|layers)\.(\d+)\.").match, self.shapes) if m})
        if self.kind not in LLMS:
            stem = "encoder.block.0.layer.{}."
            heads: int = self.shapes[stem.format(0) + "SelfAttention.relative_attention_bias.weight"][1]
            gated = stem.format(1) + "DenseReluDense.wi_0.weight" in self.shapes
            ff = stem.format(1) + ("DenseReluDense.wi_0.weight" if gated else "DenseReluDense.wi.weight")
            sizes = {
                "vocab_size": self.vocabulary, "d_model": self.width, "d_kv": self.shapes[T5_FIRST][0] // heads, "num_heads": heads,
                "d_ff": self.shapes[ff][0], "num_layers": count, "feed_forward_proj": "gated-gelu" if gated else "relu",
            }  # fmt: skip
            family = {"t5": "T5", "umt5": "UMT5"}[self.kind]
            return f"{family}EncoderModel", getattr(transformers, f"{family}Config")(**sizes)
        given, (family, theta, head) = self._given, LLMS[self.kind]
        first = f"{self.prefix}layers.0."
        norm = self.shapes.get(f"{first}self_attn.q_norm.weight")
        rows = {p: self.shapes[f"{first}self_attn.{p}_proj.weight"][0] for p in "qk"}
        head = norm[0] if norm else rows["q"] // given.get("num_attention_heads", rows["q"] // head)
        sizes = {
            "vocab_size": self.vocabulary, "hidden_size": self.width, "num_hidden_layers": count, "head_dim": head,
            "intermediate_size": self.shapes[f"{first}mlp.gate_proj.weight"][0], "num_attention_heads": rows["q"] // head,
            "num_key_value_heads": rows["k"] // head, "rms_norm_eps": 1e-6, "max_position_embeddings": 1 << 15,
            "rope_parameters": {"rope_type": "default", "rope_theta": _theta(given) or theta},
        }  # fmt: skip
        config = getattr(transformers, f"{family}Config")(**sizes)
        if self.kind == "gemma2":  # as ComfyUI reads it
            config.attn_logit_softcapping, config.query_pre_attn_scalar = None, head
        return f"{family}Model", config

    @cached_property
    def _given(self) -> dict[str, Any]:
        """What a ``config.json`` says of the language model."""
        try:
            data = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            found = data.get("text_config", data)
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError, AttributeError):
            return {}


def _theta(given: Mapping[str, Any]) -> float | None:
    """The rotary base, at the places where versions of the library have it."""
    parameters = given.get("rope_parameters") or {}
    return given.get("rope_theta") or parameters.get("rope_theta")


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """What encoder has these keys, and what stands in front of them."""
    if T5_FIRST in shapes and "shared.weight" in shapes:
        own_bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes
        return ("umt5" if own_bias else "t5"), ""
    prefixes = [key.removesuffix(LLM_FIRST) for key in shapes if key.endswith(LLM_FIRST)]
    prefix = next(
        (p for p in prefixes if not any(word in p for word in ("visual", "vision")) and f"{p}embed_tokens.weight" in shapes), None
    )
    if prefix is None:
        return None
    first = f"{prefix}layers.0."
    own_norm, sees = f"{first}self_attn.q_norm.weight" in shapes, any("visual." in key for key in shapes)
    if f"{first}pre_feedforward_layernorm.weight" in shapes:
        return None if own_norm else ("gemma2", prefix)  # Gemma 3 is read by no family in one piece
    if own_norm:
        return ("qwen3_vl" if sees else "qwen3"), prefix
    return ("qwen2", prefix) if f"{first}self_attn.q_proj.bias" in shapes else None
