"""`ldm-vae tiling VAE IMAGE`: the seam error of `enable_tiling`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ldm_vae.core.request import argument, flag
from ldm_vae.data.flags import DataFlags, decoding_flags
from ldm_vae.run.selection import checkpoint_flag

HELP = "measure the error of enable_tiling for an image"
DESCRIPTION = """\
  ldm-vae tiling my-vae panorama.jpg                     # tiles of the config's sample_size, overlap 25 % and 50 %
  ldm-vae tiling my-vae panorama.jpg --tile 512 --overlap 0.25

Decode the image whole and in tiles, and print the difference at the seams and inside the tiles.
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    vae: str = argument("VAE", "diffusers folder, run folder, hub id or single file")
    image: str = argument("IMAGE", "an image file larger than a tile")
    tile: int | None = flag("side of a tile in pixels (default: the VAE's sample_size)")
    overlap: tuple[float, ...] = flag("overlaps as shares of a tile (default 0.25 0.5)", (0.25, 0.5), nargs="+")
    config: str | None = flag("for a single-file VAE: folder with its config.json", metavar="FOLDER")
    checkpoint: str | None = checkpoint_flag()
    json: bool = flag("print JSON", False)
    flags: DataFlags = decoding_flags(resize=False)


def run(request: Request) -> None:
    import json
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from ldm_vae.autoencoder.geometry import downsampling_factor, only_images
    from ldm_vae.autoencoder.load import load_autoencoder
    from ldm_vae.autoencoder.preparation import preparation_of
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.paths import nearest_path
    from ldm_vae.data.decoding import read_image
    from ldm_vae.data.files import read_bytes
    from ldm_vae.data.quarantine import BadImage
    from ldm_vae.data.transforms import to_pixels
    from ldm_vae.export.seam_error import measure_tiling
    from ldm_vae.run.selection import at_checkpoint

    name = at_checkpoint(request.vae, request.checkpoint)
    vae = load_autoencoder(name, request.config).to("cuda" if torch.cuda.is_available() else "cpu")
    only_images(vae, f"VAE {name}")
    path, factor = Path(request.image), downsampling_factor(vae)
    if not path.is_file():
        raise UsageError(f"IMAGE {path}: no such file{nearest_path(path)}")
    if not all(0 < share < 1 for share in request.overlap):
        raise UsageError(f"--overlap: expected shares between 0 and 1, got {request.overlap}")
    preparation = preparation_of({name: vae}, request.flags)
    for note in preparation.notes:
        print(note, file=sys.stderr)
    try:
        image = read_image(read_bytes(path), preparation.decoding).pixels
    except BadImage as error:
        raise UsageError(f"IMAGE {path}: {error.reason}") from error
    height, width = (side // factor * factor for side in image.shape[1:])
    pixels = to_pixels(image[:, :height, :width])[None].to(vae.device)
    found = [measure_tiling(vae, pixels, tile=request.tile, overlap=overlap) for overlap in request.overlap]
    if request.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    print(f"{path}: {width} x {height} px in tiles of {found[0].tile} px, against the whole image")
    print("\n".join(one.line() for one in found))
