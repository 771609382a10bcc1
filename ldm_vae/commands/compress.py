"""`ldm-vae compress IMAGE... OUT`: images as a file of as many bits as a network's likelihood says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_vae.core.request import argument, flag
from ldm_vae.run.selection import checkpoint_flag

HELP = "compress images into one file, by a VAE's likelihood or a prior's"
DESCRIPTION = """\
Code all images into the file OUT.

  ldm-vae compress digits/heldout digits.lvc --vae runs/textbook_vae
  ldm-vae compress photographs photographs.lvc --vae runs/vq_demo --prior runs/prior

Without --prior the code is lossless (bits-back): VAE is the run of a VAE whose likelihood is one of discrete pixel
values (losses.gaussian_nll.levels), and the images have those values alone. With --prior it is lossy: the indices of a
VQ autoencoder under a prior of kind transformer; images of other sizes are padded to whole crops of the prior.

Names and sizes are kept, metadata is not. `ldm-vae decompress` needs the same networks, the same torch and the same
kind of CPU. One thread computes, on the CPU, on any number of cores.
"""
VAE = "run of a VAE with a likelihood of pixel levels; with --prior a VQ autoencoder"
PRIOR = "run of a prior over the VQ autoencoder's codes"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    images: tuple[Path, ...] = argument("IMAGE", "image files, and folders of them", nargs="+")
    out: Path = argument("OUT", "file to write")
    vae: str = flag(VAE, metavar="VAE", required=True)
    prior: str | None = flag(PRIOR, metavar="RUN")
    checkpoint: str | None = checkpoint_flag()


def run(request: Request) -> None:
    from ldm_vae.compression.file import in_words, write
    from ldm_vae.compression.inputs import open_codec, read_images
    from ldm_vae.core import atomic_io
    from ldm_vae.core.errors import UsageError
    from ldm_vae.data.named_images import find_images

    if request.out.exists():  # the last IMAGE, where OUT was forgotten
        raise UsageError(f"OUT {request.out}: exists already; choose a new name")
    found = find_images(request.images)
    codec = open_codec(request.vae, request.prior, request.checkpoint)
    images = read_images(found, codec)
    content = write(codec, [image.name for image in found], images)
    if not atomic_io.create(request.out, atomic_io.data(content)):
        raise UsageError(f"OUT {request.out}: was made by another process meanwhile; choose a new name")
    print(f"{request.out}: {in_words(content, images)}")
