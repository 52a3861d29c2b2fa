"""loss-spike: one step's loss is far above those of up to 128 steps before it.

Signal: the loss. Threshold: more than 6σ and more than 20 % above the mean. Persistence: none; it is a warning. Source:
6σ over 128 steps is OLMo-core's limit. Alone it fires 15 times in the 19,560 steps of a healthy GPT-2 124M, on single
batches with harder text, at most 10 % above the mean loss. With the 20 % [ours] it never fires there. The batch (or a
single update) is reported as the cause only if no other cause is known: not if the learning rate rose 2-fold within 6
steps, if the newest sample's updates were above 5 % of the weights, or if an earlier gradient norm was unusual.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from omninorm.monitor.history import History, Step
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import finite, fold, known, median, values_of
from omninorm.monitor.rules.rolling import Rolling
from omninorm.record.alarm import Alarm

SIGMAS = 6.0
RISE = 0.2
RATE_JUMP, RATE_STEPS = 2.0, 6
LARGE = 0.05  # share of the weights; after the first steps no healthy update is this large
ORDINARY = 3.0  # σ; a gradient norm below mean + 3σ is ordinary


class LossSpike(Rule):
    """Reports the likely cause: the learning rate, the updates or the gradients; if all were ordinary, the batch."""

    name = "loss-spike"
    source = "6σ over 128 steps is OLMo-core's limit; the 20 % are calibrated on a healthy GPT-2 124M"
    symptom = True
    explains = ("unrecovered-spike", "loss-rising")

    def __init__(self) -> None:
        self._losses = Rolling()
        self._gradients = Rolling()
        self._unusual: int | None = None  # the last step with an unusual gradient norm
        self._before: float | None = None
        self._rates: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS + 1)

    def bounds(self) -> dict[str, tuple[float | None, float | None]]:
        expected = self._losses.expected()
        return {} if expected is None else {"loss": (None, _limit(expected))}

    def on_step(self, history: History, step: Step) -> Iterable[Alarm]:
        loss, rate = finite(step.loss), finite(step.lr)
        if rate is not None:
            self._rates.append((step.step, rate))
        if loss is not None:
            expected = self._losses.expected()
            self._losses.add(loss, expected)
            if expected is not None and loss > _limit(expected):
                yield self._explain(history, step.step, loss, expected)
            self._before = loss
        self._look_at_gradient(step)

    def _look_at_gradient(self, step: Step) -> None:
        norm = finite(step.grad_norm)
        if norm is None:
            return
        expected = self._gradients.expected()
        self._gradients.add(norm, expected)
        if expected is not None and norm > expected[0] + ORDINARY * expected[1]:
            self._unusual = step.step

    def _explain(self, history: History, step: int, loss: float, expected: tuple[float, float]) -> Alarm:
        mean, sigma = expected
        height = f"{(loss - mean) / sigma:.1f}σ" if sigma > 0.0 else f"{100 * (loss / mean - 1):.0f} %"
        rise = f"the loss is {loss:.4g}, {height} above its mean over the last {self._losses.before} steps ({mean:.4g})"
        cause, detail, remedy = (
            self._rate(step) or _updates(history, step) or self._gradient_or_batch(history, step, expected)
        )
        return self.alarm(step, "warn", None, f"{cause}: {rise}. {detail}", remedy)

    def _rate(self, step: int) -> tuple[str, str, str] | None:
        """Return cause, evidence and remedy if the learning rate rose within the last steps."""
        recent = [(at, rate) for at, rate in self._rates if step - at <= RATE_STEPS]
        for place, (at, rate) in enumerate(recent):
            lowest = min((before for _, before in recent[:place] if before > 0.0), default=rate)
            if 0.0 < RATE_JUMP * lowest <= rate:
                jump = fold(rate / lowest)
                detail = f"The learning rate rose from {lowest:.3g} to {rate:.3g} by step {at}."
                return (
                    f"Learning rate jumped {jump}",
                    detail,
                    f"Undo the jump at step {at}, or warm up to the new learning rate.",
                )
        return None

    def _gradient_or_batch(self, history: History, step: int, expected: tuple[float, float]) -> tuple[str, str, str]:
        mean, sigma = expected
        at_once = self._before is not None and self._before <= mean + ORDINARY * sigma
        recent = self._unusual is not None and step - self._unusual <= 4
        if at_once and not recent:
            detail = f"It rose from {self._before:.4g} within one step, and the gradients before it were ordinary."
            remedy = (
                "Watch the next steps: if the loss recovers, one unusual batch has done no lasting harm. If it stays "
            )
            remedy += (
                "high or spikes repeat, clip gradients at norm 1.0 or lower the learning rate. To find the batch of "
            )
            remedy += f"step {step}, log which examples each step uses."
            return "Unusual batch or update", detail, remedy
        cause = (
            f"the gradient norm was unusual at step {self._unusual}" if recent else "the loss rose over several steps"
        )
        remedy = "Clip gradients at norm 1.0, or lower the learning rate"
        remedy += "." if history.facts.adam_eps is None else " or Adam's β₂ to 0.95."
        return "Harmful update", f"The model changed first: {cause}.", remedy


def _limit(expected: tuple[float, float]) -> float:
    mean, sigma = expected
    return mean + max(SIGMAS * sigma, RISE * abs(mean))


def _updates(history: History, step: int) -> tuple[str, str, str] | None:
    """Return cause, evidence and remedy if the newest sample's updates were too large; those of step 1 may be large."""
    sample = history.samples[-1] if history.samples else None
    if sample is None or sample.step == 1 or step - sample.step > 2 * history.facts.every:
        return None
    ratios = known(values_of(sample, "update_ratio"))
    if not ratios or median(ratios) <= LARGE:
        return None
    detail = (
        f"The update of step {sample.step} changed the weights by {100 * median(ratios):.2g} %, where 1 % is plenty."
    )
    return "Updates too large", detail, "Lower the learning rate and use a warm-up."
