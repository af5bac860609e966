"""The summed loss against fp64: whatever the size of a piece, with and without gradients, and with nothing to learn."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import loss
from minitune.kernels.softmax import plain_cross_entropy_
from minitune.loss import IGNORE, TokenLoss

D, V = 24, 53


def drawn(share: float) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states (3, 19, D), a head, and labels of which about `share` are to be learned."""
    hidden = torch.randn(3, 19, D, requires_grad=True)
    labels = torch.randint(0, V, (3, 19))
    labels[torch.rand(3, 19) >= share] = IGNORE
    head = nn.Linear(D, V, bias=False)
    with torch.no_grad():
        head.weight.normal_()
    return hidden, head, labels


def exact(hidden: Tensor, head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients for hidden and head, each term written out in fp64."""
    hidden = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            if labels[row, place] != IGNORE:
                total = total - F.log_softmax(weight @ hidden[row, place], dim=0)[labels[row, place]]
    if total.requires_grad:
        total.backward()
        return total.detach(), hidden.grad, weight.grad
    return total, torch.zeros_like(hidden), torch.zeros_like(weight)


@pytest.mark.parametrize("chunk", [1, 2, 7, 56, 57, 58, 2048])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sum_and_gradients_are_those_of_fp64(chunk: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, head, labels = drawn(share)
    total, hidden_grad, weight_grad = exact(hidden, head, labels)

    ours = TokenLoss()(hidden, head, labels)
    assert (ours.shape, ours.dtype) == ((), torch.float32)
    assert ours.item() == pytest.approx(total.item(), rel=1e-6)
    ours.backward()
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), weight_grad, rtol=1e-5, atol=1e-5)
    assert not hidden.grad[labels == IGNORE].any()

    with torch.no_grad():
        assert TokenLoss()(hidden, head, labels).item() == ours.item()
    with torch.inference_mode():
        assert TokenLoss()(hidden, head, labels).item() == ours.item()


def test_nothing_to_learn_is_zero_with_a_zero_gradient() -> None:
    hidden, head, labels = drawn(0.0)
    ours = TokenLoss()(hidden, head, labels)
    assert ours.item() == 0
    ours.backward()
    for gradient in (hidden.grad, head.weight.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert not gradient.any()
    with torch.no_grad():
        assert TokenLoss()(hidden, head, labels).item() == 0


def test_a_mean_would_have_been_nan() -> None:
    hidden, head, labels = drawn(0.0)
    assert F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten()).isnan()


def half_gone(gradient: Tensor, labels: Tensor) -> Tensor:
    losses = plain_cross_entropy_(gradient, labels)
    gradient[:, ::2] = 0
    return losses


def softmax_in_bf16(logits: Tensor, labels: Tensor) -> Tensor:
    rounded = logits.bfloat16()
    losses = plain_cross_entropy_(rounded, labels)
    logits.copy_(rounded)
    return losses.bfloat16().float()


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return plain_cross_entropy_(logits, labels.roll(1))


@pytest.mark.parametrize("wrong", [half_gone, softmax_in_bf16, shifted])
def test_a_wrong_piece_would_be_caught(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    hidden, head, labels = drawn(0.5)
    total, hidden_grad, weight_grad = exact(hidden, head, labels)
    monkeypatch.setattr(loss, "cross_entropy_", wrong)
    ours = TokenLoss()(hidden, head, labels)
    ours.backward()
    same = [ours.item() == pytest.approx(total.item(), rel=1e-4)]
    same += [
        torch.allclose(p.grad.double(), g, rtol=1e-3) for p, g in ((hidden, hidden_grad), (head.weight, weight_grad))
    ]
    assert not all(same)


class Adapted(nn.Module):
    """A head that is no plain linear map: its gradient is autograd's, and each piece is computed again."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.base = head

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_any_head_will_do(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    hidden, head, labels = drawn(share)
    total, hidden_grad, weight_grad = exact(hidden, head, labels)
    places = []
    head.register_forward_hook(lambda module, args, out: places.append(len(out)))
    ours = TokenLoss()(hidden, Adapted(head), labels)
    ours.backward()
    assert ours.item() == pytest.approx(total.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad.double(), hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad.double(), weight_grad, rtol=1e-5, atol=1e-5)
    assert max(places, default=0) <= 7 and sum(places) == 2 * (labels != IGNORE).sum()


def test_the_places_that_are_learned_may_be_given() -> None:
    hidden, head, labels = drawn(0.5)
    learned = (labels.flatten() != IGNORE).nonzero()[:, 0]
    assert TokenLoss()(hidden, head, labels, learned).item() == TokenLoss()(hidden, head, labels).item()
    fewer = TokenLoss()(hidden, head, labels, learned[1:]).item()
    assert fewer < TokenLoss()(hidden, head, labels).item()  # it is these that are looked at


def test_in_bf16_the_softmax_and_the_sum_are_fp32() -> None:
    hidden, head, labels = drawn(1.0)
    hidden, head = hidden.detach().bfloat16(), head.bfloat16()
    ours = TokenLoss()(hidden, head, labels)
    logits = head(hidden).double().flatten(0, 1)  # rounded to bf16 by the head, and no further
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(F.cross_entropy(logits, labels.flatten(), reduction="sum").item(), rel=1e-6)


def test_huge_logits_stay_finite() -> None:
    hidden, head, labels = drawn(1.0)
    ours = TokenLoss()(hidden * 1e4, head, labels)
    ours.backward()
    assert ours.isfinite()
    assert hidden.grad.isfinite().all()


def test_a_head_without_gradient_gets_none_and_passes_it_on() -> None:
    hidden, head, labels = drawn(0.5)
    head.requires_grad_(False)
    TokenLoss()(hidden, head, labels).backward()
    assert head.weight.grad is None
    assert hidden.grad.any()


def test_no_more_than_a_piece_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 7)
    hidden, head, labels = drawn(1.0)
    pieces = []
    monkeypatch.setattr(loss, "cross_entropy_", lambda a, b: pieces.append(a) or plain_cross_entropy_(a, b))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        total = TokenLoss()(hidden, head, labels)
    assert max(map(len, pieces)) == 7 and sum(map(len, pieces)) == labels.numel()
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1  # one room for all
    assert not any(shape[-1:] == (V,) for shape in kept)  # no logits wait for the backward pass
    total.backward()
    assert sum(map(len, pieces)) == labels.numel()  # nor are they computed again


def test_a_head_that_trains_alone_gets_its_gradient() -> None:
    """As where only the head is adapted: nothing before it needs a gradient."""
    hidden, head, labels = drawn(0.5)
    _, _, weight_grad = exact(hidden, head, labels)
    TokenLoss()(hidden.detach(), head, labels).backward()
    torch.testing.assert_close(head.weight.grad.double(), weight_grad, rtol=1e-5, atol=1e-5)
