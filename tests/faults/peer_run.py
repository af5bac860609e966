"""A run of HF Trainer + PEFT on the harness' model and rows, as their documentation has it.

    python tests/faults/peer_run.py BASE ROWS OUT

Goes on from its newest checkpoint, if there is one; leaves OUT/final/ and OUT/history.json when it is done.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

STEPS = 12
LENGTH = 64


class Rows(Dataset):
    def __init__(self, base: Path, rows: Path) -> None:
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self.ids = [
            tokenizer.encode(" ".join(json.loads(line).values())).ids[:LENGTH] for line in rows.read_text().splitlines()
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.ids[index] + [2] * (LENGTH - len(self.ids[index])))
        return {"input_ids": ids, "attention_mask": (ids != 2).long(), "labels": ids.masked_fill(ids == 2, -100)}


def main(base: Path, rows: Path, out: Path) -> None:
    set_seed(3)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_steps=2,
        save_total_limit=3,
        seed=3,
        full_determinism=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        enable_jit_checkpoint=True,  # their answer to SIGTERM, off by default
    )
    trainer = Trainer(model=get_peft_model(model, config), args=arguments, train_dataset=Rows(base, rows))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    if trainer.state.global_step < STEPS:
        sys.exit(f"stopped after step {trainer.state.global_step}")
    trainer.save_model(str(out / "final"))
    kept = ("step", "loss", "grad_norm", "learning_rate")
    history = [{key: line[key] for key in kept} for line in trainer.state.log_history if "loss" in line]
    (out / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
