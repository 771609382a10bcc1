"""matplotlib without a display, for the pictures of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_vae.core.errors import WorkError


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise WorkError("the plot needs matplotlib: pip install 'ldm-vae[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
    pyplot().close(figure)
