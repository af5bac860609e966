"""What explain found, as one HTML page that needs nothing but itself; its pictures are SVG."""

from collections.abc import Callable, Iterator

from minitune.explain import RecipeView, Update, UpdatesView
from minitune.explain.terminal import COUNTED, percent
from minitune.log import count
from minitune.preview.page import document, said, share, table

CELL = 44  # of a map, in its units
SPECTRA = (720, 240)


def recipe_html(view: RecipeView) -> str:
    return document("Recipe", recipe_parts(view))


def updates_html(view: UpdatesView) -> str:
    return document("Adapter", updates_parts(view))


def row(name: str, *cells: str) -> str:
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><td class="name">{name}</td>{numbers}</tr>'


def recipe_parts(view: RecipeView) -> Iterator[str]:
    trained, frozen = view.numbers["trained"], view.numbers["frozen"]
    yield f'<h1>Recipe</h1><p class="where">{said(view.method)} of {said(view.model)}</p>'
    yield f"<p>{trained:,} numbers train, {trained / (trained + frozen):.2%} of all.</p>"
    yield "<h2>Modules</h2>"
    for group in view.groups:
        yield f"<p>{said(group.words)}{f' ({group.blocks} times)' if group.blocks > 1 else ''}</p>"
        rows = (
            row(said(part.name), said(part.kind), part.shape, f"{part.frozen:,}", f"{part.trained:,}")
            for part in group.parts
        )
        yield from table(("module", "kind", "out x in", "frozen", "trained"), rows, numbers=(1, 2, 3, 4))
    yield "<h2>Bytes</h2>"
    most = max(1, *(sum(kinds.values()) for kinds in view.bytes.values()))
    rows = (
        row(
            said(what),
            f"{sum(kinds.values()) / 1e9:.4g} GB",
            ", ".join(f"{kind} {size:,}" for kind, size in kinds.items()),
            share(sum(kinds.values()) / most, "bar", height=8),
        )
        for what, kinds in view.bytes.items()
    )
    yield from table(("", "in all", "by dtype", ""), rows, numbers=(1, 2))
    yield "<h2>FLOPs a token</h2><p>One document a row, every token learned, nothing recomputed.</p>"
    most = max(sum(flops.values()) for flops in view.flops.values()) or 1.0
    rows = (
        row(
            said(what),
            count(flops["forward"]),
            count(flops["backward"]),
            share(sum(flops.values()) / most, "bar", height=8),
        )
        for what, flops in view.flops.items()
    )
    yield from table(("", "forward", "backward", ""), rows, numbers=(1, 2))
    if view.adapted:
        yield f"<h2>Where the adapters' time goes</h2><p>Of the last block: {COUNTED}.</p>"
        rows = []
        for one in view.adapted:
            flops = [cost.forward + cost.backward for cost in (one.base, one.adapter)]
            moved = [one.base.bytes_moved, one.adapter.bytes_moved]
            rows.append(row(said(one.name), *map(count, flops), percent(flops), *map(count, moved), percent(moved)))
        heads = ("linear", "its FLOPs", "adapter's", "share", "its bytes", "adapter's", "share")
        yield from table(heads, rows, numbers=(1, 2, 3, 4, 5, 6))


def updates_parts(view: UpdatesView) -> Iterator[str]:
    yield f'<h1>Adapter</h1><p class="where">{said(view.source)}</p>'
    yield f"<p>{said(view.variant)}, r = {view.r}, {len(view.updates)} adapters; "
    yield f"norms are of weights {said(view.weights)}.</p>"
    if not all(one.product for one in view.updates):
        yield "<p>This variant is no plain product: its dense merged_weight(W) - W was decomposed.</p>"
    yield "<h2>Norm of the update against that of its weight, %</h2>"
    yield f"<figure>{heat_map(view.updates, lambda one: 100 * relative(one))}</figure>"
    yield "<h2>Effective rank</h2><p>exp of the entropy of the singular values as shares of their sum (Roy and "
    yield "Vetterli, 2007).</p>"
    yield f"<figure>{heat_map(view.updates, lambda one: one.effective_rank)}</figure>"
    yield "<h2>Singular values</h2><p>Each as a share of its adapter's largest, one line an adapter.</p>"
    for module in dict.fromkeys(one.module for one in view.updates):
        yield f"<p>{said(module)}</p><figure>{spectra([u for u in view.updates if u.module == module])}</figure>"
    yield "<h2>All of them</h2>"
    rows = (
        row(
            said(one.name),
            f"{one.values[0] if one.values else 0:.4g}",
            f"{one.effective_rank:.2f}",
            str(one.rank_90),
            f"{one.norm:.4g}",
            f"{relative(one):.2%}",
        )
        for one in view.updates
    )
    yield from table(("adapter", "largest", "eff. rank", "90 % in", "norm", "of weight"), rows, numbers=(1, 2, 3, 4, 5))


def relative(one: Update) -> float:
    return one.norm / max(one.weight_norm, 1e-300)


def heat_map(updates: list[Update], value: Callable[[Update], float]) -> str:
    """Layers across, modules down; the darker the larger."""
    layers = list(dict.fromkeys(one.layer for one in updates))
    modules = list(dict.fromkeys(one.module for one in updates))
    most = max(map(value, updates), default=0) or 1.0
    parts = [f'<text x="0" y="{n * 22 + 36}">{said_in_svg(module)}</text>' for n, module in enumerate(modules)]
    parts += [
        f'<text x="{110 + n * CELL}" y="14">{"-" if layer is None else layer}</text>' for n, layer in enumerate(layers)
    ]
    for one in updates:
        x, y, number = 100 + layers.index(one.layer) * CELL, 20 + modules.index(one.module) * 22, value(one)
        parts.append(
            f'<rect class="full" x="{x}" y="{y}" width="{CELL - 2}" height="20" fill-opacity="{number / most:.3f}">'
            f"<title>{said_in_svg(one.name)}: {number:.4g}</title></rect>"
            f'<text x="{x + 4}" y="{y + 14}">{number:.3g}</text>'
        )
    width = 100 + CELL * len(layers)
    return f'<svg viewBox="0 0 {max(720, width)} {30 + 22 * len(modules)}" role="img">{"".join(parts)}</svg>'


def spectra(updates: list[Update]) -> str:
    """Singular values by their number, largest first."""
    width, height = SPECTRA
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{height - 10}" y2="{height - 10}"/>']
    for one in updates:
        if not one.values or one.values[0] == 0:
            continue
        step = width / max(1, len(one.values) - 1)
        points = " ".join(
            f"{n * step:.1f},{height - 10 - (height - 20) * value / one.values[0]:.1f}"
            for n, value in enumerate(one.values)
        )
        title = f"<title>{said_in_svg(one.name)}</title>"
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-opacity="0.6">{title}</polyline>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def said_in_svg(text: str) -> str:
    """Text fit to stand in a picture, where there is no <bdi>."""
    return said(text).removeprefix("<bdi>").removesuffix("</bdi>")
