"""Lossy compression: indices come back to the bit, in as many bits as the prior says, and decode as they did."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cli_call import call
from compression_runs import summed, with_header, write_prior, write_vq
from images import write_images
from PIL import Image
from prior_runs import MASKED
from sentences import refused
from torchvision.transforms.functional import pil_to_tensor

from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.compression.file import DIGEST, decode, parts_of, read, write
from ldm_vae.compression.indices import LANES, Indices
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.transforms import to_pixels, to_uint8
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.priors.masked import Config as MaskedConfig
from ldm_vae.priors.transformer import Causal
from ldm_vae.priors.transformer import Config as TransformerConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vae/, a VQModel with f = 2, and run/ of a prior of 4 x 4 of its indices."""
    out = tmp_path_factory.mktemp("vq")
    write_prior(out / "run", write_vq(out / "vae"))
    return out


@pytest.fixture(scope="module")
def codec(place: Path) -> Indices:
    return Indices(CodeGenerator.load(place / "run", load_autoencoder(place / "vae")), "run")


def photographs(count: int, height: int = 8, width: int = 8) -> list[torch.Tensor]:
    """uint8 [3, H, W] of noise that is smooth."""
    draw = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, -(-height // 4), -(-width // 4), generator=draw) * 255
    return [*torch.nn.functional.interpolate(small, (height, width), mode="bilinear").round().to(torch.uint8)]


def test_two_hundred_images_take_the_bits_of_the_prior_and_their_indices_come_back(codec: Indices) -> None:
    images = photographs(200)
    content = write(codec, [f"{number}" for number in range(200)], images)
    header, code = read(content, "FILE")
    crops = torch.cat([codec.crops(image) for image in images])
    assert crops.shape == (200, 1, 4, 4)
    bits = codec.prior.nats(crops, torch.zeros(200, dtype=torch.long), 0, range(200)).sum().item() / math.log(2)
    # 1 % is promised; a network of random weights that does not see the codes before it is 0.5 % off
    assert bits > 5000 and 8 * parts_of(content)["images"] == pytest.approx(bits, rel=0.002)
    assert parts_of(content)["seed"] == 0
    assert torch.equal(codec.decode_crops(code, 200), crops)
    found = decode(codec, header, code, "FILE")
    for image, crop in zip(found, crops, strict=True):
        assert torch.equal(image, to_uint8(codec.generator.decode(crop[None])[0]))


@pytest.mark.parametrize("order", ["raster", "delay"])
def test_of_several_codebooks_each_order_is_coded(place: Path, tmp_path: Path, order: str) -> None:
    """A VQModel has one codebook: the crops of three are drawn."""
    model = TransformerConfig(order=order, num_layers=1, num_attention_heads=2, attention_head_dim=4)
    codec = Indices(CodeGenerator.load(place / "run", load_autoencoder(place / "vae")), "run")
    codec.generator = write_prior(tmp_path / "run", place / "vae", model, shape=(3, 2, 2))
    assert isinstance(codec.generator.prior, Causal)
    codec.prior = codec.generator.prior
    count = LANES + 3
    crops = torch.randint(16, (count, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    codec.crops = lambda _: crops  # type: ignore[method-assign]
    code = codec.encode([torch.zeros(3, 1, 1, dtype=torch.uint8)])
    assert torch.equal(codec.decode_crops(code, count), crops)
    nats = codec.prior.nats(crops, torch.zeros(count, dtype=torch.long), 0, range(count)).sum().item()
    assert 32 * len(code.words) == pytest.approx(nats / math.log(2), rel=0.01, abs=64)


def test_images_of_any_size_are_whole_crops_of_their_padded_selves(codec: Indices) -> None:
    (wide,), (high,) = photographs(1, 9, 30), photographs(1, 17, 3)
    assert codec.crops(wide).shape == (2 * 4, 1, 4, 4) and codec.crops(high).shape == (3, 1, 4, 4)
    content = write(codec, ["wide", "deep/high"], [wide, high])
    found = decode(codec, *read(content, "FILE"), "FILE")
    assert [one.shape for one in found] == [wide.shape, high.shape]
    # the image is encoded and decoded whole, so that no seam shows where crops meet
    padded = torch.nn.functional.pad(to_pixels(wide)[None], (0, 2, 0, 7), mode="replicate")
    with torch.no_grad():
        whole = codec.vae.encode(padded).latents
        _, _, (_, _, indices) = codec.vae.quantize(whole)
        expected = to_uint8(codec.generator.decode(indices.view(1, 1, 8, 16))[0, :, :9, :30])
    assert torch.equal(found[0], expected)


def test_the_verbs_write_pictures_under_their_names(place: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "deep", 2, size=(12, 20))
    write_images(tmp_path / "in", 1, size=(9, 9))
    networks = ("--vae", place / "vae", "--prior", place / "run")
    call("compress", tmp_path / "in", tmp_path / "out.lvc", *networks)
    call("decompress", tmp_path / "out.lvc", tmp_path / "back", *networks)
    given = {path.relative_to(tmp_path / "in").as_posix(): path for path in (tmp_path / "in").rglob("*.png")}
    assert len(given) == 3
    for name, path in given.items():
        found = pil_to_tensor(Image.open(tmp_path / "back" / name))
        assert found.shape == pil_to_tensor(Image.open(path).convert("RGB")).shape
    with refused(UsageError, "OUT"):
        call("decompress", tmp_path / "out.lvc", tmp_path / "back", *networks)


def test_a_walk_that_rounds_otherwise_is_no_image(codec: Indices) -> None:
    content = write(codec, ["a"], photographs(1, 16, 16))
    weight = codec.prior.network.head.weight
    kept = weight.clone()
    try:
        weight.mul_(1.001)
        with refused(WorkError, "FILE"):
            decode(codec, *read(content, "FILE"), "FILE")
    finally:
        weight.copy_(kept)
    assert len(decode(codec, *read(content, "FILE"), "FILE")) == 1


def test_words_changed_with_their_checksum_are_one_sentence(codec: Indices) -> None:
    content = write(codec, ["a"], photographs(1, 16, 16))
    words = 4 * (read(content, "FILE")[0].words - 1)  # of the last one not every bit says something
    for place in range(len(content) - DIGEST - 4 - words, len(content) - DIGEST - 4):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(WorkError, match="FILE: what comes out"):
            decode(codec, *read(summed(bytes(damaged)), "FILE"), "FILE")
    for kind, networks in (("indices", ["0" * 64] * 3), ("bits_back", [*codec.networks])):
        with refused(UsageError, "FILE"):
            decode(codec, *read(with_header(content, kind=kind, networks=networks), "FILE"), "FILE")
    with refused(UsageError, "prior"):
        changed = [*codec.networks[:2], "0" * 64]
        decode(codec, *read(with_header(content, networks=changed), "FILE"), "FILE")


def test_priors_that_cannot_code_are_refused(place: Path, tmp_path: Path, tiny_vae_folder: Path) -> None:
    write_images(tmp_path / "in", 1, size=(9, 9))
    small = TransformerConfig(num_layers=1, num_attention_heads=1, attention_head_dim=4)
    write_prior(tmp_path / "masked", place / "vae", MaskedConfig(**MASKED), shape=(1, 4, 4))
    write_prior(tmp_path / "classes", place / "vae", small, classes=(0, 1))
    write_prior(tmp_path / "clips", place / "vae", small, shape=(1, 2, 4, 4))
    write_prior(tmp_path / "codes", place / "vae", small, codes=8)
    for name, word in (("masked", "masked"), ("classes", "classes"), ("clips", "clips"), ("codes", "codes")):
        with refused(UsageError, word):
            call("compress", tmp_path / "in", tmp_path / "out", "--vae", place / "vae", "--prior", tmp_path / name)
    with refused(UsageError, "prior"):
        call("compress", tmp_path / "in", tmp_path / "out", "--vae", tiny_vae_folder, "--prior", place / "run")
    with refused(UsageError, "run"):
        call("compress", tmp_path / "in", tmp_path / "out", "--vae", place / "vae", "--prior", tmp_path)
    with refused(UsageError, "prior"):
        call("compress", tmp_path / "in", tmp_path / "out", "--vae", place / "vae")
    assert not (tmp_path / "out").exists()
