"""Tokenizer and text encoder of the emoji world, in CLIP's file formats."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
