"""Each check of a variant's proof can fail: a planted fault for each, caught by the check that is meant for it."""

import importlib
import random
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import errors
from minitune.adapters import ADAPTERS
from minitune.adapters.lora import LoRALinear
from minitune.config import LoRAConfig
from minitune.errors import UserError
from minitune.verify import given, proof, ranks, run, small, table
from minitune.verify.run import verify
from minitune.verify.table import FAILED, HELD, NOT_MEANT, NOT_RUN, Check, Finding

CPU = torch.device("cpu")
OF_A_LAYER = [check.what for check in proof.layer_checks(LoRALinear, "lora", CPU)]


class Own(LoRALinear):
    """LoRA under a name of its own, which PEFT does not know."""

    PEFT_CONFIG: ClassVar = {"peft_type": "OWN"}


class AlphaIgnored(Own):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.scaling = 2.0


class DropoutIgnored(Own):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.dropout = 0.0


class DropoutAlways(Own):
    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(F.dropout(x, self.dropout, True), self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(inner * self.scaling, self.lora_B.to(x.dtype))


class MergedWithoutScale(Own):
    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + (self.lora_B.to(weight) @ self.lora_A.to(weight)).detach()


class MergedOntoItsArgument(Own):
    @torch.no_grad()
    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight.add_(self.scaling * (self.lora_B.to(weight) @ self.lora_A.to(weight)))


class TransposedB(Own):
    """B lies as (r, out) in memory and is read as (out, r) by forward."""

    def forward(self, x: Tensor) -> Tensor:
        B = self.lora_B.reshape(self.lora_B.shape[1], -1).T
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return self.base(x) + F.linear(inner * self.scaling, B.to(x.dtype))


class Product(torch.autograd.Function):
    """x W^T whose backward pass forgets a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, 0.99 * grad.flatten(0, -2).T @ x.flatten(0, -2)


class WrongGradient(Own):
    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return self.base(x) + Product.apply(inner * self.scaling, self.lora_B.to(x.dtype))


class StartsElsewhere(Own):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.lora_B.fill_(1e-3)


class LeavesMemoryAsItWas(Own):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.lora_B.zero_()


class InBf16(Own):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.lora_B = nn.Parameter(self.lora_B.bfloat16())


class AnswersInFp32(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class ChangesItsBase(Own):
    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.base.weight.mul_(1.001)


class ReadsThePlainWeight(Own):
    """Knows nothing of four bits."""

    def forward(self, x: Tensor) -> Tensor:
        update = self.scaling * self.lora_B @ F.dropout(self.lora_A, self.dropout, self.training)
        return F.linear(x, self.base.weight + update.to(x.dtype), self.base.bias)


class AsksForNumbers(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().sum().item() > 0 else self.base(x)


FAULTS: list[tuple[type[nn.Module], str]] = [
    (AlphaIgnored, "alpha twice as large changes the update"),
    (DropoutIgnored, "dropout in training changes the update"),
    (DropoutAlways, "dropout in evaluation"),
    (MergedWithoutScale, "merged_weight"),
    (MergedOntoItsArgument, "the base under it, after all verbs"),
    (TransposedB, "merged_weight"),
    (WrongGradient, "every gradient"),
    (StartsElsewhere, "forward after reset_parameters"),
    (LeavesMemoryAsItWas, "reset_parameters fills all, and repeats"),
    (InBf16, "dtypes: fp32 parameters, x's outputs"),
    (AnswersInFp32, "dtypes: fp32 parameters, x's outputs"),
    (ChangesItsBase, "the base under it, after all verbs"),
    (ReadsThePlainWeight, "over NF4: outputs and gradients"),
    (AsksForNumbers, "torch.compile, one graph"),
]


def state_of(checks: Any, what: str) -> Finding:
    return table.run(next(check for check in checks if check.what == what))


@pytest.mark.parametrize("what", OF_A_LAYER)
def test_lora_of_another_name_holds(what: str) -> None:
    finding = state_of(proof.layer_checks(Own, "own", CPU), what)
    assert finding.state == HELD, finding.line()


@pytest.mark.parametrize(("kind", "what"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_caught_by_its_check(kind: type[nn.Module], what: str) -> None:
    finding = state_of(proof.layer_checks(kind, "own", CPU), what)
    assert finding.state == FAILED, finding.line()


# ---- in a model ----------------------------------------------------------------------------------------------------


class StateLeftOut(Own):
    """Part of what it computes is drawn at random, and is in no file."""

    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.extra = torch.rand(cfg.r) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)) * self.extra.to(x)
        return self.base(x) + F.linear(inner * self.scaling, self.lora_B.to(x.dtype))


class ParameterWithoutAName(Own):
    def __init__(self, base: nn.Module, cfg: LoRAConfig) -> None:
        super().__init__(base, cfg)
        self.extra = nn.Parameter(torch.ones_like(self.lora_A))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.extra)


class SaysItIsLoRA(AlphaIgnored):
    PEFT_CONFIG: ClassVar = {}


class KeyThatPeftOverlooks(AlphaIgnored):
    PEFT_CONFIG: ClassVar = {"use_own": True}


class DrawsByItself(Own):
    """Drops by a generator that neither a seed nor recompute puts back."""

    def forward(self, x: Tensor) -> Tensor:
        keep = random.random() > self.dropout or not self.training
        return super().forward(x) if keep else self.base(x)


class DividesByItsRows(Own):
    """A gradient that depends on how many rows come at once."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (super().forward(x) - y) / x.shape[0]


class MergesAnything(Own):
    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * 1.01


class CountsItsSteps(Own):
    """State that changes as it trains, and that no checkpoint holds."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + self.training
        return self.base(x) + (super().forward(x) - self.base(x)) * (1 + 0.1 * self.calls)


IN_A_MODEL: list[tuple[type[nn.Module], str]] = [
    (StateLeftOut, "saved, and read back"),
    (ParameterWithoutAName, "saved, and read back"),
    (SaysItIsLoRA, "saved, and read back"),
    (KeyThatPeftOverlooks, "its files in PEFT: the same logits, or refused"),
    (DividesByItsRows, "8 micro-batches, every gradient"),
    (DrawsByItself, "a step repeated, dropout 0.25"),
    (DrawsByItself, "a step recomputed, dropout 0.25"),
    (MergesAnything, "merged model"),
    (MergesAnything, "merged model, NF4 base"),
    (CountsItsSteps, "resumed at step 2 of 4: the adapter"),
]


@pytest.mark.parametrize(("kind", "what"), IN_A_MODEL, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_in_a_model_is_caught_by_its_check(
    kind: type[nn.Module], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADAPTERS, "own.Own", kind)
    finding = state_of(proof.model_checks("own.Own", "", tmp_path, CPU), what)
    assert finding.state == FAILED, finding.line()


# ---- a class in a file ---------------------------------------------------------------------------------------------

OWN = """
    from typing import ClassVar
    import os
    from minitune.adapters.lora import LoRALinear

    class MyLinear(LoRALinear):
        PEFT_CONFIG: ClassVar = {"peft_type": "MINE"}
"""
RANKS_DIFFER = """
        def forward(self, x):
            return self.base(x) + (super().forward(x) - self.base(x)) * (1 + int(os.environ.get("RANK", 0)))
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def go(text: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(text))
        return path

    return go


def test_a_class_in_a_file_is_registered_for_as_long_as_it_is_checked(write: Callable[[str], Path]) -> None:
    before = dict(ADAPTERS)
    with given.variant(f"{write(OWN)}:MyLinear") as name:
        assert name == "mine.MyLinear" and ADAPTERS[name].__name__ == "MyLinear"
        assert issubclass(ADAPTERS[name], LoRALinear)
    assert before == ADAPTERS


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (OWN, "Mylinear", "has no class Mylinear; it has MyLinear"),
        (OWN, "os", "is no class of torch.nn.Module"),
        ("def broken(:", "MyLinear", r"cannot be imported: SyntaxError.*line 1"),
        ("\n\nraise ValueError('not today')", "MyLinear", r"cannot be imported: ValueError: not today \(line 3\)"),
        ("import torch\nclass MyLinear(torch.nn.Module):\n    pass", "MyLinear", "has no __init__, reset_parameters"),
        (
            OWN + "        def __init__(self, base, cfg):\n            raise RuntimeError('no rank of 5')",
            "MyLinear",
            r"cannot be made on a linear .*RuntimeError: no rank of 5 \(line 9\)",
        ),
        (OWN + "        PEFT_NAMES = None", "MyLinear", "has no table PEFT_NAMES"),
        (OWN + "        merged_weight = None", "MyLinear", "has no merged_weight"),
    ],
)
def test_what_cannot_be_checked_is_refused(text: str, name: str, said: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=said), given.variant(f"{write(text)}:{name}"):
        pass


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere/mine.py:MyLinear", "there is no file nowhere/mine.py"),
        ("mine.py", "names no class; write it as mine.py:MyLinear"),
        ("lara", "no variant is called 'lara'; .*did you mean lora"),
        ("", "no variant is called ''; there are lora, "),
        (":MyLinear", "names no file; write it as path/to/file.py:MyLinear"),
        (f"{Path(__file__).parent}:MyLinear", "--adapter: .*unit is a folder$"),
        (
            str(Path(__file__).parent),
            "unit is a folder, .* what an adapter has learned is shown by python scripts/explain.py",
        ),
    ],
)
def test_names_of_nothing_are_refused(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said), given.variant(spec):
        pass


def test_ranks_that_compute_other_things_are_caught(write: Callable[[str], Path], tmp_path: Path) -> None:
    """The two processes find the class by its file."""
    spec = f"{write(OWN + RANKS_DIFFER)}:MyLinear"
    with given.variant(spec) as name:
        checks = {check.what: check for check in proof.model_checks(name, spec, tmp_path, CPU)}
        for method, sharding in ranks.WAYS:
            finding = table.run(checks[f"2 ranks, {method}, sharding {sharding}"])
            assert finding.state == FAILED and finding.difference > 0.01, finding.line()


def test_a_variant_that_peft_lacks_is_held_to_its_own_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "own", Own)
    base = small.base(tmp_path / "base")
    held = [check.what for check in run.adapter_checks("own", base, tmp_path, CPU)]
    assert held[: len(OF_A_LAYER)] == OF_A_LAYER and len(held) > 20
    assert [check.against for check in run.adapter_checks("lora", base, tmp_path, CPU)] == ["PEFT"] * 4


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (OWN, 0),
        (OWN + "        def merged_weight(self, weight):\n            return weight", 1),
        ("no Python", 2),
    ],
)
def test_exit_codes(text: str, code: int, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of scripts/verify.py, with the checks of a layer alone: those of a model take their time elsewhere."""
    monkeypatch.setattr(proof, "model_checks", lambda *_: iter(()))
    monkeypatch.setattr(sys, "argv", ["verify.py", "--adapter", f"{write(text)}:MyLinear"])
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("verify")
    with pytest.raises(SystemExit) as ended:
        errors.run(script.main)
    assert (ended.value.code or 0) == code


@pytest.mark.slow
def test_the_whole_proof_of_a_class_in_a_file(write: Callable[[str], Path]) -> None:
    lines: list[str] = []
    assert verify(f"{write(OWN)}:MyLinear", lines.append) == 0, "\n".join(lines)
    assert "refused" in next(line for line in lines if "in PEFT" in line)
    assert ", 0 failed, 0 not run" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_whole_proof_of_every_variant(name: str) -> None:
    lines: list[str] = []
    assert verify(name, lines.append) == 0, "\n".join(lines)


# ---- the table -----------------------------------------------------------------------------------------------------


def check(difference: float, bound: float = 1e-5, **more: Any) -> Check:
    return Check("a thing", "another", bound, lambda: difference, **more)


def test_a_check_holds_within_its_bound_alone() -> None:
    states = [table.run(check(d)).state for d in (0.0, 1e-5, 1.1e-5, float("inf"), float("nan"))]
    assert states == [HELD, HELD, FAILED, FAILED, FAILED]
    assert [table.run(check(d, at_least=True)).state for d in (1.0, 0.0, float("nan"))] == [HELD, FAILED, FAILED]


def test_what_raises_fails_and_what_is_absent_is_said() -> None:
    def broken() -> float:
        raise ValueError("no such thing\nat all")

    def not_meant() -> float:
        raise table.NotMeant("it says so")

    assert table.run(Check("a", "b", 0, broken)).note == "ValueError: no such thing"
    assert table.run(Check("a", "b", 0, not_meant)).state == NOT_MEANT
    absent = table.run(check(0.0, needs=("a_package_of_no_one",)))
    assert (absent.state, absent.note) == (NOT_RUN, "pip install a_package_of_no_one")
    lines: list[str] = []
    table.show([("things", [check(0.0), check(1.0), check(0.0, needs=("a_package_of_no_one",))])], lines.append)
    assert lines[-1].startswith("1 held, 1 failed, 1 not run (pip install a_package_of_no_one)")


def test_empty_comparisons_do_not_hold() -> None:
    zero = torch.zeros(3)
    for compare in (lambda: table.apart(zero, zero), lambda: table.worst({"a": zero}, {"a": zero})):
        assert table.run(Check("a", "b", 1, compare)).state == FAILED
    assert table.run(Check("a", "b", 1, lambda: table.worst({}, {}))).state == FAILED
    assert table.worst({"a": zero + 1}, {"b": zero + 1})[0] == float("inf")
    assert table.apart(torch.ones(2), torch.ones(3)) == float("inf")
