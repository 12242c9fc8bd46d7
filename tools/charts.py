"""Line and stacked charts as inline SVG, drawn by hand so that a report page needs nothing from anywhere.

Colours are CSS variables: the page sets them for light and dark, a stand-alone file carries its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

import numpy as np

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
LIGHT = {
    "ink": "#1d2433",
    "muted": "#6b7486",
    "line": "#e3e7ee",
    "card": "#ffffff",
    "off": "#2563c9",
    "on": "#d2571b",
    "c1": "#138a63",
    "c2": "#7c4bc4",
    "c3": "#b3861a",
    "c4": "#8a94a6",
}
DARK = {
    "ink": "#e6eaf2",
    "muted": "#98a2b5",
    "line": "#2c3445",
    "card": "#171c27",
    "off": "#79a8ff",
    "on": "#ff9a63",
    "c1": "#55cfa0",
    "c2": "#b795f5",
    "c3": "#e3bd5c",
    "c4": "#8591a6",
}

_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 68, 40  # margins of a panel around its plot, in SVG units
_INDENT = 44  # how far titles and legends start to the left of the plot
_CHARACTER = 6.3  # mean width of a 12-unit character, for placing the legend
_SMOOTH_FROM = 12  # shorter curves are drawn as they are, with their points
_MOST_POINTS = 600  # longer curves are averaged in bins


@dataclass(frozen=True)
class Series:
    """One curve."""

    label: str
    values: np.ndarray
    """float [n]: one number for each iteration, NaN where there is none."""
    colour: str
    """A key of LIGHT and DARK."""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves that share two axes."""

    title: str
    unit: str
    series: Sequence[Series]
    stacked: bool = False
    """Pile the series up, the first at the bottom."""
    log: bool = False
    """Logarithmic y axis; numbers <= 0 are left out."""
    include: Sequence[float] = (0.0,)
    """Numbers that the y axis must reach."""
    rule: float | None = None
    """Where to draw a thin horizontal line."""
    smoothed: bool = True
    """Draw a smoothed curve over the raw one; False for what has no noise."""
    shade: bool = False
    """Fill between the first two series."""

    def mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Chart:
        """The chart with `change` applied to the numbers of each series."""
        return replace(self, series=[replace(s, values=change(s.values)) for s in self.series])

    def drawable(self) -> np.ndarray:
        """bool [n]: where any series has a number that its axis can show."""
        return np.any([np.isfinite(s.values) & ((s.values > 0) | (not self.log)) for s in self.series], axis=0)


class Phase(NamedTuple):
    """A stretch of the x axis."""

    label: str
    start: float
    """Position just before its first iteration."""


@dataclass(frozen=True)
class Track:
    """The x axis: the iterations of all phases one after the other."""

    x: np.ndarray
    """float [n], increasing."""
    phases: tuple[Phase, ...] = (Phase("", 0.0),)
    """In order; the last one is open-ended."""
    bin_size: int = 1
    """Iterations that each number is the mean of."""

    def spans(self) -> list[slice]:
        """Index range of each phase; curves do not run from one into the next."""
        starts = [0, *(int(np.sum(self.x <= phase.start)) for phase in self.phases[1:])]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self.x)], strict=True)]

    def cropped(self, charts: Sequence[Chart]) -> tuple[Track, list[Chart]]:
        """Leave out the ends where no chart has a number, and count from the first phase that remains."""
        places = np.flatnonzero(np.any([chart.drawable() for chart in charts], axis=0))
        first, last = places[0], places[-1] + 1
        kept = [p for p, span in zip(self.phases, self.spans(), strict=True) if span.stop > first and span.start < last]
        phases = tuple(Phase(p.label, p.start - kept[0].start) for p in kept)
        x = self.x[first:last] - kept[0].start
        return Track(x, phases, self.bin_size), [chart.mapped(lambda values: values[first:last]) for chart in charts]

    def shortened(self, charts: Sequence[Chart]) -> tuple[Track, list[Chart]]:
        """Average long runs in bins of equal numbers of iterations; no bin reaches into the next phase."""
        size = math.ceil(len(self.x) / _MOST_POINTS)
        if size == 1:
            return self, list(charts)
        starts = [start for span in self.spans() for start in range(span.start, span.stop, size)]
        ends = [*starts[1:], len(self.x)]

        def binned(values: np.ndarray) -> np.ndarray:
            parts = [values[a:b][np.isfinite(values[a:b])] for a, b in zip(starts, ends, strict=True)]
            return np.array([part.mean() if len(part) else math.nan for part in parts])

        return Track(binned(self.x), self.phases, size), [chart.mapped(binned) for chart in charts]


def draw(charts: Sequence[Chart], track: Track, *, width: int, height: int) -> list[str]:
    """An `<svg>` for each chart, all with the same two axes. Colours come from the page.

    Every chart needs at least one number that its axis can show.
    """
    box = _Box(0, 0, width, height)
    panels = _panels(charts, track, [box] * len(charts))
    return [_svg(panel, width, height, chart.title) for panel, chart in zip(panels, charts, strict=True)]


def draw_standalone(charts: Sequence[Chart], track: Track, *, heading: str, width: int, height: int) -> str:
    """The charts side by side in a file of its own, on a white card that reads on light and dark pages."""
    pad, top = 14, 46
    cell = (width - 2 * pad) / len(charts)
    boxes = [_Box(pad + cell * place, top, cell, height - top - pad) for place in range(len(charts))]
    style = f"<style>svg{{{variables(LIGHT)}}}</style>"
    card = (
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" fill="var(--card)" stroke="#d0d7e2"/>'
        f'<text x="{pad + _LEFT - _INDENT}" y="34" font-size="17" font-weight="600" fill="var(--ink)">'
        f"{escape(heading)}</text>"
    )
    return _svg(style + card + "".join(_panels(charts, track, boxes)), width, height, heading)


def variables(colours: dict[str, str]) -> str:
    """CSS declarations of a palette."""
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """[n] -> [n]: mean under a Gaussian of `sigma` points, over the numbers there are; NaN where most are missing."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)

    def spread(numbers: np.ndarray) -> np.ndarray:
        return np.convolve(numbers, kernel)[reach : reach + len(numbers)]

    finite = np.isfinite(values)
    weight, full = spread(finite.astype(float)), spread(np.ones(len(values)))
    total = spread(np.where(finite, values, 0.0))
    return np.where(weight > 0.5 * full, total / np.maximum(weight, 1e-12), math.nan)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers whose first is <= low and whose last is >= high."""
    if not high > low:
        spread = abs(low) * 0.5 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """Four significant digits, the way a person writes them."""
    if value == 0:
        return "0"
    if abs(value) >= 10000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value * 1e4:.3g}", "-4")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Box:
    """Where a panel stands in its SVG."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class _Plot:
    """The rectangle of a plot and its scales."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (*self.y_range, value)) if self.log else (*self.y_range, value)
        return self.top + self.height * (1 - (value - low) / (high - low))

    def path(self, xs: np.ndarray, ys: np.ndarray) -> str:
        """SVG path through the finite points; a gap where there is none, a dot where one stands alone."""
        pieces, pen_down = [], False
        for x, y in zip(xs, ys, strict=True):
            if not math.isfinite(y):
                pen_down = False
                continue
            pieces.append(f"{'L' if pen_down else 'M'}{self.x(x):.1f} {self.y(y):.1f}" + ("" if pen_down else "h0"))
            pen_down = True
        return "".join(pieces)


def _svg(content: str, width: float, height: float, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" font-family="{FONT}" font-size="12">{content}</svg>'
    )


def _panels(charts: Sequence[Chart], track: Track, boxes: Sequence[_Box]) -> list[str]:
    charts = [chart.mapped(_positive) if chart.log else chart for chart in charts]
    track, charts = track.cropped(charts)
    track, charts = track.shortened(charts)
    ticks = _y_ticks(charts)
    x_low, x_high = float(track.x[0]), float(track.x[-1])
    pad = 0.5 if charts[0].stacked or x_low == x_high else 0.0  # bars and lone points need room
    drawn = []
    for box, chart in zip(boxes, charts, strict=True):
        plot = _Plot(
            left=box.left + _LEFT,
            top=box.top + _TOP,
            width=box.width - _LEFT - _RIGHT,
            height=box.height - _TOP - _BOTTOM,
            x_range=(x_low - pad, x_high + pad),
            y_range=(ticks[0], ticks[-1]),
            log=chart.log,
        )
        drawn.append(_panel(chart, track, plot, ticks))
    return drawn


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, math.nan)


def _y_ticks(charts: Sequence[Chart]) -> list[float]:
    if charts[0].stacked:
        values = np.sum([np.nan_to_num(s.values) for s in charts[0].series], axis=0)
    else:
        values = np.concatenate([s.values[np.isfinite(s.values)] for chart in charts for s in chart.series])
    if charts[0].log:
        low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
        return [10.0**power for power in range(low, max(high, low + 1) + 1)]
    extremes = [float(values.min()), float(values.max()), *(v for chart in charts for v in chart.include)]
    return nice_ticks(min(extremes), max(extremes))


def _panel(chart: Chart, track: Track, plot: _Plot, ticks: Sequence[float]) -> str:
    body = _stack(chart, track, plot) if chart.stacked else _lines(chart, track, plot)
    right, bottom = plot.left + plot.width, plot.top + plot.height
    tips = {
        "x": [round(float(x), 1) for x in track.x],
        "phases": track.phases,
        "left": plot.left,
        "width": plot.width,
        "range": plot.x_range,
        "series": [
            {
                "label": s.label,
                "colour": s.colour,
                "values": [number_text(float(v)) if math.isfinite(v) else None for v in s.values],
            }
            for s in chart.series
        ],
    }
    unit = f'<tspan font-weight="400" fill="var(--muted)" dx="6">{escape(chart.unit)}</tspan>' if chart.unit else ""
    return (
        f'<g class="panel" data-tips="{escape(json.dumps(tips, separators=(",", ":")))}">'
        f'<text x="{plot.left - _INDENT:.1f}" y="{plot.top - 48:.1f}" font-size="14" font-weight="600" '
        f'fill="var(--ink)">{escape(chart.title)}{unit}</text>'
        f"{_legend(chart, plot)}{_axes(track, plot, ticks)}{body}"
        f'<line class="cursor" y1="{plot.top:.1f}" y2="{bottom:.1f}" stroke="var(--muted)" visibility="hidden"/>'
        f'<rect class="hit" x="{plot.left:.1f}" y="{plot.top:.1f}" width="{right - plot.left:.1f}" '
        f'height="{plot.height:.1f}" fill="transparent"/></g>'
    )


def _legend(chart: Chart, plot: _Plot) -> str:
    drawn, x, y = [], plot.left - _INDENT, plot.top - 27
    present = [series for series in chart.series if np.isfinite(series.values).any()]
    for series in present if len(chart.series) > 1 else []:
        if chart.stacked:
            swatch = f'<rect x="{x:.1f}" y="{y - 5:.1f}" width="12" height="10" rx="2" fill="var(--{series.colour})"/>'
        else:
            swatch = _stroke(f"M{x:.1f} {y:.1f}h18", series, 2.2)
        gap = 18 if chart.stacked else 24
        drawn.append(
            f'{swatch}<text x="{x + gap:.1f}" y="{y + 4:.1f}" fill="var(--muted)">{escape(series.label)}</text>'
        )
        x += gap + len(series.label) * _CHARACTER + 16
    return "".join(drawn)


def _axes(track: Track, plot: _Plot, ticks: Sequence[float]) -> str:
    right, bottom = plot.left + plot.width, plot.top + plot.height
    unit = "iteration" if track.bin_size == 1 else f"iteration (means over {track.bin_size})"
    drawn = []
    for tick in ticks:
        y = plot.y(tick)
        drawn.append(
            f'<line x1="{plot.left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{plot.left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end" fill="var(--muted)">'
            f"{number_text(tick)}</text>"
        )
    low, high = plot.x_range
    for tick in nice_ticks(low, high, 6):
        if tick == round(tick) and low <= tick <= high:
            x = plot.x(tick)
            drawn.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}" stroke="var(--muted)"/>'
                f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle" fill="var(--muted)">{tick:,.0f}</text>'
            )
    drawn.append(
        f'<line x1="{plot.left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}" stroke="var(--muted)"/>'
        f'<text x="{plot.left + plot.width / 2:.1f}" y="{bottom + 34:.1f}" text-anchor="middle" fill="var(--muted)">'
        f"{unit}</text>"
    )
    return "".join(drawn) + _phase_marks(track, plot)


def _phase_marks(track: Track, plot: _Plot) -> str:
    """A thin upright rule where a phase begins, with its name above where there is room."""
    if len(track.phases) == 1:
        return ""
    right = plot.left + plot.width
    lefts = [plot.left if i == 0 else plot.x(phase.start + 0.5) for i, phase in enumerate(track.phases)]
    drawn = []
    for i, (phase, left, end) in enumerate(zip(track.phases, lefts, [*lefts[1:], right], strict=True)):
        if i > 0:
            drawn.append(
                f'<line x1="{left:.1f}" x2="{left:.1f}" y1="{plot.top - 12:.1f}" y2="{plot.top + plot.height:.1f}" '
                'stroke="var(--muted)"/>'
            )
        if end - left > len(phase.label) * _CHARACTER * 10.5 / 12 + 6:
            drawn.append(
                f'<text x="{left + (5 if i else 0):.1f}" y="{plot.top - 5:.1f}" font-size="10.5" '
                f'fill="var(--muted)">{escape(phase.label)}</text>'
            )
    return "".join(drawn)


def _lines(chart: Chart, track: Track, plot: _Plot) -> str:
    drawn = []
    if chart.rule is not None:
        y = plot.y(chart.rule)
        drawn.append(
            f'<line x1="{plot.left:.1f}" x2="{plot.left + plot.width:.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--muted)" stroke-dasharray="2 3"/>'
        )
    for span in track.spans():
        x = track.x[span]
        is_long = len(x) >= _SMOOTH_FROM
        curves = [s.values[span] for s in chart.series]
        if is_long and chart.smoothed:
            curves = [smooth(curve, sigma=max(1.0, len(track.x) / 40)) for curve in curves]
        if chart.shade:
            drawn.append(_between(plot, x, curves[0], curves[1], chart.series[0].colour))
        for series, curve in zip(chart.series, curves, strict=True):
            if is_long and chart.smoothed:
                drawn.append(_stroke(plot.path(x, series.values[span]), series, 1, opacity=0.28, solid=True))
            drawn.append(_stroke(plot.path(x, curve), series, 2.2))
            if not is_long:
                dots = "".join(plot.path(x[i : i + 1], curve[i : i + 1]) for i in range(len(x)))
                drawn.append(_stroke(dots, series, 6, solid=True))
    return "".join(drawn)


def _between(plot: _Plot, x: np.ndarray, lower: np.ndarray, upper: np.ndarray, colour: str) -> str:
    both = np.isfinite(lower) & np.isfinite(upper)
    if both.sum() < 2:
        return ""
    there = [f"{plot.x(a):.1f} {plot.y(b):.1f}" for a, b in zip(x[both], upper[both], strict=True)]
    back = [f"{plot.x(a):.1f} {plot.y(b):.1f}" for a, b in zip(x[both][::-1], lower[both][::-1], strict=True)]
    return f'<path d="M{"L".join(there + back)}Z" fill="var(--{colour})" fill-opacity="0.1"/>'


def _stack(chart: Chart, track: Track, plot: _Plot) -> str:
    """Areas with one step an iteration, so that a single iteration is a bar."""
    middles = (track.x[1:] + track.x[:-1]) / 2
    edges = np.concatenate([[plot.x_range[0]], middles, [plot.x_range[1]]])
    below = np.zeros(len(track.x))
    drawn = []
    for series in chart.series:
        above = below + np.nan_to_num(series.values)
        there = _steps(plot, edges, above)
        back = _steps(plot, edges, below)[::-1]
        drawn.append(f'<path d="M{"L".join(there + back)}Z" fill="var(--{series.colour})" fill-opacity="0.85"/>')
        below = above
    return "".join(drawn)


def _steps(plot: _Plot, edges: np.ndarray, heights: np.ndarray) -> list[str]:
    return [
        f"{plot.x(edges[i + side]):.1f} {plot.y(height):.1f}" for i, height in enumerate(heights) for side in (0, 1)
    ]


def _stroke(path: str, series: Series, width: float, *, opacity: float = 1.0, solid: bool = False) -> str:
    if not path:
        return ""
    dash = ' stroke-dasharray="5 5"' if series.dashed and not solid else ""
    cap = "butt" if dash else "round"  # round caps would fill a dash's gaps
    return (
        f'<path d="{path}" fill="none" stroke="var(--{series.colour})" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round" stroke-linecap="{cap}"{dash}/>'
    )
