"""`ldm-vae store verify|repair|stats|merge|split|convert|push|pull`: maintain latent stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ldm_vae.commands.store import sharing
from ldm_vae.commands.store.sharing import folder
from ldm_vae.core.request import Action, argument, flag
from ldm_vae.data.flags import DataFlags, data_flags

HELP = "verify, repair, merge, split, convert or share latent stores, or print their statistics"
DESCRIPTION = f"""\
  ldm-vae store verify my-latents    # read everything again: checksums, rows, finite values
  ldm-vae store verify my-latents --reencode 100    # also encode 100 random images again and compare
  ldm-vae store repair my-latents    # rebuild damaged parts only
  ldm-vae store stats my-latents     # contents, and the measured scaling with confidence intervals
  ldm-vae store merge one two out    # one store from several; common images are copied once
  ldm-vae store merge one out        # compact: drop the rows that updates have removed
  ldm-vae store split my-latents out --parts 4    # out/0 to out/3, consecutive whole units
  ldm-vae store split my-latents out --rows 0:1000
  ldm-vae store split my-latents out --where label=3 --where source=photos
  ldm-vae store convert my-latents out --to parquet    # prints what is lost; more formats: --help
  ldm-vae store convert out my-latents --from parquet
{sharing.DESCRIPTION}"""

# the files of latent_store/convert/formats
Format = Literal["parquet", "webdataset", "lightningdit", "kohya", "musubi", "finetrainers"]
FORMATS = ", ".join(get_args(Format))
FOR_A_MODEL = ("kohya", "musubi", "finetrainers")
# their MODELS, in this order
Model = Literal[
    "sd", "sdxl", "sd3", "flux", "hv", "hv15", "wan", "k5", "ltx_video", "hunyuan_video", "cogvideox",
]  # fmt: skip
Names = Literal["sized", "plain", "old"]


@dataclass(frozen=True, kw_only=True)
class _Origins:
    """Current locations of a store's VAE and images."""

    vae: str | None = flag("location of the store's VAE (default: the one in the manifest)", metavar="VAE")
    data: str | None = flag("location of the store's images (default: the one in the manifest)", metavar="DATA")
    flags: DataFlags = data_flags(recorded="the store")


@dataclass(frozen=True, kw_only=True)
class Verify(_Origins):
    """A store to verify."""

    reencode: int | None = flag("encode N random images again and compare", metavar="N")
    store: str = argument("STORE", "folder or URL of a latent store")


@dataclass(frozen=True, kw_only=True)
class Repair(_Origins):
    """A store to repair."""

    store: str = argument("STORE", "folder of a latent store")


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A store to describe."""

    store: str = argument("STORE", "folder or URL of a latent store")
    json: bool = flag("print JSON", False)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Stores to merge."""

    stores: tuple[str, ...] = argument(
        "STORE", "folders or URLs of stores with equal identity; VAE and data are those of the first", nargs="+"
    )
    out: str = argument("OUT", "a folder that does not exist yet, or a URL of an object store with nothing there")


@dataclass(frozen=True, kw_only=True)
class Split:
    """A store to split, and the selection of samples."""

    store: str = argument("STORE", "folder of a latent store; it is not changed")
    parts: int | None = flag("N stores OUT/0, OUT/1, ... of consecutive whole units", one_of="ways", metavar="N")
    rows: str | None = flag("samples FIRST to STOP, STOP excluded", one_of="ways", metavar="FIRST:STOP")
    where: tuple[str, ...] | None = flag(
        "samples with this value (for a list: with this element); repeated conditions must all hold",
        one_of="ways", metavar="COLUMN=VALUE", action="append",
    )  # fmt: skip
    out: str = argument("OUT", "a folder that does not exist yet")


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Latents to convert, and the format."""

    source: str = argument("SRC", "a latent store (--to), or latents in another format (--from)")
    to_format: Format | None = flag(
        f"write SRC in this format: {FORMATS}", name="to", one_of="directions", metavar="FORMAT"
    )
    from_format: Format | None = flag(
        f"SRC is in this format: {FORMATS}; OUT becomes a store", name="from", one_of="directions", metavar="FORMAT"
    )
    model: Model | None = flag("--to kohya, musubi or finetrainers: the diffusion model that the cache is for")
    names: Names | None = flag(
        "--to kohya: file names, by sd-scripts version: sized 0.10.2 and later (default), plain 0.10.0, old 0.7.0"
    )
    vae: str | None = flag("--from: the VAE of the latents, if the files do not name it", metavar="VAE")
    shard_size: int = flag("--from: samples per unit (2048)", 2048, metavar="N")
    out: str = argument("OUT", "a folder that does not exist yet")


def _verify(request: Verify) -> None:
    from ldm_vae.core.errors import WorkError
    from ldm_vae.latent_store import read_manifest, verify

    problems = verify(request.store)
    for problem in problems:
        print(f"{problem.file}: {problem.what}")
    if problems:
        raise WorkError(f"store {request.store}: {len(problems)} problem(s), the first in {problems[0].file}")
    manifest = read_manifest(request.store)
    print(f"{request.store}: all {len(manifest.shards):,} shards with {manifest.samples:,} samples are sound")
    if request.reencode is not None:
        _reencode(request, request.reencode)


def _reencode(request: Verify, count: int) -> None:
    import torch

    from ldm_vae.core.errors import UsageError, WorkError
    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.format.manifest import place_of
    from ldm_vae.latent_store.maintain.provenance import find_source, find_vae
    from ldm_vae.latent_store.maintain.spot_check import reencode, unit_of

    if count < 1:
        raise UsageError(f"--reencode: expected at least 1, got {count}")
    store, manifest = place_of(request.store), read_manifest(request.store)
    vae = find_vae(store, manifest, request.vae)
    source = find_source(manifest, vae, request.data, request.flags)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = reencode(store, manifest, vae, source, count, device=device)
    for problem in found.problems:
        print(f"{problem.file}: {problem.what}")
    print(
        f"{store}: {found.samples:,} samples encoded again, {found.identical:,} to the same bits, "
        f"the largest difference is {found.worst:.2g} {unit_of(manifest)}"
    )
    if found.problems:
        raise WorkError(f"store {store}: {len(found.problems)} sample(s) are not what their images give")


def _repair(request: Repair) -> None:
    import torch

    from ldm_vae.core.errors import WorkError
    from ldm_vae.latent_store import read_manifest, verify
    from ldm_vae.latent_store.maintain.provenance import find_source, find_vae
    from ldm_vae.latent_store.maintain.repair import repair
    from ldm_vae.latent_store.write.encoder import default_threads, default_workers

    store, manifest = folder(request.store, "STORE"), read_manifest(request.store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = []

    def vae() -> object:
        loaded.append(find_vae(store, manifest, request.vae))
        return loaded[0]

    done = repair(
        store,
        vae=vae,
        source=lambda: find_source(manifest, loaded[0], request.data, request.flags),
        num_workers=default_workers(1),
        encode_threads=default_threads(1, device),
        device=device,
    )
    for file in done.copied:
        print(f"{file}: written again from its copy")
    for unit in done.encoded_units:
        print(f"unit {unit}: encoded again")
    for key in done.lost:
        print(f"{key}: has left the store, since its image is gone or has changed; `encode --update` takes it up")
    problems = verify(store)
    if problems:
        raise WorkError(f"store {store}: still damaged: {problems[0].file} {problems[0].what}")
    print(f"{store}: {'nothing to repair, ' if not (done.copied or done.encoded_units) else ''}sound")


def _stats(request: Stats) -> None:
    import json

    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.maintain.summary import describe

    manifest = read_manifest(request.store)
    if request.json:
        print(json.dumps(manifest.model_dump(mode="json", exclude={"shards"}), indent=2))
    else:
        print(describe(request.store, manifest))


def _merge(request: Merge) -> None:
    from ldm_vae.latent_store.format.manifest import place_of
    from ldm_vae.latent_store.maintain.merge_split import merge

    done = merge([place_of(store) for store in request.stores], place_of(request.out))
    print(f"{request.out}: {done.samples:,} samples in {len(done.shards):,} shards, {done.quarantined:,} quarantined")


def _split(request: Split) -> None:
    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.format.manifest import place_of
    from ldm_vae.latent_store.maintain.merge_split import split, take_samples, take_where

    store, out = place_of(request.store), place_of(request.out)
    made = [out]
    if request.parts is not None:
        made = [*split(store, folder(request.out, "OUT"), request.parts)]
    elif request.rows is not None:
        take_samples(store, out, *_range(request.rows))
    else:
        take_where(store, out, [_condition(text) for text in request.where or ()])
    for path in made:
        manifest = read_manifest(path)
        print(f"{path}: {manifest.samples:,} samples in {len(manifest.shards):,} shards")
    if left := read_manifest(store).quarantined:
        print(f"the {left:,} quarantined images stay with {store}")


def _convert(request: Convert) -> None:
    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store.convert.conversion import convert_from, convert_to
    from ldm_vae.latent_store.convert.formats import Options, kohya
    from ldm_vae.latent_store.format.manifest import place_of

    source, out = request.source, folder(request.out, "OUT")
    for name, owners in (("model", FOR_A_MODEL), ("names", ("kohya",))):
        if request.to_format not in owners and getattr(request, name) is not None:
            raise UsageError(f"--{name}: belongs to --to {', '.join(owners)}")
    if request.to_format is not None:
        if request.vae is not None:
            raise UsageError("--vae: belongs to --from; a store knows its VAE")
        options = Options(model=request.model, names=request.names or "sized")
        lost = convert_to(place_of(source), out, request.to_format, options)
        print(f"{out}: the latents of {source} as {request.to_format}; what it does not carry:")
        for phrase in lost:
            print(f"  {phrase}")
        if request.to_format == "kohya":
            print(kohya.readers(options))
        return
    assert request.from_format is not None  # argparse asks for one of the two
    vae = None if request.vae is None else load_autoencoder(request.vae)
    manifest, notes = convert_from(
        folder(source, "SRC"),
        out,
        request.from_format,
        vae=vae,
        vae_name=request.vae or "",
        shard_size=request.shard_size,
    )
    for note in notes:
        print(note)
    print(f"{out}: {manifest.samples:,} samples in {len(manifest.shards):,} shards")
    if manifest.recorded.claimed:
        print(f"that they are of {manifest.recorded.vae} is your word: the latents carry no identity")


def _range(text: str) -> tuple[int, int]:
    from ldm_vae.core.errors import UsageError

    first, _, stop = text.partition(":")
    try:
        return int(first), int(stop)
    except ValueError as error:
        raise UsageError(f"--rows: expected FIRST:STOP, such as 0:1000, got {text!r}") from error


def _condition(text: str) -> tuple[str, str]:
    from ldm_vae.core.errors import UsageError

    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--where: expected COLUMN=VALUE, got {text!r}")
    return name, value


ACTIONS = {
    "verify": Action("read all files and compare them with the manifest", Verify, _verify),
    "stats": Action("print contents and statistics", Stats, _stats),
    "repair": Action("rebuild damaged parts", Repair, _repair),
    "merge": Action("combine stores, or drop a store's removed rows", Merge, _merge),
    "split": Action("copy parts of a store into new stores", Split, _split),
    "convert": Action("convert a store to another program's format, or back", Convert, _convert),
    **sharing.ACTIONS,
}
