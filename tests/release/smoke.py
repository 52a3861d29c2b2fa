"""Checks an installed omninorm that has only torch: python smoke.py [cpu|reference]; the argument is its back end."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version

import torch

import omninorm


def main(wanted: str | None) -> None:
    assert "site-packages" in omninorm.__file__, f"not the installed package: {omninorm.__file__}"
    assert omninorm.__version__ == version("omninorm")

    available = [backend.name for backend in omninorm.backends() if backend.available]
    assert wanted is None or ("cpu" in available) == (wanted == "cpu"), omninorm.backends()

    x = torch.tensor([2.0, 4.0, 6.0, 8.0], requires_grad=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = omninorm.RMSNorm(4, eps=1e-6)(x)
    assert torch.allclose(y, torch.tensor([0.365, 0.730, 1.095, 1.461]), atol=1e-3)
    assert len(said) == ("cpu" not in available), [str(each.message) for each in said]
    assert wanted in (None, omninorm.backend_for(x).name)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()

    config = omninorm.NormConfig.from_dict({"normalization": "rmsnorm", "norm_placement": "pre", "norm_eps": 1e-6})
    model = omninorm.Thinker(omninorm.ThinkerConfig(d_model=16, n_layers=2, n_heads=2, norm=config))
    optimizer = torch.optim.AdamW(omninorm.param_groups(model, 0.1))
    tokens = torch.randint(0, 256, (2, 9))
    with omninorm.watch(model, optimizer, every=1) as watched:
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watched.step(loss)
    assert len(watched.history.steps) == 2
    print(f"omninorm {omninorm.__version__} works: {', '.join(available)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
