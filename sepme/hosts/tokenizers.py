"""CLIP's tokenizer for single-file checkpoints, which hold none: from a folder, the hub's cache or open_clip. No download."""

from __future__ import annotations

import gzip
import os
from importlib import util
from pathlib import Path

from transformers import CLIPTokenizer

from ..errors import SepMEError
from ..files import first_line

ENVIRONMENT, END = "SEPME_TOKENIZER", "<|endoftext|>"
CACHED = (  # repositories whose tokenizer is CLIP's, and where in them
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
    ("runwayml/stable-diffusion-v1-5", "tokenizer/"),
    ("CompVis/stable-diffusion-v1-4", "tokenizer/"),
    ("stabilityai/stable-diffusion-2-1", "tokenizer/"),
    ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer/"),
)
TOKENS, MERGES = 77, 48894  # prompt length; merges of the published vocabulary: 49408 = 2 * 256 + 48894 + 2


def clip_tokenizer(folder: str | Path | None = None, pad_token: str = END) -> CLIPTokenizer:
    """Find CLIP's tokenizer: ``folder``, else $SEPME_TOKENIZER, else the hub's cache, else the open_clip package.

    Args:
        folder: holds ``vocab.json`` and ``merges.txt`` or ``tokenizer.json``, or a folder ``tokenizer`` that does.
        pad_token: what fills a prompt; the end token (SD 1.x) by default, ``!`` for OpenCLIP's encoders (SD 2.x, SDXL's second).

    Raises:
        SepMEError: none of them is there, or the folder holds no tokenizer.
    """
    folder = folder or os.environ.get(ENVIRONMENT) or None
    files = _in_folder(Path(folder)) if folder is not None else _in_cache()
    try:
        if files is not None:
            tokenizer = CLIPTokenizer.from_pretrained(str(files), local_files_only=True, pad_token=pad_token)
        else:
            vocabulary, merges = _from_open_clip()
            tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token)
    except SepMEError:
        raise
    except Exception as error:  # whatever broken files make the loader raise
        raise SepMEError(f"The tokenizer in {files or 'open_clip'} cannot be read ({type(error).__name__}: {first_line(error)}).") from None
    tokenizer.model_max_length = TOKENS
    return tokenizer


def _in_folder(folder: Path) -> Path:
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file() or ((place / "vocab.json").is_file() and (place / "merges.txt").is_file()):
            return place
    raise SepMEError(f"{folder} holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json); name a folder that does.")


def _in_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, prefix in CACHED:
        found = [try_to_load_from_cache(repository, prefix + name) for name in ("vocab.json", "merges.txt")]
        if all(isinstance(path, str) for path in found):
            return Path(str(found[0])).parent
    return None


def _from_open_clip() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary from the list of merges that open_clip ships; the package itself is not imported."""
    package = util.find_spec("open_clip")
    places = list(package.submodule_search_locations or []) if package else []
    listing = next((p for p in (Path(place) / "bpe_simple_vocab_16e6.txt.gz" for place in places) if p.is_file()), None)
    if listing is None:
        raise SepMEError(
            "A single-file checkpoint holds no tokenizer and CLIP's is not on this machine; name a folder with its vocab.json and "
            "merges.txt (--tokenizer DIR, the 'tokenizer' folder of any Stable Diffusion), or run: pip install open_clip_torch."
        )
    lines = gzip.decompress(listing.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    return vocabulary_of([(a, b) for a, b in (line.split() for line in lines)])


def vocabulary_of(merges: list[tuple[str, str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids in CLIP's order: the 256 bytes, the same at a word's end, merged pieces, start and end of text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), "<|startoftext|>", END]
    return {word: i for i, word in enumerate(words)}, merges
