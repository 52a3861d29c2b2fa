"""Monitor the Trainer of transformers: a small Llama learns the King James Bible, byte by byte.

python examples/watch_trainer.py [FOLDER]        # needs pip install "omninorm[train]" "transformers[torch]"
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from omninorm.experiments.corpus import load_corpus
from omninorm.monitor.callbacks.transformers import WatchCallback

LENGTH = 64


class Bytes(torch.utils.data.Dataset):
    """Pieces of the text; a token is a byte."""

    def __init__(self, text: bytes) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.text) // LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.text[index * LENGTH : (index + 1) * LENGTH].long()
        return {"input_ids": ids, "labels": ids}


def main(folder: Path) -> None:
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, **sizes))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=60, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=3e-3, warmup_steps=6, logging_steps=20, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callback = WatchCallback(every=10)
    trainer = Trainer(model, arguments, train_dataset=Bytes(load_corpus().train), callbacks=[callback])
    with callback:  # also closes the record after an exception
        trainer.train()

    history = callback.watch.history
    print(f"steps watched: {len(history.steps)}, loss {history.steps[0].loss:.2f} → {history.steps[-1].loss:.2f}")
    streams = ", ".join(f"{value:.2f}" for value in history.samples[-1].signals["stream_rms"])
    print(f"residual stream by block: {streams}")
    print(f"failures: {sum(alarm.severity == 'fail' for alarm in callback.alarms)}")
    print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
