"""Small models on one thread: the tests are about values, and several of them run at once."""

from collections.abc import Callable, Iterator

import pytest
import torch

from omninorm.config import NormConfig
from omninorm.thinker import Thinker, ThinkerConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make() -> Callable[..., Thinker]:
    """make(placement, normalization, seed=…, **settings) → a small Thinker with gains that are not all one."""

    def make(placement: str = "pre", normalization: str = "rmsnorm", *, seed: int = 0, **settings: object) -> Thinker:
        norm = NormConfig(normalization, placement)
        shape = {"vocab_size": 40, "d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 24}
        torch.manual_seed(seed)
        # The head is not tied, because with random weights a tied head mostly repeats the last token.
        model = Thinker(ThinkerConfig(**{**shape, "norm": norm, "tied_head": False, **settings}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            # Logits of a spread above 1, so that no comparison is between numbers that are nearly 0.
            (model.head or model.embedding).weight.mul_(2)
            if model.logit_scale is not None:
                model.logit_scale.value.mul_(2)
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (3, 20), generator=torch.Generator().manual_seed(1))
