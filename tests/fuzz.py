"""Fuzzing of delta files, books, toggles and prompt tags: ``python tests/fuzz.py --cases 100000 --seed 0``.

Every case must end in a valid object or in a SepMEError of one short line. Memory is bounded by RLIMIT_AS, time by an alarm a case.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sepme.apply.toggles import merge, parse_json, parse_tags
from sepme.cli.inspect import summary
from sepme.concepts import Concept, ConceptBook
from sepme.delta.concept_delta import ConceptDelta
from sepme.delta.format import header_hash
from sepme.errors import SepMEError

CASE_SECONDS, MEMORY, MAX_MESSAGE = 20, 2 << 30, 1000
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**400, 1.5, 1e308, math.nan, math.inf, "", "F16", "F32", "F64",
    "I64", "\ud800", "\x00", "a\nb", "<x>", "9" * 5000, [], [0], [[]], [1 << 62, 1 << 62], [-1, 4], [0, 1 << 60], [True, 2], {}, {"a": {}},
    {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}, {"name": "x", "prompts": ["y"]}, [{"name": 3}],
)  # fmt: skip
YAML_BITS = (
    "concepts:", "preserve:", "- ", "\n", "  ", "name: ", "prompts: ", "anchor: ", "[a, b]", "star", "{", "}", "[", "]", ", ", ": ", "? ",
    "&a ", "*a", "<<: ", "!!set ", "!!omap ", "!!binary ", "!!int ", "!!float ", "!!timestamp ", "!!python/object:os.system ", "!!bool ",
    "0x" + "f" * 5000, "1" + ":1" * 300 + ".0", "0001-01-01 00:00:00 +23:59", "9999-12-31T23:59:59-23:59", ".inf", "~",
    "'", '"', "|\n", ">-\n",
    "%YAML 9.9\n---\n", "---\n", "...\n", "\t", "\x00", "\u2028", "\ufeff", "[" * 200, "{a: " * 200, "- " * 200, "1e999", "0b1_1", "#",
)  # fmt: skip
TEXT_BITS = (
    "<erase:", "<keep:", ">", ":", "<", "star", " ", ",", "0.7", "nan", "1e999", "-", "9" * 500, "\u0130", "\ud800", "\n", "\x00",
    "<ERASE:a>", "<keep:a>", ", " * 200, "<erase:" * 100, " " * 300, "\u0663", "1_0",
)  # fmt: skip
JSON_BITS = (
    "{", "}", "[", "]", '"a"', '"A"', '"\\ud800"', ":", ",", "1", "-1e999", "NaN", "9" * 5000, "9" * 400, "null", "true", '"0.5"', '"x\\n"',
    " ", "[" * 500, "]" * 500, '{"a":' * 300, "\x00", "\ufeff", '"' + "n" * 3000 + '"',
)  # fmt: skip


def base() -> bytes:
    """A small whole delta."""
    names = [f"{layer}.1.transformer_blocks.0.attn2.to_{x}" for layer in ("input_blocks.1", "middle_block") for x in "kv"]
    info = {
        "known": [{"name": "moon", "prompts": ["a moon"]}], "preserve": {"count": 1, "prompts": ["a cat"]}, "losses": [0.5],
        "objective": {"name": "gcirs", "steps": 1}, "certificate": {"leakage_linear": {"moon": 0.1}, "gate_low": 0.1},
        "kv_fingerprint": "x",
    }  # fmt: skip
    up = {n: torch.linspace(-1, 1, 8).reshape(4, 2) for n in names}
    return ConceptDelta.from_factors(Concept("star"), torch.eye(2, 6), up, 0.1, info).to_bytes()


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bit flips, truncation, splices."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 2000) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and rng.random() < 0.2:
            del out[at:]
        elif kind == 2:
            out[at:at] = rng.choice((rng.randbytes(4), b'"', b"{", b"[", b"9" * 20, b"\xff"))
        elif kind == 3:
            del out[at : at + rng.randint(1, 20)]
        else:
            start = rng.randrange(len(data))
            out[at : at + rng.choice((0, 16))] = data[start : start + 16]
    return bytes(out)


def spoil(rng: random.Random, value: Any) -> Any:
    """Replace, drop, add or duplicate somewhere inside a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {rng.choice(("x", "", "__metadata__", "down", f"{key}.scale", "\ud800", "up." + "x" * 2000)): value[key]}
        return value | {key: spoil(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return [*value[:i], spoil(rng, value[i]), *value[i + 1 :]]
    if rng.random() < 0.03:
        deep: Any = []
        for _ in range(rng.choice((40, 400))):
            deep = [deep]
        return deep
    return rng.choice(JUNK)


def delta_case(rng: random.Random, whole: bytes) -> bytes:
    if rng.random() < 0.4:
        return mutate(rng, whole)
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header, payload = json.loads(whole[8:end]), bytearray(whole[end:])
    metadata = header["__metadata__"]
    for _ in range(rng.randint(1, 2)):
        kind = rng.randrange(4)
        if kind == 0:
            header = spoil(rng, header)
        elif kind == 1 and isinstance(metadata, dict):
            key = rng.choice(list(metadata))
            try:
                metadata[key] = json.dumps(spoil(rng, json.loads(metadata[key])))
            except (ValueError, TypeError, RecursionError):
                metadata[key] = rng.choice(("", "nan", "-1", "1e400", "9" * 5000, "\ud800", "[" * 3000, "sepme.delta/2", '{"a": NaN}'))
            header = header | {"__metadata__": metadata} if isinstance(header, dict) else header
        elif kind == 2:
            at = rng.randrange(len(payload) - 3)
            payload[at : at + 4] = rng.choice((struct.pack("<f", 3e38), struct.pack("<f", math.inf), rng.randbytes(4)))
    if (
        isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and rng.random() < 0.8
    ):  # signed again, so that what lies behind is reached
        own = header["__metadata__"]
        try:
            digest = hashlib.sha256()
            for name in sorted(k for k in header if k != "__metadata__"):
                entry = header[name]
                kind_name = {"F16": "torch.float16", "F32": "torch.float32"}[entry["dtype"]]
                digest.update(f"{name} {kind_name} {tuple(entry['shape'])}\n".encode())
                digest.update(bytes(payload[slice(*entry["data_offsets"])]))
            own["content_hash"] = digest.hexdigest()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            pass
        own["header_hash"] = header_hash(own)
    raw = json.dumps(header).encode()
    if rng.random() < 0.1:  # the same key twice
        raw = raw[:-1] + b', "down": ' + json.dumps(spoil(rng, header.get("down") if isinstance(header, dict) else 1)).encode() + b"}"
    length = len(raw) if rng.random() < 0.95 else rng.choice((0, 1, 1 << 40, (1 << 64) - 1, len(raw) + 8))
    return struct.pack("<Q", length) + raw + bytes(payload)


def joined(rng: random.Random, bits: tuple[str, ...], most: int) -> str:
    return "".join(rng.choice(bits) for _ in range(rng.randint(1, most)))


def book_case(rng: random.Random) -> str:
    book = "concepts:\n- star\n- {name: moon, prompts: [a moon], anchor: sky}\npreserve:\n- a cat\n"
    if rng.random() < 0.5:
        at = rng.randrange(len(book))
        return book[:at] + joined(rng, YAML_BITS, 3) + book[at + rng.randint(0, 4) :]
    if rng.random() < 0.3:
        return json.dumps(spoil(rng, {"concepts": ["a", {"name": "b", "prompts": ["c"]}], "preserve": ["d"]}))
    return joined(rng, YAML_BITS, 12)


def check_delta(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    delta = ConceptDelta.load(path)
    assert delta.down.dtype == torch.float32
    assert math.isfinite(delta.gate)
    assert all(delta.up_factor(n).isfinite().all() and delta.up[n].shape[1] == delta.rank for n in delta.up)
    json.dumps(summary(delta, path), allow_nan=False).encode()
    json.dumps(delta.info, allow_nan=False, indent=2)
    ", ".join(c.name for c in delta.known).encode()
    path.write_bytes(delta.to_bytes())
    assert ConceptDelta.load(path).content_hash() == delta.content_hash()


def check_book(text: str) -> None:
    book = ConceptBook.loads(text)
    assert book.concepts
    assert ConceptBook.parse(json.loads(book.dumps())) == book


def check_toggles(text: str) -> None:
    assert all(abs(v) <= 100 for v in merge(parse_json(text)).values())


def check_tags(text: str) -> None:
    cleaned, toggles = parse_tags(text)
    assert all(abs(v) <= 100 for v in toggles.values())
    assert toggles or cleaned == text


def attempt(check: Callable[..., None], *arguments: Any) -> bool:
    """Whether the input was accepted; anything but a valid object or a SepMEError of one short line is an error."""
    try:
        check(*arguments)
    except SepMEError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error)[:300])
        assert len(str(error)) <= MAX_MESSAGE, f"{len(str(error))} characters: {str(error)[:200]}"
        return False
    return True


def run(cases: int, seed: int, go_on: bool = False) -> tuple[Counter[str], dict[str, float]]:
    """Counts by kind and outcome, and the slowest case of each kind in seconds."""
    rng, seen, slowest = random.Random(seed), Counter[str](), dict[str, float]()
    whole = base()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        path = Path(name) / "a.safetensors"
        check: Callable[..., Any]
        arguments: tuple[Any, ...]
        for i in range(cases):
            kind = ("delta", "book", "toggles", "tags")[i % 4]
            if kind == "delta":
                check, arguments = check_delta, (delta_case(rng, whole), path)
            elif kind == "book":
                check, arguments = check_book, (book_case(rng),)
            else:
                bits = JSON_BITS if kind == "toggles" else TEXT_BITS
                check, arguments = (check_toggles if kind == "toggles" else check_tags), (joined(rng, bits, 10),)
            signal.alarm(CASE_SECONDS)
            start = time.perf_counter()
            try:
                accepted = attempt(check, *arguments)
                seen[f"{kind} {'accepted' if accepted else 'refused'}"] += 1
            except BaseException as error:
                if not go_on:
                    print(f"case {i}: {str(arguments[0])[:2000]!r}", file=sys.stderr)
                    raise
                seen[f"{kind} FAILED {type(error).__name__}: {str(error)[:110]}"] += 1
            signal.alarm(0)
            slowest[kind] = max(slowest.get(kind, 0.0), time.perf_counter() - start)
    return seen, slowest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="Count failures instead of stopping at the first.")
    options = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    counts, times = run(options.cases, options.seed, options.go_on)
    for what, count in sorted(counts.items()):
        print(f"{count:8} {what}")
    print("slowest case in seconds:", {k: round(v, 3) for k, v in times.items()})
    print("peak MB:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
