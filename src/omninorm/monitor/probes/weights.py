"""Statistics of the parameters in a sampled step: the norms' gains and the size of the matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from omninorm.monitor.hooks.training_pass import safely
from omninorm.monitor.model_map.norms import Norm
from omninorm.monitor.probes.elements import row_norms, together
from omninorm.monitor.stats_buffer import UNSEEN
from omninorm.monitor.tensors import constant, whole

SILENT_GAIN = 1e-3
GAIN_SIGNALS = ("gain_max", "gain_ratio", "gain_small")


def measure_all(
    norms: Sequence[Norm],
    parameters: Sequence[nn.Parameter],
    device: torch.device,
    others: Sequence[Callable[[], Mapping[str, Tensor]]],
    failed: Callable[[Exception], None],
) -> dict[str, Tensor]:
    """Return a sample's statistics of parameters, and those of `others`, by name. An error loses only its own."""
    found: dict[str, Tensor] = {}

    def gains() -> Mapping[str, Tensor]:
        return dict(zip(GAIN_SIGNALS, measure_gains(norms, device), strict=True))

    def matrices() -> Mapping[str, Tensor]:
        return {"weight_rms": measure_matrices(parameters, device)}

    for measure in (gains, matrices, *others):
        safely(lambda measure=measure: found.update(measure()), failed)  # type: ignore[misc]
    return found


@torch.no_grad()
def measure_gains(norms: Sequence[Norm], device: torch.device) -> list[Tensor]:
    """Return max |γ|, max |γ|/median |γ| and the share of |γ| < 1e-3: three tensors (norms,), UNSEEN without a gain.

    Gains of the same width are measured together.
    """
    found = [torch.full((len(norms),), UNSEEN, device=device, dtype=torch.float32) for _ in GAIN_SIGNALS]
    kinds: dict[tuple[int, torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    for place, norm in enumerate(norms):
        gain = norm.gain
        if gain is not None and gain.numel() > 0 and not gain.is_meta:
            kinds.setdefault((gain.numel(), gain.dtype, gain.device), []).append((place, whole(gain)))
    for of_kind in kinds.values():
        places = [place for place, _ in of_kind]
        gains = torch.stack([gain.reshape(-1) for _, gain in of_kind]).to(device, torch.float32)
        offsets = constant(tuple(norms[at].offset for at in places), device, torch.float32)
        sizes = (gains + offsets.unsqueeze(1)).abs()
        most = sizes.amax(dim=1)
        index = constant(tuple(places), device)
        found[0][index] = most
        found[1][index] = most / sizes.sort(dim=1).values[:, (sizes.shape[1] - 1) // 2].clamp_min(1e-30)
        found[2][index] = (sizes < SILENT_GAIN).float().mean(dim=1)
    return found


@torch.no_grad()
def measure_matrices(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return the RMS of about a thousand elements of every matrix: (parameters,), UNSEEN for vectors."""
    matrices = {
        at: parameter
        for at, parameter in enumerate(parameters)
        if parameter.ndim >= 2 and parameter.numel() > 0 and parameter.is_floating_point()
    }
    found = torch.full((len(parameters),), UNSEEN, device=device, dtype=torch.float32)
    for group in together(matrices):
        sizes = row_norms(group.values) / group.values.shape[1] ** 0.5
        found[constant(tuple(group.places), device)] = sizes.to(device, torch.float32)
    return found
