"""Tokenizer and text encoder of the emoji world, in CLIP's file formats.

The encoder first learns which picture a caption means, from captions alone, as CLIP's comes to a denoiser trained. From random weights
the denoiser still drew the same picture for every caption after 1,100 steps.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import Lexicon, random_caption
from .data import BACKGROUND_NAMES
from .stage import Stage
from .things import STYLES, THINGS

WIDTH = 384
LENGTH = 77


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make one token of every word, the most frequent pair first; equally frequent ones in alphabetical order.

    The tokenizers library breaks such ties at random, and a resumed training needs the same tokens.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    counts = Counter(pair for p in pieces for pair in pairwise(p))
    merges: list[tuple[str, str]] = []
    while counts:
        most = max(counts.values())
        pair = min(c for c, n in counts.items() if n == most)
        merges.append(pair)
        for p in pieces:
            if pair[0] in p and pair in (before := list(pairwise(p))):
                _merge(p, pair)
                counts.subtract(before)
                counts.update(pairwise(p))
        counts = +counts
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> None:
    i = 0
    while i < len(pieces) - 1:
        if (pieces[i], pieces[i + 1]) == pair:
            pieces[i : i + 2] = ["".join(pair)]
        i += 1


def build_tokenizer(folder: Path, words: list[str]) -> CLIPTokenizer:
    """Write a CLIP tokenizer that knows ``words``; other words fall into smaller pieces.

    Raises:
        ValueError: a word is not one token.
    """
    merges = byte_pairs([w for w in words if w.isalpha()])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    split = [w for w in words if w.isalpha() and len(tokenizer(w).input_ids) != 3]
    if split:
        raise ValueError(f"not one token each: {', '.join(split)}")
    return tokenizer


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read what ``build_tokenizer`` wrote."""
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 2) -> CLIPTextModel:
    """An untrained text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=640, projection_dim=WIDTH, num_hidden_layers=layers,
            num_attention_heads=6, max_position_embeddings=LENGTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def train_text(work: Path, words: Lexicon, tokenizer: CLIPTokenizer, steps: int = 600, batch: int = 64, until: int | None = None) -> None:
    """Train the encoder, with three linear heads on its last token, to tell thing, studio and background from captions of all things."""
    torch.manual_seed(5)
    text = build_text_encoder(tokenizer)
    heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in (len(THINGS), len(STYLES), len(BACKGROUND_NAMES)))
    stage = Stage(work, "text", {"text": text, "heads": heads}, steps, 1e-3, seed=15)

    def loss_of(step: int) -> Tensor:
        captions, scenes = zip(*(random_caption(words, stage.generator) for _ in range(batch)), strict=True)
        ids = tokenizer(list(captions), padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
        pooled, labels = text(ids).pooler_output, torch.tensor(scenes)
        return torch.stack([F.cross_entropy(head(pooled), labels[:, i]) for i, head in enumerate(heads)]).sum()

    stage.run(loss_of, until=until)
