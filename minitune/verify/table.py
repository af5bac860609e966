"""A check measures one difference and holds it to its bound; a table of them tells a person what held."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf, isfinite

import torch
from torch import Tensor

from minitune import secrets, seeds
from minitune.errors import UserError

HELD, FAILED, NOT_RUN, NOT_MEANT = "ok", "FAILED", "not run", "-"
WIDTHS = (52, 31)  # of what is checked, and of what against
EXACT = 1e-5  # relative to the largest value, fp32


class NotMeant(Exception):
    """The check does not apply, by the word of what is checked; the message says which word."""


@dataclass(frozen=True)
class Check:
    """`measure()` gives the largest difference, and may add where it is, as (difference, "lora_B of q_proj")."""

    what: str
    against: str
    bound: float  # that the difference may reach; 0: bit for bit
    measure: Callable[[], float | tuple[float, str]]
    needs: tuple[str, ...] = ()  # packages
    at_least: bool = False  # the difference must reach the bound, in place of staying under it


@dataclass(frozen=True)
class Finding:
    """What came of a check."""

    check: Check
    state: str  # HELD, FAILED, NOT_RUN or NOT_MEANT
    difference: float | None = None
    note: str = ""

    def line(self) -> str:
        check = self.check
        text = f"  {check.what:{WIDTHS[0]}} {check.against:{WIDTHS[1]}} "
        if self.difference is not None:
            text += f"{self.difference:8.1e}  {'>=' if check.at_least else '<='} {check.bound:<7.0e} "
        text += self.state
        return text + (f"  ({self.note})" if self.note else "")


def absent(packages: Iterable[str]) -> list[str]:
    """Which of these are not installed."""
    return [name for name in packages if find_spec(name) is None]


def run(check: Check) -> Finding:
    """Measure. What goes wrong on the way is a failure, except a package that is not there."""
    if lacking := absent(check.needs):
        return Finding(check, NOT_RUN, note=f"pip install {' '.join(lacking)}")
    said = io.StringIO()  # what libraries and runs say while they work
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            torch.random.fork_rng(),
        ):
            torch.manual_seed(seeds.derive(0, "verify", check.what))
            found = check.measure()
    except NotMeant as word:
        return Finding(check, NOT_MEANT, note=str(word))
    except (Exception, UserError) as error:
        return Finding(check, FAILED, note=told(error))
    difference, note = found if isinstance(found, tuple) else (found, "")
    held = difference >= check.bound if check.at_least else difference <= check.bound  # neither holds of a NaN
    return Finding(check, HELD if held and difference == difference else FAILED, difference, note if not held else "")


def told(error: BaseException) -> str:
    """An error in one line of a table."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = "" if isinstance(error, AssertionError | UserError) else f"{type(error).__name__}: "
    return secrets.shortened(kind + first, 300) or type(error).__name__


def show(groups: Iterable[tuple[str, Iterable[Check]]], say: Callable[[str], None]) -> list[Finding]:
    """Run all checks, a line for each as it comes, and a last line that counts them."""
    began, findings = time.monotonic(), []
    for title, checks in groups:
        say(f"{title}\n  {'what':{WIDTHS[0]}} {'against':{WIDTHS[1]}} largest difference and bound")
        for check in checks:
            findings.append(run(check))
            say(findings[-1].line())
    say(last_line(findings, time.monotonic() - began))
    return findings


def last_line(findings: list[Finding], seconds: float) -> str:
    count = {state: sum(f.state == state for f in findings) for state in (HELD, FAILED, NOT_RUN)}
    lacking = absent(sorted({name for finding in findings for name in finding.check.needs}))
    text = f"{count[HELD]} held, {count[FAILED]} failed, {count[NOT_RUN]} not run"
    return f"{text}{f' (pip install {chr(32).join(lacking)})' if lacking else ''}, in {seconds:.0f} s"


# ---- differences ---------------------------------------------------------------------------------------------------


def apart(ours: Tensor, theirs: Tensor, beside: Tensor | None = None) -> float:
    """The largest difference between two tensors as a share of the largest value in the second, or in `beside`.

    Infinite for another shape and for what is not finite. Raises AssertionError where there is nothing to compare.
    """
    if ours.shape != theirs.shape:
        return inf
    ours, theirs = (tensor.detach().double().cpu() for tensor in (ours, theirs))
    size = (theirs if beside is None else beside.detach().double().cpu()).abs().max().item()
    assert size > 0, "all zero: there is nothing to compare"
    difference = (ours - theirs).abs().max().item() / size
    return difference if isfinite(difference) else inf


def worst(ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]) -> tuple[float, str]:
    """The largest of the differences between tensors of the same names, and which it is."""
    if ours.keys() != theirs.keys():
        return inf, f"only in one of them: {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}"
    assert ours, "there is nothing to compare"
    found = (0.0, "")
    for name, tensor in ours.items():
        assert tensor is not None and theirs[name] is not None, f"{name} has no gradient"
        assert theirs[name].any(), f"{name} is all zero: there is nothing to compare"
        found = max(found, (apart(tensor, theirs[name]), name))
    return found


def unequal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """How many tensors of the same names differ in any bit, and the first that does."""
    names = [name for name in ours.keys() | theirs.keys() if not same(ours.get(name), theirs.get(name))]
    return float(len(names)), min(names, default="")


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    return ours is not None and theirs is not None and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
