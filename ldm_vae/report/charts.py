"""Charts as inline SVG: no library, no network; colours come from the page's style sheet, so they follow its scheme."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 30


@dataclass(frozen=True)
class Series:
    """Points (x, y) in order of x; dots for few measured values, a line for many. `faint`: a reference."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """A map from values to pixels with its ticks."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_format: Callable[[float], str] | None = None,
    log: bool = False,
    mark: tuple[float, str] | None = None,
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common x (the data's own range unless x_range is given).

    Args:
        label: what is seen, in words, for those who do not see it.
        log: y is logarithmic where values cover a factor of three; those that are not positive are left out.
        mark: a vertical line with a word.
    """
    series = [
        Series(s.label, [(x, y) for x, y in s.points if math.isfinite(y) and (y > 0 or not log)], s.dots, s.faint)
        for s in series
    ]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    if not xs:
        return Markup("")
    x_axis = linear_axis(*(x_range or (min(xs), max(xs))), tight=True)
    y_axis = log_axis(min(ys), max(ys)) if log and max(ys) > 3 * min(ys) else linear_axis(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + across * x_axis.share(x), 1), round(TOP + down * (1 - y_axis.share(y)), 1)

    parts = [_grid(x_axis, y_axis, place, x_format or compact)]
    if mark is not None and x_axis.low <= mark[0] <= x_axis.high:
        x, _ = place(mark[0], y_axis.low)
        side = "end" if x > WIDTH * 0.6 else "start"
        shift = -5 if side == "end" else 5
        parts.append(
            f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="mark" x="{x + shift}" y="{TOP + 9}" text-anchor="{side}">{escape(mark[1])}</text>'
        )
    for number, s in enumerate(series):
        spots = [place(x, y) for x, y in s.points]
        colour = "faint" if s.faint else f"s{number % 5}"
        if len(spots) > 1:
            parts.append(f'<polyline class="line {colour}" points="{" ".join(f"{x},{y}" for x, y in spots)}"/>')
        if s.dots or len(spots) == 1:
            parts += [f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="2.8"/>' for x, y in spots]
    # what the pointer reads: pixels and words of every point
    written = x_format or compact
    data = [{"label": s.label, "at": [[*place(x, y), written(x), f"{y:.4g}"] for x, y in s.points]} for s in series]
    keys = "".join(
        f'<span class="key"><i class="{"faint" if s.faint else f"s{number % 5}"}"></i>{escape(s.label)}</span>'
        for number, s in enumerate(series)
    )
    legend = f'<div class="legend">{keys}</div>' if len(series) > 1 else ""
    return Markup(  # every word in it was escaped above
        f'<div class="chart" data-series="{escape(json.dumps(data))}">{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        '<div class="readout" hidden></div></div>'
    )


def bar_chart(values: Sequence[float], *, label: str) -> Markup:
    """One bar per channel from 0 up."""
    axis = linear_axis(0.0, max([*values, 1e-9]))
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    step = across / len(values)
    every = -(-len(values) // 16)

    def place(_: float, y: float) -> tuple[float, float]:
        return LEFT, round(TOP + down * (1 - axis.share(y)), 1)

    parts = [_grid(Axis(0, 1, []), axis, place, compact)]
    for channel, value in enumerate(values):
        _, top = place(0, value)
        left = LEFT + channel * step
        parts.append(
            f'<rect class="bar" x="{left + 0.15 * step:.1f}" y="{top}" width="{0.7 * step:.1f}"'
            f' height="{max(0.0, HEIGHT - BOTTOM - top):.1f}"><title>channel {channel}: {value:.4g}</title></rect>'
        )
        if channel % every == 0:
            middle = f"{left + step / 2:.1f}"
            parts.append(f'<text x="{middle}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{channel}</text>')
    return Markup(
        f'<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></div>"
    )


# --- axes -------------------------------------------------------------------------------------------------------------


def linear_axis(low: float, high: float, *, tight: bool = False) -> Axis:
    """Four or five round ticks; the axis ends at ticks unless it is `tight`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (-1.0, 1.0)
    raw = (high - low) / (5 if tight else 4)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    if tight:
        return Axis(low, high, [tick for tick in ticks if low <= tick <= high])
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """Powers of ten, with 2 and 5 between them where there are few."""
    low, high = low / 1.1, high * 1.1
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    inside = [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
    return Axis(low, high, inside[:: -(-len(inside) // 6) or 1], log=True)


def compact(value: float) -> str:
    """1200000 => 1.2M, 16000 => 16k, 0.00001 => 1e-5."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{letter}"
    if size and size < 1e-2:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.4g}"


def _grid(
    x_axis: Axis, y_axis: Axis, place: Callable[[float, float], tuple[float, float]], x_format: Callable[[float], str]
) -> str:
    parts = []
    for tick in y_axis.ticks:
        _, y = place(x_axis.low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{compact(tick)}</text>')
    for tick in x_axis.ticks:
        x, _ = place(tick, y_axis.low)
        end = "end" if x > WIDTH - RIGHT - 14 else "middle"
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{end}">{x_format(tick)}</text>')
    return "".join(parts)
