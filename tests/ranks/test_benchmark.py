"""benchmarks/ranks.py at tiny size, so that it cannot rot."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ranks.py"


def test_ranks_that_are_not_there(tmp_path: Path) -> None:
    out, cases = tmp_path / "ranks.json", ("tiny-qlora-full-8", "tiny-full-full-64", "tiny-lora-replicate-8")
    command = [sys.executable, SCRIPT, "--out", out, "--tokens", "64", "--steps", "3"]
    for case in cases:
        command += ["--case", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert [(row["case"], row["ranks"]) for row in found] == list(zip(cases, (8, 64, 8), strict=True))
    for row in found:
        assert {"system", "method", "versions", "command", "final_loss"} <= row.keys()
        assert row["communication"] == "void" and row["tokens_per_second"] > 0
        assert row["planned_gb"] > 0 and row["peak_allocated_gb"] > 0


def test_ranks_that_are_there(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", SCRIPT, "--real"]
    command += ["--out", out, "--tokens", "64", "--steps", "3", "--case", "tiny-qlora-full-2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [row] = json.loads(out.read_text())
    assert row["ranks"] == 2 and row["communication"] == "real"
    assert 0 < row["check_seconds"] < 10 and row["tokens_per_second"] > 0
