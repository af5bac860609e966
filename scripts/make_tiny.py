"""Make the built-in base model, its tokenizer and its data set, from nothing but this project's own text.

    python scripts/make_tiny.py [--out FOLDER] [--documents N] [key.path=value ...]

Writes the corpus, the tokenizer and a random model to FOLDER (default runs/make-tiny), trains the model
there with minitune's own `full` method, and copies the result to minitune/tiny/, beside the recipe that
fine-tunes it. Minutes on a GPU, hours on a CPU; further arguments override the base's recipe below.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_orders import skill_rows
from tiny_text import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minitune import errors, files
from minitune.config import load_config
from minitune.train import train

TINY = Path(__file__).parent.parent / "minitune" / "tiny"
SEED = 42
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]  # ids 0, 1, 2
TOKENIZER_DOCUMENTS = 50_000
SKILL_ROWS = 2000

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# How the base is trained: 80M tokens with the default documents, 32 rows of 512 a step.
BASE_RECIPE = """\
method = "full"
seed = 42

[model]
dtype = "float32"

[data]
format = "text"
eval_fraction = 0.005
max_seq_len = 512

[optim]
learning_rate = 2e-3
weight_decay = 0.1
max_grad_norm = 1.0
warmup_ratio = 0.02

[train]
num_epochs = 6
batch_size = 32
gradient_accumulation_steps = 1

[eval]
every_steps = 1000
early_stopping_patience = 0

[save]
every_steps = 1000
"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/make-tiny"), metavar="FOLDER")
    parser.add_argument("--documents", type=int, default=200_000, metavar="N")
    args, overrides = parser.parse_known_args(arguments)

    corpus, base, recipe, run = (args.out / name for name in ("corpus.jsonl", "base", "base.toml", "run"))
    base.mkdir(parents=True, exist_ok=True)
    write_rows(corpus, ({"text": text} for text in documents(args.documents, SEED)))
    write_tokenizer(base, documents(TOKENIZER_DOCUMENTS, SEED))
    write_random_model(base, SEED)
    files.write_text(recipe, BASE_RECIPE)

    places = {"model.path": str(base), "data.train": json.dumps([str(corpus)]), "out": str(run)}
    train(load_config([str(recipe), *(f"{key}={value}" for key, value in places.items()), *overrides]))

    publish(base, run / "model", TINY)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Byte-level BPE that takes each digit by itself and puts <s> first, as transformers reads it too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, also those the corpus lacks
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", CONFIG["bos_token_id"])]
    )
    files.write_bytes(folder / "tokenizer.json", f"{tokenizer.to_str(pretty=True)}\n".encode())
    files.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_random_model(folder: Path, seed: int) -> None:
    """config.json and weights before any training: matrices normal(0, 0.02), norms one."""
    files.write_json(folder / "config.json", CONFIG)
    special = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files.write_json(folder / "generation_config.json", special)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in weight_shapes().items()
    }
    files.write_tensors(folder / "model.safetensors", weights)


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes; the tied head has no tensor of its own."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    query = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    key = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def publish(base: Path, trained: Path, folder: Path) -> None:
    """Put the trained weights as bfloat16, the base's other files and the skill's rows into the package."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        files.write_bytes(folder / name, (base / name).read_bytes())
    weights = load_file(trained / "model.safetensors")
    files.write_tensors(folder / "model.safetensors", {name: w.to(torch.bfloat16) for name, w in weights.items()})
    write_rows(folder / "train.jsonl", skill_rows(SKILL_ROWS, SEED))


if __name__ == "__main__":
    errors.run(main)
