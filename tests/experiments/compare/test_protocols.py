"""Protocols on tiny models and real text: outcomes, reproducibility, and known facts."""

import math

import pytest

from omninorm.experiments.compare import Cell, parse_plan
from omninorm.experiments.compare.protocols import MEASURE
from omninorm.experiments.compare.protocols.train import spike_score
from omninorm.experiments.corpus import Corpus, load_corpus

TINY = {"d_model": 16, "n_heads": 2, "seq_len": 32, "batch_size": 4, "feed_forward": "gelu", "eval_bytes": 2048}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def cells(**study: object) -> list[Cell]:
    settings = {**TINY, **study.pop("settings", {})}  # type: ignore[dict-item]
    return list(parse_plan({"studies": [{"name": "a", "settings": settings, **study}]}, "here").cells().values())


@pytest.mark.slow
def test_training_learns_and_is_reproducible(corpus: Corpus) -> None:
    (cell,) = cells(protocol="train", depth=[2], seeds=1, lr=[0.01], settings={"steps": 60})
    first, second = (MEASURE["train"](cell, corpus) for _ in range(2))
    assert first.outcome == second.outcome
    assert first.outcome["status"] == "finished"
    assert first.outcome["score"] == first.outcome["bits_per_byte"] < first.outcome["initial_bits"] - 1
    assert len(first.outcome["losses"]) == 60
    assert first.clock["seconds"] > 0


def test_a_run_that_diverges_counts_as_a_uniform_guess(corpus: Corpus) -> None:
    # At this rate the first update is beyond float32's squares, whatever the machine rounds.
    (cell,) = cells(protocol="train", depth=[2], seeds=1, lr=[1e30], settings={"steps": 5})
    outcome = MEASURE["train"](cell, corpus).outcome
    assert outcome["status"] == "diverged"
    assert outcome["bits_per_byte"] is None
    assert outcome["score"] == 8.0


@pytest.mark.slow
def test_deep_post_norm_tolerates_a_lower_learning_rate_than_pre_norm(corpus: Corpus) -> None:
    """KEEL's order, at 12 blocks: post tolerates less than pre."""
    study = {"placement": ["pre", "post"], "depth": [12], "lr": [0.03], "seeds": 1}
    settings = {"steps": 150, "batch_size": 8}
    found = {
        cell.norm.norm_placement: MEASURE["ramp"](cell, corpus).outcome
        for cell in cells(protocol="ramp", settings=settings, **study)
    }
    assert found["post"]["largest_rate"] < 0.5 * found["pre"]["largest_rate"]
    assert found["post"]["sign"] is not None
    assert 0 < found["pre"]["largest_rate"] <= 0.03


def test_residual_streams_at_initialization_match_theory(corpus: Corpus) -> None:
    """Pre-norm's stream grows like a random walk, post-norm's does not grow, and without norms it grows by a factor per
    block; lns grows more slowly than pre-norm (Curse of Depth)."""
    found = {
        cell.norm.norm_placement: MEASURE["init"](cell, corpus).outcome
        for cell in cells(
            protocol="init",
            normalization=["rmsnorm", "none"],
            placement=["pre", "post", "lns", "none"],
            depth=[16],
            seeds=1,
        )
    }
    assert all(len(each["stream_rms"]) == 16 and len(each["grad_norms"]) == 16 for each in found.values())
    assert found["post"]["growth"] == pytest.approx(0, abs=1e-3)
    assert found["lns"]["growth"] < found["pre"]["growth"] < found["none"]["growth"]
    pre = found["pre"]["stream_rms"]
    assert pre[15] ** 2 / pre[7] ** 2 == pytest.approx(2, rel=0.5), "variance grows in proportion to depth"


def test_the_spike_score_is_the_share_of_spikes() -> None:
    calm = [1.0 + 0.01 * (step % 7) for step in range(200)]
    assert spike_score(calm) == 0
    spiky = list(calm)
    spiky[100] = spiky[150] = 5.0
    # The first spike raises the limit for the second one to 1.06 + 7 · 0.33 = 3.4 and more.
    assert spike_score(spiky) == pytest.approx(2 / 200)
    spiky[150] = 3.0
    assert spike_score(spiky) == pytest.approx(1 / 200)
    assert spike_score([100.0, *calm[:20]]) == 0, "there is no history yet"
    assert spike_score([]) == 0


def test_an_overflowing_stream_gives_a_valid_outcome(corpus: Corpus) -> None:
    (cell,) = cells(protocol="init", normalization=["none"], placement=["none"], depth=[200], seeds=1)
    outcome = MEASURE["init"](cell, corpus).outcome
    assert outcome["growth"] is None or math.isfinite(outcome["growth"])
