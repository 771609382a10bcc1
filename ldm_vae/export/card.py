"""README.md of an exported VAE: metadata that a model hub reads, how to load it, what was measured and how."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import yaml

from ldm_vae.autoencoder.codebooks import beside, in_words
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import downsampling_factor, geometry_of, is_of_sounds, latent_channels
from ldm_vae.autoencoder.normalisation_law import law_of, own_normalisation
from ldm_vae.autoencoder.preparation import code_rate, own_rate, recorded, shown
from ldm_vae.core import intervals
from ldm_vae.data.preprocessing import FILE
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.metrics.result import markdown

SHOWN = 6  # pipelines that a card names
MOST = 16  # channels that each have a row
TAGS = ("autoencoder", "vae", "ldm-vae")

_FORMULA = {
    "scale": "latents = z * scaling_factor",
    "shift": "latents = (z - shift_factor) * scaling_factor",
    "channel": "latents = (z - latents_mean) * scaling_factor / latents_std",
}


_WHERE = {
    "config": "`config.json` names",
    "batch_norm": "The buffers of `bn` hold",
    "buffers": "The buffers `latents_mean` and `latents_std` hold",
    "inside": "Encoding and decoding normalise by themselves; what is left is",
}
SIGNALS = {
    "image": ("images", "[B, C, H, W]"), "video": ("clips", "[B, C, T, H, W]"), "audio": ("sounds", "[B, C, L]")
}  # fmt: skip
_KINDS = {"AutoencoderKL": "A KL-regularised", "VQModel": "A vector-quantised", "AutoencoderTiny": "A distilled, tiny"}


def card_name(out: Path) -> str:
    """The model's name: that of its folder, or of the folder around one that is only called vae."""
    place = out.resolve()
    return place.parent.name if place.name == "vae" else place.name.removesuffix(".safetensors")


@dataclass
class Card:
    """Contents of a card: of a model called `name`, with statistics of its latents, contents of metrics.json (one per
    VAE and protocol), further keys of the head (license, base_model, datasets), further sections, title => Markdown
    (recipe, fp16 certificate, drift, warnings), and how to load it where that is not `from_pretrained`."""

    name: str
    statistics: LatentStatistics | None = None
    results: Sequence[dict[str, Any]] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    loading: str | None = None

    def text(self, vae: Any) -> str:
        """README.md for `vae` with the config that is written: YAML head and Markdown."""
        task = "audio-to-audio" if is_of_sounds(vae) else "image-to-image"
        head = {"library_name": "diffusers", "pipeline_tag": task, "tags": list(TAGS)}
        parts = [_shape(vae), "## Load it", self.loading or _loading(vae, self.name)]
        parts += ["## Latents", _latents(vae, self.statistics)]
        if (books := beside(vae)) is not None:
            parts += ["## Codes", f"With a {in_words(books)}. Their rate is {code_rate(vae)}."]
        if self.results:
            parts += ["## Reconstruction", markdown(self.results)]
        for title, text in self.sections.items():
            parts += [f"## {title}", text]
        front = yaml.safe_dump(head | dict(self.metadata), sort_keys=False, allow_unicode=True)
        return f"---\n{front}---\n\n# {self.name}\n\n" + "\n\n".join(part.strip() for part in parts) + "\n"


def _shape(vae: Any) -> str:
    config, kind = vae.config, _KINDS.get(type(vae).__name__, "An")
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
    factor, millions = downsampling_factor(vae), sum(parameter.numel() for parameter in vae.parameters()) / 1e6
    size = f"f = {factor} (an image of H x W pixels has H/{factor} x W/{factor} latents)"
    if is_of_sounds(vae):
        rate = f" at {own_rate(vae):,} Hz" if own_rate(vae) else ""
        size = f"of sounds{rate}, hop {factor} (a sound of L samples has L/{factor} latents)"
    return (
        f"{kind} autoencoder for latent diffusion: {size}, {latent_channels(vae)} latent channels, {millions:.2f} M "
        f"parameters"
        f"{', widths ' * bool(widths)}{', '.join(map(str, widths))}. {_users(type(vae).__name__)}{_decoding(vae)}"
    )


@functools.cache
def pipeline_words() -> dict[str, set[str]]:
    """Words in the annotations of every pipeline folder of diffusers, read once for all classes."""
    argument, found = re.compile(r"^ +\w+: (.*)", re.MULTILINE), {}
    for folder in sorted((Path(diffusers.__file__).parent / "pipelines").iterdir()):
        lines = [line for file in folder.rglob("*.py") for line in argument.findall(file.read_text("utf-8"))]
        found[folder.name] = set(re.findall(r"\w+", " ".join(lines)))
    return found


def _users(name: str) -> str:
    """A sentence on which pipelines of diffusers take a VAE of this class, as their sources say."""
    using = [folder for folder, words in pipeline_words().items() if name in words]
    if not using:
        return f"No pipeline of diffusers {diffusers.__version__} is for its class, `{name}`."
    more = f" and {len(using) - SHOWN} more" if len(using) > SHOWN else ""
    return f"Its class is `{name}`, for the pipelines {', '.join(using[:SHOWN])}{more} of diffusers."


def _decoding(vae: Any) -> str:
    """The card's paragraph on preparing images, for programs that do not read the record."""
    found = recorded(vae)
    if found is None:
        return ""
    if found.signal == "audio":
        return (
            f"\n\nSounds for it are prepared so (`{FILE}`): {found.channels} channel(s), {found.sample_rate:,} samples "
            "a second, full scale at -1 and 1; loudness is left alone."
        )
    clear = (
        "the fourth channel is straight alpha"
        if found.decoding.alpha
        else f"what is transparent is seen on {shown(found.background)}"
    )
    size = "whole images are not resized" if found.resize == "none" else "the short side is resized"
    return (
        f"\n\nImages for it are prepared so (`{FILE}`): {found.channels} channel(s); black and white are "
        f"{shown(found.value_range)} in the file, -1 and 1 at the network; {clear}; {size}, the centre is cut out."
    )


def _loading(vae: Any, name: str) -> str:
    kind = type(vae).__name__
    load = f'vae = {kind}.from_pretrained("{name}")'
    field, family = geometry_of(vae).field, family_of(vae)
    code = f"{field}.sample()" if field == "latent_dist" else field
    what, shape = SIGNALS[family.signal]
    made, own = "samples" if family.signal == "audio" else "pixels", not type(vae).__module__.startswith("diffusers")
    by_hand = family.signal == "video" and (family.padded or family.folded or family.frames_first or field == "[0]")
    by_hand = by_hand or (family.signal == "audio" and (own or family.single or bool(dict(family.mean_by))))
    if by_hand or beside(vae) is not None:
        # more than a call of the class: what signals.py does, or the codes
        use = f"{made} = decode(vae, encode(vae, {what}).mean)  # {what} {shape} in [-1, 1]"
        load = f'from ldm_vae import decode, encode, load_autoencoder\nvae = load_autoencoder("{name}")'
        return f"```python\n{load}\n{use}\n```"
    within = {"signed": "[-1, 1]", "unit": "[0, 1]", "imagenet": "[0, 1], less ImageNet's mean, over its deviation"}
    decode = f"{made} = vae.decode(vae.encode({what}).{code}).sample  # {what} {shape} in {within[family.values]}"
    return f"```python\nfrom diffusers import {kind}\n{load}\n{decode}\n```"


def _latents(vae: Any, statistics: LatentStatistics | None) -> str:
    normalisation = own_normalisation(vae)
    if normalisation is None:
        lines = ["`config.json` names no normalisation of the latents: this class has none."]
    else:
        values = {key: value for key, value in normalisation.to_config().items() if value is not None}
        where, formula = _WHERE[law_of(vae)], _FORMULA[normalisation.kind]
        if normalisation.scaling_factor is None:
            formula = formula.replace(" * scaling_factor", "")
        if normalisation.patch > 1:
            where = f"Squares of {normalisation.patch} x {normalisation.patch} positions become channels. {where}"
        lines = [f"{where} one normalisation, `{normalisation.kind}`: `{formula}`.", ""]
        lines += [f"- {key}: {_number(value)}" for key, value in values.items()]
    if normalisation is not None and statistics is not None and not statistics.gives(normalisation):
        lines += ["", "It was given, not measured: diffusion models of the VAE that has it need it. For comparison:"]
    if statistics is not None:
        what = "sounds" if is_of_sounds(vae) else "images"
        lines += ["", f"Measured in fp64 over {statistics.images:,} {what}; {about_intervals(statistics)}.", ""]
        lines += statistics_table(statistics)
    return "\n".join(lines)


def about_intervals(statistics: LatentStatistics) -> str:
    """Part of a sentence: what the 95 % intervals are, or why there are none."""
    if statistics.intervals is None:
        return intervals.why_none(statistics.images)
    return "intervals by Student's t over them"


def statistics_table(statistics: LatentStatistics) -> list[str]:
    """Lines of a Markdown table: every measured number with its 95 % interval; of more than MOST channels the smallest
    and the largest."""
    tree = statistics.to_json()
    known, count = tree["ci95"], len(tree["latents_mean"])
    rows = ["| statistic | value | 95 % interval |", "|---|---|---|"]
    for key in ("scaling_factor", "shift_factor"):
        rows.append(f"| {key} | {_number(tree[key])} | {_interval(known, key)} |")
    for key, title in (("latents_mean", "mean"), ("latents_std", "std")):
        order = sorted(range(count), key=tree[key].__getitem__)
        ends = dict.fromkeys(range(count), "")
        if count > MOST:
            ends = {order[0]: ", the smallest", order[-1]: ", the largest"}
        for channel, end in ends.items():
            value, interval = tree[key][channel], _interval(known, key, channel)
            rows.append(f"| {title} of channel {channel}{end} | {_number(value)} | {interval} |")
    return rows


def _interval(known: Mapping[str, Any] | None, key: str, channel: int | None = None) -> str:
    if known is None:
        return "none"
    low, high = (end if channel is None else end[channel] for end in known[key])
    return f"{_number(low)} to {_number(high)}"


def _number(value: float | Sequence[float] | None) -> str:
    if value is None:
        return "none: the latents do not vary"
    return f"{value:.5g}" if isinstance(value, int | float) else ", ".join(f"{item:.5g}" for item in value)
