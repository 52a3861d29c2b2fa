"""Named plans, sized for two Zen 4 cores. `compare --dry-run` estimates their duration on other machines."""

from __future__ import annotations

from typing import Any

from omninorm.config import PLACEMENTS
from omninorm.errors import ConfigError
from omninorm.experiments.compare.claims import CLAIMS, c1_without_norms, studies_of
from omninorm.experiments.compare.claims.common import DEPTHS, NORMS, TINY, TRAINED
from omninorm.experiments.compare.plan import ComparePlan, parse_plan

_RULES = ["pre", "sandwich", "x0", "mhc", "hyper", "attention_residual"]
_MUON = {**TRAINED, "optimizer": "muon"}


def _train(name: str, grid: dict[str, Any], settings: dict[str, Any] = TRAINED) -> dict[str, Any]:
    return {"name": name, "protocol": "train", "depth": [12], "seeds": 5, "settings": settings, **grid}


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "title": "RMSNorm or LayerNorm, before or after?",
        "claims": ["C1", "C3", "C4", "C6", "C7"],
        "studies": [
            {**NORMS, "depth": [4], "seeds": 4},
            {**DEPTHS, "depth": [4, 16], "lr": [0.003], "seeds": 3},
            {**c1_without_norms.STUDIES[0], "depth": [16], "seeds": 3},
            {**c1_without_norms.STUDIES[1], "seeds": 2},
        ],
    },
    "chapter": {
        "title": "The chapter's claims",
        "claims": list(CLAIMS),
        "studies": studies_of(list(CLAIMS)),
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
                "settings": {**TINY, "steps": 200},
            },
            {
                "name": "ramp",
                "protocol": "ramp",
                "placement": [name for name in PLACEMENTS if name != "none"],
                "depth": [12],
                "lr": [0.1],
                "seeds": 2,
                "margin": 0.7,
                "settings": {**TINY, "steps": 200},
            },
        ],
    },
    "residuals": {
        "title": "Residual rules and norms of today, with AdamW and with Muon",
        "studies": [
            _train("rules", {"placement": _RULES}),
            _train("rules-muon", {"placement": _RULES}, _MUON),
            _train("qk-norm-muon", {"vary": {"qk_norm": [False, True]}, "lr": [0.003, 0.01, 0.03]}, _MUON),
            _train("norms-muon", {"normalization": ["rmsnorm", "layernorm", "dyt", "derf"]}, _MUON),
            _train("gain-decay", {"vary": {"decay_norms": [False, True]}}, {**TRAINED, "gain_offset": 1.0}),
        ],
    },
}


def preset(name: str) -> ComparePlan:
    """Return the plan with this name; for the id of a claim, the plan consists of the claim's studies.

    Raises:
        ConfigError: an unknown name.
    """
    claims = {each: {"title": f"Claim {each}", "claims": [each], "studies": studies_of([each])} for each in CLAIMS}
    known = PRESETS | claims
    if name not in known:
        raise ConfigError(f"There is no preset {name!r:.80}", "", f"choose one of {', '.join(known)}")
    return parse_plan(known[name], f"preset {name}")
