"""Every key of a recipe, with its default and what it may be.

The dataclasses below are the one list of knobs. A module receives its section, as `cfg.lora`.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Annotated, Any, Literal

from minitune.rules import (
    Knob,
    above,
    all_above,
    all_at_least,
    at_least,
    below,
    ending_in,
    expressions,
    filled,
    knob,
    one_of,
    unrepeated,
)

# Those in minitune/adapters; a new one adds its name.
LORA_VARIANTS = ("lora", "rslora", "dora", "pissa", "olora", "loraplus", "lora_fa", "vera", "oplora")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of each block
ENDS = ("embed_tokens", "lm_head")  # where tokens come in and go out


@dataclass(frozen=True)
class ModelConfig:
    path: Annotated[str, filled()] = "meta-llama/Meta-Llama-3-8B"  # folder, Hub id, or "tiny" (built in)
    revision: str = ""  # branch, tag or commit on the Hub; empty: its main branch
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # that the model computes in; adapters are float32 always
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"  # auto: the fastest that is there
    dense_weights: Literal["auto", "always", "never"] = "auto"  # keep 4-bit weights dense; auto: where memory allows


@dataclass(frozen=True)
class DataConfig:
    train: Annotated[tuple[str, ...], filled()] = (
        "data/train.jsonl",
    )  # .json .jsonl .txt .parquet files, hf://, "tiny"
    weights: Annotated[tuple[float, ...], all_above(0)] = ()  # how often an epoch takes each of them; empty: once
    eval: tuple[str, ...] = ()  # files to evaluate on; empty: hold out eval_fraction
    eval_fraction: Annotated[float, at_least(0), below(1)] = 0.1  # of the documents; not used where eval names files
    format: Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "text"] = "auto"  # of a row
    columns: dict[str, str] = field(default_factory=dict)  # the files' column names -> those of the format
    template: Literal["auto", "alpaca", "chat"] = "auto"  # the prompt around a row; chat: the tokenizer's own
    train_on_prompt: bool = False  # learn the prompt too, not the answer alone
    max_seq_len: Annotated[int, at_least(2)] = 2048  # tokens in a row
    packing: bool = True  # several documents to a row; they never see each other
    overlong: Literal["drop", "truncate", "error"] = "drop"  # documents longer than max_seq_len
    bad_rows: Literal["error", "skip"] = "error"  # rows that cannot be read, or have nothing to learn
    deduplicate: bool = True  # keep one of equal documents, and train on none that is in eval
    near_duplicates: Literal["report", "remove", "off"] = "report"  # rows that say nearly the same
    checks: Literal["error", "warn"] = "error"  # what to do about data that can hardly be meant
    category: str = ""  # the column to count rows by; empty: by their first words
    cache: Annotated[str, filled()] = "auto"  # the folder to keep tokenised data in; auto: the user's cache; none


@dataclass(frozen=True)
class LoRAConfig:
    variant: Annotated[str, one_of(LORA_VARIANTS)] = "lora"  # what an adapter computes
    r: Annotated[int, at_least(1)] = 16  # rank
    alpha: Annotated[float, above(0)] = 32  # the update is scaled by alpha / r; by alpha / sqrt(r) in rslora
    dropout: Annotated[float, at_least(0), below(1)] = 0.05  # share of the adapter's inputs set to zero
    loraplus_lr_ratio: Annotated[float, above(0)] = 16  # how much faster than lora_A variant loraplus learns lora_B
    # What gets an adapter: names, whole or their ends; or one expression for whole names, or "all-linear":
    target_modules: Annotated[
        str | tuple[str, ...], filled(), ending_in((*LINEARS, *ENDS)), expressions(), unrepeated()
    ] = LINEARS
    exclude_modules: Annotated[str | tuple[str, ...], expressions(), unrepeated()] = ()  # of these, what gets none
    layers_to_transform: Annotated[tuple[int, ...], all_at_least(0), unrepeated()] = ()  # of the blocks; empty: all
    # Names or expressions for their ends -> what stands there in place of r, and of alpha:
    rank_pattern: Annotated[dict[str, int], all_at_least(1), expressions()] = field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, float], all_above(0), expressions()] = field(default_factory=dict)
    modules_to_save: Annotated[tuple[str, ...], unrepeated()] = ()  # that train whole, as lm_head or norm: name ends
    # Tokens whose rows train: of the embedding and a head tied to it; or { embed_tokens = [...], lm_head = [...] }:
    trainable_token_indices: Annotated[tuple[int, ...] | dict[str, list[int]], all_at_least(0), unrepeated()] = ()


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    learning_rate: Annotated[float, above(0)] = 2e-4  # at its peak; for method "full" the default is 2e-5
    weight_decay: Annotated[float, at_least(0)] = 0.01  # per step, times the learning rate
    max_grad_norm: Annotated[float, at_least(0)] = 0.3  # over all trained parameters; 0: no clipping
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"  # after the warmup; falls to 0
    warmup_ratio: Annotated[float, at_least(0), below(1)] = 0.03  # share of the steps


@dataclass(frozen=True)
class TrainConfig:
    num_epochs: Annotated[int, at_least(0)] = 3  # passes over the data
    max_steps: Annotated[int, at_least(0)] = 0  # optimizer steps, whatever the epochs; 0: as many as these give
    batch_size: Annotated[int, at_least(1), below(65536)] = 4  # rows of max_seq_len, per GPU and micro-step
    gradient_accumulation_steps: Annotated[int, at_least(1), below(65536)] = 4  # micro-steps to an optimizer step
    gradient_checkpointing: Literal["auto", "none", "full"] = "auto"  # auto: the fewest blocks that memory asks for
    offload: Literal["auto", "always", "inputs", "never"] = "auto"  # what recomputed blocks keep, in host memory
    fused: Literal["auto", "none"] = "auto"  # blocks run by hand-written passes; auto: on CUDA, where they can
    compile: Literal["auto", "none"] = "auto"  # blocks that are not fused; auto: on CUDA
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest checkpoint in `out`
    deterministic: bool = False  # the same bits each time, for some speed


@dataclass(frozen=True)
class EvalConfig:
    every_steps: Annotated[int, at_least(0)] = 100  # optimizer steps; 0: after the last alone
    early_stopping_patience: Annotated[int, at_least(0)] = 3  # evaluations without improvement; 0: off
    samples: Annotated[int, at_least(0)] = 0  # held-out prompts answered before and after, scored by exact match
    sample_tokens: Annotated[int, at_least(1)] = 64  # of the longest answer


@dataclass(frozen=True)
class SaveConfig:
    every_steps: Annotated[int, at_least(0)] = 100  # optimizer steps between checkpoints; 0: the best and the last
    keep_last: Annotated[int, at_least(1)] = 3  # checkpoints, besides the best


@dataclass(frozen=True)
class ParallelConfig:
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"  # what each GPU holds of the frozen base
    timeout_seconds: Annotated[int, at_least(5)] = 600  # a process that does not move for so long ends the job


@dataclass(frozen=True)
class LogConfig:
    every_steps: Annotated[int, at_least(1)] = 10  # optimizer steps between lines in metrics.jsonl
    tensorboard: bool = True  # also write them for TensorBoard


@dataclass(frozen=True)
class Config:
    method: Literal["full", "lora", "qlora"] = "qlora"  # all weights; adapters; adapters on a 4-bit base
    seed: Annotated[int, at_least(0), below(2**63)] = 42  # of adapters, dropout and order
    out: Annotated[str, filled()] = "runs/llama3-8b-qlora"  # the run's folder

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()


# ---- by their paths ------------------------------------------------------------------------------------------------

ELSEWHERE = {  # what other trainers call a key
    "lr": "optim.learning_rate",
    "rank": "lora.r",
    "epochs": "train.num_epochs",
    "output_dir": "out",
    "model_name_or_path": "model.path",
    "per_device_train_batch_size": "train.batch_size",
    "cutoff_len": "data.max_seq_len",
    "max_length": "data.max_seq_len",
}


@cache
def knobs() -> dict[str, Knob]:
    """Every knob by its key path, read off the dataclasses."""
    tables = {"": Config(), **{f"{name}.": kind() for name, kind in sections().items()}}
    return {
        prefix + f.name: knob(f.type, getattr(table, f.name))
        for prefix, table in tables.items()
        for f in fields(table)
        if not is_dataclass(f.type)
    }


@cache
def sections() -> dict[str, type]:
    return {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}


def what_is_wrong(key: str, value: Any) -> str | None:
    """Why a key cannot have this value, or None."""
    if key in knobs():
        return knobs()[key].what_is_wrong(value)
    if key in sections():
        first = fields(sections()[key])[0].name
        return None if value == {} else f"is a section; set its keys one by one, as {key}.{first}=..."
    near = nearest(key)
    return f"unknown key; did you mean {near}?" if near else "unknown key; --help lists all"


def nearest(key: str) -> str | None:
    """The key path most like `key`, whole or in its last name."""

    def likeness(path: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key.lower(), path).ratio()
        return max(whole, SequenceMatcher(None, last_name(key), last_name(path)).ratio()), whole

    if last_name(key) in ELSEWHERE:
        return ELSEWHERE[last_name(key)]
    best = max(knobs(), key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


def last_name(key: str) -> str:
    return key.rpartition(".")[2].lower()
