"""README.md of a latent store: what is in it, how it was made, how to read it. For `ldm-vae store push`."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ldm_vae.export.card import about_intervals, statistics_table
from ldm_vae.latent_store.format.codes import codes_in_words
from ldm_vae.latent_store.format.layout import ROWS, SHARDS
from ldm_vae.latent_store.format.manifest import Manifest
from ldm_vae.latent_store.format.signal_words import sizes_in_words, words_of
from ldm_vae.latent_store.format.statistics import LatentStatistics

TAGS = ("latents", "latent-diffusion", "ldm-vae")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
_STORED = {
    "moments": "`mean` and `logvar` of the posterior, unscaled: noise is drawn when they are read",
    "mean": "the posterior's `mean`, unscaled",
    "sample": "one `sample` of the posterior, unscaled",
    "indices": "`indices` of the codebook's rows",
}


def store_card(
    name: str, manifest: Manifest, license: str | None = None, *, on_hub: bool = False, picture: str | None = None
) -> str:
    """The card of a store called `name`: YAML head and Markdown. Paths of somebody's disk are left out.

    Args:
        on_hub: `name` is that of a dataset repository: the card says how to read it there.
        picture: the file of decoded samples in that repository.
    """
    head: dict[str, object] = {"pretty_name": name, "tags": list(TAGS), "size_categories": [_size(manifest.samples)]}
    if license is not None:
        head["license"] = license
    sources = [place for place in (manifest.recorded.data,) if _is_hub_id(place)]
    if sources:
        head["source_datasets"] = sources
    if on_hub:  # the rows, without the tensors, are what the hub shows and `load_dataset` gives
        rows = {"split": "train", "path": f"{SHARDS}/*.{ROWS}"}
        head["configs"] = [{"config_name": "default", "data_files": [rows]}]
    place = f"hf://datasets/{name}" if on_hub else name
    parts = [
        f"{manifest.samples:,} {words_of(manifest).samples} as latents of a VAE, {_megabytes(manifest)}, "
        "made with ldm-vae.",
        *(_samples(picture) if on_hub else ()),
        "## Read it",
        f'```python\nfrom ldm_vae import LatentDataset\n\ndataset = LatentDataset("{place}")  # memory-mapped\n'
        f"{_reading(manifest)}\n```",
        *(_elsewhere(name, manifest) if on_hub else ()),
        "## What is stored",
        "\n".join(_contents(manifest)),
        "## Made with",
        "\n".join(_making(manifest)),
    ]
    if manifest.identity.codes is not None:
        parts += ["## Use of the codes", "\n".join(f"- {name}: {value}" for name, value in _usage(manifest))]
    elif manifest.statistics is not None:
        measured = LatentStatistics.from_json(manifest.statistics)
        over = f"Measured in fp64 over {measured.images:,} latents; {about_intervals(measured)}."
        parts += ["## Statistics", over, "\n".join(statistics_table(measured))]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {name}\n\n" + "\n\n".join(parts) + "\n"


def _samples(picture: str | None) -> list[str]:
    if picture is None:
        return ["There is no picture of it: its VAE was not at hand when it was sent."]
    return [f"![Decoded samples]({picture})", "Samples, decoded by its VAE."]


def _elsewhere(name: str, manifest: Manifest) -> list[str]:
    removed = sum(len(shard.removed) for shard in manifest.shards)
    without = f" ({removed:,} of them are rows that updates took out: `manifest.json` names them)" if removed else ""
    return [
        f"A local copy: `ldm-vae store pull {name} my-latents`. The columns without the tensors: "
        f'`datasets.load_dataset("{name}")`{without}.'
    ]


def _reading(manifest: Manifest) -> str:
    positions = words_of(manifest).positions
    if manifest.identity.codes is not None:
        shape = ", ".join(("q",) * (manifest.identity.codebooks is not None) + (positions,))
        return f'indices = dataset[0]["indices"]  # int64 [{shape}]; `dataset.decode(indices, vae)` decodes them'
    return f'latents = dataset[0]["latents"]  # [c, {positions}], scaled as below'


def _usage(manifest: Manifest) -> list[tuple[str, str]]:
    measured = manifest.statistics or {}
    return [
        ("used", f"{measured['used']:,} of {codes_in_words(measured)}"),
        ("positions", f"{measured['count']:,}"),
        ("perplexity", f"{measured['perplexity']:,.1f}"),
        ("entropy", f"{measured['entropy_bits']:.2f} bits a position"),
    ]


def _contents(manifest: Manifest) -> list[str]:
    identity = manifest.identity
    shapes, words = sorted({shard.shape for shard in manifest.shards}), words_of(manifest)
    lines = [
        f"- {_STORED.get(identity.store, identity.store)}, as {identity.dtype}",
        f"- latent shapes ({words.axes}): {', '.join('x'.join(map(str, shape)) for shape in shapes)}",
        f"- views of each sample: {', '.join(view or 'centre' for view in identity.views)}",
        f"- columns: {', '.join(manifest.columns)}",
        f"- files: {len(manifest.shards):,} shards, tensors as safetensors and one row a sample as parquet; "
        "`manifest.json` has the checksum of each",
    ]
    if manifest.quarantined:
        lines.append(f"- {manifest.quarantined:,} {words.samples} could not be used: `quarantine.jsonl` says why")
    return lines


def _making(manifest: Manifest) -> list[str]:
    identity, recorded = manifest.identity, manifest.recorded
    sides = sizes_in_words(manifest)
    shape = (
        sides if identity.bucket_step is None else f"aspect buckets of about {sides}, steps of {identity.bucket_step}"
    )
    normalisation = "names no normalisation"
    if recorded.normalisation:
        used = manifest.normalisation
        values = ", ".join(f"{key} {value}" for key, value in used.to_config().items() if value is not None)
        normalisation = f"its normalisation, `{used.kind}`: {values}"
    vae = f" (`{recorded.vae}`)" if _is_hub_id(recorded.vae) else ""
    return [
        f"- VAE{vae}: encoder {identity.encoder}, decoder {recorded.decoder}",
        f"- {normalisation}",
        f"- crops: {shape}; preprocessing {identity.preprocessing}",
        f"- encoded in {'fp32' if identity.mixed_precision == 'no' else identity.mixed_precision} by ldm-vae "
        f"{recorded.tool}",
    ]


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(shard.stored_bytes for shard in manifest.shards) / 1e6:,.1f} MB"


def _size(samples: int) -> str:
    return next((name for limit, name in _SIZES.items() if samples < limit), "n>10M")


def _is_hub_id(place: str) -> bool:
    return _HUB_ID.fullmatch(place) is not None and not Path(place).exists()
