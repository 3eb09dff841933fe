"""Every configuration compiled ahead of time for every GPU family, without a driver.

No spills, shared memory within the part's limit, as many programs resident as are started, matrix instructions in half precision.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TARGETS = ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100"]
INSTRUCTIONS = {"sm80": "mma.sync", "sm90": "wgmma", "sm100": "tcgen05.mma", "gfx942": "v_mfma", "gfx1100": "v_wmma"}


@pytest.fixture
def aot(compiled: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return importlib.import_module("kernels_compiled.aot")


def test_every_family_has_configurations(aot: Any, compiled: SimpleNamespace) -> None:
    assert list(aot.TARGETS) == TARGETS
    table = compiled.configs.load()
    assert set(table) == {"default", *TARGETS}
    for kinds in table.values():
        assert set(kinds) == {"half", "float32"}
        for found in kinds.values():
            bounds = [c.max_rows for c in found]
            assert bounds == [*sorted(b for b in bounds if b), 0]  # narrowest first, the last for any number of rows


def test_choice_of_configuration(compiled: SimpleNamespace) -> None:
    choose, table = compiled.configs.choose, compiled.configs.load()
    first, last = table["sm90"]["half"]
    assert choose("sm90", torch.float16, first.max_rows) is first
    assert choose("sm90", torch.bfloat16, first.max_rows + 1) is last
    assert choose("sm90", torch.float32, 10**6) is table["sm90"]["float32"][-1]
    assert choose("sm133", torch.float16, 154) is table["default"]["half"][0]
    assert compiled.configs.family(torch.device("cpu")) == "default"


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_well(aot: Any, compiled: SimpleNamespace, target: str) -> None:
    kinds = {"fp16": set(), "bf16": set(), "fp32": set()}
    wider = [c for c in aot.cases([target], (1024, 2048)) if c.config and c.dtype == torch.float16]  # the rest: `make kernels`
    for case in [*aot.cases([target]), *wider]:
        report = case.report()
        assert report["ok"], report
        assert report["spills"] == 0
        assert 0 < report["registers"] <= 512
        assert report["shared_bytes"] <= report["shared_limit"]
        if report["kernel"] == "project_kv":
            kinds[report["dtype"]].add(case.config)
            if report["dtype"] != "fp32":
                assert report["tensor_core_instructions"] > 0
                if target in INSTRUCTIONS:
                    text = case.compile().asm
                    assert INSTRUCTIONS[target] in text["ptx" if "ptx" in text else "amdgcn"]
    table = compiled.configs.load()[target]
    assert kinds["fp16"] == kinds["bf16"] >= set(table["half"])
    assert kinds["fp32"] >= set(table["float32"])


def test_float32_is_three_tf32_products_on_nvidia_and_exact_on_amd(aot: Any) -> None:
    """Plain tf32 would break the bound of 1e-5, and the interpreter would not see it."""
    for target, instruction in (("sm80", "tf32"), ("gfx942", "xf32")):
        case = next(c for c in aot.cases([target]) if c.dtype == torch.float32 and c.config)
        asm = case.compile().asm
        if target == "sm80":
            products = [line for line in asm["ptx"].splitlines() if "mma.sync" in line and instruction in line]
            config = case.config
            tiles = config.block_m * (config.block_n // 8) // 16 // config.warps  # m16n8 tiles of a warp
            steps = (config.block_k + config.block_r) // 8
            assert len(products) == 3 * tiles * steps
        else:
            assert instruction not in asm["amdgcn"]
            assert "v_mfma_f32" in asm["amdgcn"]


def test_a_configuration_that_is_too_large_is_reported(aot: Any) -> None:
    """The checks can fail: too many stages for the shared memory, a tile that spills, too many programs."""
    case = next(c for c in aot.cases(["sm86"]) if c.dtype == torch.float16 and c.config)
    for what in ({"stages": 8}, {"block_m": 128, "block_n": 128, "warps": 4}, {"per_processor": 9}):
        report = replace(case, config=replace(case.config, **what)).report()
        assert not report["ok"], (what, report)
