"""attention-not-causal: a language model sees the tokens that it is trained to predict.

Facts, in sampled steps: at least 99 % of the labels that count are the next token of the model's input; and attention
shows a token at least half of the later ones, in the first example of the batch. A causal mask shows none of them, and
a prefix that may be read in both directions has no labels. Models with several stacks are not judged, because an
encoder may see everything, and of a block with several attentions the one that hides most counts. Persistence: 2
samples. It is a warning, because code may hide tokens in other ways; weights that are set to 0 after the softmax are
recognized in the autograd graph.
"""

from __future__ import annotations

from collections.abc import Iterable

from omninorm.monitor.history import History, Sample
from omninorm.monitor.rules.base import Rule
from omninorm.monitor.rules.numbers import Streaks
from omninorm.record.alarm import Alarm

LABELS, VISIBLE = 0.99, 0.5
SAMPLES = 2


class AttentionNotCausal(Rule):
    """Reports the attention of each such block."""

    name = "attention-not-causal"
    source = "exact: the labels, and what attention hides; the shares of 99 and 50 % are omninorm's own"
    explains = ("suspicious-loss", "held-out-rising")

    def __init__(self) -> None:
        self._streaks = Streaks()

    def on_sample(self, history: History, sample: Sample) -> Iterable[Alarm]:
        facts = history.facts
        if sample.next_tokens is None or sample.next_tokens < LABELS or len(facts.chains) > 1:
            return
        for block, (name, visible) in enumerate(zip(facts.blocks, sample.visible_future, strict=False)):
            if not self._streaks.lasts(block, visible is not None and visible >= VISIBLE, sample.step, SAMPLES):
                continue
            layer = (facts.attentions[block] if block < len(facts.attentions) else None) or name
            evidence = f"Attention sees the future: {layer} shows a token {100 * (visible or 0.0):.0f} % of the later "
            evidence += "tokens, although the labels are the next tokens."
            remedy = "Pass is_causal=True or a causal mask to the attention; without it the loss only shows how well "
            remedy += (
                "the model copies. To check, change the last token of an input: earlier logits must stay the same."
            )
            yield self.alarm(sample.step, "warn", layer, evidence, remedy)
