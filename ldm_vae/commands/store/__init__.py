"""`ldm-vae store verify|repair|stats|merge|split|convert|push|pull`: maintain latent stores."""

from __future__ import annotations

import argparse

from ldm_vae.commands.store import sharing
from ldm_vae.data.flags import DataFlags, add_data_arguments

HELP = "verify, repair, merge, split, convert or share latent stores, or print their statistics"
DESCRIPTION = f"""\
  ldm-vae store verify my-latents    # reads everything again: checksums, rows, finite values
  ldm-vae store verify my-latents --reencode 100    # and encodes 100 random images again
  ldm-vae store repair my-latents    # makes again what is damaged, and only that
  ldm-vae store stats my-latents     # what is in it, and the measured scaling with its confidence intervals
  ldm-vae store merge one two out    # one store of several; an image that both hold is taken once
  ldm-vae store merge one out        # one store without the rows that updates have taken out
  ldm-vae store split my-latents out --parts 4    # out/0 to out/3, of consecutive whole units
  ldm-vae store split my-latents out --rows 0:1000
  ldm-vae store split my-latents out --where label=3 --where source=photos
  ldm-vae store convert my-latents out --to parquet    # or webdataset, lightningdit, kohya: says what is lost
  ldm-vae store convert out my-latents --from parquet
{sharing.DESCRIPTION}"""

FORMATS = ("parquet", "webdataset", "lightningdit", "kohya")  # the files of latent_store/formats, without importing it
MODELS = ("sd", "sdxl", "sd3", "flux")
NAMES = ("sized", "plain", "old")  # of formats/kohya.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser("verify", help="read everything again and compare with the manifest")
    stats = actions.add_parser("stats", help="print what is in it and its statistics")
    repair = actions.add_parser("repair", help="make again what is damaged")
    for action in (verify, repair):
        action.add_argument("--vae", metavar="VAE", help="the store's VAE (default: where the manifest says it was)")
        action.add_argument("--data", metavar="DATA", help="the store's images (default: where they were)")
        add_data_arguments(action, recorded="the store")
    verify.add_argument("--reencode", type=int, metavar="N", help="encode N random images again and compare")
    for action, where in ((verify, "folder or URL"), (repair, "folder"), (stats, "folder or URL")):
        action.add_argument("store", metavar="STORE", help=f"{where} of a latent store")
    stats.add_argument("--json", action="store_true", help="as JSON, for programs")
    merge = actions.add_parser("merge", help="one store of several, or of one without its removed rows")
    merge.add_argument("stores", metavar="STORE", nargs="+", help="of one identity; VAE and data are the first one's")
    split = actions.add_parser("split", help="some of a store's samples as stores of their own")
    split.add_argument("store", metavar="STORE", help="folder of a latent store; it is not changed")
    ways = split.add_mutually_exclusive_group(required=True)
    ways.add_argument("--parts", type=int, metavar="N", help="N stores OUT/0, OUT/1, ... of consecutive whole units")
    ways.add_argument("--rows", metavar="FIRST:STOP", help="these samples, STOP excluded")
    ways.add_argument(
        "--where",
        metavar="COLUMN=VALUE",
        action="append",
        help="samples with this value (of a list: with this element); several must all hold",
    )
    convert = actions.add_parser("convert", help="a store in another program's format, or a store of such latents")
    convert.add_argument("source", metavar="SRC", help="a latent store (--to), or latents in another format (--from)")
    directions = convert.add_mutually_exclusive_group(required=True)
    for flag, what in (("--to", "write SRC in this format"), ("--from", "SRC is in this format, OUT becomes a store")):
        directions.add_argument(flag, choices=FORMATS, dest=flag.strip("-") + "_format", help=what)
    convert.add_argument("--model", choices=MODELS, help="--to kohya: the diffusion model that the cache is for")
    convert.add_argument(
        "--names",
        choices=NAMES,
        help="--to kohya: as sd-scripts finds them: sized 0.10.2 and later (default), plain 0.10.0, old 0.7.0",
    )
    convert.add_argument("--vae", metavar="VAE", help="--from: the VAE of the latents, where they do not carry it")
    convert.add_argument("--shard_size", type=int, default=2048, metavar="N", help="--from: samples per unit (2048)")
    for action in (merge, split, convert):
        action.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    sharing.add_arguments(actions)


def run(arguments: argparse.Namespace) -> None:
    verbs = {"verify": _verify, "repair": _repair, "stats": _stats}
    verbs |= {"merge": _merge, "split": _split, "convert": _convert}
    verbs |= {"push": sharing.push, "pull": sharing.pull}
    verbs[arguments.action](arguments)


def _verify(arguments: argparse.Namespace) -> None:
    from ldm_vae.core.errors import WorkError
    from ldm_vae.latent_store import read_manifest, verify

    problems = verify(arguments.store)
    for problem in problems:
        print(f"{problem.file}: {problem.what}")
    if problems:
        raise WorkError(f"store {arguments.store}: {len(problems)} problem(s), the first in {problems[0].file}")
    manifest = read_manifest(arguments.store)
    print(f"{arguments.store}: all {len(manifest.shards):,} shards with {manifest.samples:,} samples are sound")
    if arguments.reencode is not None:
        _reencode(arguments)


def _reencode(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from ldm_vae.core.errors import UsageError, WorkError
    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.maintain.provenance import find_source, find_vae
    from ldm_vae.latent_store.maintain.spot_check import reencode, unit_of

    if arguments.reencode < 1:
        raise UsageError(f"--reencode: expected at least 1, got {arguments.reencode}")
    store, manifest = Path(arguments.store), read_manifest(arguments.store)
    vae = find_vae(store, manifest, arguments.vae)
    source = find_source(manifest, vae, arguments.data, DataFlags.of(arguments))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = reencode(store, manifest, vae, source, arguments.reencode, device=device)
    for problem in found.problems:
        print(f"{problem.file}: {problem.what}")
    print(
        f"{store}: {found.samples:,} samples encoded again, {found.identical:,} to the same bits, "
        f"the largest difference is {found.worst:.2g} {unit_of(manifest)}"
    )
    if found.problems:
        raise WorkError(f"store {store}: {len(found.problems)} sample(s) are not what their images give")


def _repair(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from ldm_vae.latent_store import read_manifest, verify
    from ldm_vae.latent_store.maintain.provenance import find_source, find_vae
    from ldm_vae.latent_store.maintain.repair import repair
    from ldm_vae.latent_store.write.encoder import default_threads, default_workers

    store, manifest = Path(arguments.store), read_manifest(arguments.store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = []

    def vae() -> object:
        loaded.append(find_vae(store, manifest, arguments.vae))
        return loaded[0]

    done = repair(
        store,
        vae=vae,
        source=lambda: find_source(manifest, loaded[0], arguments.data, DataFlags.of(arguments)),
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
    sound = "sound" if not problems else f"still damaged: {problems[0].file} {problems[0].what}"
    print(f"{store}: {'nothing to repair, ' if not (done.copied or done.encoded_units) else ''}{sound}")


def _stats(arguments: argparse.Namespace) -> None:
    import json

    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.maintain.summary import describe

    manifest = read_manifest(arguments.store)
    if arguments.json:
        print(json.dumps(manifest.model_dump(mode="json", exclude={"shards"}), indent=2))
    else:
        print(describe(arguments.store, manifest))


def _merge(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ldm_vae.latent_store.maintain.merge_split import merge

    done = merge([Path(store) for store in arguments.stores], Path(arguments.out))
    print(f"{arguments.out}: {done.samples:,} samples in {len(done.shards):,} shards, {done.quarantined:,} quarantined")


def _split(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ldm_vae.latent_store import read_manifest
    from ldm_vae.latent_store.maintain.merge_split import split, take_samples, take_where

    store, out = Path(arguments.store), Path(arguments.out)
    made = [out]
    if arguments.parts is not None:
        made = split(store, out, arguments.parts)
    elif arguments.rows is not None:
        take_samples(store, out, *_range(arguments.rows))
    else:
        take_where(store, out, [_condition(text) for text in arguments.where])
    for path in made:
        manifest = read_manifest(path)
        print(f"{path}: {manifest.samples:,} samples in {len(manifest.shards):,} shards")
    if left := read_manifest(store).quarantined:
        print(f"the {left:,} quarantined images stay with {store}")


def _convert(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from ldm_vae.autoencoder.model import load_autoencoder
    from ldm_vae.core.errors import UsageError
    from ldm_vae.latent_store.convert.conversion import convert_from, convert_to
    from ldm_vae.latent_store.convert.formats import Options, kohya

    source, out = Path(arguments.source), Path(arguments.out)
    for flag in ("model", "names"):
        if arguments.to_format != "kohya" and getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag}: belongs to --to kohya")
    if arguments.to_format is not None:
        if arguments.vae is not None:
            raise UsageError("--vae: belongs to --from; a store knows its VAE")
        options = Options(model=arguments.model, names=arguments.names or NAMES[0])
        lost = convert_to(source, out, arguments.to_format, options)
        print(f"{out}: the latents of {source} as {arguments.to_format}; what it does not carry:")
        for phrase in lost:
            print(f"  {phrase}")
        if arguments.to_format == "kohya":
            print(kohya.readers(options))
        return
    vae = None if arguments.vae is None else load_autoencoder(arguments.vae)
    manifest, notes = convert_from(
        source, out, arguments.from_format, vae=vae, vae_name=arguments.vae or "", shard_size=arguments.shard_size
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
