"""scripts/verify.py without an argument: it holds here, and each part of it can fail."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minitune.model
from minitune import merge, nf4
from minitune.adapters import ADAPTERS
from minitune.adapters.lora import LoRALinear
from minitune.attention import CausalAttention
from minitune.verify import bf16, itself, peers, run, small, table
from minitune.verify.table import FAILED, HELD, NOT_RUN, Check

CPU = torch.device("cpu")


def test_all_of_it_holds_on_this_machine() -> None:
    lines: list[str] = []
    assert run.verify(None, lines.append) == 0, "\n".join(lines)
    assert ", 0 failed, 0 not run, in" in lines[-1]
    for part in ("model (", "packing and accumulation", "four bits", "merging", *(f"adapter {v}" for v in ADAPTERS)):
        assert sum(line.startswith(part) for line in lines) >= 1, part


def test_what_is_not_installed_is_said_and_the_rest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "ADAPTERS", {"lora": LoRALinear})
    lines: list[str] = []
    assert run.verify(None, lines.append) == 0
    absent = [line for line in lines if NOT_RUN in line]
    assert len(absent) > 8 and all("pip install " in line for line in absent)
    assert lines[-1].count("not run (pip install peft transformers)") == 1


def failed(checks: Iterable[Check], word: str) -> bool:
    found = [table.run(check) for check in checks if word in check.what]
    assert found
    return all(finding.state == FAILED for finding in found)


def test_a_wrong_rotation_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = minitune.model.rotate
    monkeypatch.setattr(minitune.model, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    assert failed(itself.model_checks(tmp_path, CPU), "logits")


def test_a_row_taken_for_one_document_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CausalAttention.forward
    monkeypatch.setattr(CausalAttention, "forward", lambda self, q, k, v, documents: plain(self, q, k, v, None))
    checks = list(itself.packing_checks(tmp_path, CPU))
    assert failed(checks, "packed rows") and failed(checks, "see another")


def test_a_mean_for_each_micro_batch_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = small.take_step

    def each_by_itself(model, optimizer, batches, cfg, step):  # the gradients of micro-batches averaged, not summed
        result = take(model, optimizer, batches, cfg, step)
        optimizer.found = {name: grad / len(batches) for name, grad in optimizer.found.items()}
        return result

    monkeypatch.setattr(small, "take_step", each_by_itself)
    assert failed(itself.packing_checks(tmp_path, CPU), "micro-batches")


@pytest.mark.parametrize("name", ["packed", "absmax", "nested_offset"])
def test_a_wrong_byte_of_nf4_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = nf4.NF4Linear.quantize

    def spoiled(self: nf4.NF4Linear, weight: Tensor) -> None:
        quantize(self, weight)
        storage = getattr(self, name).data.view(-1)
        storage[0] = storage[0] + 1

    monkeypatch.setattr(nf4.NF4Linear, "quantize", spoiled)
    checks = list(itself.nf4_checks(CPU))
    assert failed(checks, "bytes") and failed(checks, "made dense")


def test_a_weight_rounded_twice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "rounded", lambda exact, dtype: exact.float().to(dtype))
    checks = list(itself.merge_checks(tmp_path, CPU))
    assert failed(checks, "to bfloat16") and failed(checks, "to float16")
    assert table.run(next(check for check in checks if "to float32" in check.what)).state == HELD


def no_scale(self: LoRALinear, weight: Tensor) -> Tensor:
    return weight + (self.lora_B.to(weight) @ self.lora_A.to(weight)).detach()


def test_a_merge_without_scale_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRALinear, "merged_weight", no_scale)
    assert failed(itself.merge_checks(tmp_path / "one", CPU), "merged")
    pair = peers.Pair(small.recipe(small.base(tmp_path / "base")), tmp_path / "adapter", CPU)
    assert failed(peers.checks("lora", pair), "merged")


@pytest.mark.parametrize("factor", [1 / 3, 5**0.5])
def test_another_scale_than_peft_s_is_caught(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init: Callable[..., None] = LoRALinear.__init__

    def scaled(self: LoRALinear, base: nn.Module, cfg: object) -> None:
        init(self, base, cfg)
        self.scaling *= factor

    monkeypatch.setattr(LoRALinear, "__init__", scaled)
    pair = peers.Pair(small.recipe(small.base(tmp_path / "base")), tmp_path / "adapter", CPU)
    assert failed(peers.checks("lora", pair), "lora: ")


def test_bf16_has_bounds_that_a_wrong_order_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the blocks of a run are the plain ones."""
    states = [table.run(check) for check in bf16.checks(tmp_path, CPU)]
    assert [finding.state for finding in states] == [HELD] * 4, [finding.line() for finding in states]
    rotate = minitune.model.rotate
    monkeypatch.setattr(minitune.model, "rotate", lambda x, cos, sin: rotate(x, cos.bfloat16() * 1.05, sin.bfloat16()))
    assert failed(bf16.checks(tmp_path / "again", CPU), "logits")
