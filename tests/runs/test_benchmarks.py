"""The benchmarks run, at tiny size on a CPU, so that they cannot rot; what they find there is no figure."""

import importlib.util
import json
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minitune.pretrained import TINY

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def python(*arguments: object) -> str:
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)  # for what they share
    spec = importlib.util.spec_from_file_location(Path(name).stem, BENCHMARKS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cases_are_measured_and_told(tmp_path: Path) -> None:
    rows = tmp_path / "alpaca_en_demo.json"
    rows.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": f"{n} " * 40} for n in range(400)]))
    out, cases = tmp_path / "results.json", ["lora-fast", "qlora-small", "full", "alpaca"]
    common = ["--folder", tmp_path / "bench", "--out", out, "--size", "tiny", "--steps", 5]
    printed = python(BENCHMARKS / "run.py", *common, "--no-rivals", "--data", tmp_path, "--cases", *cases)
    results = json.loads(out.read_text())
    assert [result["case"] for result in results] == cases
    contract = {"case", "system", "method", "versions", "command"}
    contract |= {"tokens_per_second", "peak_allocated_gb", "final_loss"}
    for result in results:
        assert contract <= result.keys(), result
        assert result["tokens_per_second"] > 0 and result["system"] == "minitune"
        assert result["loss_tokens_per_second"] <= result["tokens_per_second"]
        assert len(result["losses"]) == 5 and result["losses"][-1] == result["final_loss"]
        assert result["step_seconds"]["least"] <= result["step_seconds"]["median"] <= result["step_seconds"]["most"]
        assert result["recipe"]["method"] == result["method"] and result["planned_gb"] > 0
        assert result["case"] in printed
        assert result["recipe"]["data"]["max_seq_len"] == 256  # at tiny size
        assert (result["recipe"]["optim"]["lr_scheduler"], result["recipe"]["optim"]["warmup_ratio"]) == ("constant", 0)

    profile = tmp_path / "profile.json"
    recipe = tmp_path / "bench" / "lora-fast" / "recipe.toml"
    python(BENCHMARKS / "profile_step.py", recipe, profile, "--random", "tiny")
    parts = json.loads(profile.read_text())["parts"]
    # At this size the clock decides which products are thin, and the machine the clock.
    assert "attention" in parts and all(ms >= 0 for ms in parts.values())
    assert parts.keys() & {"products with whole weights", "thin products of adapters"}


def test_products_are_told_apart_by_their_time() -> None:
    by_part = runpy.run_path(str(BENCHMARKS / "profile_step.py"))["by_part"]
    rows = [
        {"kernel": "nvjet_tst_256", "calls": 10, "ms": 3.0},
        {"kernel": "nvjet_tst_64", "calls": 100, "ms": 5.0},
        {"kernel": "aten::mm", "calls": 2, "ms": 1.0},
        {"kernel": "flash_fwd", "calls": 1, "ms": 2.5},
        {"kernel": "unheard of", "calls": 1, "ms": 0.5},
    ]
    assert by_part(rows) == {
        "thin products of adapters": 5.0,
        "products with whole weights": 4.0,
        "attention": 2.5,
        "the rest": 0.5,
    }


def test_a_rival_gets_the_rows_that_minitune_trains_on(tmp_path: Path) -> None:
    """Without the rivals' packages the measurement fails, and says so; what it was given is there to look at."""
    safetensors = pytest.importorskip("safetensors.torch")
    out, earlier = tmp_path / "results.json", {"case": "an earlier one"}
    out.write_text(json.dumps([earlier]))
    common = ["--folder", tmp_path / "bench", "--out", out, "--size", "tiny", "--steps", 4]
    python(BENCHMARKS / "run.py", *common, "--cases", "qlora-fast", "lora-small", "--only-rivals", "--timeout", 60)
    kept, result = json.loads(out.read_text())  # nothing is lost, and a case without rivals has nothing to measure
    assert kept == earlier
    assert result["system"] == "unsloth" and "failed" in result
    assert result["recipe"]["batches"].startswith("FOLDER/")  # results name no path of a machine
    given = safetensors.load_file(tmp_path / "bench" / result["recipe"]["batches"].removeprefix("FOLDER/"))
    assert given["tokens"].shape == given["labels"].shape == given["positions"].shape == (16, 256)
    learned = given["labels"] != -100
    assert (given["labels"][learned] == given["tokens"][learned]).all()  # at the token's own place
    assert not learned[:, 0].any() and learned[:, 1:].all()
    assert result["recipe"]["fill"] == 1.0 and result["recipe"]["loss_share"] == pytest.approx(255 / 256)
    # One rate from first to last, as minitune's; and no attention said for whom chooses by itself.
    told = {key: result["recipe"].get(key) for key in ("learning_rate", "lr_scheduler", "warmup_ratio", "attention")}
    assert told == {"learning_rate": 1e-4, "lr_scheduler": "constant", "warmup_ratio": 0.0, "attention": None}


def test_a_result_is_written_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the process that measures is not over, or does not survive one of the cases."""
    run, out, seen = script("run.py", monkeypatch), tmp_path / "results.json", []

    def running(arguments: list[str], log: Path, timeout: int) -> Iterator[str]:
        """The second case of each process breaks it."""
        log.write_text("and so it ended")
        for number, task in enumerate(json.loads(Path(arguments[-1]).read_text())):
            if number == 1:
                break
            Path(task["out"]).write_text(json.dumps({"failed": f"task {number}"}))
            yield ""
            seen.append([result["case"] for result in json.loads(out.read_text())])
        yield "exit 9"

    monkeypatch.setattr(run, "running", running)
    cases = ["lora-fast", "qlora-fast", "full"]
    asked = ["--folder", tmp_path / "bench", "--out", out, "--size", "tiny", "--steps", 5, "--no-rivals", "--cases"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, asked), *cases])
    run.main()
    assert seen == [cases[:1], cases]
    failed = [result["failed"] for result in json.loads(out.read_text())]
    assert failed == ["task 0", "exit 9: and so it ended", "task 0"]


def test_a_script_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("run.py", monkeypatch)
    assert run.run(["-c", "import time; time.sleep(60)"], tmp_path / "log", 1) == "out of time"
    assert run.run(["-c", "raise SystemExit(3)"], tmp_path / "log", 60) == "exit 3"


def test_a_plain_twin_that_no_compiler_takes_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = script("kernels.py", monkeypatch)
    calls = []

    def broken(function, **_):
        def fast(*given):
            raise RuntimeError("no such kernel\nand much more about it")

        return fast

    monkeypatch.setattr(kernels, "gpu_seconds", lambda act: (act(), 2e-6)[1])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert kernels.time_plain(kernels.compiled(calls.append, 1)) == {"plain_us": 2.0}
    monkeypatch.setattr(torch, "compile", broken)
    assert kernels.time_plain(kernels.compiled(calls.append, 2)) == {"plain_us": 2.0, "plain_failed": "no such kernel"}
    assert calls == [1, 2]
    assert kernels.time_plain(broken(None)) == {"plain_failed": "no such kernel"}  # one that is not ours


def test_a_rival_whose_attention_does_not_train_takes_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    first = script("peers/peer.py", monkeypatch).with_first_attention
    tried = []

    def trains_with(*good: str):
        def measure(attention: str) -> dict:
            tried.append(attention)
            if attention not in good:
                raise ValueError("its backward pass does not run here")
            return {"attention": attention}

        return measure

    assert first(trains_with("flash_attention_4", "sdpa"), "flash_attention_4") == {"attention": "flash_attention_4"}
    found = first(trains_with("sdpa"), "flash_attention_4")
    assert found["attention"] == "sdpa" and found["attention_failed"].keys() == {
        "flash_attention_4",
        "flash_attention_2",
    }
    assert "backward pass" in found["attention_failed"]["flash_attention_4"]
    with pytest.raises(RuntimeError, match="no attention trains"):
        first(trains_with(), "flash_attention_2")

    def without_memory(attention: str) -> dict:
        tried.append(attention)
        raise torch.OutOfMemoryError

    del tried[:]
    with pytest.raises(torch.OutOfMemoryError):  # another attention would need no less
        first(without_memory, "flash_attention_4")
    assert tried == ["flash_attention_4"]


def test_every_case_is_in_a_call() -> None:
    """run.py --call N takes what a card can do in ten minutes; no case is in none."""
    cases = tomllib.loads((BENCHMARKS / "cases.toml").read_text())
    calls = [case["call"] for case in cases.values()]
    assert set(calls) == set(range(1, max(calls) + 1))
    measurements = {
        call: sum(1 + len(c.get("rivals", ())) for c in cases.values() if c["call"] == call) for call in calls
    }
    assert max(measurements.values()) <= 8, measurements


def test_every_result_says_what_it_is_of() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        found = json.loads(path.read_text())
        for result in found if isinstance(found, list) else []:
            assert {"case", "system", "method", "versions", "command"} <= result.keys(), path.name
            assert "failed" in result or {"tokens_per_second", "peak_allocated_gb", "final_loss"} <= result.keys()


def test_data_is_measured_and_a_missing_rival_said(tmp_path: Path) -> None:
    asked = ["--tokenizer", TINY, "--megabytes", 0.5, "--trl", sys.executable, "--out", tmp_path / "results.json"]
    printed = python(BENCHMARKS / "data.py", *asked)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["system"] for result in results][:2] == ["minitune", "minitune, no near duplicates"]
    for result in results:
        assert result["rows_per_second"] > 0 and result["fill"] > 0.9 and result["peak_memory_gb"] > 0.05
        assert result["system"] in printed
    assert len(results) == 4 or "trl is not measured" in printed
