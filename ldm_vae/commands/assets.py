"""`ldm-vae assets lpips | demo | digits`: real weights and images, fetched once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_vae.core.request import Action, argument, flag

HELP = "fetch the LPIPS trunk, the demo's photographs, or digits for a textbook VAE"
DESCRIPTION = """\
Fetch what a run needs and does not bring along, before it needs it:

  ldm-vae assets lpips --net vgg       # the trunk of the perceptual loss, into the cache
  ldm-vae assets demo data/demo        # photographs to try everything on
  ldm-vae assets digits data/digits    # 1,797 digits of 8 px, for configs/textbook_vae.yaml
"""


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """Trunks to fetch."""

    net: tuple[Literal["alex", "vgg"], ...] = flag("default: both", ("alex", "vgg"), nargs="+")


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
    "lpips": Action("the ImageNet trunk of LPIPS, into $XDG_CACHE_HOME/ldm-vae", Lpips, _lpips),
    "demo": Action("photographs that scikit-image and scikit-learn ship, cut into crops", Images, _demo),
    "digits": Action("the handwritten digits of scikit-learn, as PNGs of 8 px", Images, _digits),
}
