"""What a person who runs the scripts gets to see: exit codes, one clear message, no traceback."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from minitune import errors
from minitune.config import EXAMPLE, load_config
from minitune.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = EXAMPLE.parent


@dataclass
class Ended:
    code: int
    out: str
    err: str

    def is_refusal(self, *parts: str) -> None:
        """Exit 2, all parts in one message on stderr, no traceback, nothing of Python's."""
        assert self.code == 2, self
        assert self.err.startswith(("error: ", "usage: ")), self
        for part in parts:
            assert part in self.err, (part, self.err)
        for noise in ("Traceback", 'File "', "Error:", "Exception"):
            assert noise not in self.err + self.out, self


def process(script: str, *arguments: str, python: tuple[str, ...] = (), cwd: Path | None = None) -> Ended:
    """A script in a process of its own."""
    command = [sys.executable, *python, str(SCRIPTS / script), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd, env=env, timeout=240)
    return Ended(done.returncode, done.stdout, done.stderr)


class Here:
    """A script in this process, which has paid for importing torch already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, script: str, *arguments: str) -> Ended:
        self.monkeypatch.setattr(sys, "argv", [script, *arguments])
        self.capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        return Ended(code, *self.capsys.readouterr())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the tests ask nothing of the network
    return Here(monkeypatch, capsys)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Alpaca rows that can be trained on."""
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "Repeat.", "input": "", "output": "lamp"}
    path.write_text("".join(json.dumps(row | {"input": f"{i} lamps"}) + "\n" for i in range(30)))
    return path


def recipe(rows: Path, **changes: str) -> list[str]:
    """Overrides for a run that would be over at once."""
    values = {"model.path": "tiny", "model.dtype": "float32", "method": "lora", "out": str(rows.parent / "out")}
    values |= {"data.train": str(rows), "data.max_seq_len": "256", "train.max_steps": "1", "log.tensorboard": "false"}
    values |= {"eval.samples": "0", "eval.early_stopping_patience": "0"}
    return [f"{key}={value}" for key, value in (values | changes).items()]


# ---- the recipe: said before torch is loaded ------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_recipe_is_said_at_once_and_before_torch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "lroa"\n[lora]\nrank = 8\n[train]\nbatch_size = 0\nnum_epochs = "three"\n')
    ended = process("train.py", str(path), "optim.lr=1e-4", "nonsense", python=("-X", "importtime"))
    imported = [line.rpartition("|")[2].strip() for line in ended.err.splitlines() if line.startswith("import time:")]
    assert "minitune.config" in imported  # it is the list of what was imported
    assert not [name for name in imported if name.split(".")[0] in ("torch", "numpy", "transformers", "bitsandbytes")]
    said = "\n".join(line for line in ended.err.splitlines() if not line.startswith("import time:"))
    Ended(ended.code, ended.out, said).is_refusal(
        "method", "did you mean lora?", "lora.rank", "lora.r", "train.batch_size", "at least 1", "train.num_epochs"
    )
    assert "optim.lr: unknown key; did you mean optim.learning_rate?" in said
    assert "nonsense" in said


def test_help_shows_every_key_and_ends_with_0() -> None:
    ended = process("train.py", "--help")
    assert (ended.code, ended.err) == (0, "")
    for key in ("model.path", "lora.r = 16", "optim.learning_rate = 0.0002", "data.train_on_prompt = false"):
        assert key in ended.out
    assert "RECIPE.toml" in ended.out


@pytest.mark.parametrize("script", ["merge.py", "generate.py"])
def test_help_of_the_others(here: Here, script: str) -> None:
    ended = here(script, "--help")
    assert ended.code == 0 and "usage: " in ended.out and "Error" not in ended.err


def test_an_unknown_key(here: Here) -> None:
    here("train.py", "lora.rank=8").is_refusal("lora.rank: unknown key; did you mean lora.r?")


def test_bad_toml_names_the_file_and_the_line(here: Here, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('method = "lora"\nseed = = 3\n')
    here("train.py", str(path)).is_refusal(str(path), "not TOML", "line 2")


def test_a_recipe_that_is_not_there(here: Here, tmp_path: Path) -> None:
    here("train.py", str(tmp_path / "nowhere.toml")).is_refusal("nowhere.toml", "cannot be read")
    here("train.py", str(tmp_path)).is_refusal(str(tmp_path), "cannot be read")


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", "--prompt", "a", "--instruction", "b"]])
def test_generate_says_how_it_is_used(here: Here, arguments: list[str]) -> None:
    here("generate.py", *arguments).is_refusal("usage: ")


@pytest.mark.parametrize("option", [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--temperature", "nan"]])
def test_generate_refuses_values_that_cannot_be(here: Here, option: list[str]) -> None:
    here("generate.py", "tiny", "--prompt", "a", *option).is_refusal(option[0])


# ---- data and model: said before the model is loaded ----------------------------------------------------------------


def test_a_bad_row_in_a_process_of_its_own(rows: Path) -> None:
    """End to end, once: the message names the file and the line, and nothing is left in `out`."""
    with open(rows, "a") as file:
        file.write('{"instruction": "no output"}\n')
    ended = process("train.py", *recipe(rows), cwd=rows.parent)
    ended.is_refusal(str(rows), "31", "output")
    assert not (rows.parent / "out").exists()


def test_a_row_that_is_no_json(here: Here, rows: Path) -> None:
    rows.write_text(rows.read_text() + '{"instruction": \n')
    here("train.py", *recipe(rows)).is_refusal(str(rows), "31")


def test_missing_data(here: Here, rows: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"
    here("train.py", *recipe(rows, **{"data.train": str(missing)})).is_refusal(str(missing))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def test_a_model_of_another_kind(here: Here, rows: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text()) | {"model_type": "mamba"}
    (model / "config.json").write_text(json.dumps(config))
    ended = here("train.py", *recipe(rows, **{"model.path": str(model)}))
    ended.is_refusal(str(model / "config.json"), "model_type", "mamba", "llama")
    here("generate.py", str(model), "--prompt", "a").is_refusal("mamba")


def test_a_model_whose_weights_are_damaged(here: Here, rows: Path, model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    here("train.py", *recipe(rows, **{"model.path": str(model)})).is_refusal(str(weights), "no whole safetensors file")
    assert not (tmp_path / "out" / "config.toml").exists()  # it is not there as a run that could be gone on with
    here("generate.py", str(model), "--prompt", "a").is_refusal(str(weights))


def test_a_model_that_lacks_a_weight(here: Here, rows: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, model / "model.safetensors")
    here("train.py", *recipe(rows, **{"model.path": str(model)})).is_refusal(f"missing {name}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_folder_that_lacks_a_file(here: Here, rows: Path, model: Path, name: str) -> None:
    (model / name).unlink()
    here("train.py", *recipe(rows, **{"model.path": str(model)})).is_refusal(str(model))


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "nobody/nothing", "/nowhere/at/all", ""])
def test_a_model_that_is_not_there(here: Here, path: str) -> None:
    here("generate.py", path, "--prompt", "a").is_refusal()


def test_a_file_in_the_place_of_a_folder(here: Here, rows: Path) -> None:
    here("train.py", *recipe(rows, out=str(rows))).is_refusal(str(rows))


def test_merging_what_is_no_run(here: Here, model: Path, tmp_path: Path) -> None:
    here("merge.py", str(tmp_path / "nowhere")).is_refusal("nowhere", "is no run folder")
    here("merge.py", str(model)).is_refusal("is no run folder")
    here("merge.py", str(model), "--base", "other").is_refusal("--base")


def test_a_run_whose_recipe_is_damaged(here: Here, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text("method = ")
    here("merge.py", str(run)).is_refusal("config.toml", "not TOML")
    here("generate.py", str(run), "--prompt", "a").is_refusal("config.toml", "not TOML")


# ---- from one script to the next ------------------------------------------------------------------------------------


def test_train_merge_and_generate(here: Here, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert here("train.py", *recipe(rows)).code == 0
    again = here("train.py", *recipe(rows))
    assert again.code == 0 and "is finished" in again.out
    changed = here("train.py", *recipe(rows, **{"lora.r": "4"}))
    changed.is_refusal("lora.r", "16", "4")
    assert load_config([str(out / "config.toml")]).lora.r == 16

    asked = ("--prompt", "The lamp is", "--max-new-tokens", "5")
    from_run, plain = here("generate.py", str(out), *asked), here("generate.py", "tiny", *asked)
    assert from_run.code == plain.code == 0 and plain.out.strip()
    assert here("generate.py", str(out), "--instruction", "Repeat.", "--max-new-tokens", "3").code == 0
    here("generate.py", "tiny", "--instruction", "Repeat.").is_refusal("--instruction")
    here("generate.py", str(out), "--prompt", "a", "--max-new-tokens", "5000").is_refusal("2048")
    assert here("generate.py", "tiny", "--prompt", "", "--max-new-tokens", "2").code == 0  # its bos is a beginning

    merged = here("merge.py", str(out))
    assert merged.code == 0 and str(out / "merged") in merged.out
    here("merge.py", str(out)).is_refusal("exists already")
    assert here("generate.py", str(out / "merged"), *asked).out == from_run.out


def test_nothing_in_an_error_is_obeyed_by_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """The colours and the cursor moves of a progress bar, which other lines may hold, among them."""
    with pytest.raises(SystemExit, match="2"):
        errors.end(UserError("x"), "error: a\x1b[31m\x1b[2K\x1b[1A\x07\x9b\r\u202eb 模型 é\n  \tc", 2)
    said = r"error: a\u{1b}[31m\u{1b}[2K\u{1b}[1A\u{7}\u{9b}\u{d}\u{202e}b 模型 é" + "\n  \tc\n"
    assert capsys.readouterr().err == said
