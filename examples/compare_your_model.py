"""Compare norms in your own model: a small recurrent language model with RMSNorm and with LayerNorm.

python examples/compare_your_model.py [FOLDER]        # needs pip install "omninorm[compare]"
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import Tensor, nn

from omninorm import NormConfig
from omninorm.layers import build_norm

WIDTH = 48
PLAN = {
    "title": "Which norm in my model?",
    "model": "compare_your_model:build",
    "studies": [
        {
            "name": "norms",
            "protocol": "train",
            "normalization": ["rmsnorm", "layernorm"],
            "placement": ["pre"],
            "depth": [4],
            "lr": [0.003],
            "seeds": 3,
            "settings": {"steps": 60, "seq_len": 32, "batch_size": 8, "eval_bytes": 4096},
        }
    ],
}


class Layer(nn.Module):
    def __init__(self, norm: NormConfig) -> None:
        super().__init__()
        self.norm, self.mix = build_norm(norm, WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))[0]


def build(norm: NormConfig, depth: int, vocab_size: int) -> nn.Module:
    """Build a model that maps tokens (batch, sequence) to logits; "model" in the plan names this function."""
    layers = [Layer(norm) for _ in range(depth)]
    return nn.Sequential(
        nn.Embedding(vocab_size, WIDTH), *layers, build_norm(norm, WIDTH), nn.Linear(WIDTH, vocab_size)
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    plan = folder / "plan.json"
    plan.write_text(json.dumps(PLAN))
    command = [sys.executable, "-m", "omninorm", "compare", str(plan), "--out", str(folder / "comparison")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
