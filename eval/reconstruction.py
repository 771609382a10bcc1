"""Measure how well one or several VAEs reconstruct images, clips or sounds, with a fixed protocol.

    ldm-vae evaluate runs/demo/vae HELD_OUT --output runs/demo/report --resolution 64
    ldm-vae evaluate my-vae stabilityai/sd-vae-ft-mse PHOTOS --output compared --resolution 256
    accelerate launch -m ldm_vae evaluate my-vae PHOTOS --output measured
    ldm-vae evaluate my-video-vae my-vae CLIPS --output compared --resolution 64 --frames 17
    ldm-vae evaluate my-audio-vae MUSIC --output compared --excerpt 65536

Protocol: the mode of the posterior is decoded. Images are decoded as the VAEs record (flags override it), resized by
their short side (antialiased bicubic; not if the record says none) and centre-cropped to --resolution. Output is
clamped to [-1, 1] and rounded to 8 bits before every metric. Every image counts exactly once on any number of
processes. Means have 95 % intervals over images. With --frames, videos are clips of so many frames: metrics are of
frames, a clip's value is the mean over its own, and intervals are over clips. Sounds are excerpts that cover each file,
compared as they are decoded, each without the silence that fills its last one; intervals are over excerpts.

DIR then holds metrics.json (one object, or a list with one per VAE), metrics.md, images.jsonl (metrics of each image),
pictures/ and quarantine.jsonl. `ldm-vae report DIR` writes the HTML report.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm_vae.autoencoder.codebooks import keep_first
from ldm_vae.autoencoder.geometry import check_resolution, resolution_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.preparation import preparation_of
from ldm_vae.core.errors import UsageError, WorkError, run_program
from ldm_vae.core.launch import ON_THEIR_OWN, build_accelerator
from ldm_vae.core.ownership import own_together
from ldm_vae.core.progress import Progress
from ldm_vae.core.request import Parser
from ldm_vae.data.flags import DataFlags, add_data_arguments
from ldm_vae.data.quarantine import Quarantine, read_quarantine
from ldm_vae.data.source import Source
from ldm_vae.metrics import result
from ldm_vae.metrics.batches import image_batches, share_of, size_of, spread
from ldm_vae.metrics.evaluate import Evaluation, evaluate_reconstruction
from ldm_vae.metrics.linear import MEASURED, LinearFloor, fit_code, why_no_code
from ldm_vae.metrics.metric import Metric
from ldm_vae.metrics.pictures import keep_pictures
from ldm_vae.metrics.protocol import PINNED, VARIANTS, by_name
from ldm_vae.metrics.samples import keep_samples
from ldm_vae.metrics.select import NAMES, Weights, build_metrics, check, check_names, default_names, kind_of
from ldm_vae.metrics.titles import title
from ldm_vae.run import selection


def arguments() -> argparse.Namespace:
    parser = Parser(program="eval.reconstruction", description=__doc__)
    add = parser.add_argument
    add("vae", nargs="+", metavar="VAE", help="a diffusers folder, a run folder, a hub id or a single file")
    add("data", metavar="DATA", help="a folder of images or sounds, a dataset's hub id, parquet or tar files")
    add("--output", required=True, type=Path, metavar="DIR", help="where the results go")
    add("--resolution", type=int, help="side of the crops in pixels (default: the first VAE's sample_size)")
    add("--batch_size", type=int, default=8, help="images per process and step (8)")
    add("--num_workers", type=int, default=2, help="processes that decode images, per process (2)")
    add("--pictures", type=int, default=8, metavar="N", help="images kept to look at, or sounds to hear (8)")
    add("--max_images", type=int, help="measure the first N images of DATA only")
    add(
        "--metrics",
        metavar="NAME,...",
        help=f"default: of {', '.join(NAMES)} all that the signal has (alpha's of images that have it, temporal_l1 and "
        "flicker of clips, from si_sdr to pesq of sounds); or your module, as my_lab.sharpness",
    )
    add("--lpips_weights", metavar="PATH", help="the LPIPS trunk, where it is not found by itself")
    add(
        "--inception_weights", type=Path, metavar="PATH", help="weights-inception-2015-12-05-6726825d.pth: rFID and KID"
    )
    add("--dinov2", metavar="FOLDER", help="a DINOv2 as transformers has it, or its hub id: a Frechet distance in it")
    add("--clip", metavar="FOLDER", help="a CLIP as transformers has it, or its hub id: CMMD")
    add(
        "--protocol", default=PINNED.name, metavar="NAME",
        help=f"reproduce the numbers of others: {', '.join(VARIANTS)} (default: {PINNED.name}, which is pinned)",
    )  # fmt: skip
    add("--checkpoint", metavar=selection.METAVAR, help=selection.HELP)
    add("--codebooks", type=int, metavar="K", help="of residual codes, the first K codebooks (all)")
    add("--config", metavar="FOLDER", help="config.json of a single-file VAE of a shape of its own")
    add("--max_bad", type=float, default=1.0, help="share of unreadable images above which the work stops (1: never)")
    add_data_arguments(parser)
    found = parser.parse_intermixed_args()
    if found.batch_size < 1:
        raise UsageError(f"batch_size: expected at least 1, got {found.batch_size}")
    found.vae = [selection.at_checkpoint(vae, found.checkpoint) for vae in found.vae]
    found.metrics = None if found.metrics is None else found.metrics.split(",")
    check_names(found.metrics or NAMES)
    found.protocol = by_name(found.protocol)
    return found


def main() -> None:
    options = arguments()
    accelerator = build_accelerator(ddp_timeout=ON_THEIR_OWN)
    with own_together(options.output, "output", accelerator.process_index, accelerator.wait_for_everyone):
        evaluate(options, accelerator)


def evaluate(options: argparse.Namespace, accelerator: Accelerator) -> None:
    names = result.labels(options.vae)

    # --- everything that can be wrong is opened before the first image is measured ------------------------------------
    vaes = [load_autoencoder(vae, options.config) for vae in options.vae]
    if options.codebooks is not None:
        vaes = [keep_first(vae, options.codebooks, f"VAE {name}") for name, vae in zip(options.vae, vaes, strict=True)]
    preparation = preparation_of(dict(zip(options.vae, vaes, strict=True)), DataFlags.of(options))
    decoding, notes = preparation.decoding, list(preparation.notes)
    sounds = decoding.signal == "audio"
    if not sounds:
        options.resolution = resolution_of(options.resolution, vaes[0], options.vae[0])
    options.resolution = size_of(decoding, options.resolution)
    for vae in vaes:
        check_resolution(options.resolution, vae)
    options.signal = kind_of(decoding)
    options.metrics = options.metrics or default_names(**options.signal)
    check(options.metrics, options.resolution, **options.signal)
    if decoding.alpha:
        notes.append("alpha: metrics of colour are means over composites on black and on white, of whole sets on white")
    source = preparation.open(options.data)
    indices = range(min(len(source), options.max_images or len(source)))
    prepare(options.output, accelerator)
    quarantine_path = options.output / "quarantine.jsonl"  # shared by all ranks
    quarantine = Quarantine(len(indices), max_bad=options.max_bad, path=quarantine_path)

    # --- measure: one VAE after the other on the device, each rank its share of the images ----------------------------
    evaluations = []
    for name, vae in zip(names, vaes, strict=True):
        part = options.output / PARTS / f"{len(evaluations):03d}-{accelerator.process_index:06d}.jsonl"
        vae.to(accelerator.device)
        evaluations.append(measure(name, vae, source, indices, quarantine, part, options, accelerator))
        vae.cpu()

    # --- results: numbers, a table, and pictures of a fixed choice and of the worst -----------------------------------
    if accelerator.is_main_process:
        quarantined = len(read_quarantine(quarantine_path))
        notes += dict.fromkeys(filter(None, (why_no_code(vae, decoding.frames is not None) for vae in vaes)))
        data = {
            "source": options.data, "quarantined": quarantined, "preprocessing": preparation.identity, "notes": notes,
            **result.about_signal(decoding, options.resolution),
        }  # fmt: skip
        computed = result.settings(accelerator.device, options.batch_size) | result.command("eval.reconstruction")
        frames = decoding.frames
        results = [
            result.result(
                options.protocol, result.describe_vae(vae, name, path, frames), data, computed, evaluation, source.key
            )
            for name, vae, path, evaluation in zip(names, vaes, options.vae, evaluations, strict=True)
        ]
        merge_images(options.output)
        # pictures: usable images, evenly spread, and the first VAE's worst ones that are not among them; of sounds, who
        # are listened to one by one, few, from its worst to its best
        bad = {entry.key for entry in read_quarantine(quarantine_path)}
        usable = [index for index in indices if source.key(index) not in bad] if bad else indices
        kinds = {usable[place]: "shown" for place in spread(len(usable), options.pictures)}
        if sounds:
            kinds = ranked(options.output, names[0], evaluations[0].worst_by, options.pictures) or kinds
        else:
            kinds |= {index: "worst" for index, _ in evaluations[0].worst if index not in kinds}
        keep_pictures(
            options.output, vaes, source, kinds, build(options, accelerator), accelerator.device,
            resolution=options.resolution, batch_size=options.batch_size, protocol=options.protocol,
        )  # fmt: skip
        if not sounds:
            first = vaes[0].to(accelerator.device)
            keep_samples(
                options.output, first, evaluations[0].latents, options.resolution, accelerator.device, decoding.alpha,
                frames,
            )  # fmt: skip
        result.write(options.output / "metrics.md", result.markdown(results))
        result.write(options.output / "metrics.json", results[0] if len(results) == 1 else results)
        print("\n".join([result.plain(results), *notes]))
        print(f"\nwritten to {options.output}; to look at it: ldm-vae report {options.output}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def measure(
    name: str,
    vae: Any,
    source: Source,
    indices: Sequence[int],
    quarantine: Quarantine,
    part: Path,
    options: argparse.Namespace,
    accelerator: Accelerator,
) -> Evaluation:
    """One VAE over all images; every image's numbers go to this rank's part of images.jsonl."""
    with accelerator.main_process_first():  # the first to need an LPIPS trunk fetches it
        metrics = build(options, accelerator)
    mine = share_of(accelerator.process_index, accelerator.num_processes, indices, options.batch_size)
    batches = image_batches(
        source, mine, options.resolution,
        batch_size=options.batch_size, num_workers=options.num_workers, quarantine=quarantine,
        protocol=options.protocol,
    )  # fmt: skip
    rank, ranks = accelerator.process_index, accelerator.num_processes
    shape = {"resolution": options.resolution, "batch_size": options.batch_size}
    code = fit_code(vae, source, indices, rank, ranks, **shape)
    floor = code and LinearFloor(code, build(options, accelerator, MEASURED), options.protocol)
    bar = Progress(total=len(mine), desc=f"measure {name}", unit="img")
    with part.open("w", encoding="utf-8") as file:

        def each(indices: Sequence[int], values: Mapping[str, torch.Tensor]) -> None:
            columns = {metric: column.tolist() for metric, column in values.items()}
            for row, index in enumerate(indices):
                numbers = {metric: column[row] for metric, column in columns.items() if not math.isnan(column[row])}
                file.write(json.dumps({"vae": name, "index": index, "key": source.key(index), **numbers}) + "\n")
            bar.update(len(indices))

        try:
            evaluation = evaluate_reconstruction(
                vae, batches, metrics, accelerator.device, **shape,
                protocol=options.protocol, linear=floor, each=each,
            )  # fmt: skip
        except WorkError:
            quarantine.finish()  # raises with the reason, where there was an image and none could be used
            raise
    accelerator.wait_for_everyone()  # the last reduction comes before a rank's part is flushed; the main rank reads it
    bar.close()
    return evaluation


def build(options: argparse.Namespace, accelerator: Accelerator, only: Sequence[str] | None = None) -> list[Metric]:
    """The metrics that were asked for, ready to update; `only`: among these."""
    weights = Weights(options.lpips_weights, options.inception_weights, options.dinov2, options.clip)
    return build_metrics(
        [name for name in options.metrics if only is None or name in only],
        accelerator.device,
        options.resolution,
        weights=weights,
        protocol=options.protocol,
        **options.signal,
    )


# --- files ------------------------------------------------------------------------------------------------------------

PARTS = ".images.parts"


def prepare(output: Path, accelerator: Accelerator) -> None:
    """An output folder without the rests of an earlier call."""
    if accelerator.is_main_process:
        shutil.rmtree(output / PARTS, ignore_errors=True)
        (output / PARTS).mkdir(parents=True)
        (output / "quarantine.jsonl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if not (output / PARTS).is_dir():
        raise WorkError(f"output: {output} is not the same folder for all processes; it must be on shared storage")


def merge_images(output: Path) -> None:
    """images.jsonl from the ranks' parts: VAE after VAE, images in order of their index."""
    merged = output / ".images.jsonl.tmp"
    with merged.open("wb") as file:
        for part in sorted((output / PARTS).iterdir()):
            with part.open("rb") as rows:
                shutil.copyfileobj(rows, file)
    merged.replace(output / "images.jsonl")
    shutil.rmtree(output / PARTS)


def ranked(output: Path, vae: str, metric: str, wanted: int) -> dict[int, str]:
    """The worst, the median and the best sound of a VAE by its numbers in images.jsonl, and others evenly between them,
    from the worst on: indices => kinds of pictures; empty where no sound has such a number."""
    with (output / "images.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["vae"] == vae and metric in row]
    rows.sort(key=lambda row: (row[metric], row["index"]), reverse=bool(rows) and title(metric).better == "lower")
    last = len(rows) - 1
    kinds = {last // 2: "median", last: "best", 0: "worst"}
    places = [*dict.fromkeys([0, last, last // 2, *spread(len(rows), wanted)])][:wanted] if rows else []
    return {rows[place]["index"]: kinds.get(place, "shown") for place in sorted(places)}


if __name__ == "__main__":
    run_program(main)
