"""What must not change at all: a book's preserve list and its preserve file, which never lies in memory as a whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..concepts import MAX_PROMPT, ConceptBook, normalised
from ..errors import SepMEError
from ..model.protocols import Encoding, TextEncoder
from ..progress import OnProgress, silent
from .tokens import CHUNK, encode, present

SAME = 1e-3  # relative difference of tokens up to which two prompts read the same


class PreserveFile:
    """A text file of prompts that must not change, one per line; blank lines are skipped, order and number do not matter.

    Only one batch of it is in memory at a time.

    Raises:
        SepMEError: the file is missing; while reading: it is no UTF-8 text, has an overlong line, or no prompt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.size = os.stat(self.path).st_size
            if not self.path.is_file():
                raise SepMEError(f"{path} is a folder or device; a preserve file is a text file with one prompt per line.")
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
            raise SepMEError(f"The preserve file {self.path} is empty; write one prompt per line, or leave it out.")

    def _prompt(self, line: bytes) -> str:
        try:
            prompt = line.decode("utf-8").lstrip("\ufeff").strip()
        except UnicodeDecodeError:
            prompt = "\0"
        if len(line) > 4 * MAX_PROMPT or len(prompt) > MAX_PROMPT:
            raise SepMEError(
                f"The preserve file {self.path} has a line of more than {MAX_PROMPT} characters ({line[:40]!r}...); "
                "write one prompt per line."
            )
        if "\0" in prompt:
            raise SepMEError(f"The preserve file {self.path} is not a text file; it must be UTF-8 with one prompt per line.")
        return prompt


class Preserved:
    """The preserved prompts of a book, encoded a batch at a time.

    Attributes:
        count: how many there are.
        digest: SHA-256 of them, one per line. Both are known once they were read.
    """

    def __init__(self, encoder: TextEncoder, book: ConceptBook, on_progress: OnProgress = silent) -> None:
        self.book, self.encoder, self.on_progress = book, encoder, on_progress
        self.listed = encode(encoder, book.preserve) if book.preserve else None
        self.file = PreserveFile(book.preserve_file) if book.preserve_file else None
        self.count, self.digest = 0, ""

    def batches(self, what: str) -> Iterator[tuple[Sequence[str], Encoding]]:
        """The list, then the file."""
        if self.listed is not None:
            yield self.book.preserve, self.listed
        if self.file is not None:
            for prompts, done in self.file.batches():
                yield prompts, encode(self.encoder, prompts)
                self.on_progress(what, done, self.file.size)

    def read(self, concepts: Mapping[str, Encoding], take: Callable[[Encoding], None]) -> None:
        """Hand every batch to ``take``, count it, and check it against the concepts' prompts, encoded in the book's order.

        Raises:
            SepMEError: a preserved prompt reads the same as a concept's.
        """
        places = [(c.name, i) for c in self.book.concepts for i in range(len(c.prompts))]
        texts = {normalised(self.book[n].prompts[i]): (n, i) for n, i in places}
        means = torch.cat([_means(e) for e in concepts.values()])
        digest = hashlib.sha256()
        for prompts, encoding in self.batches("Preserve file: reading"):
            same = {i: texts[normalised(p)] for i, p in enumerate(prompts) if normalised(p) in texts}
            batch = _means(encoding)
            norms = encoding.context.double().norm(dim=-1).amax(dim=1, keepdim=True)
            for i, j in (torch.cdist(batch, means) <= SAME * norms).nonzero().tolist():
                if _reads_the_same(concepts[places[j][0]].context[places[j][1]], encoding.context[i]):
                    same[i] = places[j]
            for i, (name, k) in same.items():
                raise SepMEError(
                    f"The prompt {self.book[name].prompts[k]!r} of concept {name!r} reads the same to the text encoder as the preserved "
                    f"prompt {prompts[i]!r}; it cannot be erased and preserved at once, so remove one."
                )
            digest.update("".join(f"{p}\n" for p in prompts).encode())
            self.count += len(prompts)
            take(encoding)
        self.digest = digest.hexdigest()


def _means(encoding: Encoding) -> Tensor:
    """Mean token of each row ``(rows, d_in)`` float64: rows that read the same have close ones."""
    return encoding.context.double().sum(dim=1) / present(encoding.context).sum(dim=1, keepdim=True)


def _reads_the_same(one: Tensor, other: Tensor) -> bool:
    """Whether the tokens ``(tokens, d_in)`` of two prompts agree up to what batches of other sizes round differently."""
    one, other = one[present(one)], other[present(other)]
    if one.shape != other.shape:
        return False
    apart = (one.float() - other.float()).norm(dim=-1) / other.float().norm(dim=-1).clamp_min(1e-12)
    return float(apart.max()) < SAME
