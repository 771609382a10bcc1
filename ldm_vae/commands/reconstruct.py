"""`ldm-vae reconstruct VAE IMAGE... OUT`: reconstruct images, for a first look at an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, decoding_flags
from ldm_vae.run.selection import checkpoint_flag

if TYPE_CHECKING:
    import torch

    from ldm_vae.autoencoder.preparation import Preparation
    from ldm_vae.data.decoding import Decoding

HELP = "encode and decode images, and write before and after"
DESCRIPTION = """\
Decode the mode of each image's posterior. OUT/NAME.png is the reconstruction, OUT/NAME.before-after.png shows both side
by side. PSNR is printed. Without --resolution an image keeps its size, cropped to a multiple of the VAE's factor.
With alpha, NAME.png is RGBA, and PSNR is the mean over composites on black and on white.

  ldm-vae reconstruct runs/demo photo.jpg looked-at
  ldm-vae reconstruct stabilityai/sd-vae-ft-mse a.png b.png looked-at --resolution 512
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    vae: str = argument("VAE", "a diffusers folder, a run folder, a hub id or a single file")
    images: tuple[Path, ...] = argument("IMAGE", "image files", nargs="+")
    out: Path = argument("OUT", "folder for the images")
    resolution: int | None = flag("resize the short side and crop the centre to this size")
    config: str | None = flag(
        "for a single-file VAE of a non-standard architecture: folder with its config.json", metavar="FOLDER"
    )
    checkpoint: str | None = checkpoint_flag()
    flags: DataFlags = decoding_flags()


def run(request: Request) -> None:
    from ldm_vae.autoencoder.geometry import check_resolution, step_of
    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.autoencoder.preparation import preparation_of
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.ownership import own
    from ldm_vae.run.selection import at_checkpoint

    name = at_checkpoint(request.vae, request.checkpoint)
    vae = load_autoencoder(name, request.config)
    factor = step_of(vae)
    if request.resolution is not None:
        check_resolution(request.resolution, vae)
    # every image is read before the first is reconstructed: a mistyped name costs nothing
    preparation = preparation_of({name: vae}, request.flags)
    images = [(path, _read(path, preparation.decoding)) for path in request.images]
    for path, image in images:
        if request.resolution is None and min(image.shape[1:]) < factor:
            raise UsageError(f"image {path}: its sides must be at least f = {factor} pixels, it is {_size(image)}")
    with own(request.out, "OUT"):
        _reconstruct(vae, images, preparation, request)


def _reconstruct(
    vae: Any, images: Sequence[tuple[Path, torch.Tensor]], preparation: Preparation, request: Request
) -> None:
    """Write each image's reconstruction, and the two side by side."""
    import torch

    from ldm_vae.autoencoder.geometry import step_of
    from ldm_vae.core.pictures import save
    from ldm_vae.data.alpha import visible
    from ldm_vae.data.transforms import centre_crop
    from ldm_vae.metrics import psnr
    from ldm_vae.metrics.batches import ImageBatch
    from ldm_vae.metrics.evaluate import reconstruct

    factor, alpha = step_of(vae), preparation.decoding.alpha
    for note in preparation.notes:
        print(note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae.to(device)
    taken: set[str] = set()
    for path, image in images:
        if request.resolution is None:
            height, width = (side // factor * factor for side in image.shape[1:])
            top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
            crop = image[:, top : top + height, left : left + width]
        else:
            crop = centre_crop(image, request.resolution, resize=preparation.decoding.resize, alpha=alpha).pixels
        _, pair = reconstruct(vae, ImageBatch([0], [str(path)], crop[None], alpha), device)
        name = path.stem if path.stem not in taken else f"{path.stem}-{len(taken) + 1}"
        taken.add(name)
        save(pair.reconstruction[0], request.out / f"{name}.png")
        both = [visible(one[0], alpha) for one in (pair.original, pair.reconstruction)]
        side_by_side = torch.cat(both, dim=2)
        save(side_by_side, request.out / f"{name}.before-after.png")
        decibel = psnr.build().values(pair).item()
        print(f"{path}  {_size(crop)}  PSNR {decibel:.2f} dB  {request.out / name}.before-after.png")


def _read(path: Path, decoding: Decoding) -> torch.Tensor:
    from ldm_vae.core.errors import UsageError
    from ldm_vae.data.decoding import BadImage, read_image
    from ldm_vae.data.files import read_bytes

    try:
        return read_image(read_bytes(path), decoding).pixels
    except BadImage as error:
        raise UsageError(f"image {path}: {error.reason}") from error


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} px"
