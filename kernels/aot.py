"""Every configuration compiled for every GPU family, without a GPU: registers, spills, shared memory, tensor-core instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import rows
from .configs import Config, load
from .projection import COLUMNS, precision, project_kv_kernel

KB = 1 << 10
# family: compiler target, shared memory that a program may have, shared memory of a multiprocessor
TARGETS: dict[str, tuple[GPUTarget, int, int]] = {
    "sm80": (GPUTarget("cuda", 80, 32), 163 * KB, 164 * KB),
    "sm86": (GPUTarget("cuda", 86, 32), 99 * KB, 100 * KB),
    "sm89": (GPUTarget("cuda", 89, 32), 99 * KB, 100 * KB),
    "sm90": (GPUTarget("cuda", 90, 32), 227 * KB, 228 * KB),
    "sm100": (GPUTarget("cuda", 100, 32), 227 * KB, 228 * KB),
    "sm120": (GPUTarget("cuda", 120, 32), 99 * KB, 100 * KB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KB, 64 * KB),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 64 * KB, 128 * KB),
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_|v_wmma_)")


@dataclass(frozen=True)
class Case:
    """One kernel for one family, type and configuration (None: the add kernel, which has one)."""

    target: str
    kernel: str
    dtype: torch.dtype
    config: Config | None
    d_in: int = 768

    def compile(self) -> Any:
        """Triton's compiled kernel."""
        target = TARGETS[self.target][0]
        kind = f"*{TYPES[self.dtype]}"
        if self.config is None:
            pointers = {"base": kind, "h": "*fp32", "up": "*fp32", "rows": "*i64", "out": kind}
            numbers = dict.fromkeys(("tokens", "d_out", "rank", "up_stride_r", "up_stride_n"), "i32")
            constants: dict[str, Any] = {"BLOCK_M": rows.BLOCK_M, "BLOCK_N": rows.BLOCK_N, "BLOCK_R": rows.BLOCK_R}
            kernel, warps, stages = rows.add_to_rows_kernel, rows.WARPS, 2
        else:
            c = self.config
            pointers = {"context": kind, "table": "*i64", "up": kind, "h": "*fp32", "out": kind}
            numbers = dict.fromkeys(("rows", "rank", "columns", "blocks"), "i32")
            constants = {"D_IN": self.d_in, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "BLOCK_R": c.block_r}
            constants |= {"PRECISION": precision(self.dtype, self.target), "COLUMNS": COLUMNS}
            kernel, warps, stages = project_kv_kernel, c.warps, c.stages
        signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
        aligned = [*pointers, "columns", "d_out"]  # what the launcher's arguments are multiples of 16 in
        attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
        source = ASTSource(kernel, signature, constants, attrs)
        return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True})

    def report(self) -> dict[str, Any]:
        """What the compiler made of it.

        Returns:
            ``target``, ``kernel``, ``dtype``, ``d_in``, ``config``, ``registers`` (of a thread), ``spills`` (bytes of a thread's stack on
            NVIDIA, spilled registers on AMD), ``shared_bytes``, ``shared_limit``, ``resident_programs`` (on a multiprocessor, by registers
            and shared memory; None on AMD), ``tensor_core_instructions``, and whether it is ``ok``: no spills, within the limit, as many
            programs resident as are started, matrix instructions in half precision.
        """
        compiled = self.compile()
        nvidia = "cubin" in compiled.asm
        registers, spills = _nvidia(compiled) if nvidia else _amd(compiled)
        found = len(MATRIX.findall(compiled.asm["ptx" if nvidia else "amdgcn"]))
        _, limit, whole = TARGETS[self.target]
        shared = int(compiled.metadata.shared)
        resident = None
        if nvidia:  # 65536 registers a multiprocessor; each program takes 1 KB of shared memory beside its own
            resident = min(65536 // (-(-registers // 8) * 8 * 32 * compiled.metadata.num_warps), whole // (shared + KB))
        matrices = self.config is not None and self.dtype != torch.float32
        fits = self.config is None or resident is None or resident >= self.config.per_processor
        return {
            "target": self.target,
            "kernel": self.kernel,
            "dtype": TYPES[self.dtype],
            "d_in": self.d_in if self.config else None,
            "config": asdict(self.config) if self.config else {},
            "registers": registers,
            "spills": spills,
            "shared_bytes": shared,
            "shared_limit": limit,
            "resident_programs": resident,
            "tensor_core_instructions": found,
            "ok": spills == 0 and shared <= limit and fits and (found > 0 or not matrices),
        }


def cases(targets: Iterable[str] = tuple(TARGETS), widths: Iterable[int] = (768,)) -> Iterator[Case]:
    """Every configuration of these families, and the one that unknown families get, in every type, for these d_in."""
    table = load()
    for target in targets:
        for dtype in TYPES:
            kind = "float32" if dtype == torch.float32 else "half"
            others = () if target.startswith("gfx1") else table["default"][kind]  # all gfx1xxx are one family
            for config in dict.fromkeys(table[target][kind] + others):
                for d_in in widths:
                    yield Case(target, "project_kv", dtype, config, d_in)
            yield Case(target, "add_to_rows", dtype, None)


def _nvidia(compiled: Any) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from the binary. What does not fit in registers goes to the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _amd(compiled: Any) -> tuple[int, int]:
    """Vector registers of a thread and spilled registers, vector and scalar, from the assembly's metadata."""
    text = compiled.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
