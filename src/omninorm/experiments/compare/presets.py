"""Plans that have a name, sized for two cores of a Zen 4. `compare --dry-run` estimates their time elsewhere."""

from __future__ import annotations

from typing import Any

from omninorm.config import PLACEMENTS
from omninorm.errors import ConfigError
from omninorm.experiments.compare.plan import ComparePlan, parse_plan

_TINY = {"d_model": 32, "n_heads": 2, "seq_len": 64, "batch_size": 8, "feed_forward": "gelu", "eval_bytes": 16384}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "title": "RMSNorm or LayerNorm, before or after?",
        "studies": [
            {
                "name": "norms",
                "protocol": "train",
                "normalization": ["rmsnorm", "layernorm"],
                "depth": [4],
                "seeds": 4,
                "settings": {**_TINY, "steps": 200},
            },
            {
                "name": "placements",
                "protocol": "train",
                "placement": ["pre", "post"],
                "depth": [4, 16],
                "seeds": 3,
                "settings": {**_TINY, "steps": 200},
            },
            {
                "name": "start",
                "protocol": "init",
                "normalization": ["rmsnorm", "none"],
                "placement": ["pre", "post", "none"],
                "depth": [16],
                "seeds": 3,
                "settings": _TINY,
            },
        ],
    },
    "placements": {
        "title": "Every placement",
        "studies": [
            {
                "name": "train",
                "protocol": "train",
                "placement": [name for name in PLACEMENTS if name != "none"],
                "depth": [12],
                "seeds": 3,
                "settings": {**_TINY, "steps": 200},
            },
            {
                "name": "ramp",
                "protocol": "ramp",
                "placement": [name for name in PLACEMENTS if name != "none"],
                "depth": [12],
                "lr": [0.1],
                "seeds": 2,
                "margin": 0.7,
                "settings": {**_TINY, "steps": 200},
            },
        ],
    },
}


def preset(name: str) -> ComparePlan:
    """The plan of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError("a preset must exist", repr(name), f"choose one of {', '.join(PRESETS)}")
    return parse_plan(PRESETS[name], f"preset {name}")
