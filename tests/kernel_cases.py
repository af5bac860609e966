"""Every fused operation on small odd sizes: what the interpreter on a CPU and a GPU compare with the plain twins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from minitune.kernels import adamw, four_bits, low_rank, norm, rotary, softmax, swiglu
from minitune.kernels.dropout import Dropout
from minitune.masters import moment

MODULES = (adamw, low_rank, norm, rotary, softmax, swiglu)  # those that ask `fused` which twin to take
SCALE = 1.25


class Draw:
    """Random tensors of one seed: the same numbers, rounded to `given`, on every device and in every dtype."""

    def __init__(self, device: str, dtype: torch.dtype, given: torch.dtype) -> None:
        self.device, self.dtype, self.given = device, dtype, given
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, thin: bool = False) -> Tensor:
        size = shape[-1] ** -0.5 if thin else 1.0
        return (torch.randn(shape, generator=self.generator) * size).to(self.given).to(self.device, self.dtype)

    def dropout(self) -> Dropout:
        return Dropout(torch.randint(0, 2**31, (2,), generator=self.generator).to(self.device), 19661)  # 0.3


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Draw], tuple[Tensor | None, ...]]
    wrong: Callable[[Draw], tuple[Tensor | None, ...]]  # a plausible mistake, which must be noticed
    slack: float = 0.0  # how far a GPU may be at least: where a last bit decides between neighbouring levels


CASES: list[Case] = []


def case(name: str, run: Callable[..., tuple], right: dict, wrong: dict, slack: float = 0.0) -> None:
    CASES.append(Case(name, lambda draw: run(draw, **right), lambda draw: run(draw, **(right | wrong)), slack))


# ---- norms ----------------------------------------------------------------------------------------------------------


def run_norm(draw, added, eps):
    return norm.norm(draw(37, 136), draw(136), eps, draw(37, 136) if added else None)


def run_norm_backward(draw, too, weight, factor):
    dy, x, w = draw(37, 136), draw(37, 136), draw(136)
    f = torch.rsqrt(x.double().square().mean(-1)).to(torch.promote_types(x.dtype, torch.float32)) * factor
    return norm.norm_backward(dy, x, w, f, draw(37, 136) if too else None, weight)


for added in (False, True):
    case(f"norm added={added}", run_norm, {"added": added, "eps": 1e-5}, {"eps": 0.1})
    case(
        f"norm_backward too={added}", run_norm_backward, {"too": added, "weight": added, "factor": 1.0}, {"factor": 1.1}
    )


# ---- rotary ---------------------------------------------------------------------------------------------------------


def run_turn(draw, adapted, h, sign):
    N, H, K, r = 45, 6, 2, 5
    angles = draw(N, h // 2).double()
    tables = [t.to(torch.promote_types(draw.dtype, torch.float32)) for t in (angles.cos(), sign * angles.sin())]
    width = (H + 2 * K) * h
    B = draw(width, r, thin=True) if adapted else None
    qk = rotary.turn(draw(N, (H + K) * h), draw(N, 3 * r) if adapted else None, B, *tables, H)
    back = rotary.turn_backward(draw(N, H, h), draw(N, K, h), draw(N, K, h), B, *tables, SCALE)
    return (*qk, *back)


for adapted in (False, True):
    case(f"turn adapted={adapted}", run_turn, {"adapted": adapted, "h": 64, "sign": 1}, {"sign": -1})
case("turn with a narrow head", run_turn, {"adapted": True, "h": 20, "sign": 1}, {"sign": -1})


# ---- SwiGLU ---------------------------------------------------------------------------------------------------------


def run_swiglu(draw, adapted, down, drop, r, scale, again=True, N=77):
    F = 200
    dropout = draw.dropout() if drop else None
    gate_up, dh = draw(N, 2 * F), draw(N, F)
    xa, B = (draw(N, 2 * r), draw(2 * F, r, thin=True)) if adapted else (None, None)
    A, t = (draw(r, F, thin=True), draw(N, r)) if down else (None, None)
    forward = swiglu.swiglu(gate_up, xa, B, A, scale, dropout)
    return (*forward, *swiglu.swiglu_backward(dh, t, gate_up.clone(), xa, B, A, scale, dropout, again))


def swapped(draw, **keys):
    """gate and up in each other's place."""
    gate_up, dh = draw(77, 400), draw(77, 200)
    turned = gate_up.roll(200, 1)
    forward = swiglu.swiglu(turned, None, None, None)
    return (*forward, *swiglu.swiglu_backward(dh, None, turned, None, None, None, again=True))


CASES.append(
    Case(
        "swiglu alone",
        lambda draw: run_swiglu(draw, adapted=False, down=False, drop=False, r=1, scale=1.0),
        swapped,
    )
)
for adapted, down, drop, r in (
    (True, False, False, 5),
    (False, True, False, 5),
    (True, True, False, 16),
    (True, True, True, 5),
    (True, True, True, 40),
):
    right = {"adapted": adapted, "down": down, "drop": drop, "r": r, "scale": SCALE}
    case(f"swiglu {adapted=} {down=} {drop=} {r=}", run_swiglu, right, {"scale": 1.2 * SCALE})
many = {"adapted": True, "down": True, "drop": True, "r": 5, "scale": SCALE, "again": False, "N": 700}
case("swiglu, many tokens, h not again", run_swiglu, many, {"drop": False})


# ---- thin products --------------------------------------------------------------------------------------------------


def run_low_rank(draw, n, r, drop, scale, N=150, C=264):
    dropout = draw.dropout() if drop else None
    x, A, t = draw(N, C), draw(n * r, C, thin=True), draw(N, n * r)
    return (
        low_rank.down(x, A, scale, n, dropout),
        low_rank.up(scale * t, A, n, dropout),
        low_rank.gradient(t, x, n, dropout),
    )


for n in (1, 2, 3):
    for drop in (False, True):
        right = {"n": n, "r": 5, "drop": drop, "scale": SCALE}
        wrong = {"drop": False} if drop else {"scale": 1.0}
        case(f"low_rank {n=} {drop=}", run_low_rank, right, wrong)
case(
    "low_rank r=64, many tokens",
    run_low_rank,
    {"n": 2, "r": 64, "drop": True, "scale": SCALE, "N": 700},
    {"drop": False},
)


# ---- cross-entropy --------------------------------------------------------------------------------------------------


def run_cross_entropy(draw, V, shift):
    logits = 3 * draw(11, V)
    labels = torch.randint(0, V, (11,), generator=draw.generator).to(draw.device)
    losses = softmax.cross_entropy_(logits, (labels + shift) % V)
    return losses, logits


for V in (101, 9000):
    case(f"cross_entropy {V=}", run_cross_entropy, {"V": V, "shift": 0}, {"shift": 1})

# ---- AdamW ----------------------------------------------------------------------------------------------------------


def run_adamw(draw, eight, rate, n=5000):
    """Four steps, the third of which is not applied. The weights are bf16 whatever the case's dtype."""
    weight, lower = draw(n).bfloat16(), torch.zeros(n, dtype=torch.int16, device=draw.device)
    dtype, scales = (torch.uint8, -(-n // adamw.BLOCK)) if eight else (torch.float32, 0)
    state = {name: torch.zeros(n, dtype=dtype, device=draw.device) for name in ("exp_avg", "exp_avg_sq")}
    if eight:
        state |= {f"{name}_scale": torch.zeros(scales, device=draw.device) for name in list(state)}
    for step in range(1, 5):
        numbers = torch.tensor([0.7, step != 3, 1 - 0.9**step, 1 - 0.999**step], device=draw.device)
        moments = [moment(state, name) for name in ("exp_avg", "exp_avg_sq")]
        rule = adamw.Rate(rate, 0.1, (0.9, 0.999), 1e-8, numbers)
        adamw.adamw_(weight, lower, draw(n).bfloat16(), *moments, rule)
    return adamw.join(weight, lower), *(value.float() for value in state.values())


for eight in (False, True):
    case(f"adamw {eight=}", run_adamw, {"eight": eight, "rate": 1e-2}, {"rate": 4e-2}, slack=0.01 if eight else 0.0)

assert four_bits  # its twin is bitsandbytes': tests/parity/test_nf4.py and tests/gpu compare every bit


@cache
def interpreter_works() -> bool:
    """Whether this Triton's interpreter runs at all here (some versions do not take some NumPys)."""
    try:
        softmax.cross_entropy_kernel[(1,)](
            torch.zeros(1, 9), torch.zeros(1, dtype=torch.int64), torch.zeros(1), 9, 9, 8
        )
        return True
    except Exception:
        return False


def distance(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> float:
    """The largest relative distance between two lists of outputs."""
    assert [x is None for x in ours] == [x is None for x in theirs]
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(ours, theirs, strict=True) if a is not None]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)
