"""Functions for the processes of test_distributed_training.py, which compare a step on parts of a batch with one on all."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import omninorm
from omninorm import NormConfig, Thinker, ThinkerConfig

VOCABULARY, BATCH, LENGTH = 61, 4, 16


def model(norm: str) -> Thinker:
    torch.manual_seed(3)
    config = ThinkerConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY, norm=NormConfig(norm, "pre"))
    made = Thinker(config)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return made


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(4))


def loss(made: Any, batch: Tensor) -> Tensor:
    logits = made(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def share() -> Tensor:
    """Return this process's rows of the batch."""
    return tokens().chunk(dist.get_world_size())[dist.get_rank()]


def expected_gradients(made: nn.Module) -> dict[str, Tensor]:
    alone = copy.deepcopy(made)
    loss(alone, tokens()).backward()
    return {name: parameter.grad for name, parameter in alone.named_parameters()}


def check(made: nn.Module, expected: dict[str, Tensor], tolerance: float) -> None:
    for name, parameter in made.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        wanted = expected[name.removeprefix("module.")]
        error = float((gradient - wanted).norm() / wanted.norm())
        assert error <= tolerance, f"{name}: {error:.2e}"


def data_parallel(norms: list[str]) -> None:
    for norm in norms:
        made = model(norm)
        expected = expected_gradients(made)
        wrapped = DistributedDataParallel(made)
        loss(wrapped, share()).backward()
        check(wrapped, expected, 1e-6)


def fully_sharded(norms: list[str]) -> None:
    for norm in norms:
        made = model(norm)
        expected = expected_gradients(made)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in made.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(made, mesh=mesh)
        loss(made, share()).backward()
        check(made, expected, 1e-6)
        groups = omninorm.param_groups(made, 0.1)
        assert sum(len(group["params"]) for group in groups) == len(list(made.parameters()))
        torch.optim.AdamW(groups).step()


def sharded_in_two_precisions(norms: list[str]) -> None:
    """Check matrices in bfloat16 with norms in float32; each norm is a separate group with a separate policy."""
    for norm in norms:
        made = model(norm)
        expected = expected_gradients(made)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []
        for module in list(made.modules()):
            if isinstance(module, (omninorm.RMSNorm, omninorm.LayerNorm)):
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
                module.register_forward_hook(
                    lambda m, x, y, seen=seen: seen.append((m.weight.dtype, x[0].dtype, y.dtype))
                )
        for block in made.blocks:
            fully_shard(block, mesh=mesh, mp_policy=low)
        fully_shard(made, mesh=mesh, mp_policy=low)
        loss(made, share()).backward()
        assert set(seen) == {(torch.float32, torch.bfloat16, torch.bfloat16)}
        # bfloat16 has 8 binary digits, so this only checks that the gradients are those of the same model.
        check(made, expected, 0.05)
