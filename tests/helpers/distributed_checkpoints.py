"""The functions for the processes of test_distributed_checkpoints.py, which save and load a sharded model."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from omninorm.errors import RunError
from omninorm.experiments import TrainConfig, build_model, build_optimizer, load_checkpoint, save_checkpoint
from omninorm.experiments.processes import Processes, SilentExit
from omninorm.thinker import ThinkerConfig

SETTINGS = TrainConfig(steps=6, batch_size=2, seq_len=16, eval_every=3, checkpoint_every=2, eval_bytes=None)
EXPECTED = "expected.safetensors"


def model(seed: int) -> nn.Module:
    return build_model(ThinkerConfig(d_model=18, n_layers=2, n_heads=3, max_seq_len=16), seed)


def everything(made: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return, on every process, all tensors of a checkpoint except the random state, not sharded."""
    found = {}
    for name, parameter in made.named_parameters():
        state = optimizer.state[parameter].items()
        for key, value in itertools.chain([("value", parameter.detach())], state):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[f"{name}.{key}"] = whole.clone()
    return found


def train(made: nn.Module) -> torch.optim.Optimizer:
    optimizer = build_optimizer(made, SETTINGS)
    for step in range(3):
        tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(step))
        made(tokens).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def here(parallel: str = "fsdp") -> Processes:
    return Processes(dist.get_rank(), dist.get_world_size(), parallel)


def save(folder: Path) -> None:
    """Save two checkpoints, of which only the second is kept, and the tensors that it must contain."""
    processes = here()
    made = processes.wrap(model(0))
    optimizer = train(made)
    expected = everything(made, optimizer)
    torch.manual_seed(7)
    for step in (2, 4):
        save_checkpoint(folder / "checkpoints", step, made, optimizer, 1, processes)
    if processes.first:
        save_file({**expected, "random": torch.rand(3)}, folder / EXPECTED)


def load(folder: Path, parallel: str) -> None:
    processes = here(parallel)
    made = model(5)
    processes.wrap(made)
    check(folder, made)


def check(folder: Path, made: nn.Module) -> None:
    """Load the checkpoint of step 4 and compare all its tensors."""
    optimizer = build_optimizer(made, SETTINGS)
    load_checkpoint(folder / "checkpoints", 4, made, optimizer)
    found, expected = everything(made, optimizer), load_file(folder / EXPECTED)
    assert torch.equal(torch.rand(3), expected.pop("random"))
    assert found.keys() == expected.keys()
    assert len(found) == 4 * len(list(made.parameters()))
    assert all(float(value) == 3 for name, value in found.items() if name.endswith(".step"))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def fail(folder: Path) -> None:
    """Check that, if the second process can't write, the first reports the reason and the older checkpoint is kept."""
    processes = here()
    made = processes.wrap(model(0))
    optimizer = train(made)
    if not processes.first:
        import torch.distributed.checkpoint.filesystem as filesystem

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        filesystem._write_item = full
    message = r"Cannot write .*: No space left on device" if processes.first else ""
    with pytest.raises(RunError if processes.first else SilentExit, match=message):
        save_checkpoint(folder / "checkpoints", 6, made, optimizer, 1, processes)
