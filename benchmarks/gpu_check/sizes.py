"""Sizes and time budgets of the check: full, quick, and tiny for a dry run without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# GPT-2's shape: 124 million weights with a tied head.
GPT2_SMALL = {"vocab_size": 50304, "d_model": 768, "n_layers": 12, "n_heads": 12, "max_seq_len": 1024}
SMALL = {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 16}


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured, and the time budgets.

    Args:
        shapes, checked: (rows, width) for the comparisons with float64, and for those of single features.
        rows, widths, dtypes: the sizes of the timings.
        rounds: the number of samples of each timing.
        model, batch: the Thinker that is trained, and its sequences per step.
        steps, blocks: the steps in a timed block of training, and the blocks for each variant.
        watched_blocks: the blocks for each sampling interval of the watch.
        long_step: to measure the watch's overhead, the batch is increased until a step takes this many seconds; 0 keeps
            the batch.
        budgets: the seconds for each part, in the order in which the parts run.
    """

    shapes: tuple[tuple[int, int], ...] = (
        (1, 1),
        (7, 33),
        (300, 768),
        (64, 8192),
        (5, 12345),
        (3, 65536),
        (4099, 1024),
    )
    checked: tuple[int, int] = (33, 768)
    rows: int = 4096
    widths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    rounds: int = 15
    large: bool = True
    model: dict[str, Any] = field(default_factory=lambda: dict(GPT2_SMALL))
    batch: int = 8
    steps: int = 5
    blocks: int = 9
    watched_blocks: int = 4
    long_step: float = 0.1
    budgets: dict[str, float] = field(
        default_factory=lambda: {
            "numerics": 75.0, "speed": 130.0, "training": 70.0, "watch": 60.0, "tests": 100.0, "trace": 20.0
        }
    )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Return the sum of the budgets."""
        return sum(self.budgets.values())


FULL = Sizes()
QUICK = Sizes(
    shapes=((7, 33), (300, 768), (64, 8192), (3, 65536)),
    widths=(1024, 4096, 16384),
    dtypes=("bf16",),
    rounds=9,
    large=False,
    blocks=7,
    watched_blocks=3,
    budgets={"numerics": 60.0, "speed": 45.0, "training": 65.0, "watch": 50.0},
)
TINY = Sizes(
    shapes=((7, 33), (2, 64)),
    checked=(5, 64),
    rows=8,
    widths=(64,),
    dtypes=("bf16",),
    rounds=1,
    large=False,
    model=SMALL,
    batch=2,
    steps=2,
    blocks=2,
    watched_blocks=1,
    long_step=0.0,
    # Machines without a GPU may be slow, but with these sizes the check is short.
    budgets={"numerics": 200.0, "speed": 100.0, "training": 100.0, "watch": 100.0, "tests": 100.0, "trace": 50.0},
)
