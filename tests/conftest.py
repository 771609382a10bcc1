"""Shared by all tests: no network, one thread a worker, and the smallest autoencoder that has every part."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import resource
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

# the process that only hands out the tests reads this file too, before it starts the workers: torch and diffusers are
# imported where they are used, or each would wait ten seconds for a thing that the first never needs
if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from loopback_s3 import Bucket

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LDM_VAE_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# kernels run in Python where there is no GPU; triton asks when it is imported, which diffusers does
os.environ["TRITON_INTERPRET"] = "0" if Path("/dev/nvidiactl").exists() else "1"

# a helper's assertion shows its values as a test's does, if this is said before the helper is imported
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py")))

pytest_plugins = ["sentences"]  # --write-sentences, and the golden file compared after each test

# the same examples in every run, and none that is red because a machine is slow
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
with contextlib.suppress(ImportError):  # newer ones also try the constants of whatever modules happen to be imported
    providers = importlib.import_module("hypothesis.internal.conjecture.providers")
    providers._get_local_constants = lambda: providers._local_constants


def seed(name: str) -> None:
    """Start the global generators anew: what ran before in this process, which pytest-xdist decides by the clock,
    changes no draw."""
    number = zlib.crc32(name.encode())
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def pytest_collection_finish() -> None:
    """Take what is imported and collected, millions of objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    seed(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed(item.nodeid)


def built(**shape: Any) -> AutoencoderKL:
    """An autoencoder of random weights."""
    import torch

    from ldm_vae.autoencoder.config import AutoencoderConfig

    torch.manual_seed(0)
    return AutoencoderConfig(**shape).build().eval()


@pytest.fixture
def tiny_vae() -> AutoencoderKL:
    """f = 2, 4 latent channels, random weights, scaling_factor 1."""
    return built(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)


@pytest.fixture
def tiny_vae_folder(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """The same, saved by diffusers."""
    tiny_vae.save_pretrained(tmp_path / "tiny_vae")
    return tmp_path / "tiny_vae"


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve pictures of 40 x 48 px."""
    from images import write_images

    return write_images(tmp_path / "images", 12)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty model hub (`loopback_hub.py`)."""
    from loopback_hub import serve

    with serve() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield address


@pytest.fixture(scope="module")
def object_store() -> Iterator[Bucket]:
    """An S3 server on the loopback interface (`loopback_s3.py`), which s3:// means while a module's tests run."""
    from loopback_s3 import connected

    with connected() as bucket:
        yield bucket


@pytest.fixture
def bucket(object_store: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The same without faults, waits that cost no time, a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ldm_vae.core.fsspec_files.FIRST_WAIT", 0.001)
    monkeypatch.setattr("ldm_vae.latent_store.storage.claims.LONGEST_PAUSE", 0.02)
    object_store.faults, object_store.always, object_store.requests = [], [], []
    return object_store


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights as transformers saves it, for CMMD."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"projection_dim": 8}
    text = shape | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = shape | {"image_size": 28, "patch_size": 14}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


@pytest.fixture
def few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen features in the place of EfficientNet's 1,280, whose distances cost more than all else of tiny runs."""
    import torch

    from ldm_vae.perceptual import features

    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 16))
    network = features.Features(trunk.requires_grad_(False), 16)
    monkeypatch.setattr(features, "efflite0", lambda device: network)


@pytest.fixture
def grey_vae() -> AutoencoderKL:
    """A VAE of one channel, without a record of preprocessing."""
    return built(in_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)


@pytest.fixture
def grey_folder(grey_vae: AutoencoderKL, tmp_path: Path) -> Path:
    """With a record: 12 bits in the file, pixels as they are."""
    from ldm_vae.autoencoder.preparation import record
    from ldm_vae.data.preprocessing import Preprocessing
    from ldm_vae.export.diffusers_folder import write_vae

    found = Preprocessing(channels=1, value_range=(0, 4095), resize="none")
    return write_vae(record(grey_vae, found), tmp_path / "grey", None)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three pictures of 12 bits."""
    (tmp_path / "scans").mkdir()
    draw = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(draw.integers(0, 255, (4, 4), dtype=np.uint8)).resize((26, 22))
        Image.fromarray(np.asarray(coarse).astype(np.uint16) * 16).save(tmp_path / "scans" / f"{number}.png")
    return tmp_path / "scans"


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """2 GiB more than there is now: a bomb that goes off is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def settled_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files of a moment ago count as settled; `datasets` converts into a folder of this test's."""
    from ldm_vae.data import stamps

    monkeypatch.setattr(stamps, "SETTLED", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "converted")
