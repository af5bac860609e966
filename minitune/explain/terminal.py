"""What explain found, as text for a terminal."""

from collections.abc import Iterator

from minitune.data.looks import visible
from minitune.explain import RecipeView, UpdatesView
from minitune.log import count
from minitune.preview.terminal import DIM, Writer

COUNTED = "counted on plain operations, not measured; fused kernels do the same FLOPs and move fewer bytes"


def recipe_text(view: RecipeView, colour: bool) -> str:
    return "\n".join(recipe_lines(view, Writer(colour))) + "\n"


def updates_text(view: UpdatesView, colour: bool) -> str:
    return "\n".join(updates_lines(view, Writer(colour))) + "\n"


def recipe_lines(view: RecipeView, ink: Writer) -> Iterator[str]:
    trained, frozen = view.numbers["trained"], view.numbers["frozen"]
    share = trained / (trained + frozen)
    yield f"{view.method} of {visible(view.model)}: {trained:,} numbers train ({share:.2%}), {frozen:,} are frozen"
    yield from ink.title("Modules")
    for group in view.groups:
        yield f"  {group.words}" + (f" ({group.blocks} times)" if group.blocks > 1 else "")
        for part in group.parts:
            trains = f"{part.trained:>12,} train" if part.trained else ""
            yield f"    {part.name:<34} {part.kind:<28} {part.shape:>16} {part.frozen:>14,} frozen {trains}".rstrip()
    yield from ink.title("Bytes", "on one process; moments as the optimizer has them on CUDA")
    for what, kinds in view.bytes.items():
        each = ", ".join(f"{kind} {size:,}" for kind, size in kinds.items())
        yield f"  {what:<10} {sum(kinds.values()) / 1e9:>9.4g} GB   {each}"
    yield from ink.title("FLOPs a token", "one document a row; every token learned; nothing recomputed")
    for what, flops in view.flops.items():
        yield f"  {what:<10} forward {count(flops['forward']):>10}   backward {count(flops['backward']):>10}"
    forward, backward = (sum(flops[way] for flops in view.flops.values()) for way in ("forward", "backward"))
    yield f"  {'in all':<10} forward {count(forward):>10}   backward {count(backward):>10}"
    if view.adapted:
        yield from ink.title("Where the adapters' time goes", "of the last block")
        yield ink.styled(DIM, f"  {COUNTED}")
        yield f"  {'':<12} {'FLOPs a token':>30} {'bytes a token (of ' + format(view.tokens, ',') + ')':>36}"
        for one in view.adapted:
            base, more = one.base, one.adapter
            flops = [cost.forward + cost.backward for cost in (base, more)]
            yield (
                f"  {one.name:<12} {count(flops[0]):>10} + {count(flops[1]):>9} {percent(flops):>7}"
                f" {count(base.bytes_moved):>16} + {count(more.bytes_moved):>9} "
                f"{percent([base.bytes_moved, more.bytes_moved]):>7}"
            )
        yield ink.styled(DIM, "  the linear itself + its adapter, and the adapter's share of both")


def percent(parts: list[float]) -> str:
    return f"{parts[-1] / max(1e-9, sum(parts)):.1%}"


def updates_lines(view: UpdatesView, ink: Writer) -> Iterator[str]:
    yield f"{visible(view.source)}: {view.variant}, r = {view.r}, {len(view.updates)} adapters; weights {view.weights}"
    yield from ink.title("Updates", "effective rank: exp of the entropy of the singular values (Roy and Vetterli)")
    heads = ("largest", "eff. rank", "90 % in", "norm", "of weight")
    yield f"  {'':<38} " + " ".join(f"{head:>10}" for head in heads)
    for one in view.updates:
        largest = one.values[0] if one.values else 0.0
        yield (
            f"  {ink.fitted(one.name, 38)} {largest:>10.4g} {one.effective_rank:>10.2f} {one.rank_90:>10} "
            f"{one.norm:>10.4g} {one.norm / max(one.weight_norm, 1e-300):>10.2%}"
        )
    if not all(one.product for one in view.updates):
        yield "  this variant is no plain product: its dense merged_weight(W) - W was decomposed"
