"""One measurement of what a user might run instead: TRL + PEFT, with Liger's kernels, or Unsloth.

    python benchmarks/peers/peer.py CASE.json OUT.json

CASE.json, written by run.py: system, method, model (a folder), batches (safetensors: the very rows that minitune
trained on), rows, accumulation, steps, dropout, recompute (on | off), attention (not for unsloth, which chooses by
itself), optimizer, learning_rate, lr_scheduler, warmup_ratio. Where a model does not load or train with that attention,
the next best is taken, and the result says so. Steps are timed as in measure.py. Needs the peers' own packages (trl,
peft, datasets, liger-kernel, unsloth), which minitune itself never imports.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

WARM_UP = 3
ATTENTIONS = ["flash_attention_4", "flash_attention_2", "sdpa"]  # the fastest first
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "liger-kernel", "unsloth", "unsloth-zoo")


def main() -> None:
    case, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if case["system"] == "unsloth":
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
        import unsloth  # noqa: F401  (patches transformers, so it comes first)
    if case["system"] == "unsloth":
        result = measure(case)
    else:
        import trl  # noqa: F401  (a package that is not there is no attention's fault)

        result = with_first_attention(lambda attention: measure(case | {"attention": attention}), case["attention"])
    out.write_text(json.dumps(result | {"versions": installed()}))


def with_first_attention(measure, wanted: str) -> dict:
    """What `measure(attention)` returns with `wanted`, or else with the next best that loads and trains; those that did
    not stand in it under attention_failed. Memory that runs out is no fault of an attention's."""
    import torch

    failed = {}
    for attention in ATTENTIONS[ATTENTIONS.index(wanted) :] if wanted in ATTENTIONS else [wanted]:
        try:
            return measure(attention) | ({"attention_failed": failed} if failed else {})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # transformers does not take that package, or its kernels do not run here
            traceback.print_exc()
            failed[attention] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError(f"no attention trains: {failed}")


def measure(case: dict) -> dict:
    import torch
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    model, tokenizer = (unsloth_model if case["system"] == "unsloth" else peft_model)(case)

    batches = load_file(case["batches"])  # tokens, labels, positions (rows, T)
    packed = bool((batches["positions"][:, 1:] == 0).any())
    columns = {"input_ids": batches["tokens"].tolist(), "labels": batches["labels"].tolist()}
    columns["attention_mask"] = torch.ones_like(batches["tokens"]).tolist()
    if packed:
        columns["position_ids"] = batches["positions"].tolist()

    def flatten(rows: list[dict]) -> dict:
        """Packed rows end to end, with the places where documents begin: flash attention then keeps them apart."""
        names = ("input_ids", "labels", "position_ids")
        batch = {name: torch.tensor([row[name] for row in rows]).reshape(1, -1) for name in names}
        if case["system"] != "unsloth":  # said in numbers, as transformers' own collator does; flash-attn-4 wants it
            ends = torch.cat([(batch["position_ids"][0] == 0).nonzero()[:, 0], torch.tensor([batch["labels"].numel()])])
            longest = int(ends.diff().max())
            batch |= {"cu_seq_lens_q": ends.int(), "cu_seq_lens_k": ends.int()}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch

    marks, losses, attention = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            if not marks and cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            if not marks:
                attention.append(attention_of(case["system"], model))
            marks.append(mark(torch))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

        def on_train_end(self, *args, **kwargs):
            marks.append(mark(torch))

    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": case["rows"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": case["steps"],
        "learning_rate": case["learning_rate"],
        "lr_scheduler_type": case["lr_scheduler"],
        "warmup_steps": round(case["warmup_ratio"] * case["steps"]),
        "weight_decay": 0.01,
        "max_grad_norm": 0.3,
        "bf16": cuda,
        "use_cpu": not cuda,
        "optim": case["optimizer"] if cuda else "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": batches["tokens"].shape[1],
        "packing": False,  # the rows are packed already
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": not packed,
    }
    if case["system"] != "unsloth":
        settings["gradient_checkpointing"] = case["recompute"] == "on"
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        settings["use_liger_kernel"] = case["system"] == "trl+liger"
    from datasets import Dataset

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Clock()],
        **({"data_collator": flatten} if packed else {}),
    )
    if packed and case["system"] == "unsloth":
        with suppress(ImportError):  # what its own packing does, which rows that are packed already do not meet
            from unsloth.utils.flash_impl import scope_flash_attention_impl_to_train

            scope_flash_attention_impl_to_train(trainer, model)
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(trainer.train_dataset)
    begun = time.time()
    trainer.train()
    if cuda:
        torch.cuda.synchronize()
    seconds = [span(a, b) for a, b in itertools.pairwise(marks)]
    median = statistics.median(seconds[WARM_UP:])
    tokens = case["rows"] * case["accumulation"] * batches["tokens"].shape[1]
    documents = tokens * case["fill"]
    return {
        "tokens_per_second": documents / median,
        "loss_tokens_per_second": documents / median * case["loss_share"],
        "step_seconds": {
            "median": median,
            "least": min(seconds[WARM_UP:]),
            "most": max(seconds[WARM_UP:]),
            "steps": len(seconds[WARM_UP:]),
        },
        "first_step_seconds": seconds[0],
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if cuda else 0.0,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "losses": losses,
        "final_loss": losses[-1] if losses else None,
        "run_seconds": time.time() - begun,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "attention": attention[0],
    }


def attention_of(system: str, model) -> str | None:
    """What a model computes attention with: as it says itself, or, in a step of Unsloth's, as that chooses for rows
    laid end to end, and which kernels it has put behind PyTorch's."""
    said = getattr(model.config, "_attn_implementation", None)
    if system != "unsloth":
        return said
    try:
        from unsloth.utils.attention_dispatch import select_attention_backend
        from unsloth.utils.flash_impl import FLASH_IMPL_STATE

        behind, why_not = FLASH_IMPL_STATE["active"], FLASH_IMPL_STATE["reason"]
        chosen = select_attention_backend(use_varlen=True)
        return f"{chosen}, {behind} behind it" if behind else f"{chosen} ({why_not})" if why_not else chosen
    except (ImportError, AttributeError, KeyError, TypeError):  # another version of it
        return said


def peft_model(case: dict):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bits = None
    if case["method"] == "qlora":
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    model = AutoModelForCausalLM.from_pretrained(
        case["model"],
        quantization_config=four_bits,
        dtype=torch.bfloat16,
        attn_implementation=case["attention"],
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    model.config.use_cache = False
    if case["method"] == "qlora":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=case["recompute"] == "on",
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    if case["method"] != "full":
        model = get_peft_model(
            model,
            LoraConfig(
                r=16,
                lora_alpha=32,
                lora_dropout=case["dropout"],
                target_modules=TARGETS,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
    return model, AutoTokenizer.from_pretrained(case["model"])


def unsloth_model(case: dict):
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        case["model"],
        max_seq_length=case["max_seq_len"],
        dtype=torch.bfloat16,
        load_in_4bit=case["method"] == "qlora",
        full_finetuning=case["method"] == "full",
    )
    if case["method"] != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            lora_dropout=case["dropout"],
            target_modules=TARGETS,
            bias="none",
            use_gradient_checkpointing="unsloth" if case["recompute"] == "on" else False,
            random_state=0,
        )
    return model, tokenizer


def mark(torch):
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def span(a, b) -> float:
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3


def installed() -> dict[str, str]:
    found = {}
    for package in (*PACKAGES, "bitsandbytes", "flash-attn-4", "flash-attn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
