"""`ldm-vae assets lpips | demo | digits`: real weights and images, fetched once."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "fetch the LPIPS trunk, the demo's photographs, or digits for a textbook VAE"
DESCRIPTION = """\
Fetch what a run needs and does not bring along, before it needs it:

  ldm-vae assets lpips --net vgg       # the trunk of the perceptual loss, into the cache
  ldm-vae assets demo data/demo        # photographs to try everything on
  ldm-vae assets digits data/digits    # 1,797 digits of 8 px, for configs/textbook_vae.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="asset", metavar="ASSET", required=True)
    lpips = kinds.add_parser("lpips", help="the ImageNet trunk of LPIPS, into $XDG_CACHE_HOME/ldm-vae")
    lpips.add_argument("--net", nargs="+", choices=("alex", "vgg"), default=("alex", "vgg"), help="default: both")
    demo = kinds.add_parser("demo", help="photographs that scikit-image and scikit-learn ship, cut into crops")
    demo.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    digits = kinds.add_parser("digits", help="the handwritten digits of scikit-learn, as PNGs of 8 px")
    digits.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def run(arguments: argparse.Namespace) -> None:
    if arguments.asset == "demo":
        from ldm_vae.demo.photographs import prepare_demo

        print(prepare_demo(arguments.out))
        return
    if arguments.asset == "digits":
        from ldm_vae.demo.digits import prepare_digits

        print(prepare_digits(arguments.out))
        return
    from ldm_vae.core.paths import cache_dir
    from ldm_vae.perceptual.pretrained import lpips_trunk

    for net in arguments.net:
        tensors = lpips_trunk(net)
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"LPIPS-{net}: trunk of {count / 1e6:.1f} M parameters, cache {cache_dir()}")
