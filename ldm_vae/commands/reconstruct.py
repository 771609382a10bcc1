"""`ldm-vae reconstruct VAE IMAGE... OUT`: reconstruct images, clips or sounds, for a first look at an autoencoder.

Legend: C channels, T frames, H W sides, L samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, decoding_flags
from ldm_vae.run.selection import checkpoint_flag

if TYPE_CHECKING:
    import torch

    from ldm_vae.autoencoder.preparation import Preparation
    from ldm_vae.data.decoding import Decoding
    from ldm_vae.data.named_images import NamedImage

ON_SHEET, SHEET_SIDE = 32, 192  # pairs, and their side in pixels

HELP = "encode and decode images, clips or sounds, and write before and after"
DESCRIPTION = """\
Decode the mode of each image's posterior. OUT/NAME.png is the reconstruction, OUT/NAME.before-after.png shows both side
by side; OUT/sheet.png shows the first 32 of several. PSNR is printed. Of a folder, every image below it is taken, and
what is left out is said; its sub-folders are kept in OUT. Without --resolution an image keeps its size, cropped to a
multiple of the VAE's factor. With alpha, NAME.png is RGBA, and PSNR is the mean over composites on black and on white.
With --frames N, IMAGE may be a video: its first N frames, in animated PNG files; PSNR is the mean over them. Of a VAE
of sounds IMAGE is a sound, whole or its first --excerpt N; OUT/NAME.before.wav and OUT/NAME.wav hold before and after,
and the signal-to-noise ratio is printed.

  ldm-vae reconstruct runs/demo photo.jpg looked-at
  ldm-vae reconstruct runs/demo photographs one-more.png looked-at --resolution 256
  ldm-vae reconstruct stabilityai/sd-vae-ft-mse a.png b.png looked-at --resolution 512
  ldm-vae reconstruct my-video-vae film.mp4 looked-at --resolution 64 --frames 17
  ldm-vae reconstruct my-audio-vae speech.flac heard
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    vae: str = argument("VAE", "a diffusers folder, a run folder, a hub id or a single file")
    images: tuple[Path, ...] = argument("IMAGE", "image files, with --frames videos, and folders of them", nargs="+")
    out: Path = argument("OUT", "folder for the images")
    resolution: int | None = flag("resize the short side and crop the centre to this size")
    config: str | None = flag(
        "for a single-file VAE of a non-standard architecture: folder with its config.json", metavar="FOLDER"
    )
    checkpoint: str | None = checkpoint_flag()
    codebooks: int | None = flag("of residual codes, keep the first K codebooks (default: all)", metavar="K")
    flags: DataFlags = decoding_flags()


def run(request: Request) -> None:
    from ldm_vae.autoencoder.codebooks import keep_first
    from ldm_vae.autoencoder.geometry import check_resolution, is_of_sounds
    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.autoencoder.preparation import preparation_of
    from ldm_vae.core.ownership import own
    from ldm_vae.data.named_images import find_images
    from ldm_vae.run.selection import at_checkpoint

    name = at_checkpoint(request.vae, request.checkpoint)
    vae = load_autoencoder(name, request.config)
    if request.codebooks is not None:
        keep_first(vae, request.codebooks, f"VAE {name}")
    images = find_images(
        request.images, clips=request.flags.frames is not None, sounds=is_of_sounds(vae), taken={"sheet"}
    )
    if is_of_sounds(vae):
        _reconstruct_sounds(vae, images, request, name)
        return
    if request.resolution is not None:
        check_resolution(request.resolution, vae)
    preparation = preparation_of({name: vae}, request.flags)
    # what a user named is read before the first is reconstructed: a mistyped name costs nothing
    for image in images:
        if image.named:
            _read(image, vae, preparation.decoding, request)
    with own(request.out, "OUT"):
        _reconstruct(vae, images, preparation, request)


def _reconstruct_sounds(vae: Any, sounds: Sequence[NamedImage], request: Request, name: str) -> None:
    """Write each sound, or its first samples, before and after, as it was given: what is added to fill a latent
    position is taken away."""
    import torch
    from torch.nn.functional import pad

    from ldm_vae.autoencoder import finite
    from ldm_vae.autoencoder.geometry import downsampling_factor
    from ldm_vae.autoencoder.preparation import preparation_of
    from ldm_vae.core.errors import UsageError, WorkError
    from ldm_vae.core.ownership import own
    from ldm_vae.core.terminal import print_note
    from ldm_vae.data.footage import Video
    from ldm_vae.data.quarantine import BadImage
    from ldm_vae.data.sounds import crops_of, write_sound

    if request.resolution is not None:
        raise UsageError("--resolution: is of images, and VAE is one of sounds; --excerpt N takes the first N")
    preparation = preparation_of({name: vae}, request.flags)
    # as they are: what a network was trained on says nothing of what is listened to
    decoding = replace(preparation.decoding, samples=request.flags.samples)
    rate, hop, done = decoding.sample_rate or 1, downsampling_factor(vae), 0
    for note in preparation.notes:
        print(note)
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    with own(request.out, "OUT"):
        for sound in sounds:
            try:
                (crop,), _ = crops_of(Video(str(sound.path)), decoding)
            except BadImage as error:
                if sound.named:
                    raise UsageError(f"sound {sound.path}: {error.reason}") from error
                print_note(f"left out: {sound.path}: {error.reason}")
                continue
            before = crop.pixels[:, : crop.box[3]]
            with torch.no_grad():
                whole = pad(before, (0, -before.shape[1] % hop))[None].to(vae.device)
                after = finite.decode(vae, finite.encode(vae, whole).mean)[0, :, : before.shape[1]].cpu()
            place = request.out / sound.name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_sound(place.with_name(f"{place.name}.before.wav"), before, rate)
            write_sound(place.with_name(f"{place.name}.wav"), after, rate)
            noise = (after - before).double().square().mean().clamp_min(1e-20)
            ratio = float(10 * torch.log10(before.double().square().mean() / noise))
            print(f"{sound.path}  {before.shape[1] / rate:.2f} s  SNR {ratio:.2f} dB  {place}.wav")
            done += 1
    if not done:
        raise WorkError(f"IMAGE {', '.join(map(str, request.images))}: no usable sound")


def _reconstruct(vae: Any, images: Sequence[NamedImage], preparation: Preparation, request: Request) -> None:
    """Write each image's reconstruction, and the two side by side; of several a sheet, of clips with their first
    frames."""
    import torch

    from ldm_vae.core.errors import WorkError
    from ldm_vae.core.pictures import save, sheet
    from ldm_vae.core.terminal import print_note
    from ldm_vae.data.alpha import visible
    from ldm_vae.data.transforms import centre_crop
    from ldm_vae.metrics import psnr
    from ldm_vae.metrics.batches import ImageBatch
    from ldm_vae.metrics.evaluate import reconstruct

    alpha = preparation.decoding.alpha
    for note in preparation.notes:
        print(note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae.to(device)
    decibels: list[float] = []
    shown: list[torch.Tensor] = []
    for image in images:
        crop = _read(image, vae, preparation.decoding, request)
        if isinstance(crop, str):
            print_note(f"left out: {image.path}: {crop}")
            continue
        _, pair = reconstruct(vae, ImageBatch([0], [str(image.path)], crop[None], alpha), device)
        place = request.out / image.name
        place.parent.mkdir(parents=True, exist_ok=True)
        save(_as_given(pair.reconstruction), place.with_name(f"{place.name}.png"))
        both = [visible(one, alpha).cpu() for one in (pair.original, pair.reconstruction)]
        save(_as_given(torch.cat(both, dim=3)), place.with_name(f"{place.name}.before-after.png"))
        decibels.append(psnr.build().values(pair).item())
        print(f"{image.path}  {_size(crop)}  PSNR {decibels[-1]:.2f} dB  {place}.before-after.png")
        if len(shown) < ON_SHEET:
            small = [centre_crop(one[0].round().to(torch.uint8), SHEET_SIDE).pixels for one in both]
            shown.append(torch.cat(small, dim=2))
    if not decibels:
        raise WorkError(f"IMAGE {', '.join(map(str, request.images))}: no usable image")
    if len(images) > 1:
        save(sheet(shown, min(4, len(shown))), request.out / "sheet.png")
        print(f"{len(decibels):,} images, mean PSNR {fmean(decibels):.2f} dB; {request.out / 'sheet.png'}")


def _as_given(frames: torch.Tensor) -> torch.Tensor:
    """Frames [T, C, H, W] of one clip => [C, T, H, W], of an image [C, H, W]."""
    return frames[0] if len(frames) == 1 else frames.transpose(0, 1)


def _read(image: NamedImage, vae: Any, decoding: Decoding, request: Request) -> torch.Tensor | str:
    """The part of an image that is reconstructed, uint8 [C, H, W], of a clip [C, T, H, W]; the reason where none is, of
    one in a folder.

    Raises:
        UsageError: nothing is, of one that a user named.
    """
    from ldm_vae.autoencoder.geometry import step_of
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.paths import nearest_path
    from ldm_vae.data.clips import crops_of
    from ldm_vae.data.decoding import BadImage
    from ldm_vae.data.files import read_bytes
    from ldm_vae.data.footage import Video, is_footage
    from ldm_vae.data.transforms import Crop, centre_crop

    factor = step_of(vae)

    def view(pixels: torch.Tensor, size: tuple[int, int]) -> tuple[Crop, ...]:
        if request.resolution is not None:
            return (centre_crop(pixels, request.resolution, size, decoding.resize, decoding.alpha),)
        if min(pixels.shape[1:]) < factor:
            raise BadImage(f"its sides must be at least f = {factor} pixels, it is {_size(pixels)}")
        height, width = (side // factor * factor for side in pixels.shape[1:])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return (Crop(pixels[:, top : top + height, left : left + width], size, (top, left, height, width)),)

    try:
        content = Video(str(image.path)) if is_footage(image.path.name) else read_bytes(image.path)
        return crops_of(content, decoding, view)[0][0].pixels
    except BadImage as error:
        reason = f"{error.reason}{nearest_path(image.path)}"
        if image.named:
            raise UsageError(f"image {image.path}: {reason}") from error
        return reason


def _size(image: torch.Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} px"
