"""Summary of a store's contents as lines of text."""

from __future__ import annotations

from pathlib import Path

from ldm_vae.autoencoder.codebooks import rate_in_words
from ldm_vae.core import intervals
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.transforms import decoding_of
from ldm_vae.latent_store.format.codes import codes_in_words
from ldm_vae.latent_store.format.manifest import Manifest, read_manifest
from ldm_vae.latent_store.format.signal_words import sizes_in_words, words_of
from ldm_vae.latent_store.write.finalize import with_intervals


def units_in(store: str | Path) -> int:
    """Number of finished units in a store; 0 where there is none yet."""
    try:
        return read_manifest(store).units
    except (UsageError, WorkError):  # whoever writes to it says what is wrong
        return 0


def describe(store: str | Path, manifest: Manifest) -> str:
    """The lines that `ldm-vae encode` ends with and `ldm-vae store stats` prints."""
    identity = manifest.identity
    shapes = sorted({shard.shape for shard in manifest.shards})
    size = sum(shard.stored_bytes for shard in manifest.shards)
    precision = "fp32" if identity.mixed_precision == "no" else identity.mixed_precision
    lines = [
        f"{store}: {manifest.samples:,} samples in {_shards(len(manifest.shards))}, {size / 1e6:,.1f} MB"
        + ("" if manifest.complete else "  (not finished: run the same `ldm-vae encode` command again)"),
        f"  tensors      {identity.store} in {identity.dtype}, encoded in {precision} "
        f"at {sizes_in_words(manifest)}, "
        f"latent shape {', '.join('x'.join(map(str, shape)) for shape in shapes) or 'none yet'}",
        f"  encoder      {identity.encoder[:16]}  ({'claimed to be' if manifest.recorded.claimed else 'from'} "
        f"{manifest.recorded.vae or 'memory'})",
        f"  columns      {', '.join(manifest.columns)}",
        f"  quarantined  {manifest.quarantined:,}" + (" (quarantine.jsonl says why)" if manifest.quarantined else ""),
    ]
    # an older version wrote no intervals of this method: they are taken from the shards' sums, where those are at hand
    if manifest.statistics is not None:
        lines += _statistics(with_intervals(store, manifest))
    return "\n".join(lines)


def _shards(count: int) -> str:
    return f"{count:,} shard" if count == 1 else f"{count:,} shards"


def _statistics(manifest: Manifest) -> list[str]:
    if manifest.identity.codes is not None:
        return _usage(manifest)
    measured = manifest.statistics or {}
    known = intervals.recorded(measured)

    def interval(name: str, position: int | None = None) -> str:
        if known is None:
            return ""
        low, high = known[name] if position is None else (end[position] for end in known[name])
        return f"  [{low:.4f}, {high:.4f}]"

    sure = f"95 % intervals over {words_of(manifest).samples}"
    lines = [
        f"  measured over {measured['images']:,} latents, "
        f"{sure if known is not None else intervals.why_none(measured['images'])}:",
        "    scaling_factor      none  (the latents do not vary)"
        if measured["scaling_factor"] is None
        else f"    scaling_factor {measured['scaling_factor']:9.5f}{interval('scaling_factor')}",
        f"    shift_factor   {measured['shift_factor']:9.5f}{interval('shift_factor')}",
    ]
    for channel, (mean, std) in enumerate(zip(measured["latents_mean"], measured["latents_std"], strict=True)):
        lines.append(
            f"    channel {channel:<3d}    mean {mean:9.5f}{interval('latents_mean', channel)}   "
            f"std {std:9.5f}{interval('latents_std', channel)}"
        )
    if not manifest.recorded.normalisation:
        return [*lines, "  the VAE names no normalisation: readers choose scale, shift or channel of these"]
    used = manifest.normalisation
    scale = "" if used.scaling_factor is None else f", scaling_factor {used.scaling_factor:.5f}"
    reader = f", for the pipelines {used.pipelines}" if used.pipelines else ""
    return [*lines, f"  read with the VAE's own normalisation: {used.kind}{scale}{reader}"]


def _usage(manifest: Manifest) -> list[str]:
    measured = manifest.statistics or {}
    shard, decoding = manifest.shards[0], decoding_of(manifest.identity.preprocessing)
    rate = None if decoding is None else decoding.sample_rate
    uniform = rate_in_words(manifest.identity.codebooks, measured["codes"], shard.size[1] // shard.shape[-1], rate)
    lines = [
        f"  codes        {measured['used']:,} of {codes_in_words(measured)} used in {measured['count']:,} positions, "
        f"perplexity {measured['perplexity']:,.1f}, {measured['entropy_bits']:.2f} bits a position",
        f"               an index of each codebook: {uniform}",
    ]
    for number, book in enumerate(measured.get("codebooks", ()), start=1):
        lines.append(
            f"    codebook {number:<3d} {book['used']:,} used, perplexity {book['perplexity']:,.1f}, "
            f"{book['entropy_bits']:.2f} bits a position"
        )
    return lines
