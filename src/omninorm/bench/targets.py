"""The performance targets, as data, and the verdicts on a result. This module only reads results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from omninorm.bench import cases, memory, models
from omninorm.timing import OURS

PASS, FAIL, UNKNOWN = "pass", "FAIL", "not measured"
# The sizes to which the limits apply; models and the one-row case have other sizes.
_LEAST_ROWS, _WIDTHS = 512, (576, 4096)
_ANY_SIZE = frozenset({cases.ONE_ROW, models.QWEN_TRAINING, models.QWEN_PREFILL, models.THINKER_TRAINING})


class Target(NamedTuple):
    """A limit on the ratio of our time to another's.

    If `at_least` is true, it is a lower limit on the speed-up instead: the other's time over ours.
    """

    name: str
    case: str
    against: str
    dtypes: tuple[str, ...]
    limit: float
    at_least: bool = False

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:.2f}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


_HALVES, _FLOATS = ("bf16", "fp16"), ("fp32", "bf16")
TARGETS = (
    Target("RMSNorm forward / clone", cases.RMS_FORWARD, "clone", ("fp32",), 1.05),
    Target("RMSNorm forward / clone", cases.RMS_FORWARD, "clone", _HALVES, 1.20),
    Target("RMSNorm backward / clone", cases.RMS_BACKWARD, "clone", ("fp32",), 1.60),
    Target("RMSNorm backward / clone", cases.RMS_BACKWARD, "clone", ("bf16",), 2.00),
    Target("add_rms_norm / torch.add", cases.ADD_RMS_FORWARD, "torch.add", _FLOATS, 1.40),
    Target("RMSNorm fwd+bwd / nn.RMSNorm", cases.RMS_BOTH, "torch.nn", ("fp32",), 0.22),
    Target("RMSNorm fwd+bwd / nn.RMSNorm", cases.RMS_BOTH, "torch.nn", ("bf16",), 0.15),
    Target("RMSNorm fwd+bwd / nn.LayerNorm", cases.RMS_BOTH, "torch.nn.LayerNorm", ("fp32",), 0.85),
    Target("RMSNorm fwd+bwd / nn.LayerNorm", cases.RMS_BOTH, "torch.nn.LayerNorm", ("bf16",), 0.60),
    Target("LayerNorm fwd+bwd / nn.LayerNorm", cases.LAYER_BOTH, "torch.nn", ("fp32",), 0.95),
    Target("LayerNorm fwd+bwd / nn.LayerNorm", cases.LAYER_BOTH, "torch.nn", ("bf16",), 0.65),
    Target("RMSNorm compiled / nn.RMSNorm", cases.RMS_COMPILED, "torch.compile", _FLOATS, 0.90),
    Target("one row / nn.LayerNorm", cases.ONE_ROW, "torch.nn.LayerNorm", _FLOATS, 0.80),
    Target("Qwen3 training step / stock", models.QWEN_TRAINING, "transformers", ("bf16",), 0.86),
    Target("Qwen3 prefill / stock", models.QWEN_PREFILL, "transformers", ("bf16",), 0.92),
    Target("Thinker speed / nn.RMSNorm", models.THINKER_TRAINING, "torch.nn", ("fp32",), 1.03, at_least=True),
    Target("Thinker speed / nn.RMSNorm", models.THINKER_TRAINING, "torch.nn", ("bf16",), 1.15, at_least=True),
    Target("Thinker speed / nn.LayerNorm", models.THINKER_TRAINING, "torch.nn.LayerNorm", _FLOATS, 1.00, at_least=True),
)
# The bytes per row that a norm may keep for its backward pass in addition to x.
KEPT_LIMITS = {memory.RMS_KEPT: 4.0, memory.LAYER_KEPT: 8.0}


class Point(NamedTuple):
    """A measured value with its dtype, size and threads."""

    value: float
    dtype: str
    rows: int
    width: int
    threads: int

    @property
    def place(self) -> str:
        return f"{self.dtype} {self.rows}×{self.width}, {self.threads}t"


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the verdict on every target. The worst size decides; the median over the sizes is reported as well.

    The verdict on a target without measurements is "not measured".
    """
    verdicts = []
    for target in TARGETS:
        points = list(points_of(target, result))
        verdicts.append(_verdict(target, f"{target.name}, {'/'.join(target.dtypes)}", points))
    for norm, limit in KEPT_LIMITS.items():
        target = Target(f"{norm}: bytes per row kept beyond x", norm, OURS, (), limit)
        entries = [each for each in result["kept"] if each["norm"] == norm]
        points = [Point(each["bytes"][OURS], each["dtype"], each["rows"], each["width"], 1) for each in entries]
        verdicts.append(_verdict(target, target.name, points))
    return verdicts


def points_of(target: Target, result: Mapping[str, Any]) -> Iterator[Point]:
    """Yield the measurements of a target's case, dtypes and sizes, with the allocator "raised"."""
    for each in result["measurements"]:
        place = (each["dtype"], each["rows"], each["width"], each["threads"])
        counts = each["case"] == target.case and each["dtype"] in target.dtypes and each["allocator"] == "raised"
        if counts and _size_counts(each) and target.against in each["ratios"]:
            ratio = each["ratios"][target.against]["median"]
            yield Point(1 / ratio if target.at_least else ratio, *place)


def find_losses(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every size at which a peer or an alternative function was faster than ours."""
    losses = []
    for each in result["measurements"]:
        for name, ratio in each["ratios"].items():
            if each["contestants"][name]["role"] in ("peer", "other") and ratio["median"] > 1:
                place = {key: each[key] for key in ("case", "dtype", "rows", "width", "threads", "allocator")}
                losses.append({**place, "against": name, "ratio": ratio["median"]})
    return losses


def _size_counts(measurement: Mapping[str, Any]) -> bool:
    if measurement["case"] in _ANY_SIZE:
        return True
    narrowest, widest = _WIDTHS
    return bool(measurement["rows"] >= _LEAST_ROWS and narrowest <= measurement["width"] <= widest)


def _verdict(target: Target, name: str, points: Sequence[Point]) -> dict[str, Any]:
    verdict: dict[str, Any] = {"name": name, "wanted": target.wanted, "worst": None, "median": None, "at": None}
    if not points:
        return {**verdict, "sizes": 0, "missed": [], "missing": list(target.dtypes), "verdict": UNKNOWN}
    worst = (min if target.at_least else max)(points, key=lambda point: point.value)
    missing = [dtype for dtype in target.dtypes if dtype not in {point.dtype for point in points}]
    missed = [f"{point.place}: {point.value:.2f}" for point in points if not target.met(point.value)]
    return {
        **verdict,
        "worst": worst.value,
        "median": statistics.median(point.value for point in points),
        "at": worst.place,
        "sizes": len(points),
        "missed": missed,
        "missing": missing,
        "verdict": FAIL if missed else UNKNOWN if missing else PASS,
    }
