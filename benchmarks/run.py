"""Measure minitune and its rivals on the same rows, one after the other on one machine.

    python benchmarks/run.py --folder /tmp/bench --out benchmarks/results/H200-2026-01-31.json
    python benchmarks/run.py --folder /tmp/bench --out x.json --cases lora-fast qlora-fast --no-rivals
    python benchmarks/run.py --folder /tmp/bench --out x.json --call 3 --data data --tokenizer data/tokenizer.model
    python benchmarks/run.py --folder /tmp/bench --out x.json --size tiny --steps 5            # on a CPU, in a minute

The cases are in cases.toml. Each measurement runs in a process of its own: minitune's by measure.py, the rivals' by
peers/peer.py on the very rows that minitune trained on, dumped first. Both draw the same random weights, and train at
one rate from the first step to the last, so that their losses may be compared. A result is one object of the list in
--out, with the recipe, versions and command it came from, written when it is there; runs add to what is there.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shapes import SIZES, write_full_rows, write_model

from minitune import files
from minitune.config import knobs, load_config, read_value
from minitune.data import prepare
from minitune.log import versions
from minitune.loss import IGNORE
from minitune.pretrained import find
from minitune.tokenizer import load_tokenizer
from minitune.train import make_stream

HERE = Path(__file__).parent
DEFAULTS = {"size": "8b", "rows": 4, "max_seq_len": 2048, "accumulation": 1, "dropout": 0.0, "steps": 12}
POLL = 0.2  # seconds between two looks at what a measurement has left
TINY_LENGTH = 256  # tokens a row, at most, of a tiny model: it is there to see that all runs
CONSTANT = {"learning_rate": 1e-4, "lr_scheduler": "constant", "warmup_ratio": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, rows and runs; needs 17 GB for rivals")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", help="names in cases.toml; all")
    parser.add_argument("--call", type=int, help="the cases of this number: ten minutes with their rivals on a card")
    parser.add_argument("--data", type=Path, help="the folder of the data files that some cases name")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model to read them with; the built-in one")
    parser.add_argument("--size", choices=SIZES, help="of the model, in place of the cases' own")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--no-rivals", action="store_true")
    parser.add_argument("--only-rivals", action="store_true")
    parser.add_argument("--rivals", nargs="*", help="of these systems alone")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe keys for all of minitune's runs"
    )
    parser.add_argument("--label", default="minitune", help="minitune's name in the results, where --set changes it")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for one measurement")
    options = parser.parse_args()

    cases = tomllib.loads((HERE / "cases.toml").read_text())
    chosen, left_out = [], []
    for name in options.cases or [name for name, case in cases.items() if options.call in (None, case["call"])]:
        case = DEFAULTS | cases[name] | {"name": name}
        case |= {key: value for key in ("size", "steps") if (value := getattr(options, key))}
        case["max_seq_len"] = min(case["max_seq_len"], TINY_LENGTH if case["size"] == "tiny" else case["max_seq_len"])
        (left_out if "data" in case and options.data is None else chosen).append(case)
    if left_out:
        print(f"left out, since they need --data: {', '.join(case['name'] for case in left_out)}")

    recipes = {case["name"]: write_recipe(case, options) for case in chosen}
    results = json.loads(options.out.read_text()) if options.out.exists() else []
    ours: dict[str, dict[str, Any]] = {}
    for found in measure_ours(chosen, recipes, options) if not options.only_rivals else ():
        ours[found["case"]] = found
        results.append(anywhere(found, options))
        files.write_json(options.out, results)
        report(found, None)
    for case in chosen if not options.no_rivals else ():
        rivals = [
            rival for rival in case.get("rivals", ()) if rival["system"] in (options.rivals or (rival["system"],))
        ]
        dump = dump_batches(case, recipes[case["name"]]) if rivals else {}
        for rival in rivals:
            found = measure_rival(case, rival, dump, options)
            results.append(anywhere(found, options))
            files.write_json(options.out, results)
            report(found, ours.get(case["name"]))


def write_recipe(case: dict[str, Any], options: argparse.Namespace) -> Path:
    """The recipe of a case as a file, with its data beside it."""
    folder = options.folder / case["name"]
    folder.mkdir(parents=True, exist_ok=True)
    model = options.folder / case["size"]
    if case.get("rivals") and not options.no_rivals and not list(model.glob("*.safetensors")):
        write_model(model, case["size"])
    if not (model / "config.json").exists():  # its shape alone: measure.py draws the weights on the device
        write_model(model, case["size"], weights=False)
    if options.tokenizer and "data" in case:
        model = with_tokenizer(model, options.tokenizer, options.folder)
    steps = case["steps"] + 2
    keys: dict[str, Any] = {
        "method": case["method"],
        "out": str(folder / "run"),
        "model.path": str(model),
        "model.dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "data.eval_fraction": 0.0,
        "data.max_seq_len": case["max_seq_len"],
        "train.batch_size": case["rows"],
        "train.gradient_accumulation_steps": case["accumulation"],
        "train.max_steps": steps,
        "train.resume": "never",
        **{f"optim.{key}": value for key, value in CONSTANT.items()},
        "eval.every_steps": 0,
        "eval.early_stopping_patience": 0,
        "save.every_steps": 0,
        "log.tensorboard": False,
    }
    if "data" in case:
        keys |= {"data.train": [str(options.data / case["data"])], "data.columns": case.get("columns", {})}
    else:
        rows = folder / "rows.jsonl"
        write_full_rows(rows, case["max_seq_len"], case["rows"] * case["accumulation"] * steps)
        keys |= {"data.train": [str(rows)], "data.overlong": "truncate", "data.deduplicate": False}
    if case["method"] != "full":
        keys["lora.dropout"] = case["dropout"]
    keys |= {"optim.name": case["optimizer"]} if "optimizer" in case else {}
    keys |= case.get("recipe", {})
    for each in options.set:
        key, _, text = each.partition("=")
        keys[key] = read_value(text, str if key not in knobs() else knobs()[key].kind)
    recipe = folder / "recipe.toml"
    recipe.write_text("".join(f"{key} = {toml(value)}\n" for key, value in keys.items()))
    return recipe


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + " }"
    return str(value) if isinstance(value, float) else json.dumps(value)


def with_tokenizer(model: Path, tokenizer: Path, folder: Path) -> Path:
    """The same model with a sentencepiece tokenizer in place of the built-in one; weights are linked."""
    other = folder / f"{model.name}-{tokenizer.stem}"
    other.mkdir(exist_ok=True)
    for path in model.iterdir():
        if not path.name.startswith("tokenizer") and not (other / path.name).exists():
            (other / path.name).hardlink_to(path)
    (other / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return other


def dump_batches(case: dict[str, Any], recipe: Path) -> dict[str, Any]:
    """The rows of the measured steps, in their order, for the rivals: a file, how full they are, what share is learned.

    Labels as transformers wants them: at the place of the token itself, not one before.
    """
    cfg = load_config([str(recipe)])
    tokenizer = load_tokenizer(find(cfg.model.path))
    stream = make_stream(cfg, prepare(cfg.data, tokenizer).train, tokenizer)
    batches = [batch for _ in range(case["steps"]) for batch in stream.next_step()]
    labels = torch.cat([batch.labels for batch in batches]).roll(1, dims=1)
    labels[:, 0] = IGNORE
    tensors = {
        "tokens": torch.cat([batch.tokens for batch in batches]),
        "labels": labels,
        "positions": torch.cat([batch.positions for batch in batches]),
    }
    path = recipe.with_name("batches.safetensors")
    save_file(tensors, path)
    documents = sum(batch.document_tokens for batch in batches)
    learned = sum(batch.loss_tokens for batch in batches)
    return {"batches": str(path), "fill": documents / tensors["tokens"].numel(), "loss_share": learned / documents}


def write_rival(case: dict[str, Any], rival: dict[str, Any], dump: dict[str, Any], options: argparse.Namespace) -> str:
    """A rival's settings as a file; its best ones where the case does not say."""
    settings = {
        "method": case["method"],
        "model": str(options.folder / case["size"]),
        "rows": case["rows"],
        "accumulation": case["accumulation"],
        "steps": case["steps"],
        "max_seq_len": case["max_seq_len"],
        "dropout": case["dropout"],
        "recompute": "on",
        "optimizer": "adamw_torch_fused",
        **CONSTANT,
        **dump,
        **rival,
    }
    if rival["system"] != "unsloth":  # which chooses by itself
        settings["attention"] = "flash_attention_4" if torch.cuda.is_available() else "sdpa"
    path = options.folder / case["name"] / f"{rival['system']}.json"
    path.write_text(json.dumps(settings, indent=1))
    return str(path)


def measure_ours(
    cases: list[dict[str, Any]], recipes: dict[str, Path], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Minitune's results, each as soon as it is there; in one process (and a new one after each case that it does not
    survive)."""
    outs = {name: recipe.with_name(f"{options.label}-result.json") for name, recipe in recipes.items()}
    tasks = {
        case["name"]: {
            "recipe": str(recipes[case["name"]]),
            "out": str(outs[case["name"]]),
            "steps": case["steps"],
            "random": case["size"],
        }
        for case in cases
    }
    for out in outs.values():
        out.unlink(missing_ok=True)
    waiting = list(cases)
    while waiting:
        plan = options.folder / "plan.json"
        plan.write_text(json.dumps([tasks[case["name"]] for case in waiting]))
        log = options.folder / f"{options.label}.log"
        for ended in running([str(HERE / "measure.py"), str(plan)], log, options.timeout * len(waiting)):
            while waiting and outs[waiting[0]["name"]].exists():
                case = waiting.pop(0)
                result = json.loads(outs[case["name"]].read_text())
                yield told(case, options.label, recipes[case["name"]]) | with_share(case, result)
            if ended and waiting:  # the first without a result is the one that broke it
                case = waiting.pop(0)
                yield told(case, options.label, recipes[case["name"]]) | failure(ended, log)


def measure_rival(
    case: dict[str, Any], rival: dict[str, Any], dump: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    settings = Path(write_rival(case, rival, dump, options))
    out = settings.with_name(f"{rival['system']}-result.json")
    out.unlink(missing_ok=True)
    log = out.with_suffix(".log")
    code = run([str(HERE / "peers" / "peer.py"), str(settings), str(out)], log, options.timeout)
    result = json.loads(out.read_text()) if out.exists() else failure(code, log)
    return told(case | rival, rival["system"], settings) | result


def failure(code: str, log: Path) -> dict[str, Any]:
    return {"failed": f"{code}: {log.read_text()[-1500:]}", "versions": versions()}


def run(arguments: list[str], log: Path, timeout: int) -> str:
    """Run a script to its end; how it ended."""
    *_, code = running(arguments, log, timeout)
    return code


def running(arguments: list[str], log: Path, timeout: int) -> Iterator[str]:
    """Run a script; "" now and then while it runs, at last how it ended."""
    until, command = time.monotonic() + timeout, [sys.executable, *arguments]
    with open(log, "w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as script:
        try:
            while script.poll() is None and time.monotonic() < until:
                yield ""
                time.sleep(POLL)
            code = "out of time" if script.poll() is None else f"exit {script.returncode}"
        finally:
            script.kill()
    yield code


def told(case: dict[str, Any], system: str, settings: Path) -> dict[str, Any]:
    """What a result is of."""
    return {
        "case": case["name"],
        "what": case["what"],
        "system": system,
        "method": case["method"],
        "size": case["size"],
        "target": case.get("target"),
        "date": date.today().isoformat(),
        "recipe": (json if settings.suffix == ".json" else tomllib).loads(settings.read_text()),
        "command": "python benchmarks/run.py " + shlex.join(sys.argv[1:]),
    }


def anywhere(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A result without the paths of this machine."""
    text = json.dumps(found)
    for name, path in (("OUT", options.out), ("FOLDER", options.folder), ("DATA", options.data)):
        text = text.replace(json.dumps(str(path))[1:-1], name) if path else text
    return json.loads(text)


def with_share(case: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    if "product_tflops" in found and "tokens_per_second" in found:
        rate = found["tokens_per_second"] * flops_per_token(case) / 1e12
        found["share_of_products"] = rate / found["product_tflops"]
    return found


def flops_per_token(case: dict[str, Any]) -> float:
    """What a token must cost, whatever is recomputed: products with frozen weights forward and for the gradient of
    their input, 4 P; with trained ones also for their own, 6 P; causal attention, 2 S D L forward and 2.5 times
    that backward; adapters aside, which are under one per cent."""
    shape = SIZES[case["size"]]
    D, F, L, V = (shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    kv = D * shape["num_key_value_heads"] // shape["num_attention_heads"]
    products = L * (2 * D * D + 2 * D * kv + 3 * D * F) + V * D
    document = case["max_seq_len"] if "data" not in case else 0  # of short ones attention costs next to nothing
    return (6 if case["method"] == "full" else 4) * products + 3.5 * 2 * document * D * L


def report(r: dict[str, Any], ours: dict[str, Any] | None) -> None:
    """A line for a person; `ours` is minitune's result of the case, to hold a rival's against."""
    if "failed" in r:
        print(f"{r['case']:11} {r['system']:9} FAILED {r['failed'][-900:]}", flush=True)
        return
    spread, late = r["step_seconds"], len(r.get("compiled_after_warm_up", []))
    parts = [
        f"{r['case']:11} {r['system']:9}",
        f"{r['tokens_per_second']:7.0f} tok/s",
        f"{r['loss_tokens_per_second']:7.0f} loss tok/s",
        f"{r['peak_allocated_gb']:6.2f} GB allocated {r['peak_reserved_gb']:6.2f} reserved",
        f"step {spread['median']:.3f} ({spread['least']:.3f}-{spread['most']:.3f}) s",
        f"first {r['first_step_seconds']:.1f} s",
        f"loss {r['losses'][0]:.3f} -> {r['final_loss']:.3f}",
        f"{late} compiled late" if late else "",
        f"{r['share_of_products']:.0%} of products" if "share_of_products" in r else "",
        f"minitune {ours['loss_tokens_per_second'] / r['loss_tokens_per_second']:.2f}x"
        if ours and "failed" not in ours
        else "",
    ]
    print("  ".join(filter(None, parts)), flush=True)


if __name__ == "__main__":
    main()
