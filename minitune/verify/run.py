"""All checks in their order: of minitune itself, or of one adapter variant."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from minitune.adapters import ADAPTERS
from minitune.verify import given, itself, peers, proof, small, table
from minitune.verify.table import FAILED, Check

Groups = Iterator[tuple[str, Iterable[Check]]]


def verify(adapter: str | None, say: Callable[[str], None]) -> int:
    """Check all of minitune, or one adapter variant, and tell; returns the exit code, 1 if anything failed.

    Raises:
        UserError: `adapter` names nothing that can be checked.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="minitune-verify-") as made:
        if adapter is None:
            findings = table.show(everything(Path(made), device), say)
        else:
            with given.variant(adapter) as name:
                findings = table.show(one_variant(name, adapter, Path(made), device), say)
    return int(any(finding.state == FAILED for finding in findings))


def everything(folder: Path, device: torch.device) -> Groups:
    yield f"model ({device.type}, fp32)", itself.model_checks(folder, device)
    yield "packing and accumulation", itself.packing_checks(folder, device)
    yield "four bits", itself.nf4_checks(device)
    yield "merging", itself.merge_checks(folder, device)
    base = small.base(folder / "base")
    for variant in ADAPTERS:
        yield f"adapter {variant}", peers.checks(variant, base, folder / f"adapter-{variant}", device)


def one_variant(name: str, spec: str, folder: Path, device: torch.device) -> Groups:
    kind = ADAPTERS[name]
    yield f"adapter {name}: {kind.__qualname__}", proof.checks(name, spec, folder, device)
