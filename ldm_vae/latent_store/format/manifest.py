"""manifest.json: what a latent store is, what it was made with, and where its rows are.

*Identity* is compared whenever something is added: another encoder, preprocessing, resolution or dtype is refused with
the difference named. What is *recorded* is never compared: a decoder-only fine-tune or a new version of this tool keeps
every store valid. docs/latent_store_format.md describes each field for readers in other languages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.core import config
from ldm_vae.core.config import Section
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.file_record import FileRecord
from ldm_vae.core.files import LARGEST as LARGEST_FILE
from ldm_vae.core.files import read_bytes
from ldm_vae.core.paths import nearest_path
from ldm_vae.core.validation import (
    HEAD,
    check_model_config,
    disguise,
    parse_json,
)
from ldm_vae.latent_store.format.codes import Usage
from ldm_vae.latent_store.format.identity import LARGEST, Identity
from ldm_vae.latent_store.format.layout import EXTENSIONS, FORMAT, VERSION
from ldm_vae.latent_store.format.layout import MANIFEST as MANIFEST  # part of this module's interface
from ldm_vae.latent_store.format.statistics import Measured
from ldm_vae.latent_store.storage.places import Place, storage_at


class SourceIdentity(Section):
    """Identity of the encoded source: number of samples, SHA-256 over their keys in order, each with a newline."""

    samples: int = Field(ge=0)
    keys: str


class Settings(Section):
    """Settings that units were computed with. Equal settings promise equal bytes, others equality to rounding."""

    batch_size: int = Field(gt=0)
    threads: int = Field(gt=0)
    device: str
    memory_format: str
    torch: str


class Recorded(Section):
    """Provenance that a reader uses or shows and nothing compares."""

    vae: str
    """The VAE as it was named on the command line."""
    data: str
    """The data as they were named on the command line."""
    decoder: str
    """SHA-256 of the decoder's and post_quant_conv's tensors."""
    normalisation: dict[str, Any]
    """The VAE's own normalisation (`Normalisation.to_config`); empty where it names none."""
    tool: str
    """Version of ldm-vae that began the store."""
    claimed: bool = False
    """The latents came from another program without an identity; that they are of this VAE is what the user said."""

    @model_validator(mode="after")
    def _check(self) -> Recorded:
        mean = self.normalisation.get("latents_mean")
        check_model_config(self.normalisation | {"latent_channels": len(mean) if isinstance(mean, list) else 0})
        if self.normalisation:
            Normalisation.from_config(self.normalisation, "normalisation")
        return self


class ShardRecord(Section):
    """Rows of one unit that share one latent shape; the files are shards/NAME.EXTENSION."""

    name: str = Field(pattern=r"^[0-9]{8}(-[0-9]+-[0-9]+x[0-9]+(x[0-9]+)?)?$")
    unit: int
    rows: int
    shape: tuple[int, ...]
    """Latent shape c, h, w, of clips c, t, h, w, of sounds c, n."""
    resolution: int
    """The resolution it was made for."""
    size: tuple[int, int]
    """Height and width of its crops in pixels; of sounds 1 and the samples of an excerpt."""
    frames: int | None = None
    """Frames of its clips; absent of images."""
    files: dict[str, FileRecord]
    """By extension: safetensors, parquet, arrow."""
    removed: tuple[int, ...] = ()
    """Rows that an update has taken out, ascending."""

    @model_validator(mode="after")
    def _check(self) -> ShardRecord:
        if set(self.files) != {*EXTENSIONS}:
            raise ValueError(f"shard {self.name}: expected the files {', '.join(EXTENSIONS)}")
        numbers = (self.rows, *self.shape, *self.size, self.resolution, self.frames or 1)
        ranks = (2, 3) if self.frames is None else (4,)
        if not all(0 < number < LARGEST for number in numbers) or len(self.shape) not in ranks or self.unit < 0:
            raise ValueError(f"shard {self.name}: no shard has {self.rows} rows of shape {self.shape}")
        if any(a >= b for a, b in itertools.pairwise((-1, *self.removed, self.rows))):
            raise ValueError(f"shard {self.name}: removed rows are ascending and below {self.rows}")
        return self

    @property
    def group(self) -> tuple[int, ...]:
        """Resolution, height and width, and of clips their frames: what its rows share."""
        return self.resolution, *self.size, *([] if self.frames is None else [self.frames])

    @property
    def live(self) -> int:
        """Number of rows that are still part of the store."""
        return self.rows - len(self.removed)

    @property
    def live_rows(self) -> npt.NDArray[np.int64]:
        """The rows that are still part of the store, ascending."""
        return np.setdiff1d(np.arange(self.rows), self.removed)

    def without(self, rows: Sequence[int]) -> ShardRecord:
        """The same shard, these rows taken out too."""
        return self.model_copy(update={"removed": tuple(sorted({*self.removed, *rows}))}) if rows else self

    @property
    def stored_bytes(self) -> int:
        """Size of all its files together."""
        return sum(file.bytes for file in self.files.values())


class Manifest(Section):
    """The whole of manifest.json."""

    format: Literal["ldm-vae latent store"] = "ldm-vae latent store"
    version: int = VERSION
    complete: bool = False
    identity: Identity
    source: SourceIdentity
    recorded: Recorded
    settings: tuple[Settings, ...] = ()
    units: int = Field(0, ge=0)
    """Units so far: the number of the next one."""
    samples: int = Field(0, ge=0)
    quarantined: int = Field(0, ge=0)
    columns: dict[str, str] = Field(default_factory=dict)
    statistics: dict[str, Any] | None = None
    shards: tuple[ShardRecord, ...] = ()

    @property
    def contents(self) -> str:
        """Part of a sentence: a sample's kind and shape."""
        shapes = [*dict.fromkeys("x".join(map(str, shard.shape)) for shard in self.shards)]
        several = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        return f"{self.identity.store} {''.join(shapes[:1])}{several} in {self.identity.dtype}"

    def __repr__(self) -> str:
        state, count = "" if self.complete else ", not finished", len(self.shards)
        shards = "1 shard" if count == 1 else f"{count:,} shards"
        return f"Manifest({self.samples:,} samples in {shards}: {self.contents}{state})"

    __str__ = __repr__

    def check_contents(self) -> None:
        """Raises ValueError unless the parts of a finished store agree: names, shapes and counts of its shards, its
        statistics and the normalisation."""
        names, shapes = [shard.name for shard in self.shards], {shard.shape for shard in self.shards}
        if len({*names}) < len(names):
            raise ValueError("shards: two have one name")
        if (live := sum(shard.live for shard in self.shards)) != self.samples or not live:
            raise ValueError(f"samples: {self.samples:,}, its shards have {live:,}")
        if self.identity.codes is not None:
            usage = config.validate(Usage, self.statistics or {}, "statistics")
            good = usage.codes == self.identity.codes and all(
                0 < len(one) - self.identity.axes < 4 and self.identity.codebooks in (None, one[0]) for one in shapes
            )
            images = usage.images
        else:
            measured = config.validate(Measured, self.statistics or {}, "statistics")
            used, channels = self.recorded.normalisation.get("latents_mean"), len(measured.mean)
            images, good = (
                measured.images,
                all(len(one) in (2, 3, 4) and one[0] * self.identity.patch**2 == channels for one in shapes),
            )
            good = good and (used is None or len(used) == channels * self.recorded.normalisation.get("frames", 1))
        if not good:
            raise ValueError("shards, statistics and normalisation: expected one number of channels, or of codes")
        if images != live * len(self.identity.views):
            raise ValueError(f"statistics: of {images:,} latents, the store has {live * len(self.identity.views):,}")

    @property
    def batch_size(self) -> int:
        """Of the newest settings; without any (latents of another program) a usual one."""
        return self.settings[-1].batch_size if self.settings else 8

    @property
    def normalisation(self) -> Normalisation:
        """The one normalisation that the VAE named when the store was made. Raises UsageError where it named none."""
        if not self.recorded.normalisation:
            raise UsageError(
                "normalisation: the VAE of this store names none; LatentDataset(..., normalisation=KIND) takes what "
                "was measured on the store: scale, shift or channel"
            )
        return Normalisation.from_config(self.recorded.normalisation, "the store's recorded.normalisation")

    @property
    def for_decoding(self) -> Normalisation | None:
        """Normalisation for a reader that only decodes: any will do where the VAE names none; None is the VAE's own."""
        return None if self.recorded.normalisation else Normalisation(1.0)

    def to_bytes(self) -> bytes:
        """JSON with one line per shard, so that a manifest of thousands of shards can still be read and compared."""
        tree = self.model_dump(mode="json")
        shards = tree.pop("shards")
        head = json.dumps(tree, indent=2, ensure_ascii=False)
        # a field that images do not have is left out, so that their stores stay as they were
        known = ({key: value for key, value in shard.items() if value is not None} for shard in shards)
        lines = ",\n    ".join(json.dumps(shard, ensure_ascii=False) for shard in known)
        body = f"[\n    {lines}\n  ]" if shards else "[]"
        return f'{head[:-2]},\n  "shards": {body}\n}}\n'.encode()


def has_manifest(store: Place) -> bool:
    """True if a store, finished or not, was begun there."""
    return storage_at(store).sizes()(MANIFEST) >= 0


def read_manifest(store: str | Path) -> Manifest:
    """Read and check STORE/manifest.json, of a folder or of a URL.

    Raises:
        UsageError: there is no store, or a newer version of this tool wrote it.
        WorkError: the manifest is damaged, or its URL cannot be read.

    >>> from ldm_vae import load_autoencoder, open_images, read_manifest, write_store
    >>> vae = load_autoencoder("my-vae")
    >>> _ = write_store(vae, open_images("photos", vae), "my-latents", resolution=32)
    >>> manifest = read_manifest("my-latents")
    >>> manifest.samples, manifest.normalisation.kind
    (12, 'scale')
    """
    place = place_of(store)
    content = _local(place) if isinstance(place, Path) else _remote(place)
    try:
        tree = parse_json(content)
    except ValueError as error:
        what = disguise(content[:HEAD])
        raise WorkError(f"store {store}: manifest.json cannot be read: {f'it {what}' if what else error}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UsageError(f"store {store}: manifest.json is not that of a latent store")
    if tree.get("version") != VERSION:
        raise UsageError(
            f"store {store}: format version {tree.get('version')}, this program reads version {VERSION}; "
            "use the version of ldm-vae that wrote it, or a newer one"
        )
    try:
        manifest = Manifest.model_validate(tree)
        if manifest.complete:
            manifest.check_contents()
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise WorkError(f"store {store}: manifest.json is damaged: `{where}`: {first['msg']}") from error
    except ValueError as error:
        raise WorkError(f"store {store}: manifest.json is damaged: {error}") from error


def read_finished(store: str | Path) -> Manifest:
    """As `read_manifest`, of a store that was finished: only such a one is read, copied, checked or sent anywhere.

    Raises:
        UsageError: as `read_manifest`, and where the encode that began it has not ended.
    """
    manifest = read_manifest(store)
    if not manifest.complete:
        raise UsageError(f"store {store}: not finished; run the `ldm-vae encode` command that began it again")
    return manifest


def place_of(store: Place) -> Place:
    """A folder as a Path (`file://` as well), a store elsewhere as its URL."""
    if not isinstance(store, str) or "://" not in store:
        return Path(store)
    if store.startswith("file://"):
        return Path(unquote(urlsplit(store).path))
    return store.rstrip("/")


def _local(store: Path) -> bytes:
    try:
        return read_bytes(store / MANIFEST, LARGEST_FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"store {store}: no manifest.json there{nearest_path(store)}; `ldm-vae encode VAE DATA {store}` makes one"
        ) from error
    except OSError as error:
        raise WorkError(f"store {store}: manifest.json cannot be read: {error}") from error


def _remote(store: str) -> bytes:
    # fsspec, which readers of folders have no need of
    from ldm_vae.core import fsspec_files
    from ldm_vae.latent_store.storage.object_store import WHOLE

    try:
        return fsspec_files.read(f"{store}/{MANIFEST}")
    except fsspec_files.AbsentError as error:
        there = "`ldm-vae store push` it" if urlsplit(store).scheme == "hf" else "copy it there, its manifest.json last"
        made = f"write one to a folder, then {there}"
        if urlsplit(store).scheme in WHOLE:
            made = f"`ldm-vae encode VAE DATA {store}` makes one"
        raise UsageError(f"store {store}: no manifest.json there; {made}") from error


def write_manifest(store: Place, manifest: Manifest) -> None:
    """Replace STORE/manifest.json in one step. Raises WorkError for one that would not be read again."""
    if manifest.complete:
        try:
            manifest.check_contents()
        except ValueError as error:
            raise WorkError(f"store {store}: cannot be finished: {error}") from error
    storage_at(store).replace(MANIFEST, manifest.to_bytes())


def check_identity(store: Place, existing: Identity, wanted: Identity) -> None:
    """Raises UsageError naming what differs between a store and what would be added to it."""
    before, after = existing.model_dump(mode="json"), wanted.model_dump(mode="json")
    differing = [
        f"{name} is {_short(before[name])}, not {_short(after[name])}" for name in before if before[name] != after[name]
    ]
    if differing:
        raise UsageError(
            f"OUT {store}: already holds a latent store of another identity: {'; '.join(differing)}; "
            "choose another OUT, or repeat the settings it was begun with"
        )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text  # a SHA-256
