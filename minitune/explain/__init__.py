"""What a recipe trains and what that costs, and what an adapter has learned, for a person to look at.

recipe.py counts on the meta device, where nothing has memory; updates.py reads an adapter's files and its base's.
terminal.py and page.py write it down.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Modules that are alike: of one block, or outside of all."""

    name: str  # without the block
    kind: str  # the class of the module, and of what it wraps
    shape: str  # of the weight, as out x in
    frozen: int  # numbers
    trained: int


@dataclass(frozen=True)
class Group:
    """Equal blocks in a row; or what is outside of the blocks."""

    words: str
    blocks: int
    parts: list[Part]


@dataclass(frozen=True)
class Cost:
    """Of one linear, counted on PyTorch's plain operations: FLOPs and bytes a token."""

    forward: float
    backward: float
    bytes_moved: float  # read and written by every operation, forward and backward


@dataclass(frozen=True)
class Adapted:
    """An adapted linear, beside the same one without its adapter."""

    name: str
    base: Cost
    adapter: Cost  # what the adapter adds


@dataclass(frozen=True)
class RecipeView:
    method: str
    model: str
    tokens: int  # of a micro-batch, over which bytes are shared
    groups: list[Group]
    numbers: dict[str, int]  # frozen and trained; of NF4, the weights that the bytes stand for
    bytes: dict[str, dict[str, int]]  # frozen, trained, gradients, moments -> dtype -> bytes
    flops: dict[str, dict[str, float]]  # linears, adapters, attention, head -> forward and backward, a token
    adapted: list[Adapted]


@dataclass(frozen=True)
class Update:
    """What one adapter adds to its weight."""

    name: str
    layer: int | None  # None: outside of the blocks
    module: str
    values: list[float]  # singular values, largest first
    effective_rank: float
    rank_90: int  # how many values hold 90 % of the squared norm
    norm: float  # Frobenius
    weight_norm: float
    product: bool  # s B A, decomposed through its core; else the dense difference was


@dataclass(frozen=True)
class UpdatesView:
    source: str
    variant: str
    r: int
    weights: str  # which weights the norms are of
    updates: list[Update]
