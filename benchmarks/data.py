"""Rows to packed tokens: rows and megabytes a second, peak memory, and how full the rows are, beside TRL.

    python benchmarks/data.py --tokenizer FOLDER --gsm8k FILE [--megabytes 200] [--rounds 3] [--trl PYTHON] [--out FILE]

Each system tokenises, masks and packs the same file of prompts and completions in a process of its own, one after the
other: minitune as it comes, and without its search for near duplicates, which TRL does not have; TRL as it comes (one
process), and with as many processes as there are cores. Rounds take turns, each system once and then each again, and
their medians are compared. Imports and the making of TRL's (tiny, random) model are not counted. Memory is the
proportional set size of the whole process tree, looked at every 50 ms: pages that processes share count once.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

MAX_SEQ_LEN = 2048
SYSTEMS = {  # name -> what its process is asked
    "minitune": {"system": "minitune", "near_duplicates": "report"},
    "minitune, no near duplicates": {"system": "minitune", "near_duplicates": "off"},
    "trl": {"system": "trl", "processes": 1},
    "trl, all cores": {"system": "trl", "processes": len(os.sched_getaffinity(0))},
}


def main(options: argparse.Namespace) -> None:
    results, times = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for case, path in cases(options, Path(folder)):
            mine = list(taking_turns(case, path, options))
            if len({(result["tokens"], result["trained_tokens"]) for result in mine}) != 1:
                raise SystemExit(f"{case}: the systems do not agree on what is learned: {mine}")
            results += mine
            if any(result["system"] == "trl" for result in mine):
                times[case] = {name: times_trl(mine, name) for name in SYSTEMS if name != "trl"}
                by_clock, by_cpu = times[case]["minitune"].values()
                print(f"{case}: {by_clock:.1f} times TRL by the clock, {by_cpu:.1f} by processor time", flush=True)
    if options.out:
        from minitune import files

        about = {"what": __doc__.split("\n")[0], "date": time.strftime("%Y-%m-%d"), "command": command(), **machine()}
        files.write_json(options.out, about | {"times_trl": times, "results": results})


def taking_turns(case: str, path: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each system made of a file, in as many rounds as are asked for; those that are not there are left out."""
    there = dict(SYSTEMS)
    for number in range(1, options.rounds + 1):
        for name, asked in list(there.items()):
            load = os.getloadavg()[0]  # of the minute before
            if result := measured(name, asked, path, options):
                result = {"case": case, "system": name, "round": number, "load_before": round(load, 2), **result}
                print(told(result), flush=True)
                yield result
            else:
                del there[name]


def times_trl(results: list[dict[str, Any]], name: str) -> dict[str, float]:
    """How many times as fast as TRL a system is, by the medians of the rounds."""

    def took(system: str, what: str) -> float:
        return median(result[what] for result in results if result["system"] == system)

    return {what: round(took("trl", what) / took(name, what), 2) for what in ("seconds", "cpu_seconds")}


def command() -> str:
    """The command, without the machine's folders."""
    return " ".join(["python", "benchmarks/data.py", *(Path(each).name for each in sys.argv[1:])])


def machine() -> dict[str, Any]:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("minitune", "torch", "tokenizers", "sentencepiece", "numpy", "rensa")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"machine": f"{len(os.sched_getaffinity(0))} cores, {', '.join(sorted(set(names)))}", "versions": versions}


def told(result: dict[str, Any]) -> str:
    return (
        f"{result['case']:12} {result['system']:30} {result['rows_per_second']:9,.0f} rows/s "
        f"{result['megabytes_per_second']:7.2f} MB/s {result['cpu_seconds']:7.1f} s CPU "
        f"{result['peak_memory_gb']:6.2f} GB  fill {result['fill']:.2%}  "
        f"{result['trained_tokens']:,} tokens to learn"
    )


# ---- the files -----------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of each case, in the columns that both systems read."""
    if options.gsm8k:
        with open(options.gsm8k, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        path = folder / "gsm8k.jsonl"
        path.write_text("".join(line(row["question"], row["answer"]) for row in rows))
        yield "gsm8k", path
    if options.megabytes:
        path = folder / "synthetic.jsonl"
        write_synthetic(path, int(options.megabytes * 1e6))
        yield "synthetic", path
        path.unlink()


def line(question: str, answer: str) -> str:
    prompt = f"### Instruction:\n{question}\n\n### Response:\n"
    return json.dumps({"prompt": prompt, "completion": answer}) + "\n"


WORDS = """
    account answer basket because before between bicycle blue borrowed bridge bring brother build carry cheaper
    children city clock coffee compare cost could count day divide dollars double each early eight evening every
    explain family farmer find first five flour friend garden gave group half hour hundred invoice kitchen later
    left letter library many market minutes money more morning name number often orange order paper party pay people
    pound price question quickly reason recipe remaining return river room save school second seven share short
    sister six sold some station step story student sum table teacher tell their then there thirty three ticket time
    together total train travel tree twice under until village walk water week where which while window without
    write year
""".split()  # noqa: SIM905  (a list would be a line each)


def write_synthetic(path: Path, size: int) -> None:
    """Rows of random sentences, of lengths as instruction data has them (log-normal), up to this many bytes."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            some = [line(sentences(draw, 3.3), sentences(draw, 4.0)) for _ in range(1000)]
            file.writelines(some)


def sentences(draw: random.Random, log_words: float) -> str:
    """About e^log_words words and numbers, with a full stop now and then."""
    count = min(int(draw.lognormvariate(log_words, 0.7)) + 3, 600)
    words = [draw.choice(WORDS) if draw.random() < 0.93 else str(draw.randrange(2000)) for _ in range(count)]
    for place in range(9, count, 11):
        words[place] += "."
    return " ".join(words).capitalize() + "."


# ---- a system in a process of its own ------------------------------------------------------------------------------


def measured(name: str, asked: dict[str, Any], path: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a system made of the file and what that took; None where it is not there."""
    python = options.trl if asked["system"] == "trl" else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        asked = asked | {"path": str(path), "tokenizer": str(options.tokenizer), "folder": folder}
        process = subprocess.Popen(
            [python, "-P", __file__, "--as-process", json.dumps(asked)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            text=True,
        )
        peak = Peak(process.pid)
        out, errors = process.communicate()
        peak.stop()
    if process.returncode == MISSING:
        print(f"{name} is not measured: {errors.strip().splitlines()[-1]} ({python})", flush=True)
        return None
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{errors[-3000:]}")
    result = json.loads(out.splitlines()[-1])
    seconds = result["seconds"]
    return {
        "rows_per_second": round(result["rows"] / seconds, 1),
        "megabytes_per_second": round(path.stat().st_size / 1e6 / seconds, 3),
        "peak_memory_gb": round(peak.bytes / 1e9, 3),
        "fill": round(result["tokens"] / (result["packed_rows"] * MAX_SEQ_LEN), 5),
        **result,
    }


class Peak:
    """The most memory that a process and its children have had at once, in bytes."""

    def __init__(self, pid: int) -> None:
        self.pid, self.bytes, self.ended = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        while not self.ended.wait(0.05):
            self.bytes = max(self.bytes, sum(map(proportional, tree(self.pid))))

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()


def tree(pid: int) -> list[int]:
    """A process and all that came of it."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return []
    return [pid, *(each for child in children for each in tree(int(child)))]


def proportional(pid: int) -> int:
    """Memory in bytes, of pages shared with n processes an n-th."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(each.split()[1]) for each in lines if each.startswith("Pss:"))


# ---- what that process does ----------------------------------------------------------------------------------------

MISSING = 77


def prepare_with_minitune(asked: dict[str, Any]) -> dict[str, Any]:
    from minitune.config import DataConfig
    from minitune.data import prepare
    from minitune.data.packing import rows
    from minitune.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(asked["tokenizer"]))
    cfg = DataConfig(
        train=(asked["path"],),
        eval_fraction=0.0,
        max_seq_len=MAX_SEQ_LEN,
        near_duplicates=asked["near_duplicates"],
        deduplicate=False,  # TRL trains on all
        cache=asked["folder"],
    )
    clock = Clock()
    got = prepare(cfg, tokenizer)
    packed = rows(got.train.lengths, MAX_SEQ_LEN, 0, packing=True)
    took = clock.read()
    tokens = {"tokens": got.train.tokens, "trained_tokens": got.train.trained_tokens}
    return {**took, "rows": got.counts["rows"], "packed_rows": len(packed), **tokens}


class Clock:
    """Seconds, and seconds of processor time of this process and of those that it has started and seen end."""

    def __init__(self) -> None:
        self.started, self.busy = time.perf_counter(), sum(os.times()[:4])

    def read(self) -> dict[str, float]:
        seconds, busy = time.perf_counter() - self.started, sum(os.times()[:4]) - self.busy
        return {"seconds": round(seconds, 3), "cpu_seconds": round(busy, 2)}


def prepare_with_trl(asked: dict[str, Any]) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(asked["tokenizer"])
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    settings = SFTConfig(
        output_dir=asked["folder"],
        max_length=MAX_SEQ_LEN,
        packing=True,
        dataset_num_proc=asked["processes"] if asked["processes"] > 1 else None,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    clock = Clock()
    rows = load_dataset("json", data_files=asked["path"], split="train", cache_dir=asked["folder"])
    trainer = SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
    took = clock.read()
    tokens = trained = 0
    for batch in trainer.train_dataset.iter(1000):
        tokens += sum(map(len, batch["input_ids"]))
        trained += sum(label != -100 for labels in batch["labels"] for label in labels)
    packed = {"packed_rows": len(trainer.train_dataset), "tokens": tokens, "trained_tokens": trained}
    return {
        **took,
        "rows": len(rows),
        **packed,
        "versions": {name: version(name) for name in ("trl", "datasets", "transformers", "tokenizers")},
    }


def as_process(asked: dict[str, Any]) -> None:
    try:
        done = {"minitune": prepare_with_minitune, "trl": prepare_with_trl}[asked["system"]](asked)
    except ImportError as error:
        print(error, file=sys.stderr)
        raise SystemExit(MISSING) from None
    print(json.dumps(done))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a model folder with its tokenizer")
    parser.add_argument("--gsm8k", type=Path, help="gsm8k's train.jsonl; left out: not measured")
    parser.add_argument("--megabytes", type=float, default=200, help="of the synthetic file; 0: none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trl", default=sys.executable, help="a python that has TRL, if it is not this one")
    parser.add_argument("--out", type=Path, help="write the results here")
    parser.add_argument("--as-process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_process:
        as_process(json.loads(options.as_process))
    else:
        main(options)
