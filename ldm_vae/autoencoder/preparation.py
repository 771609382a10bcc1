"""Preparation of DATA for networks: flags first, then the networks' (or a store's) record, then the defaults.

The one place that every verb with DATA asks. Two records that differ are refused, both named, unless a flag decides.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ldm_vae.autoencoder.codebooks import codes_of, rate_in_words
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import downsampling_factor, image_channels, is_of_sounds
from ldm_vae.autoencoder.lengths import check_frames, check_samples
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.data.decoding import DEFAULT, Decoding
from ldm_vae.data.flags import NO_FLAGS, DataFlags, SplitPart, flag_of
from ldm_vae.data.holdout import Holdout, part_of
from ldm_vae.data.preprocessing import FILE, OF_CLIPS, OF_SOUNDS, SETTABLE, Preprocessing
from ldm_vae.data.source import Source, open_source, with_resize
from ldm_vae.data.transforms import decoding_of, preprocessing_identity
from ldm_vae.data.windows import windows

Network = TypeVar("Network")


@dataclass(frozen=True)
class Preparation:
    """The decoding of DATA, and what the user must know of it: a note for each flag that overrides a record."""

    decoding: Decoding
    flags: DataFlags = NO_FLAGS
    notes: tuple[str, ...] = ()
    holdout: Holdout | None = None
    """Split of the images that the networks were trained on."""

    @property
    def identity(self) -> str:
        """The preprocessing identity, as a latent store compares it."""
        return preprocessing_identity(self.decoding)

    @property
    def kept(self) -> Preprocessing:
        """The record of a network that goes on with this."""
        return Preprocessing.of(self.decoding, self.holdout)

    def open(self, data: str | Path, *, whole: bool = False) -> Source:
        """Open DATA, or the part that a flag names, with this decoding: images, the clips that cover its videos, or the
        excerpts that cover its sounds (whole: the videos, the sounds).

        Raises:
            UsageError: nothing is there.
            WorkError: it is empty.
        """
        flags, decoding = self.flags, self.decoding
        source = open_source(
            data, image_column=flags.image_column, caption_column=flags.caption_column, split=flags.split,
            kind=flags.kind, channels=decoding.channels, background=decoding.background,
            value_range=decoding.value_range, alpha=decoding.alpha, jpeg_draft=decoding.jpeg_draft,
            frames=decoding.frames, frame_rate=decoding.frame_rate, frame_stride=decoding.frame_stride,
            sample_rate=decoding.sample_rate, samples=decoding.samples, **flags.data_fields,
        )  # fmt: skip
        source = with_resize(source, decoding.resize)
        if source.decoding != decoding:  # of a kind of somebody's own
            names = [
                name
                for name in Decoding.__dataclass_fields__
                if getattr(decoding, name) != getattr(source.decoding, name)
            ]
            expected, has = (
                ", ".join(f"{name} {getattr(one, name)!r}" for name in names) for one in (decoding, source.decoding)
            )
            raise UsageError(f"data {data}: expected images decoded with {expected}, its kind has {has}")
        if flags.part is not None:
            if self.holdout is None:
                raise UsageError(
                    f"--part {flags.part}: no network here records a split of its images; expected one that was "
                    "trained with data.holdout"
                )
            chosen, said = part_of(source, self.holdout, flags.part, str(data))
            print(f"note: {said}", file=sys.stderr)
            source = chosen
        return source if whole else windows(source)


def preparation_of(vaes: Mapping[str, Any], flags: DataFlags = NO_FLAGS) -> Preparation:
    """The preparation of images for these networks: flags where they are given, else what the networks record, else the
    defaults; the channels are the networks'.

    Args:
        vaes: by name on the command line; all see the same images.

    Raises:
        UsageError: they take different numbers of channels, a flag asks for another, two records differ and no flag
            decides, or one would cut or pad clips of that length.
    """
    channels = {name: image_channels(vae) for name, vae in vaes.items()}
    if len(set(channels.values())) > 1:
        raise UsageError(f"vae: all must take images of one kind, these take {sorted(set(channels.values()))} channels")
    name, wanted = next(iter(channels.items()))
    found = {f"VAE {name}": one for name, vae in vaes.items() if (one := recorded(vae)) is not None}
    records = [(name, one.decoding) for name, one in found.items()]
    rates = {own_rate(vae) for vae in vaes.values()} - {None}
    rate = next(iter(rates)) if len(rates) == 1 else None
    decided = _decide(records, wanted, f"VAE {name}", flags, any(map(has_alpha, vaes.values())), rate)
    for name, vae in vaes.items():
        check_signal_of(vae, decided.decoding, f"VAE {name}", "--sample_rate")
        if (frames := decided.decoding.frames) is not None:
            check_frames(vae, frames, "frames")
        if (samples := decided.decoding.samples) is not None:
            check_samples(vae, samples, "samples (--excerpt)")
    split = _split_of({name: one.holdout for name, one in found.items()}, flags)
    asked = () if flags.part is None or split is None else (f"part: {flags.part}, by data.holdout {split.share:g}",)
    return replace(decided, holdout=split, notes=(*decided.notes, *asked))


def own_rate(vae: Any) -> int | None:
    """Samples a second that the config of a class of sounds names; None of one that does not."""
    said = [getattr(vae.config, name, None) for name in ("sampling_rate", "sample_rate")] if is_of_sounds(vae) else []
    return next((int(rate) for rate in said if rate), None)


def code_rate(vae: Any) -> str:
    """Rate of a network's codes as `rate_in_words` says it; empty without codes."""
    found = codes_of(vae)
    return "" if found is None else rate_in_words(*found, downsampling_factor(vae), own_rate(vae))


def check_signal_of(vae: Any, decoding: Decoding, name: str, field: str) -> None:
    """Raises UsageError unless sounds are decoded for a class of sounds, and images or clips for any other."""
    if is_of_sounds(vae) != (decoding.signal == "audio"):
        wanted = "the rate of sounds" if is_of_sounds(vae) else "none"
        raise UsageError(
            f"{field}: expected {wanted} for {name}, {an(type(vae).__name__)}, got {decoding.sample_rate or 'none'}"
        )


def _split_of(found: Mapping[str, Holdout | None], flags: DataFlags) -> Holdout | None:
    """The one split that networks record; None where they record none, or several that nobody asks for."""
    splits = {name: split for name, split in found.items() if split is not None}
    # what is held out follows from the share alone
    laws = {name: (split.share, () if flags.part == "holdout" else split.left_out) for name, split in splits.items()}
    if len(set(laws.values())) <= 1:
        return next(iter(splits.values()), None)
    if flags.part is None:
        return None
    said = ", ".join(f"{name} {share:g} with {len(left)} copies left out" for name, (share, left) in laws.items())
    raise UsageError(f"--part {flags.part}: expected networks that were trained with one data.holdout, got {said}")


def open_images(
    data: str | Path,
    vae: Any,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    kind: str | None = None,
    part: SplitPart | None = None,
    **fields: Any,
) -> Source:
    """Open images as `vae` takes them: its channels, and decoded as its record says (value range, background, resize).

    Args:
        data: a folder, zip, list file, parquet or arrow files, tar shards, or a hub dataset: see `open_source`.
        vae: what `load_autoencoder` gave.
        kind, fields: as for `open_source`; `frames=17` opens the clips of videos.
        part: of images that its training split (`data.holdout`), only those that it trained on (`train`) or those held
            out (`holdout`).

    Raises:
        UsageError: nothing is there, or it is none of these, or the network records no split of such images.
        WorkError: it holds no image.

    >>> from ldm_vae import load_autoencoder, open_images
    >>> photos = open_images("photos", load_autoencoder("my-vae"))
    >>> len(photos), photos.key(0)
    (12, 'img_0000.png')
    """
    # how images are decoded the network decides too, so those fields are not the source's alone
    flagged = {name: fields.pop(name) for name in [*fields] if name in DataFlags.__dataclass_fields__}
    flags = DataFlags(
        image_column=image_column, caption_column=caption_column, split=split, kind=kind, part=part,
        data_fields=fields, **flagged,
    )  # fmt: skip
    return preparation_of({"": vae}, flags).open(data)


def preparation_of_store(identity: str, vae: Any, flags: DataFlags = NO_FLAGS) -> Preparation:
    """The preparation that decodes a latent store's images again: as its identity says, unless flags say otherwise.
    Where the network records something else than the store, that is among the notes.

    Raises:
        UsageError: a flag asks for other channels than the network takes.
    """
    known = decoding_of(identity)
    if known is None:  # another program's latents: as the network records
        return preparation_of({"of the store": vae}, flags)
    flags = replace(flags, jpeg_draft=flags.jpeg_draft or known.jpeg_draft)
    found = _decide([("the store", known)], image_channels(vae), "the VAE of the store", flags)
    own = known if (found_own := recorded(vae)) is None else found_own.decoding
    notes = [
        f"{field}: {shown(getattr(known, field))}, as the store says; its VAE records {shown(getattr(own, field))}"
        for field in SETTABLE
        if getattr(flags, field) is None and getattr(own, field) != getattr(known, field)
    ]
    return replace(found, notes=(*found.notes, *notes))


def plain(flags: DataFlags) -> Preparation:
    """The preparation where no network is concerned: flags, else the defaults."""
    return _decide([], flags.channels or DEFAULT.channels, "", flags)


def _decide(
    records: Sequence[tuple[str, Decoding]],
    channels: int,
    taker: str,
    flags: DataFlags,
    alpha: bool = False,
    sample_rate: int | None = None,
) -> Preparation:
    """alpha, sample_rate: of networks without a record."""
    if flags.channels not in (None, channels):
        raise UsageError(f"--channels: expected {channels}, which {taker} takes, got {flags.channels}")
    chosen: dict[str, Any] = {"alpha": alpha, "sample_rate": sample_rate}
    notes = []
    for field in (*SETTABLE, *OF_CLIPS, *OF_SOUNDS):
        given, said = getattr(flags, field), [(name, getattr(found, field)) for name, found in records]
        if given is not None:
            chosen[field] = given
            notes += [
                f"{field} is {shown(given)}, as --{flag_of(field)} says; {name} records {shown(value)}"
                for name, value in said
                if value != given
            ]
        elif said:
            (first, chosen[field]), *others = said
            for other, value in others:
                if value != chosen[field]:
                    flag = flag_of(field)
                    raise UsageError(
                        f"{field}: {first} records {shown(chosen[field])}, {other} {shown(value)}; --{flag} decides"
                    )
    decoding = Decoding(channels=channels, jpeg_draft=flags.jpeg_draft, **chosen)
    if decoding.jpeg_draft and decoding.resize == "none":
        raise UsageError("--jpeg_draft: decodes at another size, and resize is none: pixels are taken as they are")
    return Preparation(decoding, flags, tuple(notes))


def check_same(ours: str, mine: Decoding, theirs: str, other: Decoding, names: Mapping[str, str], hint: str) -> None:
    """Raise UsageError naming both where two differ in what they record.

    Args:
        names: what the caller calls a field (`value_range` => `data.value_range`); those not named as they are.
        hint: what would do.
    """
    for field in SETTABLE:
        here, there = getattr(mine, field), getattr(other, field)
        if here != there:
            name = names.get(field, field)
            raise UsageError(f"{name}: {ours} {shown(here)}, {theirs} records {shown(there)}; {hint}")


def shown(value: Any) -> str:
    """Format a value for a sentence."""
    if value is None:
        return "that of the file's number type"
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{number:g}" for number in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- with a network ---------------------------------------------------------------------------------------------------

_ATTRIBUTE = "_ldm_vae_preprocessing"


def record(vae: Network, found: Preprocessing | None) -> Network:
    """Attach a record to a network in memory (None: it has none); returns the network.

    Raises:
        UsageError: the record is of another number of channels.
    """
    if found is not None and found.channels != (expected := image_channels(vae)):
        raise UsageError(f"{FILE}: `channels` is {found.channels}, and the network's in_channels {expected}")
    vae.__dict__[_ATTRIBUTE] = found
    return vae


def recorded(vae: Any) -> Preprocessing | None:
    """The record that came with a network, None where there was none."""
    found = vars(vae).get(_ATTRIBUTE)  # not getattr: diffusers looks into a config that anybody may have written
    assert found is None or isinstance(found, Preprocessing)
    return found


def has_alpha(vae: Any) -> bool:
    """True if the fourth channel of its images is alpha: by its record, without one by its class."""
    found = recorded(vae)
    return family_of(vae).alpha if found is None else found.decoding.alpha
