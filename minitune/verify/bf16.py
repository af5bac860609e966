"""What a GPU computes in. bf16 has 8 bits, so its bounds are multiples of an error that somebody else makes too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minitune import pretrained
from minitune.config import Config
from minitune.verify import itself, small
from minitune.verify.peers import reference
from minitune.verify.table import Check, apart

AS_GOOD = 1.5  # times the error of the other: roundings fall differently, and no one's are worse


def checks(folder: Path, device: torch.device) -> Iterator[Check]:
    base = small.base(folder / "bf16", torch.bfloat16)
    error = "transformers' own, against fp64"
    yield Check("bf16 logits: error", error, AS_GOOD, partial(logits, base, device), ("transformers",))
    fused = {"fused": "auto", "compile": "auto"}
    cfg = small.in_bf16(small.recipe(base, **fused))
    for method in ("lora", "qlora"):
        made = partial(gradients, replace(cfg, method=method), device)
        yield Check(f"bf16 {method}, blocks as a run has them: error", "plain blocks', against fp32", AS_GOOD, made)
    seen = partial(itself.seen, cfg, device)
    yield Check("bf16 documents that see another one change", "none, bit for bit", 0, seen)


@torch.no_grad()
def logits(base: Path, device: torch.device) -> float:
    """How much further from fp64 ours are than those of transformers, the same weights in bf16."""
    tokens, _ = itself.tokens_and_positions(device)
    exact = reference(base, torch.float64)(tokens.cpu()).logits
    theirs = reference(base, torch.bfloat16, device)(tokens).logits
    return apart(pretrained.load(base, "bfloat16", device)(tokens), exact) / apart(theirs, exact)


def gradients(cfg: Config, device: torch.device) -> float:
    """The joint error of all gradients of a step, as a multiple of that of plain bf16 blocks; both against fp32."""
    plain = replace(cfg, train=replace(cfg.train, fused="none", compile="none"))
    exact = replace(plain, model=replace(plain.model, dtype="float32", attention="sdpa"))
    found = []
    for one in (cfg, plain, exact):
        model = small.built(one, device)
        step = small.step_gradients(model, one, small.step_batches(small.SHAPE["vocab_size"], 4, device))
        found.append(torch.cat([grad.double().flatten() for _, grad in sorted(step.items())]))
    ours, theirs, truth = found
    return share(ours - truth, truth) / share(theirs - truth, truth)


def share(part: Tensor, whole: Tensor) -> float:
    assert part.any(), "no difference at all: this was not bf16"
    return (part.norm() / whole.norm()).item()
