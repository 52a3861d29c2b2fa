"""Published facts that models small enough for a test reproduce, and equal configurations, which must not get a verdict.

The other facts are in docs/claims.md; test_recorded.py checks them.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from omninorm.experiments.compare import parse_plan
from omninorm.experiments.compare.cards import Card
from omninorm.experiments.compare.claims import CLAIMS, studies_of
from omninorm.experiments.compare.evidence import Evidence, Row
from omninorm.experiments.compare.protocols import MEASURE
from omninorm.experiments.compare.statistics import BETTER, WORSE, judge, paired
from omninorm.experiments.corpus import Corpus, load_corpus
from omninorm.experiments.evaluate import unigram_bits_per_byte

SMALL = {"d_model": 16, "n_heads": 2, "seq_len": 32, "batch_size": 8, "feed_forward": "gelu", "eval_bytes": 4096}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(autouse=True)
def one_thread():
    """As in a worker process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measure(claim: str, corpus: Corpus, **changes: Any) -> Card:
    """The claim's card from its first study with some entries changed; `settings` are added to those of SMALL."""
    study = {**studies_of([claim])[0], **changes, "settings": {**SMALL, **changes.get("settings", {})}}
    (grid,) = parse_plan({"claims": [claim], "studies": [study]}, "here").studies
    rows = []
    for variant in grid.variants():
        cells = {seed: grid.cell(variant, seed, None, None) for seed in range(grid.seeds)}
        outcomes = {seed: MEASURE[grid.protocol](cell, corpus).outcome for seed, cell in cells.items()}
        rows.append(Row(variant, outcomes, {}))
    unigram = unigram_bits_per_byte(corpus.train, corpus.held_out)
    return CLAIMS[claim].judge(Evidence({grid.name: grid}, {grid.name: tuple(rows)}, unigram))


@pytest.mark.slow
def test_gradients_before_training_follow_theory(corpus: Corpus) -> None:
    """Xiong et al. 2020: the last layer's gradient falls with depth in pre-norm, and hardly changes in post-norm."""
    settings = {"d_model": 64, "tied_head": False, "batch_size": 4}
    card = measure("Xiong", corpus, depth=[4, 12, 36], seeds=6, settings=settings)
    pre, post = card.conditions[0], card.conditions[2]
    assert -0.75 < pre.low < pre.high < -0.35
    assert -0.25 < post.low < post.high < 0.35


@pytest.mark.slow
def test_layer_norm_scaling_reduces_the_streams_variance(corpus: Corpus) -> None:
    """Curse of Depth: below pre-norm's variance, here more than twofold."""
    (found,) = measure("lns", corpus, depth=[24]).conditions
    assert found.high < -0.7
    assert found.outcome == "yes"


@pytest.mark.slow
def test_real_runs_of_one_configuration_rarely_get_a_verdict(corpus: Corpus) -> None:
    """Thirty real runs of one configuration; 200 times five of them against five others: at most 5 % verdicts."""
    study = {
        "name": "a",
        "protocol": "train",
        "depth": [1],
        "seeds": 30,
        "lr": [0.01],
        "settings": {**SMALL, "steps": 20, "batch_size": 2},
    }
    cells = parse_plan({"studies": [study]}, "here").cells().values()
    scores = [MEASURE["train"](cell, corpus).outcome["score"] for cell in cells]
    assert len(set(scores)) == 30
    draw = random.Random(1)
    false = 0
    for _ in range(200):
        chosen = draw.sample(scores, 10)
        found = paired(chosen[:5], chosen[5:])
        false += judge(found, found.p, 0.02) in (BETTER, WORSE)
    assert false <= 10
