"""`ldm-vae fp16 audit|fix VAE`: check whether a VAE may run in half precision, and make it so."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ldm_vae.core.request import Action, argument, flag
from ldm_vae.data.flags import DataFlags, data_flags
from ldm_vae.run.selection import checkpoint_flag

HELP = "find fp16 overflows, and remove them by rescaling, without training"
DESCRIPTION = """\
  ldm-vae fp16 audit my-vae photographs        # the largest activation of every layer, and its distance to 65,504
  ldm-vae fp16 fix my-vae my-vae-fp16 photographs

`fix` multiplies values that only GroupNorms read by powers of two. Weights stay exact, and the fp32 output changes only
through GroupNorm's epsilon. OUT is a diffusers folder with `force_upcast: false` and the certificate in its card.
Without DATA, only synthetic extremes are tested, and the card says so.
"""


@dataclass(frozen=True, kw_only=True)
class _Probed:
    """Inputs of the measurement."""

    resolution: int | None = flag("side in pixels (default: the VAE's sample_size, at most 512)")
    images: int = flag("number of images of DATA (default 8)", 8, metavar="N")
    config: str | None = flag("for a single-file VAE: folder with its config.json", metavar="FOLDER")
    checkpoint: str | None = checkpoint_flag()
    flags: DataFlags = data_flags()


@dataclass(frozen=True, kw_only=True)
class Audit(_Probed):
    """A VAE to audit."""

    vae: str = argument("VAE", "diffusers folder, run folder, hub id or single file")
    data: str | None = argument("DATA", "images to test in addition to synthetic extremes", nargs="?")
    all: bool = flag("print every layer, not only the ten largest of each half", False)
    json: bool = flag("print every layer as JSON", False)


@dataclass(frozen=True, kw_only=True)
class Fix(_Probed):
    """A VAE to rescale."""

    vae: str = argument("VAE", "diffusers folder, run folder, hub id or single file")
    out: str = argument("OUT", "diffusers folder to write")
    data: str | None = argument("DATA", "images to test in addition to synthetic extremes", nargs="?")


def _prepare(request: Audit | Fix) -> tuple[Any, Any]:
    import torch

    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.autoencoder.preparation import preparation_of
    from ldm_vae.core.errors import UsageError
    from ldm_vae.export.fp16.probes import make_probes
    from ldm_vae.export.fp16.structure import structure_of
    from ldm_vae.run.selection import at_checkpoint
    from ldm_vae.training.scaling import measure_checkpoint

    if request.flags.part is not None and request.data is None:
        raise UsageError(f"--part {request.flags.part}: is a part of images; expected DATA")
    name = at_checkpoint(request.vae, request.checkpoint)
    vae = load_autoencoder(name, request.config).to("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(request, Fix):
        structure_of(vae)  # before the work, not after it
        measure_checkpoint(vae, name)
    preparation = preparation_of({name: vae}, request.flags)
    for note in preparation.notes:
        print(note, file=sys.stderr)
    probes = make_probes(vae, request.data, preparation, resolution=request.resolution, count=request.images)
    return vae, probes


def _audit(request: Audit) -> None:
    import json

    from ldm_vae.export.fp16.audit import LARGEST, audit
    from ldm_vae.export.fp16.structure import is_scalable

    vae, probes = _prepare(request)
    found = audit(vae, probes)
    if request.json:
        headroom = {side: found.headroom(side) for side in ("encoder", "decoder")}
        print(json.dumps({"safe": found.safe, "headroom": headroom, "largest": found.largest}, indent=1))
        return
    print(f"measured over {probes.describe()}")
    for side in ("encoder", "decoder"):
        rows = sorted(found.of(side).items(), key=lambda row: -row[1])
        print(f"\n{side}: headroom {found.headroom(side):,.3g}")
        for name, value in rows if request.all else rows[:10]:
            print(f"  {value:>12,.4g}  {LARGEST / max(value, 1e-30):>10,.3g} x  {name}")
    unsafe = f"NOT safe in fp16: {'`ldm-vae fp16 fix` rescales it' if is_scalable(vae) else 'take bf16 or fp32'}"
    print(f"\n{'safe in fp16' if found.safe else unsafe}")


def _fix(request: Fix) -> None:
    from pathlib import Path

    from ldm_vae.core.errors import WorkError
    from ldm_vae.export.card import Card, card_name
    from ldm_vae.export.diffusers_folder import write_vae
    from ldm_vae.export.fp16.audit import audit
    from ldm_vae.export.fp16.certificate import certify
    from ldm_vae.export.fp16.rescale import rescale
    from ldm_vae.export.normalisation import statistics_beside
    from ldm_vae.export.replacement import check_replaceable

    out = Path(request.out)
    check_replaceable(out)  # before the work, not after it
    vae, probes = _prepare(request)
    before = audit(vae, probes)
    rescaling = rescale(vae, before)
    certificate = certify(vae, probes, rescaling, before)
    if not certificate.passed:
        print("\n".join(certificate.lines()), file=sys.stderr)
        reason = certificate.limits[0] if certificate.limits else "fp16 is too far from fp32"
        raise WorkError(f"{request.vae}: rescaling does not make it safe in fp16 ({reason}); {out} was not written")
    sections = {"Half precision": "\n".join(f"- {line}" for line in certificate.lines())}
    # the latents are those of before, so what was measured stays true, and whether the normalisation is that
    statistics = statistics_beside(request.vae)
    card = Card(card_name(out), statistics, sections=sections).text(rescaling.vae)
    write_vae(rescaling.vae, out, None, card=card, statistics=statistics, force_upcast=False)
    print("\n".join([f"wrote {out}: force_upcast is false", *certificate.lines()]))


ACTIONS = {
    "audit": Action("record the largest activation of every layer", Audit, _audit),
    "fix": Action("write a VAE whose activations fit fp16", Fix, _fix),
}
