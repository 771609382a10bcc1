"""The training and health sections: curves of every logged number, and what changed when the adversary came in."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ldm_vae.metrics.titles import TITLES, heading, number
from ldm_vae.report.charts import MOST, Series, bar_chart, compact, extremes, line_chart, small_charts

Json = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A heading, one sentence of what to look for, and the drawing."""

    title: str
    hint: str
    drawing: Markup


@dataclass(frozen=True)
class Group:
    """Curves that belong in one chart: `names` of the log (a trailing * takes all that begin so) to legend labels, and
    what their axis counts."""

    title: str
    hint: str
    unit: str
    names: dict[str, str]
    log: bool = False


TRAINING = (
    Group("Loss", "All terms times their weights.", "loss", {"loss/total": "total"}),
    Group("Terms", "Before their weights.", "loss", {"loss/*": ""}, log=True),
    Group("Information", "KL: what the latent may carry.", "nats per image", {"kl_nats_per_image": "KL"}),
    Group("Rate", "The same, per pixel.", "bits per pixel", {"bits_per_pixel": "rate"}),
    Group("Active channels", "The variance of their mean is above 0.01.", "channels", {"active_units": "active"}),
    Group("Learning rate", "As scheduled.", "learning rate", {"learning_rate": "learning rate"}),
)
HEALTH = (
    Group(
        "Adversarial losses",
        "Discriminator at 1.0 (hinge): it cannot tell them apart.",
        "loss",
        {"adversary/discriminator": "discriminator", "adversary/generator": "generator"},
    ),
    Group("Adversary's weight", "Balances the gradients.", "weight", {"adversary/weight": "weight"}, log=True),
    Group(
        "Discriminator accuracy",
        "Near 1 on both: it has won. Near 0.5: it has learned nothing.",
        "share told right",
        {"health/real_accuracy": "originals", "health/fake_accuracy": "reconstructions"},
    ),
    Group("Logit margin", "Originals minus reconstructions.", "mean logit", {"health/logit_margin": "margin"}),
    Group("Gradient norms", "A jump announces trouble.", "norm", {"gradient_norm/*": ""}, log=True),
    Group("Regularisers", "Times their weights.", "loss", {"adversary/r1": "R1", "adversary/lecam": "LeCAM"}, log=True),
)
IMAGES, SOUNDS = "images seen", "sounds seen"
# of numbers that the log has for each channel: title and unit
PER_CHANNEL = {"kl_nats_per_channel": ("KL per channel", "nats per image")}
HIDDEN = {"images", "seconds", "num_processes", "loss/total", "loss/pixels", "loss/kl", "adversary/weight_on_sums"}
OF_HEALTH = ("adversary/", "health/", "gradient_norm/")


def curves(log: Sequence[Json], config: Json) -> list[Chart]:
    """Validation first, then TRAINING, then numbers of channels, then whatever else was logged and is not HEALTH's, one
    chart each."""
    series = {name: values for name, values in _series(log).items() if not name.startswith(OF_HEALTH)}
    around = _around(log, config)
    charts = []
    for name in [name for name in series if name.startswith("validation/")]:
        metric = name.removeprefix("validation/")
        title = heading(metric) if metric in TITLES else metric.replace("_", " ")
        better = f"{TITLES[metric].better} is better" if metric in TITLES else ""
        # popped: what is left at the end was shown nowhere and gets a chart of its own
        lines = [Series(title, series.pop(name), dots=True)]
        if floor := series.pop(f"linear_code/{metric}", []):
            lines.append(Series("linear code of this size", floor, faint=True))
        unit = (TITLES[metric].unit if metric in TITLES else "") or title
        drawing = line_chart(lines, label=f"held-out {title} over {around['x']}", y=unit, **around)
        charts.append(Chart(f"Validation {title}", f"{better}; averaged weights.".lstrip("; "), drawing))
    charts += [chart for group in TRAINING if (chart := _chart(group, series, around))]
    charts += _channels(series, around["x"])
    for name, values in series.items():
        if name not in HIDDEN:
            drawing = line_chart([Series(name, values)], label=f"{name} over {around['x']}", y=name, **around)
            charts.append(Chart(name, "As logged.", drawing))
    return [chart for chart in charts if chart.drawing]


def _channels(series: dict[str, list[tuple[float, float]]], seen: str) -> list[Chart]:
    """Two charts of each number that the log has for every channel, NAME/0, NAME/1, ..., whose curves leave `series`:
    over images, and at the end."""
    families: dict[str, dict[int, Sequence[tuple[float, float]]]] = {}
    for name in list(series):
        if found := re.fullmatch(r"(.+)/(\d+)", name):
            families.setdefault(found[1], {})[int(found[2])] = series.pop(name)
    charts = []
    for name, curves in families.items():
        title, unit = PER_CHANNEL.get(name, (name, name))
        last = [curves[channel][-1][1] for channel in sorted(curves)]
        shown = f"{MOST} of {len(curves)}, evenly spread by their last value" if len(curves) > MOST else "Each"
        small = small_charts(curves, label=f"{title} over {seen}", x=seen, y=unit)
        hint = f"{shown}, on one scale; left its number, right its last value."
        bars = bar_chart(last, label=f"{title} at the end", y=unit)
        charts.append(Chart(f"{title}, over training", hint, small))
        charts.append(Chart(f"{title}, at the end", f"Last logged values. {extremes(last, unit)}", bars))
    return charts


def health(log: Sequence[Json], config: Json) -> Json | None:
    """The adversary's curves, and what the monitor said: each warning with the images at which it first stood and at
    which it last did; None when no adversary played and nothing was said."""
    series = _series(log)
    if not any(name.startswith("adversary/") for name in series) and not any(line.get("warnings") for line in log):
        return None
    around = _around(log, config)
    warnings: dict[str, Json] = {}
    for line in log:
        for name, sentence in line.get("warnings", {}).items():
            # the first images stay, the last and the sentence are overwritten
            first = warnings.get(name, {"since": compact(line["images"])})
            warnings[name] = first | {"until": compact(line["images"]), "sentence": sentence}
    charts = [chart for group in HEALTH if (chart := _chart(group, series, around)) and chart.drawing]
    return {"warnings": list(warnings.values()), "charts": charts}


def _chart(group: Group, series: dict[str, list[tuple[float, float]]], around: Json) -> Chart | None:
    """The chart of a group, whose curves leave `series`."""
    found: dict[str, str] = {}
    for name, label in group.names.items():
        if name.endswith("*"):
            taken = [key for key in series if key.startswith(name[:-1]) and key not in HIDDEN]
            found |= {key: key.removeprefix(name[:-1]) for key in taken}
        elif name in series:
            found[name] = label
    if not found:
        return None
    lines = [Series(label, series.pop(name)) for name, label in found.items()]
    label = f"{group.title} over {around['x']}"
    unit = group.unit.replace("pixel", "sample") if around["x"] == SOUNDS else group.unit
    return Chart(group.title, group.hint, line_chart(lines, label=label, y=unit, log=group.log, **around))


def _around(log: Sequence[Json], config: Json) -> Json:
    """Settings that all charts share: where the adversary starts, and the range of images."""
    x_range = (0.0, float(log[-1]["images"])) if log else (0.0, 1.0)
    sounds = (config.get("data") or {}).get("sample_rate") is not None
    return {"mark": _adversary_mark(config), "x": SOUNDS if sounds else IMAGES, "x_range": x_range}


def _series(log: Sequence[Json]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        for name, value in line.items():
            if isinstance(value, int | float) and name != "images" and abs(value) <= sys.float_info.max:
                series.setdefault(name, []).append((float(line["images"]), float(value)))
    return series


def _adversary_mark(config: Json) -> tuple[float, str] | None:
    adversary = config.get("adversary") or {}
    starts = adversary.get("start_images")
    return (float(starts), "adversary") if starts and adversary.get("weight") else None


def adversary_change(log: Sequence[Json], config: Json) -> Json | None:
    """Validation just before the adversary reached the autoencoder and at the end; None unless both were measured."""
    mark = _adversary_mark(config)
    lines = [line for line in log if any(name.startswith("validation/") for name in line)]
    before = [line for line in lines if mark is not None and line["images"] <= mark[0]]
    if mark is None or not before or lines[-1]["images"] <= mark[0]:
        return None
    first, last = before[-1], lines[-1]
    rows = []
    for name in first:
        metric = name.removeprefix("validation/")
        if metric in TITLES and name in last:
            change = last[name] - first[name]
            better = (change > 0) == (TITLES[metric].better == "higher") if change else None
            rows.append(
                {
                    "heading": heading(metric),
                    "before": number(metric, first[name]),
                    "after": number(metric, last[name]),
                    "change": ("+" if change >= 0 else "−") + number(metric, abs(change)),
                    "better": better,
                }
            )
    return {
        "rows": rows,
        "starts": compact(mark[0]),
        "before": compact(first["images"]),
        "after": compact(last["images"]),
        "between": compact(last["images"] - first["images"]),
    }
