"""Compiles the Triton kernels ahead of time and inspects the compiled code; no GPU is needed."""

import math
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from omninorm.kernels import gpu, triton_norms

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# The kernels with everything that they can have, an addition apart.
FORWARD_RMS = {"OFFSET": 0.0, "ROUND_FIRST": False, "KEEP": True}
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{'add_' if add else ''}{name}": (name, {**options, "ADD": add, "GAIN": True})
    for add in (False, True)
    for name, options in {
        "rms_norm_forward": FORWARD_RMS,
        "layer_norm_forward": {"BIAS": True, "KEEP": True},
        "rms_norm_backward": {"OFFSET": 0.0, "ROUND_FIRST": False, "LEARNS": True},
        "layer_norm_backward": {"GAIN_LEARNS": True, "BIAS_LEARNS": True},
    }.items()
}


class Case(NamedTuple):
    kernel: str
    dtype: torch.dtype
    width: int
    target: str

    @property
    def tile(self) -> gpu.Tile:
        return gpu.tile(KERNELS[self.kernel][0], self.width, self.dtype, most_warps=gpu.most_warps(self.target[:3]))


@cache
def compiled(case: Case) -> Any:
    """Return the kernel, compiled for float32 gains, aligned pointers and contiguous rows."""
    name, options = KERNELS[case.kernel]
    kernel = getattr(triton_norms, name)
    shape = case.tile._asdict()
    warps = shape.pop("num_warps")
    compute = torch.float64 if case.dtype == torch.float64 else torch.float32
    constants = {"EPS": 1e-6, "LEAST": math.sqrt(1e-6), "C": tl.float64 if compute == torch.float64 else tl.float32}
    constants |= options | shape
    if "EVEN" in kernel.arg_names:
        constants["EVEN"] = shape["WHOLE"] and shape["BLOCK"] == case.width
    signature, aligned = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument in ("gain_ptr", "bias_ptr"):
            signature[argument] = "*fp32"
        elif argument in ("mean_ptr", "scale_ptr", "dgain_ptr", "dbias_ptr"):
            signature[argument] = TYPES[compute]
        else:
            signature[argument] = TYPES[case.dtype] if argument.endswith("_ptr") else "i32"
        if argument.endswith(("_ptr", "stride")) or argument == "width":
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[case.target], options=options)


def totals(dtype: torch.dtype, target: str) -> Any:
    """Return the compiled kernel that sums the blocks, for gains of a dtype."""
    signature = dict.fromkeys(("first_ptr", "second_ptr"), TYPES[torch.float32])
    signature |= dict.fromkeys(("first_total_ptr", "second_total_ptr"), TYPES[dtype])
    signature |= dict.fromkeys(("blocks", "width"), "i32")
    constants = {"ROWS": gpu.BLOCKS, "BLOCK": gpu.COLUMNS}
    source = ASTSource(
        triton_norms.column_totals, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    return triton.compile(source, target=TARGETS[target], options={"num_warps": 4, "enable_fp_fusion": False})


def local_memory(made: Any) -> int:
    """Return the number of bytes that a thread stores outside of its registers."""
    if "amdgcn" in made.asm:
        sizes = re.findall(r"\.(?:private_segment_fixed_size|[sv]gpr_spill_count):\s*(\d+)", made.asm["amdgcn"])
        assert len(sizes) >= 3
        return sum(map(int, sizes))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    assert "EXIT" in code
    assert bool(int(stack)) == bool(re.search(r"\b(?:STL|LDL)\b", code))
    return int(stack)


def bytes_moved(case: Case, kind: str) -> dict[int, int]:
    """Return the bytes that all loads (kind "ld") or stores ("st") of global memory in the code move, each counted once.

    The keys are the bytes of one instruction of a thread, at most 16."""
    moved: dict[int, int] = {}
    threads = case.tile.num_warps * 32
    for vector, bits in re.findall(rf"\b{kind}\.global(?:\.\w+::\w+)*(?:\.v(\d))?\.b(\d+)", compiled(case).asm["ptx"]):
        size = int(vector or 1) * int(bits) // 8
        moved[size] = moved.get(size, 0) + size * threads
    return moved


def _cuobjdump(option: str, path: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout
