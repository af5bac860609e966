"""Two gigabytes of rows train in less memory than that."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from data import WORDS, proportional, tree  # noqa: E402

SIZE = 2_000_000_000  # bytes
LIMIT = 1.5e9  # bytes: the proportional set sizes of the run and of all processes it starts, together
SECONDS = 3600


def write_rows(path: Path, size: int) -> int:
    """Rows of about a kilobyte, no two alike; how many there are."""
    draw, rows = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            for _ in range(1000):
                said = " ".join(draw.choices(WORDS, k=draw.randrange(20, 320)))
                row = {"instruction": f"Sum up number {rows}.", "input": said[:80], "output": said[80:]}
                file.write(json.dumps(row) + "\n")
                rows += 1
    return rows


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_two_gigabytes_train_in_less_memory(tmp_path: Path, small_base: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", SIZE)
    recipe = {
        "method": "lora",
        "out": str(tmp_path / "run"),
        "model.path": str(small_base),
        "model.dtype": "float32",
        "data.train": [str(tmp_path / "rows.jsonl")],
        "data.eval_fraction": 1e-5,
        "data.max_seq_len": 1024,
        "data.cache": str(tmp_path / "cache"),
        "train.max_steps": 3,
        "train.batch_size": 1,
        "train.gradient_accumulation_steps": 1,
        "log.tensorboard": False,
    }
    (tmp_path / "recipe.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.items()))
    for what in ("made", "found"):  # the store is made; then it is there, and a second run has it to read
        started, peak = time.monotonic(), 0
        line = [sys.executable, str(ROOT / "scripts" / "train.py"), str(tmp_path / "recipe.toml")]
        process = subprocess.Popen([*line, "train.resume=never"], env=os.environ | {"PYTHONPATH": str(ROOT)})
        try:
            while process.poll() is None:
                peak = max(peak, sum(map(proportional, tree(process.pid))))
                assert time.monotonic() - started < SECONDS
                time.sleep(0.1)
        finally:
            process.kill()
        print(f"store {what}: {time.monotonic() - started:.0f} s, at most {peak / 1e9:.2f} GB")
        assert process.returncode == 0
        assert 0.1e9 < peak < LIMIT
        facts = json.loads((tmp_path / "run" / "run.json").read_text())
        assert facts["step"] == 3
        assert facts["data"]["rows"] == rows == facts["data"]["train_documents"] + facts["data"]["eval_documents"]
        assert facts["data"]["fill"] > 0.98
    (tmp_path / "rows.jsonl").unlink()
