"""Llama, as plain as the papers: token ids in, logits or a summed loss out.

What this file promises, so that every technique can be added from outside (docs in README, "How it composes"):

- every matrix product is an `nn.Linear` attribute, called as a module;
- norm, attention core and loss are leaf modules;
- `model.layers` is a list of equal blocks, and the forward pass is a for-loop over it;
- no tensor is made in `__init__` that a checkpoint does not fill, so the model can be built on the meta device;
- parameter names are Hugging Face's, and rotary positions are half-split as theirs: a base needs no key map.

Papers: Llama https://arxiv.org/abs/2302.13971, Llama 3 https://arxiv.org/abs/2407.21783.

Letters in shape comments, here and everywhere:
    B rows   T tokens of a row   D hidden width   H query heads   K key and value heads   h head width
    F width of the feed-forward   V vocabulary   r rank of an adapter
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.attention import CausalAttention, Documents
from minitune.loss import TokenLoss


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to longer contexts than the model was first trained on."""

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0  # llama3 only, as the rest
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face config.json that decide what a Llama computes, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


class Llama(nn.Module):
    """A decoder and its head. Holds no dtype of its own: weights decide."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.loss = TokenLoss()

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        positions: Tensor | None = None,  # (B, T) int64, from 0 in each document; None: each row is one document
        documents: Documents | None = None,  # which tokens see each other; goes to the attention core unopened
        labels: Tensor | None = None,  # (B, T) int64: the token to predict at each place, -100 for none
        learned: Tensor | None = None,  # (N,) int64: where, over all B T places, labels are not -100; may be left out
    ) -> Tensor:
        """Logits (B, T, V); given labels, the sum of cross-entropies over them instead (nats, fp32 scalar)."""
        hidden = self.model(tokens, positions, documents)  # (B, T, D)
        if labels is None:
            return self.lm_head(hidden)
        return self.loss(hidden, self.lm_head, labels, learned)


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor | None, documents: Documents | None) -> Tensor:
        x = self.embed_tokens(tokens)  # (B, T, D)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = rotary_tables(self.config, positions)
        for layer in self.layers:
            x = layer(x, cos, sin, documents)
        return self.norm(x)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention, https://arxiv.org/abs/2305.13245: H / K query heads share a key and value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, h, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = h
        self.q_proj = nn.Linear(D, config.num_attention_heads * h, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * h, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * h, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * h, D, bias=bias)
        self.core = CausalAttention()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, h)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, h)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        y = self.core(rotate(q, cos, sin), rotate(k, cos, sin), v, documents)  # (B, T, H, h)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU, https://arxiv.org/abs/2002.05202."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, F_, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F_, bias=bias)
        self.up_proj = nn.Linear(D, F_, bias=bias)
        self.down_proj = nn.Linear(F_, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467. The mean square is taken in fp32 and the weight multiplied after the
    cast back, as in transformers: the other order changes a quarter of all bf16 outputs."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + h/2}) by its angle: x (B, T, heads, h), tables (B or 1, T, 1, h/2) in fp32.

    RoFormer, https://arxiv.org/abs/2104.09864, in the half-split layout of Hugging Face's checkpoints.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_tables(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, h/2) for positions (B, T). Always fp32: in bf16, position 1023 is off by 0.75."""
    angles = positions[..., None, None].float() * rotary_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


@cache  # one small table per model and device, made on the CPU so that every device turns by the same angles
def rotary_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Radians per position (h/2,) in fp32, scaled as the config says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.to(device)
    if scaling.rope_type == "linear":  # position interpolation, https://arxiv.org/abs/2306.15595
        return (frequencies / scaling.factor).to(device)

    # Llama 3.1: wavelengths that never came round within the original context are stretched by the factor,
    # those that came round often are kept, and between the two the change is gradual.
    assert scaling.rope_type == "llama3", scaling
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)  # 1: as it was; 0: stretched
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).to(device)
