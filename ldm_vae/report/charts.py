"""Charts as inline SVG: no library, no network; colours come from the page's style sheet, so they follow its scheme."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from ldm_vae.metrics.titles import amount

WIDTH, HEIGHT = 400, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 36, 44
COLOURS = 5  # of the style sheet; the lines after them are dashed
MOST = 16  # of what has a bar or a small chart of its own: a latent may have 768 channels


@dataclass(frozen=True)
class Series:
    """Points (x, y) in order of x; dots for few measured values, a line for many. `faint`: a reference; `band`: (x,
    low, high), an interval around the line."""

    label: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    faint: bool = False
    band: Sequence[tuple[float, float, float]] = ()


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
    x: str,
    y: str,
    x_format: Callable[[float], str] | None = None,
    log: bool = False,
    mark: tuple[float, str] | None = None,
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Lines over a common x (the data's own range unless x_range is given).

    Args:
        label: what is seen, in words, for those who do not see it.
        x, y: what the axes count, with the unit.
        log: y is logarithmic where values cover a factor of three; those that are not positive are left out.
        mark: a vertical line with a word.
    """
    series = [
        replace(s, points=[(x, y) for x, y in s.points if math.isfinite(y) and (y > 0 or not log)]) for s in series
    ]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + [end for s in series for _, *ends in s.band for end in ends]
    if not xs:
        return Markup("")
    x_axis = linear_axis(*(x_range or (min(xs), max(xs))), tight=True)
    y_axis = log_axis(min(ys), max(ys)) if log and max(ys) > 3 * min(ys) else linear_axis(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + across * x_axis.share(x), 1), round(TOP + down * (1 - y_axis.share(y)), 1)

    parts = [_grid(x_axis, y_axis, place, x_format or compact), _titles(x, f"{y}, logarithmic" if y_axis.log else y)]
    if mark is not None and x_axis.low <= mark[0] <= x_axis.high:
        across, _ = place(mark[0], y_axis.low)
        side = "end" if across > WIDTH * 0.6 else "start"
        shift = -5 if side == "end" else 5
        parts.append(
            f'<line class="mark" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="mark" x="{across + shift}" y="{TOP - 6}" text-anchor="{side}">{escape(mark[1])}</text>'
        )
    for number, s in enumerate(series):
        spots = [place(x, y) for x, y in s.points]
        colour = _colour(number, s)
        if s.band:
            around = [place(x, low) for x, low, _ in s.band] + [place(x, high) for x, _, high in reversed(s.band)]
            parts.append(f'<polygon class="band {colour}" points="{" ".join(f"{x},{y}" for x, y in around)}"/>')
        if len(spots) > 1:
            parts.append(f'<polyline class="line {colour}" points="{" ".join(f"{x},{y}" for x, y in spots)}"/>')
        if s.dots or len(spots) == 1:
            parts += [f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="2.8"/>' for x, y in spots]
    # what the pointer reads: pixels and words of every point
    written = x_format or compact
    data = [{"label": s.label, "at": [[*place(x, y), written(x), f"{y:.4g}"] for x, y in s.points]} for s in series]
    keys = "".join(
        f'<span class="key"><i class="{_colour(number, s)}"></i>{escape(s.label)}</span>'
        for number, s in enumerate(series)
    )
    legend = f'<div class="legend">{keys}</div>' if len(series) > 1 else ""
    return Markup(  # every word in it was escaped above
        f'<div class="chart" data-series="{escape(json.dumps(data))}">{legend}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        '<div class="readout" hidden></div></div>'
    )


def bar_chart(values: Sequence[float], *, label: str, y: str) -> Markup:
    """One bar per channel from 0 up; more than MOST channels are a line instead, the largest first."""
    if len(values) > MOST:
        ordered = sorted(values, reverse=True)
        line = Series("channels", [(float(rank + 1), value) for rank, value in enumerate(ordered)])
        return line_chart([line], label=label, x=f"rank among {len(values)} channels, the largest first", y=y)
    axis = linear_axis(0.0, max([*values, 1e-9]))
    step = (WIDTH - LEFT - RIGHT) / len(values)

    def place(_: float, y: float) -> tuple[float, float]:
        return LEFT, round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.share(y)), 1)

    parts = [_grid(Axis(0, 1, []), axis, place, compact), _titles("channel", y)]
    for channel, value in enumerate(values):
        _, top = place(0, value)
        left = LEFT + channel * step
        parts.append(
            f'<rect class="bar" x="{left + 0.15 * step:.1f}" y="{top}" width="{0.7 * step:.1f}"'
            f' height="{max(0.0, HEIGHT - BOTTOM - top):.1f}"><title>channel {channel}: {value:.4g}</title></rect>'
            f'<text x="{left + step / 2:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{channel}</text>'
        )
    return _drawing(label, HEIGHT, parts)


def ends(values: Sequence[float]) -> list[int]:
    """Channels that a table names: all of at most MOST; of more as many in their order, half of them with the largest
    values, half with the smallest."""
    if len(values) <= MOST:
        return list(range(len(values)))
    order = sorted(range(len(values)), key=lambda channel: -values[channel])
    return order[: MOST // 2] + order[-MOST // 2 :]


def extremes(values: Sequence[float], unit: str) -> str:
    """Sentence that names the channels whose bars `bar_chart` has no room for; empty where it draws them all."""
    if len(values) <= MOST:
        return ""
    named = [f"{channel} ({amount(values[channel])})" for channel in ends(values)]
    return f"Largest: channels {', '.join(named[:3])} {unit}; smallest: {', '.join(named[-3:])}."


def small_charts(curves: dict[int, Sequence[tuple[float, float]]], *, label: str, x: str, y: str) -> Markup:
    """Curves of channels, each small, all on one scale; of more than MOST those evenly spread from the one with the
    largest last value to the one with the smallest."""
    order = sorted(curves, key=lambda channel: -curves[channel][-1][1])
    if len(order) > MOST:
        order = [order[round(place * (len(order) - 1) / (MOST - 1))] for place in range(MOST)]
    points = [point for channel in order for point in curves[channel]]
    x_axis = linear_axis(min(at for at, _ in points), max(at for at, _ in points), tight=True)
    y_axis = linear_axis(min(0.0, *(value for _, value in points)), max(value for _, value in points))
    columns, width, height, gap = 4, 94, 40, 8
    parts = [_titles("", f"{y}, each chart from {compact(y_axis.low)} to {compact(y_axis.high)}")]
    for place, channel in enumerate(sorted(order)):
        left, top = place % columns * (width + gap), TOP + 12 + place // columns * (height + 26)
        line = " ".join(
            f"{left + width * x_axis.share(at):.1f},{top + height * (1 - y_axis.share(value)):.1f}"
            for at, value in curves[channel]
        )
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}"/>'
            f'<polyline class="line s0" points="{line}"/><text x="{left}" y="{top - 3}">{channel}</text>'
            f'<text x="{left + width}" y="{top - 3}" text-anchor="end">{amount(curves[channel][-1][1])}</text>'
        )
    bottom = TOP + 12 + -(-len(order) // columns) * (height + 26)
    ends = f"{x}, {compact(x_axis.low)} to {compact(x_axis.high)}"
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{bottom - 6}" text-anchor="end">{escape(ends)}</text>')
    return _drawing(label, bottom, parts)


def _drawing(label: str, height: int, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<div class="chart"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg></div>"
    )


def _colour(number: int, series: Series) -> str:
    return "faint" if series.faint else f"s{number % COLOURS}{' dashed' * (number >= COLOURS)}"


def _titles(x: str, y: str) -> str:
    """Titles of the axes: y above its ticks, x below them at the right."""
    return (
        f'<text class="axis" x="0" y="13">{escape(y)}</text>'
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x)}</text>'
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
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
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
