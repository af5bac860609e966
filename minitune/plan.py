"""How much memory a run needs, before it runs, and what it keeps and computes again to fit.

Bytes, all of them, at the peak of a training step; the coefficients say where they come from. `choose` takes the
fastest way that fits: keep everything; compute the least again, with what is kept in host memory where copies to it are
hidden behind the compute. Where they are not, they are the last resort.
"""

from dataclasses import dataclass

from torch import nn

from minitune.adapters import own_modules
from minitune.adapters.whole import TrainedCopy
from minitune.byhand import Keep
from minitune.config import Config
from minitune.loss import CHUNK, is_plain
from minitune.masters import SMALLEST_PAGED
from minitune.model import LlamaConfig
from minitune.nf4 import NF4Linear
from minitune.offload import host_bytes
from minitune.parallel import BUCKET
from minitune.precision import DTYPES

AGAIN = {Keep.ALL: 0, Keep.QKV: 5, Keep.ATTENTION: 6, Keep.INPUT: 7}  # what a block costs that is computed again
HIDDEN = 7e-5  # bytes for each operation of a forward pass: what a PCIe 5 link carries while an H100 multiplies
HOST = 0.5  # of the host's free memory, at most: checkpoints and paged moments want some, too
SPARE = 0.08  # of what is free: left for fragments, the CUDA libraries' own room and what is not counted


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: int  # frozen and trained
    moments: int  # the optimizer's, where they are not paged
    gradients: int
    accumulates: bool  # gradients are there from one micro-batch to the next
    arriving: int  # a micro-batch's gradients, where they are apart from the sum until its backward pass is over
    dense: int  # one block's four-bit weights made dense
    blocks: int
    untouched: int  # of them, the first ones, to which no backward pass comes: they keep nothing
    kept: dict[Keep, int]  # by one block, between forward and backward
    working: dict[Keep, int]  # in one block's backward pass, besides
    away: dict[Keep, int]  # by one block, of the host's, where what it keeps waits there
    hidden: bool  # copies of q, k and v to host memory, too, are over as soon as the block is
    head: int  # the loss: one piece of logits, and the hidden states around it
    held: int = 0  # the head's gradient while blocks compute, where it is in no sum yet
    embedding: int = 0  # what the embedding's gradient is made of, at the end of a backward pass
    passing: int = 0  # what is here of other ranks' weights and gradients while blocks compute
    passing_head: int = 0  # and while the loss does
    passing_embedding: int = 0  # and when a forward pass begins
    shards: int = 1  # ranks that share the weights

    def total(self, choice: "Choice") -> int:
        """At the peak: in the loss, or in the backward pass of the last block or of the first, or at the embedding."""
        recomputed = sum(keep is not Keep.ALL for keep in choice.keep)
        away = min(recomputed, 3) if choice.host else recomputed  # so many are on the device at a time
        met = choice.keep[self.untouched :]  # the blocks that a backward pass comes to
        first, last = (met[0], met[-1]) if met else (Keep.ALL, Keep.ALL)
        kept = (len(met) - recomputed) * self.kept[Keep.ALL] + away * self.kept[first]
        always = self.weights + self.moments + (self.dense * self.blocks if choice.dense else self.dense)
        earlier = self.gradients if self.accumulates else 0
        coming = earlier + self.arriving if self.arriving else self.gradients
        return always + max(
            kept + earlier + self.head + self.passing_head,
            kept + earlier + self.held + self.working[last] + self.passing,
            (self.kept[first] if met else 0) + coming + self.working[first] + self.passing,
            coming + self.embedding,
            earlier + self.passing_embedding,
            self.gradients,
        )

    def reserved(self, choice: "Choice") -> int:
        """With what is freed and not to be had: where ranks share weights, what is on its way has streams of its own,
        and what one stream has freed another cannot take."""
        return self.total(choice) + (self.passing + self.passing_embedding if self.shards > 1 else 0)

    def on_host(self, choice: "Choice") -> int:
        """In page-locked host memory."""
        met = choice.keep[self.untouched :]
        return sum(self.away[keep] for keep in met if keep is not Keep.ALL) if choice.host else 0


@dataclass(frozen=True)
class Choice:
    """How a run fits: what each block keeps; whether those that do not keep all put it into host memory; whether
    four-bit weights are made dense once and for all."""

    keep: tuple[Keep, ...]
    host: bool = False
    dense: bool = False

    def __str__(self) -> str:
        again = sum(keep is not Keep.ALL for keep in self.keep)
        parts = ["no recompute" if not again else f"{again} of {len(self.keep)} blocks recomputed"]
        inputs = "their inputs" + (", q, k and v" if Keep.QKV in self.keep else "")
        parts += [f"{inputs} in host memory"] if self.host else []
        parts += ["dense weights kept"] if self.dense else []
        return ", ".join(parts)


def memory(
    model: nn.Module, config: LlamaConfig, cfg: Config, by_hand: bool, ranks: int = 1, shards: int = 1
) -> Memory:
    """From the parameters as they stand (the meta device is enough) and the shape of a micro-batch.

    `shards` of the `ranks` share the weights that are frozen, or all where all train.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers, N = sum(p.numel() for p in trained), cfg.train.batch_size * cfg.data.max_seq_len
    accumulates = cfg.train.gradient_accumulation_steps > 1
    width = DTYPES[cfg.model.dtype].itemsize
    grads = sum(p.numel() * (4 if accumulates or ranks > 1 else p.itemsize) for p in trained)
    a_number = 8 + (2 if trained[0].itemsize == 2 else 0)  # two fp32 moments; the lower halves of bf16's masters
    here = numbers if cfg.optim.name == "adamw" else sum(p.numel() for p in trained if p.numel() < SMALLEST_PAGED)
    in_blocks = sum(p.numel() for p in model.layers.parameters() if p.requires_grad)
    copies = 0 if cfg.method == "full" or not by_hand else width * in_blocks  # adapters as they multiply
    D, V = config.hidden_size, config.vocab_size
    head = N * 3 * width * D + loss_size(model.lm_head, N, D, V, width)
    held, late, embedding = whole_ends(model, V * D, width, accumulates)
    kept, working = by_hand_sizes(config, cfg, N, width) if by_hand else compiled_sizes(model, config, cfg, N, width)
    four_bits = [m for m in model.layers[0].modules() if isinstance(m, NF4Linear)]
    weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers()))  # buffers: what variants freeze
    full = cfg.method == "full"
    passing = passing_head = 2 * 4 * min(BUCKET, numbers) if ranks > 1 and not (full and shards > 1) else 0
    passing_embedding, arriving = 0, late
    if shards > 1:
        shared = [p for p in model.parameters() if full or not p.requires_grad]
        block = sum(p.nbytes for p in model.layers[0].parameters() if full or not p.requires_grad)
        weights -= sum(p.nbytes for p in shared) * (shards - 1) // shards
        table = width * V * D  # the head, or the embedding
        passing += 3 * block + table  # a block at work, the next, and where it arrives
        passing_head += block + table
        passing_embedding = 3 * table  # the head is there already, and the embedding where it arrives
        if full:
            a_block = sum(p.numel() for p in model.layers[0].parameters())
            sums = (width + 4 + 4 // shards) * max(a_block, V * D)  # a unit's gradients, on their way to be summed
            passing += sums - block  # for which no block is on its way in the backward pass
            numbers, here = numbers // shards, here // shards
            grads, arriving = 4 * numbers, width * numbers
    return Memory(
        weights=weights + copies,
        moments=a_number * here,
        gradients=grads,
        accumulates=accumulates,
        arriving=arriving,
        dense=sum(width * m.in_features * m.out_features for m in four_bits),
        blocks=config.num_hidden_layers,
        untouched=untouched_blocks(model),
        kept=kept,
        working=working,
        away=on_host_sizes(config, N, width) if by_hand else {},
        hidden=by_hand and is_hidden(model.layers[0], kept[Keep.QKV] / N),
        head=head,
        held=held,
        embedding=embedding,
        passing=passing,
        passing_head=passing_head,
        passing_embedding=passing_embedding,
        shards=shards,
    )


def untouched_blocks(model: nn.Module) -> int:
    """How many blocks, from the first on, no backward pass comes to: nothing in them or before them trains."""
    if trains(model.model.embed_tokens):
        return 0
    return next((n for n, layer in enumerate(model.layers) if trains(layer)), len(model.layers))


def is_hidden(block: nn.Module, kept: float) -> bool:
    """Whether so many bytes a token are in host memory as soon as the next block has been through."""
    weights = sum(m.in_features * m.out_features for m in block.modules() if isinstance(m, (nn.Linear, NF4Linear)))
    return kept <= HIDDEN * 2 * weights


def trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def whole_ends(model: nn.Module, VD: int, width: int, accumulates: bool) -> tuple[int, int, int]:
    """Of a head and an embedding of VD numbers that train as copies: the head's gradient while blocks compute; what of
    it comes to the sum at the end only; what the embedding's gradient is made of, besides."""
    head, table = model.lm_head, model.model.embed_tokens
    tied = isinstance(head, TrainedCopy) and bool(head.twin)  # the head's gradient waits for the embedding's
    held = 4 * VD if isinstance(head, TrainedCopy) and (tied or not accumulates) else 0
    made = 0
    if isinstance(table, TrainedCopy):
        made = width * VD + (4 * VD if width < 4 else 0)  # as it was used, then as it trains
        made -= 0 if tied or accumulates else 4 * VD  # the latter is the gradient itself
    return held, held if accumulates else 0, made


def loss_size(head: nn.Module, N: int, D: int, V: int, width: int) -> int:
    """What the loss works with beside the hidden states, line by line in loss.py."""
    n = min(N, CHUNK)
    if is_plain(head):  # the piece of logits is its own gradient; fp32 sums where the weight trains
        return n * V * width + (2 * 4 * V * D if head.weight.requires_grad else 0)
    # By way of autograd a piece is there three times at once in fp32, as the softmax' logarithm, its gradient and the
    # logits'; and as often as a variant keeps its output.
    kept = sum(m.KEPT_OUTPUTS for m in (head, *head.children()) if hasattr(m, "KEPT_OUTPUTS"))
    logits = n * V * (3 * 4 + kept * width)
    if not isinstance(head, TrainedCopy):
        return logits
    as_used = width if width < 4 else 0  # a cast copy
    sums = 4 if N > CHUNK else 0  # of the pieces before
    made = width + (4 if sums or width < 4 else 0)  # a piece's gradient, then cast or added
    return max(logits + (as_used + sums) * V * D, (made + sums) * V * D)


def by_hand_sizes(config: LlamaConfig, cfg: Config, N: int, width: int) -> tuple[dict[Keep, int], dict[Keep, int]]:
    """What a block by hand keeps and works with, line by line in byhand/block.py."""
    D, F = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim  # of attention's output
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    thin = 0 if cfg.method == "full" else 7 * max(cfg.lora.r, *cfg.lora.rank_pattern.values(), 1)
    scores = 4 * config.num_attention_heads  # log-sum-exp, fp32
    inputs = width * (D + thin)
    attention = inputs + width * heads + scores
    with_qkv = attention + width * qkv + 4
    every = with_qkv + width * (D + 2 * F) + 4
    weight_grads = 0 if cfg.method != "full" else 2 * D * F * 4  # on their way to bf16, where the sums are fp32
    after = width * (F + 2 * D)  # dh, and the gradients that come in and go out
    later = after + width * (D + 2 * F)
    again = later + width * qkv
    kept = {Keep.ALL: every, Keep.QKV: with_qkv, Keep.ATTENTION: attention, Keep.INPUT: inputs}
    working = {Keep.ALL: after, Keep.QKV: later, Keep.ATTENTION: again, Keep.INPUT: again + width * heads + scores}
    return {k: N * v for k, v in kept.items()}, {k: N * v + weight_grads for k, v in working.items()}


def on_host_sizes(config: LlamaConfig, N: int, width: int) -> dict[Keep, int]:
    """What each tensor of those that a block keeps takes there, the thin ones aside."""
    D, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    kept = {Keep.INPUT: [D], Keep.ATTENTION: [D, heads], Keep.QKV: [D, heads, heads, groups, groups]}
    return {keep: sum(host_bytes(N * width * n) for n in widths) for keep, widths in kept.items()}


def compiled_sizes(
    model: nn.Module, config: LlamaConfig, cfg: Config, N: int, width: int
) -> tuple[dict[Keep, int], dict[Keep, int]]:
    """A block by way of autograd keeps its input, two norms (in and out), q k v rotated, attention's output, gate,
    up, silu, their product, the masked inputs of its adapters, and the outputs that their variant keeps."""
    D, F = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    dropped = 0 if cfg.method == "full" or cfg.lora.dropout == 0 else 3 * D + 2 * F
    outputs = max(
        sum(m.KEPT_OUTPUTS * m.out_features for m in own_modules(layer) if hasattr(m, "KEPT_OUTPUTS"))
        for layer in model.layers
    )
    every, inputs = N * width * (7 * D + heads + 4 * F + dropped + outputs), N * width * D
    return {Keep.ALL: every, Keep.INPUT: inputs}, {Keep.ALL: N * width * F, Keep.INPUT: every + N * width * F}


def choose(need: Memory, free: int, cfg: Config, by_hand: bool, host_free: float = float("inf")) -> Choice:
    """The fastest way that fits into `free` bytes and HOST of `host_free`, as far as the recipe leaves the choice; else
    the smallest way."""
    least = Keep.ATTENTION if by_hand else Keep.INPUT  # a compiled block is computed again as a whole
    met, wanted = need.blocks - need.untouched, cfg.train.gradient_checkpointing
    offload = cfg.train.offload if by_hand and wanted != "none" else "never"
    if offload in ("always", "inputs"):
        wanted = "full"

    def ways_of(level: Keep, host: bool = False) -> list[Choice]:
        again = {"auto": range(met + 1), "none": [0], "full": [met]}[wanted]
        before = (Keep.ALL,) * need.untouched
        return [Choice(before + (level,) * k + (Keep.ALL,) * (met - k), host=host and k > 0) for k in again]

    with_qkv = ways_of(Keep.QKV, host=True) if need.hidden and offload != "inputs" else []
    inputs = ways_of(Keep.INPUT)[-1:] if by_hand and wanted != "none" else []
    if offload in ("always", "inputs"):
        ways = with_qkv + ways_of(least, host=True)
    elif offload == "auto":
        ways = ways_of(least) + with_qkv + ways_of(least, host=True) + inputs
        ways = sorted(ways, key=cost) if need.hidden else ways
    else:
        ways = ways_of(least) + inputs
    bearable = [way for way in ways if need.on_host(way) <= host_free * HOST] or ways
    if by_hand and need.dense and need.shards == 1 and cfg.model.dense_weights != "never":
        kept = [Choice(way.keep, way.host, dense=True) for way in bearable]
        bearable = kept if cfg.model.dense_weights == "always" else [kept[0], *bearable]
    smallest = min(bearable, key=lambda way: (need.reserved(way), cost(way), not way.host))
    return next((way for way in bearable if fits(need, way, free)), smallest)


def cost(way: Choice) -> int:
    """Of what is computed again, in the units of AGAIN."""
    return sum(AGAIN[keep] for keep in way.keep)


def fits(need: Memory, way: Choice, free: int) -> bool:
    return need.reserved(way) <= free * (1 - SPARE)
