"""The faults of a pull request: some injections of each row, none of them lost, each row's control lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LEAST = {  # injections in a full table
    "kill -9": 200,
    "SIG": 50,
    "corruption": 24,
    "byte edits": 100,
    "nonsense": 36,
    "no ": 10,
    "rotation": 10_000,
    "NaN": 20,
    "two runs": 10,
    "locks": 9,
    "finished": 3,
    "hostile": 70,
}


@pytest.mark.skipif(sys.platform != "linux", reason="faults are planted by way of /proc")
@pytest.mark.timeout(600)
def test_nothing_is_lost_and_each_control_is(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    command = [sys.executable, str(RUN), "--tier", "pr", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert out.exists(), done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= len(LEAST)
    for row in rows:
        assert row["injected"] > 0 and row["failed"] == 0, (row["name"], row["losses"])
        assert row["survived"] == row["injected"]
        assert row["control"]["lost"] > 0, f"{row['name']}: its control is not lost, so it proves nothing"
    assert done.returncode == 0, done.stdout + done.stderr


def test_full_tables_are_full() -> None:
    """What is kept as a result has all rows with all their injections, and none lost."""
    tables = [json.loads(path.read_text()) for path in RESULTS.glob("faults-*.json")]
    for table in tables:
        assert table["tier"] == "full" and table["versions"] and table["command"] and table["machine"]
        ours = [row for row in table["rows"] if row["system"] == "minitune"]
        for name, least in LEAST.items():
            assert sum(row["injected"] for row in ours if name in row["name"]) >= least, name
        assert all(row["failed"] == 0 and row["control"]["lost"] > 0 for row in ours)
