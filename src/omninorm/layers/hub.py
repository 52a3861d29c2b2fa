"""omninorm's RMSNorm as a layer of the Hugging Face `kernels` package, for `from_pretrained(…, use_kernels=True)`.

`kernels` replaces the forward methods of layers for which a repository is registered. transformers registers
repositories for GPUs, which have to be downloaded; `register_hub_layers` registers one that needs no download.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from omninorm import functional
from omninorm.errors import ConfigError, MissingExtraError
from omninorm.kernels.constants import constant_in_graphs

DEVICES = ("cpu", "cuda", "rocm", "mps", "xpu")


class HubRMSNorm(nn.Module):
    """The forward method of RMSNorm for modules of transformers, which have `weight` and `variance_epsilon`.

    Models round either before or after the product with the gain; probing the class determines which. A class that
    computes something else keeps its own forward method.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        original: Any = type(self)
        cast = rounding_order(original)
        if cast is None or self.weight.dtype != hidden_states.dtype:  # with mixed dtypes the result has the wider one
            result: Tensor = original.forward(self, hidden_states)
            return result
        return functional.rms_norm(hidden_states, self.weight, float(self.variance_epsilon), cast=cast)


@constant_in_graphs
def rounding_order(layer: Any) -> str | None:
    """Return the `cast`, "llama" or "fp32", with which `rms_norm` equals the class's forward; None if neither does."""
    return _probed(layer)


@cache
def _probed(layer: Any) -> str | None:
    numbers = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=numbers).bfloat16() for shape in [(8, 96), (96,)])
    module = SimpleNamespace(weight=weight, variance_epsilon=1e-3)
    try:
        with torch.no_grad():
            theirs = layer.forward(module, x)
            results = {cast: functional.rms_norm(x, weight, 1e-3, cast=cast) for cast in ("llama", "fp32")}
    except Exception:  # the class needs other attributes
        return None
    # The same order may still differ by one unit in few elements, where the reciprocal root was rounded differently.
    # The two orders differ in a fifth of all elements.
    shares = {cast: float((theirs != y).float().mean()) for cast, y in results.items()}
    best = min(shares, key=shares.__getitem__)
    return best if shares[best] < 0.02 else None


class HubRepository:
    """A repository for `kernels` that returns `HubRMSNorm` of this process instead of a downloaded class."""

    layer_name = "RMSNorm"

    def load(self) -> type[nn.Module]:
        return HubRMSNorm

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HubRepository)

    def __hash__(self) -> int:
        return hash(HubRepository)

    def __str__(self) -> str:
        return "omninorm, layer RMSNorm"


def register_hub_layers(devices: Iterable[str] = ("cpu", "cuda")) -> None:
    """Register omninorm's RMSNorm with Hugging Face `kernels`, for all models that are loaded with `use_kernels=True`.

    If transformers itself registers a layer for the same device, such as Liger's on CUDA, that layer takes precedence.

    Args:
        devices: some of "cpu", "cuda", "rocm", "mps" and "xpu".

    Raises:
        ConfigError: an unknown device.
        MissingExtraError: `kernels` is not installed.
    """
    devices = list(devices)
    if wrong := [each for each in devices if each not in DEVICES]:
        raise ConfigError(f"Each device must be one of {', '.join(DEVICES)}", repr(wrong[0]), "choose one of these")
    try:
        from kernels import register_kernel_mapping
    except ImportError as error:
        remedy = "install the version that your transformers needs, e.g. with pip install kernels"
        raise MissingExtraError("Replacing layers of transformers needs Hugging Face kernels", "", remedy) from error
    register_kernel_mapping({"RMSNorm": {device: HubRepository() for device in devices}})
