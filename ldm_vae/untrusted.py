"""What files from anywhere may say: JSON that does not exhaust the stack, and a model's config.json whose numbers are
those of a network and not of a bomb. Nothing is built, allocated or imported before it was looked at here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

LARGEST = 2**24  # of any whole number in a config: widths, codes, sides
DEEPEST = 128  # of anything that is repeated: blocks, layers


def parse_json(content: str | bytes) -> Any:
    """As json.loads. Raises ValueError for whatever is wrong, 10^5 brackets too (Python's own is a RecursionError)."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_model_config(config: Any) -> None:
    """Raises ValueError unless a diffusers config.json describes a network that can exist.

    Its shape is diffusers' affair; here only what would exhaust the machine, or become NaN, before anybody notices.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected an object, got {type(config).__name__}")
    for name, value in config.items():
        if isinstance(value, list | tuple):
            _check_size(name, len(value), DEEPEST if "block" in name else LARGEST)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name} is {number}")
                layers = name == "layers_per_block" or (name.startswith("num_") and name.endswith(("blocks", "layers")))
                _check_size(name, number, DEEPEST if layers else LARGEST)
    for name in ("scaling_factor", "shift_factor"):
        if config.get(name) is not None and not isinstance(config[name], int | float):
            raise ValueError(f"{name}: expected a number, got {str(config[name])[:40]!r}")
    for name in ("down_block_types", "up_block_types"):
        # diffusers builds as many blocks as are named, and leaves the weights of the others out
        if name in config and len(config[name]) != len(config["block_out_channels"]):
            raise ValueError(f"{name}: expected one for each of block_out_channels, got {len(config[name])}")
    if config.get("norm_num_groups", 1) < 1:
        raise ValueError(f"norm_num_groups: expected at least 1, got {config['norm_num_groups']}")
    for name in ("latents_mean", "latents_std"):
        per_channel = config.get(name)
        if per_channel is not None and (
            not isinstance(per_channel, list | tuple) or len(per_channel) != config.get("latent_channels")
        ):
            raise ValueError(f"{name}: expected one number for each of {config.get('latent_channels')} latent channels")


def _check_size(name: str, size: float, largest: int) -> None:
    if abs(size) > largest:
        # a whole number of JSON has any length, and no float for it beyond 1.8e308
        raise ValueError(f"{name}: expected at most {largest:,}, got {max(min(size, 1e300), -1e300):.4g}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name; a file's own bytes in it are no control characters."""
    said = str(error).strip() or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in said.splitlines()[0][:300])
