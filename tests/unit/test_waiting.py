"""A step never asks the device for a number, parameter by parameter or block by block: a GPU would wait each time.

Counted on the CPU, where nothing waits and the same operators are called; tests/gpu has the card's own word for it.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitune import adapters, byhand, optim, step
from minitune.byhand import Keep
from minitune.config import Config, LoRAConfig
from minitune.model import Llama, LlamaConfig

SHAPE = LlamaConfig(61, 64, 192, 1, 4, 2, 16, 512, 1e-5, 10000.0)
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")  # operators whose result the host must have


class Asked(TorchDispatchMode):
    """Notes each operator that hands a number of a tensor, or a size that hangs on one, to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(self, function, types, given=(), named=None):
        if function.overloadpacket.__name__ in ASKING:
            self.by.append(function.overloadpacket.__name__)
        return function(*given, **(named or {}))


def asked(layers: int, how: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """What one step of two micro-batches asks; the second one, since the first makes the optimizer's memory."""
    model = Llama(replace(SHAPE, num_hidden_layers=layers)).to(dtype).train()
    if how != "full":
        adapters.attach(model, LoRAConfig(r=4, alpha=6, dropout=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    if how != "plain":
        byhand.by_hand(model, [Keep.ATTENTION] * layers)
    cfg = Config()
    optimizer, _ = optim.make_optimizer(model, cfg.optim)
    if isinstance(optimizer, torch.optim.AdamW):
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, fused=True)  # as it is on a GPU
    tokens = torch.randint(3, 61, (2, 16))
    labels = tokens.roll(-1, 1)
    labels[:, ::3] = -100
    learned = (labels.flatten() != -100).nonzero()[:, 0]
    batch = SimpleNamespace(
        tokens=tokens, positions=None, documents=None, labels=labels, learned=learned, loss_tokens=len(learned)
    )
    step.take_step(model, optimizer, [batch, batch], cfg, 0)
    with Asked() as seen:
        step.take_step(model, optimizer, [batch, batch], cfg, 1)
    return seen.by


@pytest.mark.parametrize(("how", "once"), [("plain", 0), ("by hand", 0), ("full", 1)])
def test_a_step_asks_for_no_number(how: str, once: int) -> None:
    """On the CPU, PyTorch reads the number that all of the masters' step counts are raised by; once a step."""
    assert len(asked(1, how)) == len(asked(3, how)) == once


def test_asking_parameter_by_parameter_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own clipping by an `if`, and a check of each gradient."""

    def norm(model: Llama) -> torch.Tensor:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        return torch.nn.utils.get_total_norm(gradients)

    monkeypatch.setattr(optim, "gradient_norm", norm)
    assert len(asked(3, "by hand")) == 3 * 14  # the A and the B of seven linears in each block
