"""GatedRMSNorm, the norm of linear attention and state-space layers."""

from __future__ import annotations

from typing import get_type_hints

import torch
from torch import Tensor, nn

from omninorm import functional
from omninorm.config import CASTS, check_choice, read_count
from omninorm.errors import ConfigError
from omninorm.layers.shape import explain_arguments, flatten_features, read_eps
from omninorm.layers.tracing import refuse_scripting


class GatedRMSNorm(nn.Module):
    """y = N(x) · γ · act(z), or N(x · act(z)) · γ, with N(v) = v / √(mean(v²) + ε) over each group of features.

    Loads the state dicts of transformers' gated norms: `weight`, one value per feature.

    Args:
        width: d, the number of features, ≥ 1.
        eps: ε ≥ 0; None means the machine epsilon of the compute dtype.
        activation, norm_first, groups, cast: as in `omninorm.functional.gated_rms_norm`. Qwen3-Next, Qwen3.5 and OLMo
            hybrid are `cast="llama"`; Kimi Linear is `activation="sigmoid"`; Mamba-2, Bamba, Granite hybrid, Zamba 2
            and Nemotron-H are `norm_first=False, groups=width // group_size, cast="llama"`.

    Shape: x and the gate z (..., d) → (..., d), in x's dtype. Called with x alone, it is a norm without gate.

    Raises:
        ConfigError: on construction, for a width or number of groups that is no count, groups that do not divide the
            width, an unknown activation or cast, or an ε out of range.
        InputError: on a call, for an input that does not fit.

    Source: as `omninorm.functional.gated_rms_norm`.

    Example:
        >>> GatedRMSNorm(4, activation="sigmoid")(torch.tensor([2.0, 4.0, 6.0, 8.0]), torch.zeros(4))
        tensor([0.1826, 0.3651, 0.5477, 0.7303], grad_fn=<MulBackward0>)
    """

    @explain_arguments
    def __init__(
        self,
        width: int,
        eps: float | None = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
        norm_first: bool = True,
        groups: int = 1,
        cast: str = "fp32",
    ) -> None:
        super().__init__()
        self.width, self.groups = read_count("width", width), read_count("groups", groups)
        if self.width % self.groups:
            raise ConfigError(f"groups must divide the {self.width} features", f"groups={groups}", "use another number")
        if not isinstance(norm_first, bool):
            raise ConfigError("norm_first must be True or False", f"{norm_first!r:.40}", "choose one of them")
        check_choice("activation", activation, tuple(functional.ACTIVATIONS))
        check_choice("cast", cast, CASTS)
        self.eps = read_eps(eps)
        self.activation, self.norm_first, self.cast = activation, norm_first, cast
        self.weight = nn.Parameter(torch.empty(self.width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor):  # not a proxy of torch.fx, which has no shape
            flatten_features(x, (self.width,))
        if gate is None:
            return functional.rms_norm(x, self.weight, self.eps, groups=self.groups, cast=self.cast)
        return functional.gated_rms_norm(
            x,
            gate,
            self.weight,
            self.eps,
            activation=self.activation,
            norm_first=self.norm_first,
            groups=self.groups,
            cast=self.cast,
        )

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        order = "" if self.norm_first else ", norm_first=False"
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        cast = f", cast={self.cast!r}" if self.cast != "fp32" else ""
        return f"{self.width}, eps={self.eps}, activation={self.activation!r}{order}{groups}{cast}"


# torch.fx copies a forward's annotations into the code that it generates, where a string would be no type.
GatedRMSNorm.forward.__annotations__ = get_type_hints(GatedRMSNorm.forward)
