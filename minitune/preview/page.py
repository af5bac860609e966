"""A preview as one HTML page that needs nothing but itself.

Text from rows is escaped, and what nobody could see in it is written out. Should something slip through all the same,
the page's Content-Security-Policy lets nothing load or run: no script at all, and of styles only the one below, by its
digest.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from html import escape

from minitune import secrets
from minitune.data.looks import visible
from minitune.preview import Category, Found, Lengths, Preview, Shown, Stretch, Twins

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1c1c1a; --faint: #6b6b66; --line: #e2e1dc; --card: #f5f4f0; --bar: #b9b7ae;
  --accent: #0b6b4f; --ground: #cdeedd; --warn: #8a4b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161716; --ink: #e8e7e3; --faint: #9b9a94; --line: #33342f; --card: #1e1f1d; --bar: #5b5c56;
    --accent: #6fd3a8; --ground: #134a37; --warn: #e8b06a;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 3rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.125rem; margin: 3.25rem 0 0.25rem; }
p { margin: 0.25rem 0 1rem; max-width: 44rem; }
.faint, figcaption, th, .where { color: var(--faint); }
.where { font: 0.8125rem/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.warning { border-left: 3px solid var(--warn); padding: 0.1rem 0 0.1rem 0.9rem; margin: 1rem 0; max-width: none; }
mark { background: var(--ground); color: inherit; padding: 0.12em 0; border-radius: 2px; }
.sums { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1.25rem 1.5rem;
  margin: 2rem 0 0; }
.sums div { border-top: 1px solid var(--line); padding-top: 0.6rem; }
.sums b { display: block; font-size: 1.5rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.sums .learned { border-top: 2px solid var(--accent); }
.sums .learned b { color: var(--accent); }
.sums span { font-size: 0.8125rem; color: var(--faint); }
article { background: var(--card); border-radius: 6px; margin: 1rem 0; padding: 0.9rem 1.1rem; }
article header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1.5rem; margin-bottom: 0.6rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.875rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }
details { margin-top: 0.75rem; border-top: 1px solid var(--line); padding-top: 0.6rem; }
summary { cursor: pointer; font-size: 0.8125rem; color: var(--faint); }
.gap { color: var(--faint); font-style: italic; }
table { border-collapse: collapse; width: 100%; margin-top: 0.5rem; font-size: 0.9375rem; }
td, th { padding: 0.4rem 1rem 0.4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 500; font-size: 0.8125rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.number:first-child { width: 4.5rem; }
.name, .said { overflow-wrap: anywhere; }
.examples { margin: 0; padding: 0; list-style: none; font-size: 0.875rem; }
.examples li { padding: 0.15rem 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .bar { fill: var(--bar); }
svg .over { fill: var(--warn); }
svg .full { fill: var(--accent); }
svg .rest { fill: var(--line); }
svg .axis { stroke: var(--line); }
svg .limit { stroke: var(--warn); stroke-dasharray: 3 3; }
figure { margin: 1rem 0 0; }
.share { width: 34%; vertical-align: middle; }
@media (max-width: 36rem) {
  body { padding: 1.75rem 1rem 3rem; }
  .share { display: none; }
}
"""
DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{DIGEST}'; base-uri 'none'; form-action 'none'"
SUMS = (
    ("rows", "rows read"),
    ("train_documents", "documents to train on"),
    ("eval_documents", "held out"),
    ("tokens", "tokens an epoch"),
    ("trained_tokens", "of them learned"),
)
REPEATS = (("duplicates", "exact duplicates"), ("near_duplicates", "near duplicates"), ("overlap", "in train and eval"))
EXCERPT = 240  # characters
LEARNED = 4000


def html(preview: Preview) -> str:
    """The whole page."""
    return document("Data preview", body(preview))


def document(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, which needs nothing but itself."""
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f'<meta name="referrer" content="no-referrer">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n',
            "</head>\n<body>\n",
            *(f"{part}\n" for part in parts),
            "</body>\n</html>\n",
        ]
    )


def body(preview: Preview) -> Iterator[str]:
    counts = preview.counts
    yield f'<h1>Data preview</h1>\n<p class="where">{said(", ".join(preview.files))}</p>'
    yield from (f'<p class="warning">{said(warning)}</p>' for warning in preview.warnings)
    yield '<div class="sums">'
    for name, words in SUMS:
        learned = ' class="learned"' * (name == "trained_tokens")
        yield f"<div{learned}><b>{counts[name]:,}</b><span>{words}</span></div>"
    yield "</div>"

    yield "<h2>What the model learns</h2>"
    yield "<p>The first documents as the model meets them. <mark>Marked</mark> tokens are trained; all others are "
    yield "only read.</p>"
    yield from map(row, preview.rows)

    if preview.lengths:
        yield "<h2>Lengths</h2>"
        yield f"<p>{lengths_in_words(preview.lengths)}</p>"
        yield f"<figure>{histogram(preview.lengths)}</figure>"

    yield "<h2>Packing</h2>"
    how = "whole documents packed into" if preview.packing else "one document to each of"
    yield f"<p>An epoch is {counts['packed_rows']:,} rows: {how} {preview.max_seq_len:,} tokens, "
    yield f"{preview.documents_per_row:.1f} documents a row, {counts['fill']:.2%} full.</p>"
    yield f"<figure>{share(counts['fill'], 'full', height=10)}</figure>"

    yield "<h2>Left out</h2>"
    if preview.left_out:
        yield from table(("rows", ""), map(found, preview.left_out))
    else:
        yield "<p>Nothing: every row is used.</p>"
    if counts["truncated"]:
        yield f"<p>{counts['truncated']:,} documents are cut at {preview.max_seq_len:,} tokens.</p>"

    yield "<h2>Repeats</h2>"
    pairs = {"duplicates": preview.duplicates, "near_duplicates": preview.near_duplicates, "overlap": preview.overlap}
    yield from table(("rows", ""), (repeat(words, int(counts[name]), pairs[name]) for name, words in REPEATS))
    if preview.near_overlap:
        yield f"<p>Near duplicates with one row in training and one held out: {preview.near_overlap:,}.</p>"

    if preview.categories:
        yield "<h2>Categories</h2>"
        most = max(one.documents for one in preview.categories if not one.rest)
        total = sum(one.documents for one in preview.categories)
        rows = (category(one, most, total) for one in preview.categories)
        yield from table(("category", "documents", "share", "tokens", ""), rows, numbers=(1, 2, 3))

    yield "<h2>Worth a look</h2>"
    if preview.looks:
        yield "<p>None of this is a fault for certain, and nothing is left out for it.</p>"
        yield from table(("rows", ""), map(found, preview.looks))
    else:
        yield "<p>Nothing was seen.</p>"


def said(text: str, most: int | None = None) -> str:
    """Text from outside, fit to stand in the page; on one line and cut, where there is a limit."""
    text = visible(secrets.hidden(text))
    if most is not None:
        text = " ".join(text.split())
        text = text if len(text) <= most else text[: most - 3] + "..."
    return f"<bdi>{escape(text)}</bdi>"


def row(shown: Shown) -> str:
    learned = secrets.shortened(shown.learned, LEARNED)
    return (
        f'<article><header><span class="where">{said(shown.origin)}</span>'
        f'<span class="where">{shown.tokens:,} tokens, {shown.trained:,} learned</span></header>'
        f"<pre>{''.join(map(stretch, shown.stretches))}</pre>"
        f"<details><summary>the learned text alone</summary><pre>{said(learned)}</pre></details></article>"
    )


def stretch(one: Stretch) -> str:
    if one.left_out:
        return f'<span class="gap"> [{one.left_out:,} tokens not shown] </span>'
    text = escape(visible(one.text))
    return f"<mark>{text}</mark>" if one.trained else text


def table(heads: tuple[str, ...], rows: Iterable[str], numbers: tuple[int, ...] = (0,)) -> Iterator[str]:
    cells = (
        f"<th{numbered}>{escape(head)}</th>"
        for head, numbered in ((head, ' class="number"' * (n in numbers)) for n, head in enumerate(heads))
    )
    yield f"<table><thead><tr>{''.join(cells)}</tr></thead><tbody>"
    yield from rows
    yield "</tbody></table>"


def found(one: Found) -> str:
    items = "".join(
        f'<li><span class="where">{said(origin)}</span> &ensp;<span class="said">{said(text, EXCERPT)}</span></li>'
        for origin, text in one.rows
    )
    return (
        f'<tr><td class="number">{one.count:,}</td>'
        f'<td class="name">{escape(one.words)}<ul class="examples">{items}</ul></td></tr>'
    )


def repeat(words: str, count: int, pairs: list[Twins]) -> str:
    items = "".join(
        f'<li><span class="where">{said(pair.origin)}</span> &ensp;{said(pair.text, EXCERPT)}<br>'
        f'<span class="faint">{pair.similarity:.0%} alike:</span> <span class="where">{said(pair.twin_origin)}</span> '
        f"&ensp;{said(pair.twin_text, EXCERPT)}</li>"
        for pair in pairs
    )
    return f'<tr><td class="number">{count:,}</td><td class="name">{words}<ul class="examples">{items}</ul></td></tr>'


def category(one: Category, most: int, total: int) -> str:
    return (
        f'<tr><td class="name">{said(one.name)}</td><td class="number">{one.documents:,}</td>'
        f'<td class="number">{one.documents / total:.1%}</td><td class="number">{one.tokens:,}</td>'
        f'<td class="share">{"" if one.rest else share(one.documents / most, "bar", height=8)}</td></tr>'
    )


# ---- pictures ------------------------------------------------------------------------------------------------------


def share(part: float, kind: str, height: int) -> str:
    """A bar that is filled in part."""
    rest = f'<rect class="rest" width="600" height="{height}" rx="2"/>' if kind == "full" else ""
    return (
        f'<svg viewBox="0 0 600 {height}" preserveAspectRatio="none" height="{height}" role="presentation">{rest}'
        f'<rect class="{kind}" width="{600 * part:.1f}" height="{height}" rx="2"/></svg>'
    )


def lengths_in_words(about: Lengths) -> str:
    over = f"{about.over:,} are longer than" if about.over else "None is longer than"
    return (
        f"Half of the documents have {about.median:,} tokens or fewer, the longest {about.longest:,}. "
        f"{over} max_seq_len = {about.limit:,}."
    )


def histogram(about: Lengths, width: int = 720, height: int = 220) -> str:
    """Documents by their tokens; the edges grow by the root of two."""
    bins, floor = len(about.documents), height - 24
    step, most = width / bins, max(about.documents)
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{floor}" y2="{floor}"/>']
    every = max(1, -(-bins // 12))  # labels that fit beside each other
    for n, (edge, documents) in enumerate(zip(about.edges, about.documents, strict=False)):
        tall = max(1.5, (floor - 40) * documents / most) if documents else 0
        left, middle = n * step, (n + 0.5) * step
        kind = "over" if edge > about.limit else "bar"
        title = f"<title>{edge:,} to {about.edges[n + 1] - 1:,} tokens: {documents:,} documents</title>"
        parts.append(
            f'<rect class="{kind}" x="{left + 2:.1f}" y="{floor - tall:.1f}" width="{step - 4:.1f}" '
            f'height="{tall:.1f}" rx="1.5">{title}</rect>'
        )
        if documents:
            parts.append(f'<text x="{middle:.1f}" y="{floor - tall - 5:.1f}" text-anchor="middle">{documents:,}</text>')
        if n % every == 0:
            parts.append(f'<text x="{left:.1f}" y="{height - 8}" text-anchor="middle">{edge:,}</text>')
    limit = about.edges.index(about.limit + 1) * step
    anchor = "end" if limit > width / 2 else "start"
    shift = -6 if anchor == "end" else 6
    parts.append(f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{floor}"/>')
    parts.append(f'<text x="{limit + shift:.1f}" y="10" text-anchor="{anchor}">max_seq_len {about.limit:,}</text>')
    label = f"Documents by their tokens, from {about.edges[0]:,} to {about.longest:,}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
