"""Generation: greedy against a loop without cache, ragged batches, stop tokens, seeds, and every refusal."""

import pytest
import torch

from omninorm.config import PLACEMENTS
from omninorm.errors import InputError


def greedy(model, prompt, count):
    """Without cache or batch: the most probable token of the whole context, which slides as documented."""
    limit = model.config.max_seq_len
    context, new = list(prompt), []
    for _ in range(count):
        if len(context) > limit:
            context = context[-(limit // 2) :]
        with torch.no_grad():
            new.append(model(torch.tensor([context]))[0, -1].argmax().item())
        context.append(new[-1])
    return new


PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 3]]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_greedy_is_the_argmax_of_the_whole_context(make, placement):
    model, seen = make(placement), set()
    for prompt in PROMPTS[:3]:
        got = model.generate([prompt], 5, temperature=0)
        assert got == [greedy(model, prompt, 5)]
        seen.update(got[0])
    assert len(seen) > 2


@pytest.mark.parametrize("placement", ["pre", "residual", "hybrid"])
def test_prompts_of_different_lengths_continue_as_each_alone(make, placement):
    model = make(placement)
    together = model.generate(PROMPTS, 14, temperature=0)
    assert together == [model.generate([prompt], 14, temperature=0)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) == 4


def test_past_max_seq_len_each_row_keeps_its_newest_half(make):
    model = make()
    prompts = [*PROMPTS, list(range(24))]
    together = model.generate(prompts, 30, temperature=0)
    assert together == [greedy(model, prompt, 30) for prompt in prompts]


def test_a_context_of_one_token_keeps_the_newest(make):
    model = make(max_seq_len=1)
    got = model.generate([[7]], 5, temperature=0)[0]
    for before, after in zip([7, *got], got, strict=False):
        assert after == greedy(model, [before], 1)[0]


def test_a_stop_token_ends_its_row_only(make):
    model = make()
    free = model.generate(PROMPTS, 40, temperature=0)
    stops = {free[0][3], free[2][7]}
    want = []
    for row in free:
        ends = [index for index, token in enumerate(row) if token in stops]
        want.append(row[: ends[0] + 1] if ends else row)
    assert model.generate(PROMPTS, 40, temperature=0, stop_tokens=stops) == want
    assert len({len(row) for row in want}) > 1


def test_the_stream_yields_step_by_step_and_none_after_a_stop(make):
    model = make()
    rows = model.generate(PROMPTS, 10, temperature=0)
    stop = rows[1][2]
    steps = list(model.stream(PROMPTS, 10, temperature=0, stop_tokens=[stop]))
    stopped = model.generate(PROMPTS, 10, temperature=0, stop_tokens=[stop])
    assert len(steps) == max(len(row) for row in stopped)
    for index, row in enumerate(stopped):
        assert [step[index] for step in steps] == row + [None] * (len(steps) - len(row))


def test_the_stream_is_lazy(make):
    model, calls = make(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    steps = model.stream([[1, 2]], 10)
    next(steps)
    next(steps)
    assert len(calls) == 2


def test_a_stream_leaves_gradients_enabled_for_the_caller(make):
    steps = make().stream([[1, 2]], 3)
    next(steps)
    assert torch.is_grad_enabled()


def test_a_seed_repeats_the_text_whatever_the_global_state(make):
    model = make()
    first = model.generate(PROMPTS, 20, seed=5)
    torch.manual_seed(99)
    assert model.generate(PROMPTS, 20, seed=5) == first
    assert model.generate(PROMPTS, 20, seed=6) != first


def test_without_a_seed_the_global_generator_draws(make):
    model = make()
    torch.manual_seed(3)
    first = model.generate(PROMPTS, 20)
    assert model.generate(PROMPTS, 20) != first
    torch.manual_seed(3)
    assert model.generate(PROMPTS, 20) == first


def test_settings_reach_the_sampler(make):
    model = make()
    most_probable = model.generate(PROMPTS, 10, temperature=0)
    assert model.generate(PROMPTS, 10, temperature=5.0, top_k=1, seed=0) == most_probable
    assert model.generate(PROMPTS, 10, temperature=5.0, top_p=1e-9, seed=0) == most_probable
    assert model.generate(PROMPTS, 10, temperature=5.0, seed=0) != most_probable


def test_tensors_and_bytes_are_accepted_as_prompts(make):
    model = make()
    want = model.generate([[1, 2, 3], [4, 5, 6]], 6, temperature=0)
    assert model.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), 6, temperature=0) == want
    assert model.generate([torch.tensor([1, 2, 3]), bytes([4, 5, 6])], 6, temperature=0) == want


def test_prompts_are_not_modified(make):
    prompts = [[1, 2, 3], [4]]
    make().generate(prompts, 30)
    assert prompts == [[1, 2, 3], [4]]


BAD = [
    ([], {}, "prompts", "none"),
    ("text", {}, "prompts", "str"),
    ([3, 4], {}, "Prompt 0", "3"),
    (["text"], {}, "Prompt 0", "'text'"),
    ([[1], []], {}, "Prompt 1", "0"),
    ([[1] * 25], {}, "Prompt 0 must have between 1 and max_seq_len=24 tokens", "25"),
    ([[1, 40]], {}, "Prompt 0", "40"),
    ([[-1]], {}, "Prompt 0", "-1"),
    ([[1.0]], {}, "Prompt 0", "1.0"),
    (torch.zeros(1, 2), {}, "Prompt 0", "0.0"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens", "0"),
    ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens", "1.5"),
    ([[1]], {"temperature": -1}, "temperature", "-1"),
    ([[1]], {"top_k": 0}, "top_k", "0"),
    ([[1]], {"top_p": 2}, "top_p", "2"),
    ([[1]], {"stop_tokens": [40]}, "stop_tokens", "40"),
    ([[1]], {"stop_tokens": 4}, "stop_tokens", "4"),
    ([[1]], {"seed": -1}, "seed", "-1"),
    ([[1]], {"seed": 0.5}, "seed", "0.5"),
]


@pytest.mark.parametrize(("prompts", "settings", "name", "received"), BAD)
def test_a_bad_argument_is_refused_by_the_call(make, prompts, settings, name, received):
    with pytest.raises(InputError) as caught:
        make().stream(prompts, **{"max_new_tokens": 3, **settings})
    assert name in caught.value.invariant
    assert str(caught.value.received) == received


def test_logits_that_are_not_finite_are_refused(make):
    model = make()
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="earlier checkpoint"):
        model.generate([[0]], 2)
