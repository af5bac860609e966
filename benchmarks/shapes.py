"""Models and data of a known size for benchmarks: random weights, the built-in tokenizer, rows of known length.

    python benchmarks/shapes.py FOLDER [--size 8b --layers 32]      # writes the model

The work of a step does not depend on what the weights and tokens are, as long as they are not all equal.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minitune import shards
from minitune.model import Llama
from minitune.pretrained import TINY, read_config

SIZES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
}


def write_model(folder: Path, size: str, weights: bool = True, layers: int = 0) -> None:
    """A model folder of this size: normal(0, 0.02), made on the GPU where there is one; or all but the weights.
    `layers`: that many in place of the size's own."""
    companions = folder.with_name(folder.name + "-companions")
    shutil.copytree(TINY, companions, dirs_exist_ok=True)
    (companions / "model.safetensors").unlink()
    shape = SIZES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = json.loads((TINY / "config.json").read_text()) | shape
    config |= {"head_dim": shape["hidden_size"] // shape["num_attention_heads"], "tie_word_embeddings": False}
    config |= {"max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
    (companions / "config.json").write_text(json.dumps(config))
    if weights:
        shards.save(folder, random_tensors(companions), like=companions)
    else:
        shutil.copytree(companions, folder, dirs_exist_ok=True)


def random_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model folder of this kind, drawn in the order of the model."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(read_config(folder)).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
        else:
            yield name, torch.randn(shape, dtype=torch.bfloat16, device=device, generator=draw) * 0.02


def write_full_rows(path: Path, tokens: int, rows: int) -> None:
    """Raw texts, each of more than `tokens` tokens under the built-in tokenizer: cut, they fill a row each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(3000)]
    with open(path, "w") as file:
        for _ in range(rows):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=tokens))}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, default=0, help="in place of the size's own")
    options = parser.parse_args()
    write_model(options.folder, options.size, layers=options.layers)


if __name__ == "__main__":
    main()
