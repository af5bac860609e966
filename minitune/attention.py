"""Causal attention over packed documents: a token sees the tokens before it in its own document, no others.

Rows of a batch are laid end to end, and `Documents` says where each document ends; so a document never sees
another on any path below, with or without a flash-attention package. All paths are leaves of the same face:

    forward(q (B, T, H, h), k (B, T, K, h), v (B, T, K, h), documents) -> (B, T, H, h)

with H query heads, K key and value heads (H a multiple of K), h the head width, scores scaled by 1 / sqrt(h).
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune import surgery
from minitune.errors import UserError


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, as lengths along its rows laid end to end (padding counts as a document)."""

    ends: Tensor  # (N + 1,) int32: 0, then where each document ends; the last is B * T
    longest: int  # tokens; a bound is enough

    @staticmethod
    def of(lengths: list[int], longest: int | None = None) -> Documents:
        """Documents of these lengths, in order; none may cross the end of a row."""
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return Documents(ends, longest or max(lengths))

    def to(self, device: torch.device) -> Documents:
        return Documents(self.ends.to(device), self.longest)


class CausalAttention(nn.Module):
    """The plain path and the reference: each document by itself through PyTorch's attention.

    Isolation needs no mask here: another document's keys are never in the call.
    """

    @torch.compiler.disable  # its loop has other lengths in every batch: each would be compiled anew
    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        B, T, H, h = q.shape
        if documents is None:  # each row is one document
            return attend(q, k, v)
        lengths = documents.ends.diff().tolist()
        split = [x.reshape(1, B * T, -1, h).split(lengths, dim=1) for x in (q, k, v)]
        parts = [attend(*document) for document in zip(*split, strict=True)]
        return torch.cat(parts, dim=1).view(B, T, H, h)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row: q (B, T, H, h), k and v (B, T, K, h) -> (B, T, H, h)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, h), as PyTorch wants it
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


# What a variable-length kernel is called with: q, k, v (B * T, heads, h), where documents end, the longest.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class VarlenAttention(nn.Module):
    """PyTorch's own variable-length kernel (FlashAttention-2 inside): CUDA, bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = pytorch_varlen()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        return end_to_end(self.kernel, q, k, v, documents)


class FlashAttention(nn.Module):
    """The installed flash-attn package: version 4 (`flash-attn-4`, Hopper and newer) or version 2."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = flash_varlen()

    @torch.compiler.disable  # its kernels are not traceable; the rest of the block still compiles around it
    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        return end_to_end(self.kernel, q, k, v, documents)


def use(model: nn.Module, choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Swap in the attention core that `model.attention` asks for; returns the name of what is in use."""
    fast = device.type == "cuda" and dtype == torch.bfloat16
    if choice in ("flash", "varlen") and not fast:
        raise UserError(
            f"model.attention: {choice} needs a CUDA device and bfloat16, here it is {device.type} and "
            f"{str(dtype).removeprefix('torch.')}; set model.attention = 'sdpa' or leave it at 'auto'"
        )
    if choice == "flash" and flash_package() is None:
        raise UserError(
            "model.attention: no flash-attn package is installed that can be imported; pip install 'minitune[flash]', "
            "or set model.attention = 'varlen'"
        )
    if choice == "auto":
        choice = "sdpa" if not fast else "varlen" if flash_package() is None else "flash"
    if choice == "sdpa":
        return choice
    core = VarlenAttention if choice == "varlen" else FlashAttention
    surgery.replace(model, lambda name, leaf: isinstance(leaf, CausalAttention), lambda leaf: core())
    return choice if choice == "varlen" else flash_package()


def end_to_end(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """Call a variable-length kernel, which takes all rows as one line of tokens and where its documents end."""
    B, T, H, h = q.shape
    if documents is None:
        documents = Documents(torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device), T)
    q, k, v = (x.reshape(B * T, -1, h) for x in (q, k, v))
    return kernel(q, k, v, documents.ends, documents.longest).view(B, T, H, h)


@cache  # one function for all blocks, so that they share compiled code
def pytorch_varlen() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    causal = partial(varlen_attn, window_size=(-1, 0), **grouped)  # torch 2.11 groups heads without being told
    return lambda q, k, v, ends, longest: causal(q, k, v, ends, ends, longest, longest)


@cache
def flash_package() -> str | None:
    """Which flash-attn is installed and runs on this card: "flash-attn-4", "flash-attn" or None.

    One that cannot be imported, since it lacks a package or was built for another torch, counts as not there.
    """
    if find_spec("flash_attn") is None:
        return None
    with suppress(ImportError):
        if find_spec("flash_attn.cute") and torch.cuda.get_device_capability()[0] >= 9:
            keep_compiled_kernels()
            import_module("flash_attn.cute")
            return "flash-attn-4"
    with suppress(ImportError):
        import_module("flash_attn.flash_attn_interface")
        return "flash-attn"
    return None


@cache
def flash_varlen() -> Kernel:
    if flash_package() == "flash-attn-4":
        from flash_attn.cute import flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_varlen_func

    def kernel(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
        repeatable = torch.are_deterministic_algorithms_enabled()
        out = flash_attn_varlen_func(q, k, v, **lengths, causal=True, deterministic=repeatable)
        return out[0] if isinstance(out, tuple) else out  # version 4 also returns the log-sum-exp

    return kernel


def keep_compiled_kernels() -> None:
    """Let flash-attn-4 keep what it compiles at first use (some ten seconds) in the user's own cache folder.

    What is compiled does not depend on how rows are packed, so it happens once for a head width.
    """
    folder = os.path.expanduser("~/.cache/minitune/flash-attn-4")
    with suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", folder)
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)  # its own compiler's
