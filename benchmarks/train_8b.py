"""Train the Llama-3-8B shape with random weights for a few steps, by each method, and write down speed and memory.

    python benchmarks/train_8b.py --folder /tmp/llama-8b --out benchmarks/results/NAME.json [--size tiny] [METHOD ...]

The figure is that of the median step after the third. Random tokens in documents of the real length mix of
instruction data, packed: the work of a step does not depend on what the tokens are.
"""

import argparse
import json
import random
import shlex
import shutil
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch

from minitune import files, shards
from minitune.config import load_config
from minitune.log import versions
from minitune.model import Llama
from minitune.pretrained import TINY, read_config
from minitune.train import train

SIZES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
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
OPTIMIZER = {"qlora": "paged_adamw_32bit", "lora": "paged_adamw_32bit", "full": "paged_adamw_8bit"}
KEPT = ("loss", "tokens_per_second", "memory_gb", "grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["qlora", "lora", "full"], metavar="METHOD")
    parser.add_argument("--folder", type=Path, required=True, help="where the random model is, or will be, written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys for every run")
    options = parser.parse_args()
    if not (options.folder / "config.json").exists():
        write_random_model(options.folder, SIZES[options.size])
    rows = options.folder.parent / "rows.jsonl"
    write_rows(rows, tokens=4 * 2048 * (options.steps + 2))

    results = []
    for method in options.methods:
        overrides = [
            f"method={method}",
            f"model.path={options.folder}",
            "model.dtype=bfloat16",
            f"data.train={rows}",
            "data.eval_fraction=0",
            "data.max_seq_len=2048",
            "data.deduplicate=false",
            f"optim.name={OPTIMIZER[method]}",
            "optim.learning_rate=1e-4",
            f"train.max_steps={options.steps}",
            "train.batch_size=4",
            "train.gradient_accumulation_steps=1",
            "eval.every_steps=0",
            "eval.early_stopping_patience=0",
            "eval.samples=0",
            "save.every_steps=0",
            "log.every_steps=1",
            "log.tensorboard=false",
            *options.set,
        ]
        case = "-".join([options.size, method, *(each.partition("=")[2] for each in options.set)])
        result = measure(case, method, overrides, options.folder.parent / f"run-{method}")
        results.append(result)
        files.write_json(options.out, results)
    for r in results:
        print(
            f"{r['case']:16} {r['tokens_per_second']:>8.0f} tokens/s  {r['peak_allocated_gb']:6.2f} GB  "
            f"first step {r['first_step_seconds']:5.1f} s  loss {r['losses'][0]:.3f} -> {r['final_loss']:.3f}"
        )


def measure(case: str, method: str, overrides: list[str], run: Path) -> dict[str, object]:
    """One run; the contract's fields of a result, and what is needed to repeat it."""
    shutil.rmtree(run, ignore_errors=True)
    recipe = run.parent / "recipe.toml"
    recipe.write_text("")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.time()
    train(load_config([str(recipe), f"out={run}", *overrides]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    speeds = [line["tokens_per_second"] for line in steps[3:]]
    shutil.rmtree(run)
    return {
        "case": case,
        "system": "minitune",
        "method": method,
        "tokens_per_second": statistics.median(speeds),
        "slowest_and_fastest": [min(speeds), max(speeds)],
        "peak_allocated_gb": steps[-1]["memory_gb"],
        "first_step_seconds": steps[0]["tokens"] / steps[0]["tokens_per_second"],
        "run_seconds": time.time() - begun,
        "final_loss": steps[-1]["loss"],
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "date": date.today().isoformat(),
        "versions": versions(),
        "recipe": [each for each in overrides if not each.startswith(("model.path", "data.train="))],
        "command": "python benchmarks/train_8b.py " + shlex.join(sys.argv[1:]),
    }


def write_random_model(folder: Path, size: dict[str, int]) -> None:
    """A model folder of this size: normal(0, 0.02), made on the GPU where there is one; the built-in tokenizer."""
    folder.mkdir(parents=True)
    tiny = json.loads((TINY / "config.json").read_text())
    config = {**tiny, **size, "head_dim": size["hidden_size"] // size["num_attention_heads"]}
    config |= {"tie_word_embeddings": False, "max_position_embeddings": 8192}
    companions = folder.with_name(folder.name + "-companions")
    shutil.copytree(TINY, companions, dirs_exist_ok=True)
    (companions / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(read_config(companions))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)

    def tensors():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                yield name, torch.randn(parameter.shape, dtype=torch.bfloat16, device=device, generator=draw) * 0.02

    folder.rmdir()
    shards.save(folder, tensors(), like=companions)


def write_rows(path: Path, tokens: int) -> None:
    """Random text of about so many tokens, in rows of 20 to 600 words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(3000)]
    with open(path, "w") as file:
        while tokens > 0:
            n = draw.randint(20, 300)
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=n))}) + "\n")
            tokens -= n  # at least one token a word


if __name__ == "__main__":
    main()
