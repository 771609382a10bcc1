"""`ldm-vae assets lpips | demo | digits`: real weights and images, fetched once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_vae.core.request import Action, argument, flag

HELP = "download the LPIPS trunk, or write the demo's photographs or the digits of the textbook VAE"
DESCRIPTION = """\
Prepare network weights and example images before a run:

  ldm-vae assets lpips --net vgg       # the trunk of the perceptual loss, into the cache
  ldm-vae assets demo data/demo        # photographs for the demo
  ldm-vae assets digits data/digits    # 1,797 digits of 8 px, for configs/textbook_vae.yaml
"""


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """Trunks to download."""

    net: tuple[Literal["alex", "vgg"], ...] = flag("backbones (default: both)", ("alex", "vgg"), nargs="+")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images to write."""

    out: Path = argument("OUT", "folder to write")


def _lpips(request: Lpips) -> None:
    from ldm_vae.core.paths import cache_dir
    from ldm_vae.perceptual.pretrained import lpips_trunk

    for net in request.net:
        tensors = lpips_trunk(net)
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"LPIPS-{net}: trunk of {count / 1e6:.1f} M parameters, cache {cache_dir()}")


def _demo(request: Images) -> None:
    from ldm_vae.demo.photographs import prepare_demo

    print(prepare_demo(request.out))


def _digits(request: Images) -> None:
    from ldm_vae.demo.digits import prepare_digits

    print(prepare_digits(request.out))


ACTIONS = {
    "lpips": Action("download the ImageNet trunk of LPIPS into $XDG_CACHE_HOME/ldm-vae", Lpips, _lpips),
    "demo": Action("write crops of photographs from scikit-image and scikit-learn", Images, _demo),
    "digits": Action("write scikit-learn's handwritten digits as PNGs of 8 px", Images, _digits),
}
