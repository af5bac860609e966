"""The recipe of a run: every knob with its default, read from TOML and from `key.path=value`.

The dataclasses below are the one list of knobs. A module receives its section, as `cfg.lora`. All that is wrong with a
recipe is found here and said at once, before torch is loaded.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w

from minitune import secrets
from minitune.errors import UserError
from minitune.foreign import read_bytes
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

LONGEST, DEEPEST = 1_000_000, 1000  # bytes of a recipe, and parts of a key in it
EXAMPLE = Path(__file__).parent / "tiny" / "recipe.toml"  # what runs when no recipe is named
FULL_LEARNING_RATE = 2e-5  # the default where all weights train
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
    offload: Literal["auto", "always", "never"] = "auto"  # recomputed blocks' inputs to host memory; auto: if short
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


# ---- what depends on more than one key -----------------------------------------------------------------------------


def dependent_defaults(cfg: Config) -> dict[str, Any]:
    """Defaults that follow from other keys, for those that the user left alone."""
    defaults: dict[str, Any] = {}
    if cfg.method == "full":
        defaults["optim.learning_rate"] = FULL_LEARNING_RATE
    if cfg.data.eval:
        defaults["data.eval_fraction"] = 0.0
    if not cfg.eval.every_steps or not (cfg.data.eval or cfg.data.eval_fraction):
        defaults["eval.early_stopping_patience"] = 0
    return defaults


def contradictions(cfg: Config, given: dict[str, str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that cannot stand together, and what to do; `given` says where the user set each key that he did set.

    A recipe may hold a [lora] that method=full leaves unused: methods are switched from the command line.
    """
    held_out = ("data.eval", "data.eval_fraction")
    nothing_held_out = not cfg.data.eval and not cfg.data.eval_fraction
    if cfg.train.num_epochs == cfg.train.max_steps == 0:
        yield ("train.num_epochs", "train.max_steps"), "both are 0, which trains nothing; set one of them"
    if cfg.data.eval and cfg.data.eval_fraction:
        yield held_out, "evaluate on files or on a held-out share, not both; set data.eval_fraction=0 or data.eval=[]"
    if twice := [name for name in cfg.data.eval if real(name) in map(real, cfg.data.train)]:
        yield ("data.train", "data.eval"), f"{', '.join(twice)} is in both; evaluate on what is not trained on"
    if cfg.eval.early_stopping_patience and nothing_held_out:
        yield ("eval.early_stopping_patience", *held_out), "nothing is held out to judge by; set the patience to 0"
    if cfg.eval.early_stopping_patience and not cfg.eval.every_steps:
        yield ("eval.early_stopping_patience", "eval.every_steps"), "there are no evaluations to count; set both"
    if cfg.eval.samples and nothing_held_out:
        yield ("eval.samples", *held_out), "no prompts are held out to be answered; set eval.samples=0"
    if cfg.eval.samples and cfg.data.format == "text":
        yield ("eval.samples", "data.format"), "raw text has no prompts to be answered; set eval.samples=0"
    if cfg.data.template != "auto" and cfg.data.format == "text":
        yield ("data.template", "data.format"), "raw text goes into no template; leave it at auto"
    if cfg.data.weights and len(cfg.data.weights) != len(cfg.data.train):
        yield ("data.weights", "data.train"), "one weight for each file of train, or none at all"
    if len(set(cfg.data.columns.values())) < len(cfg.data.columns):
        yield ("data.columns",), "two columns are given one name"
    if cfg.model.attention in ("flash", "varlen") and cfg.model.dtype == "float32":
        yield ("model.attention", "model.dtype"), "flash and varlen compute in bfloat16 alone; use sdpa or auto"
    if cfg.model.revision and (cfg.model.path == "tiny" or os.path.isdir(cfg.model.path)):
        yield ("model.revision", "model.path"), "a model on this disk has no revisions; only one on the Hub has"
    whole = {last_name(name) for name in cfg.lora.modules_to_save}
    rows = cfg.lora.trainable_token_indices
    if twice := whole & set(rows if isinstance(rows, dict) else ["embed_tokens"] if rows else []):
        keys = ("lora.modules_to_save", "lora.trainable_token_indices")
        yield keys, f"{', '.join(sorted(twice))} trains whole, its rows with it; leave it out of one of them"
    if isinstance(cfg.lora.target_modules, str) and cfg.lora.layers_to_transform:
        keys = ("lora.target_modules", "lora.layers_to_transform")
        yield keys, "an expression names the layers itself; give a list of modules beside layers_to_transform"
    lora = tuple(key for key, place in given.items() if key.startswith("lora.") and place == COMMAND_LINE)
    if cfg.lora.loraplus_lr_ratio != LoRAConfig().loraplus_lr_ratio and cfg.lora.variant != "loraplus":
        yield ("lora.loraplus_lr_ratio", "lora.variant"), "only variant loraplus has two learning rates; leave it out"
    if "lora.alpha" in lora and cfg.lora.variant == "vera":
        yield ("lora.alpha", "lora.variant"), "vera has no alpha, its vectors are the scale; leave it out"
    if cfg.method == "full" and lora:
        yield lora, "method=full trains no adapter; leave it out, or set method=lora"


def real(name: str) -> str:
    """A data file's name, the same for every way to write it."""
    return name if name == "tiny" or "://" in name else os.path.realpath(name)


# ---- reading and writing -------------------------------------------------------------------------------------------

COMMAND_LINE = "the command line"
Problem = tuple[str, str]  # the recipe's file or COMMAND_LINE, and a sentence that begins with the key


class ConfigError(UserError):
    """All that is wrong with a recipe, a line each."""

    def __init__(self, problems: list[Problem]) -> None:
        if len(problems) == 1:
            super().__init__(": ".join(problems[0]))
            return
        problems = sorted(problems, key=lambda problem: problem[0] == COMMAND_LINE)  # the file's first
        places = " and ".join(dict.fromkeys(place for place, _ in problems))
        super().__init__("\n  ".join([f"{len(problems)} problems in {places}:", *(line for _, line in problems)]))


def load_config(arguments: list[str]) -> Config:
    """The recipe that a command line asks for: `[RECIPE.toml] [key.path=value ...]`; without a file, the example.

    -h or --help prints every key and exits. Raises ConfigError with all problems at once.
    """
    if {"-h", "--help"} & set(arguments):
        print(usage())
        raise SystemExit(0)
    recipe, overrides, problems = read_arguments(arguments)
    table, unreadable = read_recipe(recipe)
    problems += unreadable

    values: dict[str, Any] = {}
    given: dict[str, str] = {}  # key -> where it was set last
    wrong: set[str] = set()
    settings = [(str(recipe), key, value) for key, value in flat(table)]
    settings += [(COMMAND_LINE, key, value) for key, value in overrides]
    for place, key, value in settings:
        secrets.note(key, value)
        if complaint := what_is_wrong(key, value):
            problems.append((place, f"{key}: {complaint}"))
            wrong.add(key)
        elif key in knobs():
            values[key] = tuple(value) if isinstance(value, list) else value
            given[key] = place

    cfg = assemble(dependent_defaults(assemble(values)) | values)
    if not unreadable:  # else there is no telling what stands in it
        for keys, sentence in contradictions(cfg, given):
            if wrong.isdisjoint(keys):
                place = COMMAND_LINE if COMMAND_LINE in map(given.get, keys) else str(recipe)
                problems.append((place, f"{', '.join(keys)}: {sentence}"))
    if problems:
        raise ConfigError(problems)
    return cfg


def dump(cfg: Config) -> str:
    """The whole recipe as TOML; load_config reads it back to an equal Config."""
    return tomli_w.dumps(secrets.hidden_in(asdict(cfg)))


def usage() -> str:
    """Every key with its default and what it may be."""
    lines = ["[RECIPE.toml] [key.path=value ...]   no recipe: the built-in example", ""]
    for key, each in knobs().items():
        default = json.dumps(each.default)
        lines.append(f"  {f'{key} = {default}':46}  {each.words}")
    return "\n".join(lines)


def read_arguments(arguments: list[str]) -> tuple[Path, list[tuple[str, Any]], list[Problem]]:
    """The recipe's file, the overrides as (key, value), and what is neither."""
    recipe, overrides, problems = None, [], []
    for argument in arguments:
        key, equals, text = (part.strip() for part in argument.partition("="))
        if argument.startswith("-"):
            problems.append(f"{argument}: no such option; a key is set as key.path=value, and --help lists all")
        elif equals and not os.path.isfile(argument):
            try:
                overrides.append((key, read_value(text, knobs()[key].kind if key in knobs() else str)))
            except (ValueError, RecursionError):
                problems.append(
                    f"{key}: {text[:200]} is not TOML; the strings in it need quotes that the shell leaves alone"
                )
        elif key in knobs() or key in sections():
            problems.append(f"{argument}: has no value; write it as key.path=value")
        elif recipe is None:
            recipe = Path(argument)
        else:
            problems.append(f"{argument}: a second recipe, after {recipe}; give one")
    return recipe or EXAMPLE, overrides, [(COMMAND_LINE, problem) for problem in problems]


def read_value(text: str, kind: Any) -> Any:
    """A value in TOML's grammar. Where text is wanted it needs no quotes, and a list of one no brackets."""
    try:
        document = tomllib.loads(f"value = {text}")
        value = document["value"] if len(document) == 1 else text  # a line break may have begun another key
    except (ValueError, RecursionError):
        if text.startswith(("'", '"', "[")):
            raise
        value = text
    if kind == tuple[str, ...] and not isinstance(value, list):
        return [value if isinstance(value, str) else text]
    if kind == str | tuple[str, ...] and value == text and re.fullmatch(r"\w+", text):
        return [text]  # a module's name, which as an expression would have to be whole
    if kind == tuple[int, ...] and type(value) is int:
        return [value]
    return text if kind is str and not isinstance(value, str) else value


def read_recipe(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The TOML of a file, and what keeps it from being read."""
    try:
        text = read_bytes(path, LONGEST).decode("utf-8-sig")
        if any(key.count(".") > DEEPEST for line in text.split("\n") for key in line.split("=")[:-1]):
            raise ValueError(f"a key of more than {DEEPEST} parts")  # each part costs the parser all those before it
        return tomllib.loads(text), []
    except UserError as error:
        return {}, [(str(path), f"this recipe cannot be read ({error}); a key is set as key.path=value")]
    except UnicodeDecodeError as error:
        problem = f"this recipe is not UTF-8 text (byte {error.start})"
    except (ValueError, RecursionError) as error:
        problem = f"this recipe is not TOML: {error}"
    return {}, [(str(path), problem)]


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (key.path, value) pairs of nested tables."""
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in knobs() and prefix.count(".") < 3:
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def assemble(values: dict[str, Any]) -> Config:
    """The Config with these values, by key path."""
    made = {
        name: kind(**{f.name: values[f"{name}.{f.name}"] for f in fields(kind) if f"{name}.{f.name}" in values})
        for name, kind in sections().items()
    }
    return Config(**made, **{key: value for key, value in values.items() if "." not in key})


# ---- keys -----------------------------------------------------------------------------------------------------------

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
