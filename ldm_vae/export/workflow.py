"""Export workflow: load, decide the normalisation, write, read back, compare, and report what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from ldm_vae.autoencoder.codebooks import beside, in_words, only_without
from ldm_vae.autoencoder.geometry import downsampling_factor, is_of_sounds, resolution_of, sample_size
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.preparation import Preparation, code_rate, preparation_of, record, recorded
from ldm_vae.autoencoder.single_file import load_single_file
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError
from ldm_vae.core.ownership import own_name
from ldm_vae.core.text import an
from ldm_vae.export import hub
from ldm_vae.export.card import Card, card_name
from ldm_vae.export.dac_folder import check_carried, write_dac
from ldm_vae.export.diffusers_folder import configured_copy, write_configured
from ldm_vae.export.drift_report import measure_drift
from ldm_vae.export.fp16.audit import audit
from ldm_vae.export.fp16.probes import make_probes
from ldm_vae.export.measurement import (
    Images,
    is_store,
    measure,
    statistics_of_store,
)
from ldm_vae.export.normalisation import choose, statistics_beside
from ldm_vae.export.onnx_folder import check_exportable, usage, write_onnx
from ldm_vae.export.picture import PICTURE, reconstruction_sheet
from ldm_vae.export.preview import FILE as PREVIEW
from ldm_vae.export.preview import Preview, fit_preview, pairs_of_images, pairs_of_store
from ldm_vae.export.recipe import read_recipe
from ldm_vae.export.replacement import check_replaceable
from ldm_vae.export.request import Request
from ldm_vae.export.targets import TARGETS, Target, check_class, warnings_for, warnings_for_pipelines, write_target
from ldm_vae.latent_store.format.statistics import LatentStatistics
from ldm_vae.metrics.batches import size_of
from ldm_vae.perceptual.spectrogram import DECIBELS

AUDIT_SIDE = 64  # pixels on a CPU, where the audit of an SD-sized VAE would take minutes at its own size


@dataclass
class Done:
    """Result of an export: what was written, line by line, and what the user must know."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def export(
    request: Request, measure_checkpoint: Callable[[Any, str, LatentStatistics | None], LatentStatistics | None]
) -> Done:
    """Export a VAE. Raises UsageError for a wrong request, WorkError when what was written does not read back.

    Args:
        measure_checkpoint: `ldm_vae.training.scaling.measure_checkpoint`.
    """
    done = Done()
    # everything that the request alone can be refused for, before weights are loaded or images read
    _check(request)
    vae = _load(request, done)
    if request.target == "dac":
        check_carried(vae)
    elif request.target != "diffusers":
        only_without(vae, f"--target {request.target}")
    if request.target in TARGETS:
        check_class(request.target, type(vae).__name__)
    if request.target == "onnx":
        check_exportable(vae)
    base = None if request.drift_from is None else load_autoencoder(request.drift_from).to(vae.device)
    # before anything is measured: statistics, preview and drift must see images as OUT's record will say
    preparation = _preparation(request, vae, base, done)
    statistics = _statistics(request, vae, preparation)
    statistics = measure_checkpoint(vae, request.source, statistics) or statistics
    choice = choose(request, vae, statistics)
    normalisation = choice.normalisation
    done.warnings += [] if choice.warning is None else [choice.warning]
    card, files = _card(request, statistics), {}
    if choice.incompatible is not None:
        card.sections["Compatibility"] = f"The normalisation was chosen anew at the export: {choice.incompatible}."
    if request.preview:
        preview = _preview(request, vae, normalisation or Normalisation(1.0), preparation)
        done.lines += preview.lines()
        files[PREVIEW] = preview.to_json().encode()
    if request.stats is not None and not is_store(request.stats):
        first = next(_images(request, vae, preparation).batches(vae))
        files[PICTURE] = reconstruction_sheet(vae, first[:4], preparation.decoding.sample_rate)
        form = f", as spectrograms of {DECIBELS:g} dB" if is_of_sounds(vae) else ""
        shown = f"Originals above, reconstructions below{form}.\n\n![originals and their reconstructions]({PICTURE})"
        card.sections = {"Pictures": shown} | card.sections
    if base is not None:
        card.sections["Drift"] = _drift(request, vae, base, normalisation, preparation, done)
    if request.target == "diffusers":
        _write_folder(vae, request, normalisation, preparation, card, files, done)
        loader = "from_pretrained" if beside(vae) is None else "load_autoencoder"
        load = f'{type(vae).__name__ if beside(vae) is None else "ldm_vae"}.{loader}("{request.place}")'
    elif request.target == "onnx":
        _write_onnx(vae, request, normalisation, card, files, done)
        load = f'onnxruntime.InferenceSession("{request.place}/encoder.onnx")'
    elif request.target == "dac":
        done.lines += write_dac(configured_copy(vae), request.place, card, files)
        load = f'transformers.DacModel.from_pretrained("{request.place}")'
    else:
        path = _write_file(vae, request, normalisation, card, files, done)
        load = f'ldm_vae.load_autoencoder("{path}")'
        if request.target == "single_file":
            config = f'"{request.place}"' if path != request.place else "FOLDER of its config.json"
            load = f'{type(vae).__name__}.from_single_file("{path}", config={config})'
    if request.target != "dac":  # whose class gives codes and takes codes
        done.lines += [*choice.lines, *([] if choice.incompatible is None else [choice.incompatible])]
    done.lines.append(f"load it: {load}")
    if request.push_to_hub is not None:
        done.lines.append(f"uploaded to {_push(request)}")
    return done


def _push(request: Request) -> str:
    assert request.push_to_hub is not None
    return hub.push(request.place, request.push_to_hub, private=request.private, path="vae" if request.pipeline else "")


def _check(request: Request) -> None:
    """Refuse what can be refused before anything is loaded."""
    if request.preview and request.stats is None:
        raise UsageError("--preview: needs images to fit the colours; give --stats STORE or --stats DATA")
    if request.drift_from is not None and (request.stats is None or is_store(request.stats)):
        raise UsageError("--drift_from: needs images to compare the two over; give --stats DATA")
    if request.flags.part is not None and (request.stats is None or is_store(request.stats)):
        raise UsageError(f"--part {request.flags.part}: is a part of images; give --stats DATA")
    if request.normalisation_from is not None and request.normalisation is not None:
        raise UsageError(f"--normalisation {request.normalisation}: --normalisation_from names the kind already")
    if request.push_to_hub is not None:
        hub.check_name(request.push_to_hub)
    if request.target in TARGETS and request.push_to_hub and request.place.suffix == ".safetensors":
        raise UsageError(f"--push_to_hub: uploads a folder; give OUT without .safetensors, got {request.place}")
    if not request.place.name:
        raise UsageError(f"OUT {request.place}: expected a new folder or an older export")
    if request.target == "dac" and (request.normalisation or request.normalisation_from or request.stats):
        raise UsageError("--target dac: DacModel has codes in the place of latents, and no normalisation; leave it out")
    if request.target in ("onnx", "dac") and request.half:
        raise UsageError(f"--variant fp16: --target {request.target} is written in fp32; leave it out, and convert it")
    if request.target not in TARGETS or request.place.suffix != ".safetensors":
        check_replaceable(request.place)
    elif request.place.is_dir():
        raise UsageError(f"OUT {request.place}: expected a file to write, found a folder")


def _load(request: Request, done: Done) -> AutoencoderKL:
    if Path(request.source).is_file() and request.weights_only_pickle:
        config = None if request.config is None else Path(request.config)
        vae = load_single_file(Path(request.source), config, allow_pickle=True).float()
        # said aloud: pickles are read only where the user allows it
        done.lines.append(f"read {request.source} as a pickle, with weights_only: tensors alone, no code was run")
    else:
        vae = load_autoencoder(request.source, request.config)
    return vae.to("cuda" if torch.cuda.is_available() else "cpu")


def _preparation(request: Request, vae: AutoencoderKL, base: AutoencoderKL | None, done: Done) -> Preparation:
    """Decoding of images for SRC; flags about it are recorded with OUT."""
    both = {request.source: vae} | ({} if base is None or request.drift_from is None else {request.drift_from: base})
    preparation = preparation_of(both, request.flags)
    # a network without a record stays without one unless a flag asks: what was not known is not made up
    if recorded(vae) is not None or request.flags.decide:
        record(vae, preparation.kept)
        done.lines += preparation.notes
        changed = preparation.identity.partition(" ")[2]  # behind its version
        done.lines.append(f"images are decoded with {changed or 'the defaults'}, which is recorded with the weights")
    return preparation


def _statistics(request: Request, vae: AutoencoderKL, preparation: Preparation) -> LatentStatistics | None:
    """Statistics of the latents: measured now if asked, else as they were measured when SRC was written."""
    if request.stats is None:
        return statistics_beside(request.source)
    if is_store(request.stats):
        return statistics_of_store(vae, request.stats, preparation)
    if not is_of_sounds(vae):
        resolution_of(request.resolution, vae, request.source)  # which it is is said here, and holds below
    return measure(vae, _images(request, vae, preparation).batches(vae), vae.device)


def _images(request: Request, vae: AutoencoderKL, preparation: Preparation) -> Images:
    assert request.stats is not None
    side = request.resolution if is_of_sounds(vae) else request.resolution or sample_size(vae)
    side = size_of(preparation.decoding, side)
    return Images(request.stats, side, request.batch_size, request.stats_images, preparation)


# --- what goes with the weights ---------------------------------------------------------------------------------------


def _card(request: Request, statistics: LatentStatistics | None) -> Card:
    recipe = read_recipe(Path(request.source))
    asked = {"license": request.license, "base_model": request.base_model}
    metadata = recipe.metadata | {key: value for key, value in asked.items() if value is not None}
    return Card(card_name(request.place), statistics, recipe.results, metadata, dict(recipe.sections))


def _preview(request: Request, vae: AutoencoderKL, normalisation: Normalisation, preparation: Preparation) -> Preview:
    assert request.stats is not None
    pairs: Iterator[Any] = (
        pairs_of_store(vae, Path(request.stats), normalisation)
        if is_store(request.stats)
        else pairs_of_images(vae, _images(request, vae, preparation).batches(vae), normalisation)
    )
    return fit_preview(pairs)


def _drift(
    request: Request,
    vae: AutoencoderKL,
    base: AutoencoderKL,
    normalisation: Normalisation | None,
    preparation: Preparation,
    done: Done,
) -> str:
    """Measure the drift from the base that a diffusion model was trained with, over the images of --stats."""
    images = _images(request, vae, preparation)
    batches = images.image_batches(vae)
    found = measure_drift(
        base, vae, batches, resolution=images.resolution, normalisation=normalisation,
        sample_rate=preparation.decoding.sample_rate,
    )  # fmt: skip
    done.lines.append(f"drift from {request.drift_from}: {found.verdict}")
    return "\n".join(f"- {line}" for line in found.lines())


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_folder(
    vae: AutoencoderKL,
    request: Request,
    normalisation: Normalisation | None,
    preparation: Preparation,
    card: Card,
    files: dict[str, bytes],
    done: Done,
) -> None:
    """The diffusers folder; force_upcast is what an audit of the activations says (of an AutoencoderKL)."""
    upcast, verdict = None, f"force_upcast is left as it is: {an(type(vae).__name__)} is not audited"
    if isinstance(vae, AutoencoderKL):
        upcast, verdict = _audit(vae, request, preparation, card)
    ready = configured_copy(vae, normalisation, sample_size=request.resolution, force_upcast=upcast)
    done.warnings += warnings_for_pipelines(ready.config)
    write_configured(
        ready,
        request.place,
        card=card.text(ready),
        statistics=card.statistics,
        half=request.half,
        max_shard_size=request.max_shard_size,
        files=files,
    )
    done.lines.append(f"wrote {request.place} (diffusers), read back: weights equal to the bit, decode equal")
    done.lines.append(verdict)
    if (books := beside(vae)) is not None:
        done.lines += [in_words(books), f"codes: {code_rate(vae)}"]


def _audit(vae: AutoencoderKL, request: Request, preparation: Preparation, card: Card) -> tuple[bool | None, str]:
    """force_upcast, and the sentence that says why; the card gets it too."""
    data = None if request.stats is None or is_store(request.stats) else request.stats
    side = request.resolution or sample_size(vae)
    # multiples of f only, hence the division and multiplication
    if vae.device.type == "cpu":  # GroupNorm's statistics hardly change with the size; the time does
        side = min(side, AUDIT_SIDE) // downsampling_factor(vae) * downsampling_factor(vae)
    probes = make_probes(vae, data, preparation, resolution=max(side, downsampling_factor(vae)))
    found = audit(vae, probes)
    verdict = f"force_upcast {str(not found.safe).lower()}: {found.describe()}"
    card.sections["Half precision"] = f"{verdict}; fp32 activations over {probes.describe()}."
    return not found.safe, verdict


def _write_file(
    vae: AutoencoderKL,
    request: Request,
    normalisation: Normalisation | None,
    card: Card,
    files: dict[str, bytes],
    done: Done,
) -> Path:
    """OUT.safetensors with its card beside it, or a folder that holds both."""
    ready = configured_copy(vae, normalisation, sample_size=request.resolution)
    target = TARGETS[request.target]
    done.warnings += warnings_for(target, ready.config, type(vae).__name__)
    # after the warnings are known, which the card repeats
    card.sections[f"For {target.title}"] = _for_target(done.warnings)
    alone = request.place.suffix == ".safetensors"
    if alone:
        # the name is owned while file and card are written, so that two exports do not mix theirs
        with own_name(request.place):
            difference = write_target(ready, request.place, half=request.half, name=request.target)
            atomic_io.replace(request.place.with_suffix(".md"), atomic_io.data(card.text(ready).encode()))
    else:
        with atomic_io.whole_folder(request.place, check_replaceable) as folder:
            path = folder / f"{card.name}.safetensors"
            difference = write_target(ready, path, half=request.half, name=request.target)
            if request.target == "single_file":  # which its loader is given beside the file
                ready.save_config(folder)
            for name, content in ({"README.md": card.text(ready).encode()} | files).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)
    path = request.place if alone else request.place / f"{card.name}.safetensors"
    done.lines.append(_written(path, target, difference))
    return path


def _write_onnx(
    vae: Any,
    request: Request,
    normalisation: Normalisation | None,
    card: Card,
    files: dict[str, bytes],
    done: Done,
) -> None:
    """The two graphs, and what the card and the printed lines say of them."""
    ready = configured_copy(vae, normalisation)
    card.metadata, card.loading = {"library_name": "onnx", **card.metadata}, usage(ready, card.name)
    graphs = write_onnx(ready, request.place, card.text(ready), files)
    done.lines.append(f"wrote {request.place} (ONNX)")
    done.lines += [graph.describe() for graph in graphs]


def _written(path: Path, target: Target, difference: float | None) -> str:
    read = "weights equal to the bit, decode equal"
    if difference is not None:
        read = f"by LDM's names: encode and decode differ by {difference:.1g} at most"
    return f"wrote {path} ({target.title}), read back {read}"


def _for_target(warnings: list[str]) -> str:
    return "\n".join(f"- {warning}" for warning in warnings) or "Loads as it is; nothing in it is ignored."
