"""Rules for a single tensor: non-finite values, gains, massive weights, and the cost of lower precision."""

from __future__ import annotations

from collections.abc import Iterator

from omninorm.inspection.findings import Finding
from omninorm.inspection.gains import SILENT, Gains
from omninorm.inspection.measure import FP16_MAX, TensorStats

GAIN_DRIFT = 10.0
SILENT_SHARE = 0.01
MASSIVE = 50.0
"""max |w| / RMS: 6 for 10⁹ draws from a normal distribution, about 100 for the "super weights" of trained models."""
FP16_LOST, FP16_SUBNORMAL = 0.01, 0.25
INT8_ERROR = 0.05
"""The relative error of a normal distribution in rows of 4096 is 1 %."""


def tensor_findings(tensor: TensorStats) -> Iterator[Finding]:
    """Yield findings about a single tensor."""
    if tensor.numel == 0:
        remedy = "save the checkpoint again; with DeepSpeed ZeRO-3 or FSDP, gather the parameters first"
        yield about(tensor, "warn", "empty-tensor", f"its shape {list(tensor.shape)} has no elements", remedy)
    if not tensor.measured or tensor.numel == 0:
        return
    yield from _non_finite(tensor)
    if tensor.place.kind == "buffer":
        return
    if tensor.gains is not None:
        yield from _gains(tensor, tensor.gains)
    if tensor.is_matrix:
        yield from _massive(tensor)
        yield from _int8(tensor)
    yield from _fp16(tensor)


def about(tensor: TensorStats, severity: str, rule: str, evidence: str, remedy: str, magnitude: float = 0.0) -> Finding:
    """Build a finding about this tensor."""
    place = tensor.place
    return Finding(severity, rule, tensor.name, place.layer, evidence, remedy, magnitude, role=place.role)


def _non_finite(tensor: TensorStats) -> Iterator[Finding]:
    count = tensor.nan + tensor.inf
    # A mask contains −∞ on purpose.
    if count == 0 or (tensor.nan == 0 and "mask" in tensor.name):
        return
    what = f"{tensor.nan} NaN and {tensor.inf} infinite of {tensor.numel} values"
    evidence = f"{what}; the first is {tensor.first_bad_value} at {_at(tensor.first_bad)}"
    remedy = "use an earlier checkpoint, or convert the original again to a wider type"
    yield about(tensor, "fail", "non-finite", evidence, remedy, count)


def _gains(tensor: TensorStats, gains: Gains) -> Iterator[Finding]:
    if gains.largest < SILENT:
        final = tensor.place.block is None
        evidence = f"all {gains.count} gains are silent; the largest |γ| is {gains.largest:.2g}"
        remedy = "this norm outputs only zeros, or only its bias: check that γ was trained and saved"
        remedy += "; if the file stores γ − 1, as Gemma's do, put config.json next to it"
        yield about(tensor, "fail" if final else "warn", "silent-norm", evidence, remedy, gains.count)
        return
    if gains.silent >= SILENT_SHARE:
        evidence = (
            f"{gains.silent:.1%} of {gains.count} gains have |γ| < {SILENT:g}, starting at channel {gains.silent_first}"
        )
        remedy = "these channels are switched off here: prune them, or check whether weight decay is applied to gains"
        yield about(tensor, "warn", "silent-gains", evidence, remedy, gains.silent)
    if gains.ratio is None or gains.ratio > GAIN_DRIFT:
        ratio = "∞" if gains.ratio is None else f"{gains.ratio:.3g}"
        evidence = (
            f"max |γ| = {gains.largest:.3g} at channel {gains.largest_at} is {ratio} × the median {gains.median:.3g}"
            f" (threshold {GAIN_DRIFT:g})"
        )
        remedy = "expect outlier activations after this norm: rotate or smooth them before quantizing, or keep 16 bits"
        yield about(tensor, "warn", "gain-drift", evidence, remedy, gains.ratio or float("inf"))


def _massive(tensor: TensorStats) -> Iterator[Finding]:
    if tensor.rms > 0 and tensor.max_abs > MASSIVE * tensor.rms:
        ratio = tensor.max_abs / tensor.rms
        evidence = (
            f"|w| = {tensor.max_abs:.3g} at {_at(tensor.argmax)} is {ratio:.3g} × the RMS {tensor.rms:.3g}"
            f" (threshold {MASSIVE:g})"
        )
        remedy = (
            "keep this weight in 16 bits when quantizing; if it did not come from training, the file is damaged there"
        )
        yield about(tensor, "warn", "massive-weight", evidence, remedy, ratio)


def _fp16(tensor: TensorStats) -> Iterator[Finding]:
    if tensor.fp16_lost is None or tensor.fp16_subnormal is None:
        return
    if tensor.max_abs > FP16_MAX:
        evidence = f"max |w| = {tensor.max_abs:.3g} is {tensor.max_abs / FP16_MAX:.3g} × fp16's largest number, 65504"
        remedy = "it would overflow in fp16: use bf16 or fp32"
        yield about(tensor, "warn", "fp16-overflow", evidence, remedy, tensor.max_abs)
    if tensor.fp16_lost >= FP16_LOST:
        evidence = f"{tensor.fp16_lost:.1%} of the non-zero values would become 0 in fp16 (RMS {tensor.rms:.3g})"
        yield about(tensor, "warn", "fp16-underflow", evidence, "use bf16 or fp32, or rescale", tensor.fp16_lost)
    elif tensor.is_matrix and tensor.fp16_subnormal >= FP16_SUBNORMAL:
        evidence = f"{tensor.fp16_subnormal:.1%} of the non-zero values are below fp16's smallest normal number, 6.1e-5"
        remedy = "they would lose precision in fp16, but not in bf16 or fp32"
        yield about(tensor, "note", "fp16-underflow", evidence, remedy, tensor.fp16_subnormal)


def _int8(tensor: TensorStats) -> Iterator[Finding]:
    if tensor.int8_error is not None and tensor.int8_error > INT8_ERROR:
        evidence = (
            f"int8 quantization with one scale per row has an error of {tensor.int8_error:.1%} of the RMS"
            f" (int4 in groups of 32: {tensor.int4_error:.1%})"
        )
        remedy = "quantize it in smaller groups, or keep it in 16 bits"
        yield about(tensor, "note", "int8-error", evidence, remedy, tensor.int8_error)


def _at(index: tuple[int, ...] | None) -> str:
    return str(list(index or ()))
