"""MS-SSIM, LPIPS and the protocols of others, each against the library that its repository calls."""

from __future__ import annotations

import warnings
from pathlib import Path

import lpips as lpips_package
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sentences import refused
from skimage.data import astronaut
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from torchvision import transforms

from ldm_vae.core.errors import UsageError
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import centre_crop, to_pixels
from ldm_vae.metrics import lpips, ms_ssim, psnr, ssim
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.evaluate import reconstruct
from ldm_vae.metrics.protocol import PINNED, VARIANTS, by_name
from ldm_vae.metrics.select import build_metrics


def floats(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two crops of a photograph in [-1, 1], and a distorted copy that leaves the range, as a decoder does."""
    image = torch.from_numpy(astronaut()).permute(2, 0, 1) / 127.5 - 1
    crops = torch.stack([image[:, :side, 100 : 100 + side], image[:, 250 : 250 + side, 200 : 200 + side]])
    noise = torch.randn(crops.shape, generator=torch.Generator().manual_seed(0))
    return crops, crops * 1.05 + 0.08 * noise


@pytest.mark.slow
@pytest.mark.parametrize("side", [176, 201])
def test_ms_ssim_agrees_with_torchmetrics(side: int) -> None:
    pair = PINNED.pair(*floats(side))
    theirs = multiscale_structural_similarity_index_measure(
        pair.reconstruction.double(), pair.original.double(), data_range=255.0, reduction="none"
    )
    assert ms_ssim.ms_ssim(pair.original, pair.reconstruction).tolist() == pytest.approx(theirs.tolist(), abs=1e-4)


def test_ms_ssim_below_161_px_says_what_it_needs() -> None:
    (metric,) = build_metrics(["ms_ssim"], torch.device("cpu"), 160)
    assert metric.compute().note == "needs 161 px or more"
    (metric,) = build_metrics(["ms_ssim"], torch.device("cpu"), 161)
    metric.update(PINNED.pair(*floats(161)))
    assert 0 < metric.compute().mean < 1


def test_lpips_agrees_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 8-bit images scaled to [-1, 1], as the package's own command line does; any trunk serves to compare."""
    torch.manual_seed(0)
    with warnings.catch_warnings():  # the package calls torchvision's old interface
        warnings.simplefilter("ignore")
        network = lpips_package.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr("ldm_vae.perceptual.pretrained.load_lpips", lambda *_: network)
    pair = PINNED.pair(*floats(64))
    ours = lpips.build("alex", torch.device("cpu")).update(pair)
    arrays = [[image.permute(1, 2, 0).numpy() for image in side] for side in (pair.original, pair.reconstruction)]
    theirs = [network(*(lpips_package.im2tensor(image) for image in both)).item() for both in zip(*arrays, strict=True)]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-5)

    raw = lpips.build("alex", torch.device("cpu"), protocol=by_name("eq-vae")).update(pair)
    expected = network(pair.raw_original, pair.raw_reconstruction).flatten()
    assert raw.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert raw.tolist() != pytest.approx(ours.tolist(), abs=1e-5)


def test_ssim_of_eq_vae_is_torchmetrics_without_a_range() -> None:
    original, other = floats(96)
    ours = ssim.build(by_name("eq-vae")).update(by_name("eq-vae").pair(original, other))
    theirs = [
        structural_similarity_index_measure(b[None].double(), a[None].double()).item()
        for a, b in zip(original, other, strict=True)
    ]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-6)


def test_ssim_of_lightningdit_is_torchmetrics_on_minus_one_to_one() -> None:
    original, other = floats(96)
    ours = ssim.build(by_name("lightningdit")).update(by_name("lightningdit").pair(original, other))
    theirs = structural_similarity_index_measure(
        other.double(), original.double(), data_range=(-1.0, 1.0), reduction="none"
    )
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)


def test_ssim_and_psnr_of_lavinal712_are_scikit_images_on_floats() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    original, other = floats(96)
    protocol = by_name("lavinal712")
    pair = protocol.pair(original, other)
    unit = [((image + 1) / 2).clamp(0, 1).double().permute(0, 2, 3, 1).numpy() for image in (original, other)]
    pairs = list(zip(*unit, strict=True))
    theirs = [structural_similarity(a, b, win_size=11, channel_axis=-1, data_range=1.0) for a, b in pairs]
    assert ssim.build(protocol).update(pair).tolist() == pytest.approx(theirs, abs=1e-6)
    expected = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs]
    assert psnr.build(protocol).update(pair).tolist() == pytest.approx(expected, abs=1e-4)


def preprocessing(name: str, side: int) -> transforms.Compose:
    """The transforms of each repository, in its order (ldm_vae/metrics/protocol.py names file and commit)."""
    resize, crop, tensor = transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()
    order = [resize, crop, tensor] if name == "lavinal712" else [tensor, resize, crop]
    return transforms.Compose([*order, transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3)])


@pytest.mark.parametrize("size", [(300, 401), (201, 133), (64, 90), (40, 37)])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_pixels_are_those_of_the_repositorys_transforms(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Resized in the order and in the number type of each: to 1e-6, where a byte more or less is 8e-3."""
    Image.fromarray(astronaut()[: size[0], : size[1]]).save(tmp_path / "a.png")
    theirs = preprocessing(name, 64)(Image.open(tmp_path / "a.png"))
    (batch,) = image_batches(open_source(tmp_path), None, 64, batch_size=1, protocol=by_name(name))
    ours = to_pixels(batch.pixels.clone())[0]
    assert (ours - theirs).abs().max() < 2e-6


def test_ours_resizes_bytes(tmp_path: Path) -> None:
    Image.fromarray(astronaut()[:100, :120]).save(tmp_path / "a.png")
    (batch,) = image_batches(open_source(tmp_path), None, 64, batch_size=1)
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(
        batch.pixels[0], centre_crop(torch.from_numpy(astronaut()[:100, :120]).permute(2, 0, 1), 64).pixels
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_of_floats_is_measured_and_left_alone(name: str, tiny_vae: AutoencoderKL, image_folder: Path) -> None:
    protocol = by_name(name)
    (batch,) = image_batches(open_source(image_folder), range(3), 16, batch_size=3, protocol=protocol)
    before = batch.pixels.clone()
    _, pair = reconstruct(tiny_vae, batch, torch.device("cpu"), protocol, 3)
    assert torch.equal(batch.pixels, before)
    assert torch.equal(pair.raw_original, to_pixels(before.clone()))
    assert torch.equal(pair.original, pair.original.round()) and pair.original.max() <= 255


def test_protocols_move_the_numbers_and_ours_is_the_default() -> None:
    original, other = floats(96)
    means = {}
    for name in (PINNED.name, *VARIANTS):
        protocol = by_name(name)
        means[name] = ssim.build(protocol).update(protocol.pair(original, other)).mean().item()
    assert len({round(value, 4) for value in means.values()}) == 4
    assert ssim.build().update(PINNED.pair(original, other)).mean().item() == means["ldm-vae"]


def test_an_unknown_protocol_names_those_that_exist() -> None:
    with refused(UsageError, "protocol"):
        by_name("best")
