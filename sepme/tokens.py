"""Prompts -> token matrices: encoding many prompts, and preserve files that never lie in memory as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .concepts import MAX_PROMPT
from .errors import SepMEError
from .protocols import Encoding, TextEncoder

Padding = Literal["all", "none"]
OnProgress = Callable[[str, int, int], None]  # what is going on, done, total
CHUNK = 256  # prompts encoded at once


def silent(what: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def encode(encoder: TextEncoder, prompts: Sequence[str]) -> Encoding:
    """Encode many prompts on the CPU, a few hundred at a time; rows of fewer 77-token chunks are repeated to the longest's length.

    Raises:
        SepMEError: the encoder returned NaN or infinite values.
    """
    parts = [encoder.encode(list(prompts[i : i + CHUNK])).to("cpu") for i in range(0, len(prompts), CHUNK)]
    longest = max(p.context.shape[1] for p in parts)
    contexts, masks = [], []
    for part in parts:
        repeat = longest // part.context.shape[1]
        if part.context.shape[1] * repeat != longest:
            raise SepMEError("The text encoder returned rows of incompatible lengths; prompts must fill whole chunks of tokens.")
        contexts.append(part.context.detach().repeat(1, repeat, 1))
        masks.append(part.mask.repeat(1, repeat))
    context = torch.cat(contexts)
    pooled = [p.pooled.detach() for p in parts if p.pooled is not None]
    if not all(v.isfinite().all() for v in (context, *pooled)):
        raise SepMEError("The text encoder returned NaN or infinite values; check the checkpoint, or run the encoder in float32.")
    return Encoding(context, torch.cat(masks), torch.cat(pooled) if pooled else None)


def token_rows(encoding: Encoding, padding: Padding) -> Tensor:
    """Token rows ``(n, d_in)`` float64."""
    context = encoding.context.double()
    return context.reshape(-1, context.shape[-1]) if padding == "all" else context[encoding.mask]


class PreserveFile:
    """A text file of prompts that must not change, one a line; blank lines are skipped, order and number do not matter.

    Only one batch of it is in memory at a time.

    Raises:
        SepMEError: the file is missing; while reading: it is no UTF-8 text, has an overlong line, or no prompt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size = os.stat(self.path).st_size
            if not self.path.is_file():
                raise SepMEError(f"{path} is a folder or device; a preserve file is a text file with one prompt a line.")
        except OSError as error:
            raise SepMEError(f"The preserve file {path} cannot be read ({error.strerror}); check the path.") from None

    def batches(self, size: int = CHUNK) -> Iterator[tuple[list[str], int]]:
        """Lists of at most ``size`` prompts, each with the number of bytes read so far."""
        count, done, batch = 0, 0, list[str]()
        try:
            with open(self.path, "rb") as file:
                # a UTF-8 character has at most 4 bytes; a longer line is cut there and found to be overlong below
                while line := file.readline(4 * MAX_PROMPT + 2):
                    done += len(line)
                    prompt = self._prompt(line)
                    if prompt:
                        batch.append(prompt)
                        count += 1
                    if len(batch) == size:
                        yield batch, done
                        batch = []
        except OSError as error:
            raise SepMEError(f"The preserve file {self.path} cannot be read ({error.strerror}); check the path.") from None
        if batch:
            yield batch, done
        if not count:
            raise SepMEError(f"The preserve file {self.path} is empty; write one prompt a line, or leave it out.")

    def _prompt(self, line: bytes) -> str:
        try:
            prompt = line.decode("utf-8").lstrip("\ufeff").strip()
        except UnicodeDecodeError:
            prompt = "\0"
        if len(line) > 4 * MAX_PROMPT or len(prompt) > MAX_PROMPT:
            raise SepMEError(
                f"The preserve file {self.path} has a line of more than {MAX_PROMPT} characters ({line[:40]!r}...); "
                "write one prompt a line."
            )
        if "\0" in prompt:
            raise SepMEError(f"The preserve file {self.path} is not a text file; it must be UTF-8 with one prompt a line.")
        return prompt
