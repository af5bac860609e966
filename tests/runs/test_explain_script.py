"""scripts/explain.py on a run, its checkpoint, its adapter folder, and on what it must refuse."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Start
from safetensors.torch import load_file

from minitune import shards
from minitune.merge import through_four_bits

SCRIPT = Path(__file__).parents[2] / "scripts" / "explain.py"


Explain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explain:
    """explain(argument, ...) -> exit code, stdout and stderr of the script."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    return go


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_trained_run(method: str, start: Start, explain: Explain, small_base: Path, tmp_path: Path) -> None:
    run, _ = start("run", f"method={method}", "train.max_steps=4", "eval.every_steps=4")
    code, out, err = explain(run, "--json", "--html", tmp_path / "page.html")
    assert code == 0, err
    view = json.loads(out)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(view["updates"]) == 14 and len(tensors) == 28
    with shards.Shards(small_base) as weights:
        for one in view["updates"]:
            A, B = (tensors[f"base_model.model.{one['name']}.lora_{side}.weight"].double() for side in "AB")
            values = torch.linalg.svdvals(12 / 4 * B @ A)[:4]  # alpha 12, r 4
            torch.testing.assert_close(torch.tensor(one["values"]).double(), values, rtol=1e-5, atol=1e-9)
            weight = weights.tensor(f"{one['name']}.weight")
            original = weight.double().norm().item()
            trained_on = through_four_bits(weight).double().norm().item() if method == "qlora" else original
            assert one["weight_norm"] == pytest.approx(trained_on, rel=1e-9)
            assert method == "lora" or one["weight_norm"] != pytest.approx(original, rel=1e-9)
            assert one["norm"] > 0 and one["product"]
    html = (tmp_path / "page.html").read_text()
    assert html.count("<svg") > 7 and "<script" not in html and html.endswith("</html>\n")
    if method == "qlora":
        return
    for folder in (run / "adapter", sorted((run / "checkpoints").glob("step-*"))[-1]):
        code, out, err = explain(folder, "--json")
        assert code == 0, err
        assert json.loads(out)["updates"] == view["updates"]
    code, out, _ = explain(run)
    assert code == 0 and "effective rank" in out and "\x1b" not in out

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    whole = (newest / "trained.safetensors").read_bytes()
    (newest / "trained.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for wrong, words in ((newest, "damaged"), (tmp_path, "no run folder"), (tmp_path / "none", "no such recipe")):
        code, out, err = explain(wrong)
        assert code == 2 and words in err and out == ""
    for other, words in (("lora.r=3", "leave out lora.r=3"), (run, "leave out the second"), ("--adapter", "--adapter")):
        code, _, err = explain(run, other)
        assert code == 2 and words in err
