"""`ldm-vae decompress FILE OUT`: the images of a file of `ldm-vae compress`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_vae.commands.compress import PRIOR, VAE
from ldm_vae.core.request import argument, flag
from ldm_vae.run.selection import checkpoint_flag

HELP = "write the images of a compressed file"
DESCRIPTION = """\
Decode FILE, made by `ldm-vae compress`, with the networks it was made with; OUT/NAME.png for each image.

  ldm-vae decompress digits.lvc digits --vae runs/textbook_vae
  ldm-vae decompress photographs.lvc photographs --vae runs/vq_demo --prior runs/prior

Checksums are compared: of the networks before, of the images (with --prior, of the indices) after. Where torch or the
kind of CPU is another than the one that FILE was made with, this is said, and decoding may then fail.
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line."""

    file: Path = argument("FILE", "file of `ldm-vae compress`")
    out: Path = argument("OUT", "new folder for the images")
    vae: str = flag(VAE, metavar="VAE", required=True)
    prior: str | None = flag(PRIOR, metavar="RUN")
    checkpoint: str | None = checkpoint_flag()


def run(request: Request) -> None:
    from ldm_vae.compression.file import decode, read
    from ldm_vae.compression.inputs import open_codec
    from ldm_vae.core import atomic_io
    from ldm_vae.core.errors import UsageError
    from ldm_vae.core.files import LARGEST, read_bytes
    from ldm_vae.core.paths import nearest_path
    from ldm_vae.core.pictures import save

    place = f"FILE {request.file}"
    try:
        content = read_bytes(request.file, LARGEST)
    except OSError as error:
        raise UsageError(f"{place}: cannot be read: {error.strerror or error}{nearest_path(request.file)}") from error
    header, code = read(content, place)
    atomic_io.absent(request.out)
    images = decode(open_codec(request.vae, request.prior, request.checkpoint), header, code, place)
    with atomic_io.whole_folder(request.out) as folder:
        for name, image in zip(header.names, images, strict=True):
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(image, path)
    print(f"{request.out}: {len(images):,} images")
