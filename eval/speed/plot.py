"""speed.png: the rows of speed.json as a picture.

Ratios are bars (above 1, the row's name is faster or smaller than what stands behind the stroke), rows that have
`against` and `at` are lines over what grows, rows that have a `curve` are lines over minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_vae.core.errors import WorkError

Results = Sequence[dict[str, Any]]
SCORES = {"lpips_alex": "LPIPS alex, held-out photographs (lower is better)", "psnr": "PSNR, dB, held-out photographs"}


def pyplot() -> Any:
    """matplotlib, for files only. Raises WorkError when it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise WorkError("the plot needs matplotlib: pip install 'ldm-vae[report]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(results: Results, path: Path) -> None:
    """Write PATH. Raises WorkError when matplotlib is not installed."""
    plt = pyplot()
    curves = [row for row in results if "curve" in row]
    growing = [row for row in results if "against" in row]
    bars = [row for row in results if "ratio" in row and row not in growing]
    grown = list(dict.fromkeys(row["against"] for row in growing))
    # title of a panel => what draws it
    panels: list[tuple[float, Any]] = [
        (3.4, (_curve, [row for row in curves if row["name"].startswith(work)], score))
        for work in dict.fromkeys(row["name"][: len("quality_f4_")] for row in curves)
        for score in SCORES
    ]
    panels += [(3.4, (_growth, [row for row in growing if row["against"] == what], what)) for what in grown]
    panels += [(0.9 + 0.22 * len(bars), (_bars, bars, "ratio"))] if bars else []
    heights = [height for height, _ in panels] or [1.0]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(9, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, (_, (drawer, rows, what)) in zip(axes[:, 0], panels, strict=bool(panels)):
        drawer(axis, rows, what)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curve(axis: Any, rows: Results, score: str) -> None:
    names = [row["name"].removeprefix("quality_").replace("train_step", "ldm-vae") for row in rows]
    recipes = list(dict.fromkeys(name.removesuffix("_linear") for name in names))
    for name, row in zip(names, rows, strict=True):  # a recipe has one colour, with `init: linear` too
        style = {"color": f"C{recipes.index(name.removesuffix('_linear'))}", "label": name}
        style |= {"linestyle": "dashed"} if name.endswith("_linear") else {}
        points = row["curve"]
        axis.plot([point["minutes"] for point in points], [point[score] for point in points], **style)
    axis.set(xlabel="minutes of one core", title=SCORES[score])
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside what it would cover


def _growth(axis: Any, rows: Results, what: str) -> None:
    for name in dict.fromkeys(row["name"] for row in rows):
        points = [row for row in rows if row["name"] == name]
        axis.plot([row["at"] for row in points], [row["median_s"] for row in points], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel=what, ylabel="seconds", title=f"cost against {what}")
    axis.legend(fontsize="small")


def _bars(axis: Any, rows: Results, what: str) -> None:
    ratios = [row["ratio"] for row in rows]
    middle = [ratio["median"] for ratio in ratios]
    below = [ratio["median"] - ratio["min"] for ratio in ratios]
    above = [ratio["max"] - ratio["median"] for ratio in ratios]
    lengths = [value - 1 for value in middle]  # a bar begins where nothing is gained
    axis.barh(range(len(rows)), lengths, left=1.0, xerr=[below, above], height=0.7, error_kw={"linewidth": 0.8})
    axis.set_yticks(range(len(rows)), [f"{row['name']} / {row['ratio']['to']}" for row in rows], fontsize="small")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_xscale("log")
    # 0.5, 1, 1.5 and not 10^0: ratios lie within a decade, where the default labels every tenth and they overlap
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(title=f"{what}: above 1 the first is faster or smaller (bar: median; line: min to max)")
