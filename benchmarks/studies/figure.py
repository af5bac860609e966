"""A figure of a study: what each seed gave, and the mean of all, at places along an axis. SVG, of a few lines."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 62, 52
COLOURS = ("#0b6b4f", "#b5541c", "#3b5b92", "#8a3a6b", "#6b6b66")  # told apart by the colour-blind, too
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #4a4a46; }
.title { font-size: 14px; font-weight: 600; fill: #1c1c1a; }
.grid { stroke: #e2e1dc; } .level { stroke: #1c1c1a; stroke-dasharray: 4 4; }
polyline { fill: none; stroke-width: 2; } .spread { stroke-width: 1.5; } .seed { fill-opacity: 0.35; }
"""


@dataclass(frozen=True)
class Series:
    name: str
    values: list[list[float]]  # at each place of the axis, one of each seed; [] where there is none


@dataclass(frozen=True)
class Figure:
    title: str
    across: str  # what the places are
    up: str  # what the values are, with their unit
    places: list[str]
    series: list[Series]
    level: tuple[float, str] | None = None  # a line to compare with


def draw(figure: Figure) -> str:
    """The figure as the text of an SVG file that needs nothing else."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(figure.title)}</title><style>{STYLE}</style>"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fdfdfc"/>' + "\n".join(parts(figure)) + "</svg>\n"
    )


def parts(figure: Figure) -> Iterator[str]:
    values = [value for series in figure.series for some in series.values for value in some]
    shown = [value for value in values if math.isfinite(value)] + ([figure.level[0]] if figure.level else [])
    marks = ticks(min(shown), max(shown))
    low, high = min(marks[0], *shown), max(marks[-1], *shown)
    span = high - low or 1.0

    def x(place: int, nudge: float = 0.0) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (place + 0.5) / len(figure.places) + nudge

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / span

    yield f'<text class="title" x="{LEFT}" y="22">{escape(figure.title)}</text>'
    yield f'<text x="{LEFT}" y="42">{escape(figure.up)}</text>'
    for mark in marks:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>'
    for place, name in enumerate(figure.places):
        yield f'<text x="{x(place):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{escape(name)}</text>'
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    yield f'<text x="{middle:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(figure.across)}</text>'
    if figure.level:
        at, words = figure.level
        yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        yield f'<text x="{WIDTH - RIGHT}" y="{y(at) - 6:.1f}" text-anchor="end">{escape(words)}</text>'
    for number, series in enumerate(figure.series):
        colour = COLOURS[number % len(COLOURS)]
        nudge = 7.0 * (number - (len(figure.series) - 1) / 2)  # so that bars at one place do not hide each other
        finite = [[value for value in some if math.isfinite(value)] for some in series.values]
        means = [(x(place, nudge), y(statistics.mean(some))) for place, some in enumerate(finite) if some]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in means)
        yield f'<polyline points="{line}" stroke="{colour}"/>'
        for place, some in enumerate(finite):
            yield from spread([y(value) for value in some], x(place, nudge), colour)
        at = LEFT + 200 + 110 * number if len(figure.series) > 1 else None
        if at is not None:
            yield f'<circle cx="{at}" cy="38" r="4" fill="{colour}"/>'
            yield f'<text x="{at + 9}" y="42">{escape(series.name)}</text>'


def spread(heights: list[float], x: float, colour: str) -> Iterator[str]:
    """Each seed's value, their mean, and one standard deviation to either side of it."""
    if not heights:
        return
    mean = statistics.mean(heights)
    deviation = statistics.stdev(heights) if len(heights) > 1 else 0.0
    yield (
        f'<line class="spread" x1="{x:.1f}" x2="{x:.1f}" y1="{mean - deviation:.1f}" y2="{mean + deviation:.1f}" '
        f'stroke="{colour}"/>'
    )
    yield from (f'<circle class="seed" cx="{x:.1f}" cy="{height:.1f}" r="2.5" fill="{colour}"/>' for height in heights)
    yield f'<circle cx="{x:.1f}" cy="{mean:.1f}" r="4" fill="{colour}"/>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = size * next(times for times in (1, 2, 5, 10) if span / (size * times) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]
