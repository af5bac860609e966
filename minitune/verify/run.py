"""All checks in their order: of minitune itself, or of one adapter variant."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from minitune.adapters import ADAPTERS
from minitune.verify import bf16, given, itself, peers, proof, small, table
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
    if device.type == "cuda":
        yield (
            f"bf16 on {torch.cuda.get_device_name(device)}, in multiples of another's error",
            bf16.checks(folder, device),
        )
    base = small.base(folder / "base")
    for variant in ADAPTERS:
        yield f"adapter {variant}", adapter_checks(variant, base, folder, device)


def adapter_checks(variant: str, base: Path, folder: Path, device: torch.device) -> Iterator[Check]:
    """Against PEFT; what PEFT cannot be asked for is held to the variant's own proof."""
    pair = peers.Pair(small.recipe(base, variant), folder / f"{variant}-peft", device)
    if not table.absent(peers.PACKAGES) and peers.peft_reads(pair.path):
        own = folder / f"{variant}-proof"
        own.mkdir()
        yield from proof.checks(variant, variant, own, device)
        return
    yield from peers.checks(variant, pair)
    if not pair.trains_as_it_is_saved():
        yield from proof.layer_checks(ADAPTERS[variant], variant, device)


def one_variant(name: str, spec: str, folder: Path, device: torch.device) -> Groups:
    kind = ADAPTERS[name]
    yield f"adapter {name}: {kind.__qualname__}", proof.checks(name, spec, folder, device)
