"""The writer: a source and a VAE become a latent store, by any number of processes, stopped and started at will.

The processes of one launch share the ownership of OUT; another launch waits or is refused. There is no collective in
the loop: a process does the units that are its own and not done yet, and when all have their records, one process
finishes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_vae import __version__
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.fingerprint import decoder_fingerprint, encoder_fingerprint
from ldm_vae.autoencoder.geometry import check_resolution
from ldm_vae.autoencoder.lengths import check_frames
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.autoencoder.preparation import check_signal_of
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.ownership import is_mark
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.source import Source
from ldm_vae.data.stream import by_index
from ldm_vae.data.transforms import preprocessing_identity
from ldm_vae.latent_store.format import work_units
from ldm_vae.latent_store.format.codes import choose
from ldm_vae.latent_store.format.identity import Identity
from ldm_vae.latent_store.format.layout import (
    MANIFEST,
    SHARDS,
    UNITS,
    ComputeDtype,
    StorageDtype,
    StoreKind,
)
from ldm_vae.latent_store.format.manifest import (
    Manifest,
    Recorded,
    check_identity,
    has_manifest,
    place_of,
    read_manifest,
    write_manifest,
)
from ldm_vae.latent_store.format.work_units import (
    Plan,
    fresh_plan,
    read_plan,
    write_plan,
)
from ldm_vae.latent_store.storage.claims import Owner, own_place
from ldm_vae.latent_store.storage.places import Place, storage_at
from ldm_vae.latent_store.write import freshness, updates
from ldm_vae.latent_store.write.crops import (
    VIEW_SETS,
    Cutting,
    ViewSet,
    cutting_of,
)
from ldm_vae.latent_store.write.encoder import Encoder
from ldm_vae.latent_store.write.finalize import finish
from ldm_vae.latent_store.write.freshness import Check
from ldm_vae.latent_store.write.freshness_cache import Sightings
from ldm_vae.latent_store.write.processes import Job, Processes
from ldm_vae.latent_store.write.tiled_encode import check_own_tiles, check_tile


def write_store(
    vae: Any,
    source: Source,
    out: Place,
    *,
    resolution: int | Sequence[int],
    batch_size: int = 16,
    shard_size: int = 2048,
    store: StoreKind | None = None,
    dtype: StorageDtype | None = None,
    mixed_precision: ComputeDtype = "no",
    views: ViewSet = "centre",
    bucket_step: int | None = None,
    tile: tuple[int, int] | None = None,
    pixels: bool = False,
    pipelines: str | None = None,
    update: bool = False,
    retry_quarantined: bool = False,
    check: Check = "doubt",
    max_bad: float = 1.0,
    num_workers: int = 0,
    encode_threads: int = 1,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
    source_name: str = "",
    vae_name: str = "",
) -> Manifest:
    """Encode every image of `source` into the store OUT, or go on where an earlier call was stopped.

    Args:
        vae: a diffusers AutoencoderKL, VQModel or AutoencoderTiny (eval mode).
        resolution: side of the crop, a multiple of f; several give one shape each, from one decode. (Frames of clips
            likewise; clips of each length are shards of their own.) Of sounds the samples of the source's excerpts.
        batch_size: images per forward pass, and part of what byte identity depends on.
        shard_size: source samples per work unit.
        store: which tensors are stored.  dtype: as what.  (None: see `codes.choose`.)
        mixed_precision: how the encoder computes.
        views: `centre`, `flip` (and its mirror image), `five_crop`, `ten_crop`.
        bucket_step: aspect buckets of about resolution x resolution pixels, with sides in steps of this.
        tile: (tile, overlap) in pixels; larger crops are encoded in tiles.
        pixels: store the crops too (uint8), for training a decoder from the store alone.
        pipelines: those that the latents are for, of the families that read an AutoencoderKLFlux2's normalisation in
            another way than FLUX.2 (bria_fibo2, ernie_image, ideogram4); None is what OUT was for before.
        update: take up what was added to, changed in and removed from the source since.
        retry_quarantined: try the bad images again.
        check: which images of an earlier call are read, to see that they are still those: in `doubt`, all (`contents`),
            or only where their `size` does not tell. (An update reads all.)
        max_bad: share of unusable images above which the store is not finished.
        num_workers: decoding processes.  encode_threads: batches encoded at the same time, each with one torch thread.
        processes: this process among those of its launch, the launch's part of the job, and what encodes it.
        source_name, vae_name: what the column `source` and the manifest call them.

    Raises:
        UsageError: OUT holds something else, a store of another identity (the difference is named), or one of other
            images than there are now; another launch is at work on it.
        WorkError: nothing usable, too many bad images, disk full: what was finished is kept.

    >>> from ldm_vae import load_autoencoder, open_images, write_store
    >>> vae = load_autoencoder("my-vae")
    >>> manifest = write_store(vae, open_images("photos", vae), "my-latents", resolution=32)
    >>> manifest.samples, manifest.identity.store
    (12, 'moments')
    """
    out, processes = place_of(out), processes or Processes()
    storage_at(out).prepare()
    source = by_index(source)
    resolutions = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    for side in resolutions:
        check_resolution(side, vae)
    if not processes.part.is_whole and (update or retry_quarantined):
        raise UsageError(
            f"part {processes.part}: expected a first encode, got {'update' if update else 'retry_quarantined'}: the "
            "plan of what differs is made by one launch (of any number of processes)"
        )
    _at_least_one(batch_size=batch_size, shard_size=shard_size, encode_threads=encode_threads)
    if (frames := source.decoding.frames) is not None:
        check_frames(vae, frames)
    check_signal_of(vae, source.decoding, f"VAE {vae_name}", "sample_rate")
    if source.decoding.signal == "audio":
        _check_sounds(source.decoding, resolutions, views=views != "centre", bucket_step=bucket_step, tile=tile,
                      pixels=pixels)  # fmt: skip
    if tile is not None:
        check_tile(*tile, vae)
    check_own_tiles(vae)
    identity = Identity(
        encoder=encoder_fingerprint(vae),
        preprocessing=preprocessing_identity(source.decoding),
        resolution=resolutions,
        **choose(vae, store, dtype),
        mixed_precision=mixed_precision,
        shard_size=shard_size,
        views=VIEW_SETS[views],
        bucket_step=bucket_step,
        tile=tile,
        pixels=pixels,
        patch=family_of(vae).patch,
    )
    cutting = cutting_of(identity, vae)
    if pipelines is None and has_manifest(out):
        pipelines = read_manifest(out).recorded.normalisation.get("pipelines")
    normalisation = own_normalisation(vae, f"VAE {vae_name}", pipelines)
    recorded = Recorded(
        vae=vae_name,
        data=source_name,
        decoder=decoder_fingerprint(vae),
        normalisation={} if normalisation is None else normalisation.to_config(),
        tool=__version__,
    )
    wanted = Manifest(identity=identity, source=work_units.source_identity(source), recorded=recorded)

    # owned from before the manifest is read until it is written for the last time
    with own_place(out, "OUT", processes.rank, processes.barrier, processes.part) as owner:
        work = _Work(out, wanted, source, cutting, processes, owner, check, num_workers, encode_threads, max_bad)
        return _write(work, Encoder(vae, identity, batch_size=batch_size, device=device), update, retry_quarantined)


def _write(work: _Work, encoder: Encoder, update: bool, retry_quarantined: bool) -> Manifest:
    out, wanted = work.out, work.wanted
    manifest = begin(out, wanted)
    work.processes.barrier()  # nobody changes the manifest before all have seen it
    # a first encode that was stopped, and other images since: its done units become a finished store, which the update
    # below extends
    if update and not manifest.complete and manifest.source != wanted.source:
        manifest = work.on_one(lambda: updates.adopt_finished_units(out, manifest, wanted))
    # an update reads every image for its plan; any other call keeps old latents, so it checks that their images are the
    # same
    if not (update or retry_quarantined):
        share = work.processes.launch
        work.on_one(
            lambda: freshness.check(out, manifest, wanted.source, work.source, work.check, work.num_workers, share),
            reads=True,
        )
    # a new store, or a first encode that was stopped: the plan is the same, units that are done are skipped
    if not manifest.complete:
        if manifest.source != wanted.source:
            raise _other_images(out, manifest, wanted)
        manifest = work.do(fresh_plan(wanted.source), encoder)
    if not manifest.complete:  # other parts are at work
        return manifest
    # now finished, whichever way: compare it with the source and leave a plan for what differs
    if update or retry_quarantined:
        if manifest.source != wanted.source and not update:
            raise _other_images(out, manifest, wanted)
        manifest = work.on_one(lambda: _plan(work, manifest, retry_quarantined))
    # The plan is read from disk by all processes: it may be the one just written, or one that an earlier call was
    # stopped in, which is resumed without --update too.
    plan = read_plan(out, manifest.units)
    if plan is not None and plan.source == wanted.source:
        manifest = work.do(plan, encoder)
    elif manifest.source != wanted.source:
        raise _other_images(out, manifest, wanted)
    # only the encoder is part of the identity: the decoder may have been trained on since
    return work.on_one(lambda: _refresh(out, wanted))


@dataclass(frozen=True)
class _Work:
    """Work that the processes share: each encodes its own units, and process 0 does what only one may do."""

    out: Place
    wanted: Manifest
    source: Source
    cutting: Cutting
    processes: Processes
    owner: Owner
    check: Check
    num_workers: int
    threads: int
    max_bad: float

    def on_one(self, task: Callable[[], object], *, reads: bool = False) -> Manifest:
        """Process 0 does the task, the others wait for it; the manifest after it. A task that only `reads` the store is
        done beside those of other parts."""
        if self.processes.rank == 0:
            self.owner.check()
            with contextlib.nullcontext() if reads else self.owner.turn():
                task()
        self.processes.barrier()
        return read_manifest(self.out)

    def do(self, plan: Plan, encoder: Encoder) -> Manifest:
        """Encode the units of a plan that are not done yet, and finish."""
        digest = plan.digest(encoder.identity)
        # dealt before done units are left out: processes that look at different moments must agree on each unit's
        # process
        units = plan.units(encoder.identity.shard_size)
        own = units[self.processes.own]
        done = {record.unit for record in work_units.done_records(self.out, own, digest)}
        pending = [unit for unit in own if unit.number not in done]
        # the encoder's size, which may have been halved: out of memory
        job = Job(
            self.out, self.wanted, digest, self.owner, self.cutting, encoder.batch_size, self.num_workers, self.threads
        )
        if self.processes.engine is not None:
            self.processes.engine(job, pending)
        else:
            show = self.processes.rank == 0
            job.encode(self.source, encoder, pending, Sightings(self.out), show=show)
        # the merge reads the records of all processes, and of all parts: the one that ends last finds them complete
        self.processes.barrier()

        def merge() -> None:
            if self.processes.part.is_whole or work_units.are_done(self.out, units, digest):
                finish(self.out, read_manifest(self.out), plan, max_bad=self.max_bad)

        return self.on_one(merge)


def _plan(work: _Work, manifest: Manifest, retry: bool) -> None:
    """Leave plan.json in the store if there is something to add, change or take out."""
    out, wanted = work.out, work.wanted
    under_way = read_plan(out, manifest.units)
    # an update that was stopped goes on, unless an image has changed since it was planned
    same = under_way is not None and under_way.source == wanted.source
    if same and not freshness.is_stale(out, manifest, wanted.source, work.source, work.num_workers):
        return
    plan = updates.make_plan(
        out, manifest, wanted.source, work.source, Sightings(out), retry=retry, num_workers=work.num_workers
    )
    if under_way is not None:
        # before the new plan is written: both count their units on from manifest.units, so the names are the same
        updates.forget(out, under_way, manifest)
    if plan is not None:
        write_plan(out, plan)


def _refresh(out: Place, wanted: Manifest) -> None:
    """Record the decoder and normalisation of the VAE at hand; they are recorded, not compared."""
    manifest = read_manifest(out)
    recorded = wanted.recorded.model_copy(update={"tool": manifest.recorded.tool})
    if recorded != manifest.recorded:
        write_manifest(out, manifest.model_copy(update={"recorded": recorded}))


def _other_images(out: Place, manifest: Manifest, wanted: Manifest) -> UsageError:
    return UsageError(
        f"OUT {out}: was made from other images ({manifest.source.samples:,} of them, DATA has "
        f"{wanted.source.samples:,}); --update takes up what was added, changed and removed"
    )


def _check_sounds(decoding: Decoding, resolutions: tuple[int, ...], **asked: Any) -> None:
    if resolutions != (decoding.samples,):
        raise UsageError(f"samples: expected those of an excerpt, {resolutions[0]}, got {decoding.samples or 'none'}")
    if named := [name for name, value in asked.items() if value]:
        raise UsageError(f"{named[0]}: is of images and clips, and DATA has sounds; leave it out")


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")


def begin(out: Place, wanted: Manifest) -> Manifest:
    """Make OUT with an incomplete manifest, or check that the store in it is of the same identity; what is there.

    Raises:
        UsageError: OUT holds something else, or a store of another identity.
        WorkError: OUT cannot be written.
    """
    storage = storage_at(out)
    try:
        # listed before the manifest is looked for: of processes that begin at once, another may make it in between
        foreign = any(name not in (SHARDS, UNITS) and not is_mark(Path(name)) for name in storage.names())
        if foreign and not has_manifest(out):
            raise UsageError(f"OUT {out}: holds something that is not a latent store; choose an empty or new folder")
        if not has_manifest(out):
            # folders first, so that a store with a manifest always has them
            storage.prepare(SHARDS, UNITS)
            # `create`, not `replace`: of processes that begin at once one manifest stands, others compare theirs
            storage.create(MANIFEST, wanted.to_bytes())
    except OSError as error:
        raise WorkError(f"OUT {out}: cannot be made: {error.strerror}") from error
    existing = read_manifest(out)
    check_identity(out, existing.identity, wanted.identity)
    return existing
