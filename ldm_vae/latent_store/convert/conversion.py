"""Converting latent stores to other programs' formats and back; the formats themselves are in `formats/`.

A store's rows go out shard by shard, each verified before it is read; what comes back is dealt into units as `merge`
does it. Latents that carry no identity become a store only with the VAE that the user says they are of, and the store
says that this is a claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm_vae import __version__
from ldm_vae.autoencoder.geometry import latent_channels
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import nearest_path
from ldm_vae.core.progress import Progress
from ldm_vae.latent_store.convert import formats
from ldm_vae.latent_store.convert.formats import Options
from ldm_vae.latent_store.convert.import_rows import Claim
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    Recorded,
    SourceIdentity,
    read_finished,
)
from ldm_vae.latent_store.maintain.merge_split import pieces
from ldm_vae.latent_store.maintain.repack import repack
from ldm_vae.latent_store.storage.places import Place


def convert_to(store: Place, out: Path, name: str, options: Options | None = None) -> list[str]:
    """Write a finished store's latents in the format of that name; what it has no place for, one phrase each.

    Raises:
        UsageError: no such format, it has no place for such a store, or OUT exists.
        WorkError: a shard is damaged, or OUT cannot be written.
    """
    options = options or Options()
    chosen, manifest = formats.load(name), read_finished(store)
    if not chosen.CLIPS and any(shard.frames is not None for shard in manifest.shards):
        raise UsageError(f"--to {name}: is for latents [c, h, w], and store {store} holds those of clips [c, t, h, w]")
    if any(len(shard.shape) == 2 for shard in manifest.shards) and manifest.identity.codes is None:
        raise UsageError(f"--to {name}: is for latents of images and clips, and store {store} holds those of sounds")
    lost = chosen.cannot_carry(manifest, options)
    if manifest.samples == 0:
        raise UsageError(f"store {store}: no samples to convert")
    with atomic_io.whole_folder(out) as folder:
        parts = list(pieces(store, manifest))
        for piece in Progress(parts, desc="verify", unit="shards", leave=False):
            piece.check()
        chosen.write(folder, manifest, parts, options)
    return lost


def convert_from(
    path: Path, out: Path, name: str, *, vae: Any = None, vae_name: str = "", shard_size: int = 2048
) -> tuple[Manifest, Sequence[str]]:
    """A store of the latents in SRC, and what was noticed on the way.

    Args:
        vae: the VAE that they are of: needed where they carry no identity, compared with it where they do.
        shard_size: samples per unit where no identity says it.

    Raises:
        UsageError: nothing of that format in SRC, no VAE where one is needed, one of another encoder, channel count or
            f, or one whose normalisation is none; OUT exists.
        WorkError: a file is damaged, or holds what no store may hold.
    """
    from ldm_vae.autoencoder.fingerprint import decoder_fingerprint, encoder_fingerprint
    from ldm_vae.autoencoder.geometry import downsampling_factor
    from ldm_vae.autoencoder.lengths import frames_of

    chosen = formats.load(name)
    if not path.exists():
        raise UsageError(f"SRC {path}: no such file or folder{nearest_path(path)}")
    known = chosen.carried(path)
    if known is None and vae is None:
        raise UsageError(f"--vae: the latents in {path} do not say which VAE made them; name it")
    encoder = None if vae is None else encoder_fingerprint(vae)
    if known is not None:
        if encoder not in (None, known.manifest.identity.encoder):
            raise UsageError(
                f"--vae: {vae_name or 'it'} has another encoder than the one that the latents in {path} name"
            )
        found = chosen.read(path, known)
        head = known.manifest.model_copy(update={"identity": found.identity, "shards": ()})
        return repack(found.pieces, out, head, known.quarantine), found.notes
    if shard_size < 1:
        raise UsageError(f"--shard_size: expected at least 1, got {shard_size}")
    assert encoder is not None
    codes = getattr(vae.config, "num_vq_embeddings", None)
    normalisation = normalisation_of(vae, f"VAE {vae_name}")
    claim = Claim(
        encoder=encoder,
        factor=downsampling_factor(vae),
        channels=latent_channels(vae),
        codes=codes,
        source=str(path),
        shard_size=shard_size,
        normalisation=normalisation,
        frames_of=partial(frames_of, vae),
    )
    found = chosen.read(path, claim)
    head = Manifest(
        identity=found.identity,
        source=SourceIdentity(samples=0, keys=""),
        recorded=Recorded(
            vae=vae_name,
            data=str(path),
            decoder=decoder_fingerprint(vae),
            normalisation=normalisation.to_config(),
            tool=__version__,
            claimed=True,
        ),
    )
    return repack(found.pieces, out, head), found.notes
