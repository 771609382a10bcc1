"""Images with alpha: what is read of them, what resizing does to it, what losses and metrics see.

Colour that cannot be seen has no part in any of it; composites over a background are the reference everywhere.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cut_outs import cut_out, write_cut_outs
from PIL import Image
from sentences import refused
from tiny_classes import tiny
from tiny_networks import TinyLPIPS

from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.latents import Moments, posterior_noise
from ldm_vae.autoencoder.preparation import preparation_of, record
from ldm_vae.autoencoder.trainable import Reconstruction, TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.data import alpha
from ldm_vae.data.decoding import Decoding, read_image
from ldm_vae.data.flags import DataFlags
from ldm_vae.data.preprocessing import Preprocessing, parse
from ldm_vae.data.source import open_source
from ldm_vae.data.transforms import (
    TransformConfig,
    centre_crop,
    decoding_of,
    preprocessing_identity,
    random_crop,
    to_pixels,
)
from ldm_vae.discriminators.patchgan import Config as PatchGAN
from ldm_vae.latent_space.equivariance import equivariance_error
from ldm_vae.latent_store.write.crops import Cutting
from ldm_vae.losses.alpha import Config as Alpha
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.losses.haar import Config as Haar
from ldm_vae.losses.kl import Config as KL
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.metrics import lpips as lpips_metric
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.frechet import FrechetDistance
from ldm_vae.metrics.linear import fit_code
from ldm_vae.metrics.protocol import PINNED, by_name
from ldm_vae.metrics.psnr import psnr
from ldm_vae.metrics.select import build_metrics, default_names
from ldm_vae.perturbations import Draw
from ldm_vae.perturbations.eq import Config as Equivariance
from ldm_vae.training.adversary import Adversary, AdversaryConfig
from ldm_vae.training.objective import Objective
from ldm_vae.training.step import TrainingStep

STRAIGHT = Decoding(4, alpha=True)
SHAPE = {"in_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}


def saved(array: np.ndarray, mode: str | None = None) -> bytes:
    file, picture = io.BytesIO(), Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cut(side: int = 48, seed: int = 0) -> np.ndarray:
    return cut_out(np.random.default_rng(seed), side)


def over(pixels: torch.Tensor, grey: float) -> torch.Tensor:
    """[..., 4, H, W] on 0..255 => composites, written out by hand."""
    pixels = pixels.double()
    opacity = pixels[..., 3:, :, :] / 255
    return pixels[..., :3, :, :] * opacity + grey * (1 - opacity)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_images_that_look_alike_are_read_alike() -> None:
    one = cut()
    other = one.copy()
    other[one[:, :, 3] == 0, :3] = 77
    assert (one[:, :, 3] == 0).mean() > 0.2
    first, second = (read_image(saved(array), STRAIGHT).pixels for array in (one, other))
    assert torch.equal(first, second)
    shown = torch.from_numpy(one).permute(2, 0, 1)
    hidden = shown[3] == 0
    assert torch.equal(first[:, ~hidden], shown[:, ~hidden]) and not first[:, hidden].any()
    # four channels of any other meaning stay as they are
    assert torch.equal(read_image(saved(one), Decoding(4)).pixels, shown)
    assert torch.equal(read_image(npy(one), Decoding(4)).pixels, shown)
    assert torch.equal(read_image(npy(one), STRAIGHT).pixels, first)


def test_images_without_alpha_are_opaque() -> None:
    colour = cut()[:, :, :3]
    grey, deep = colour[:, :, 0], colour[:, :, 0].astype(np.uint16) * 257
    for data in (saved(colour), npy(colour), npy(colour.transpose(2, 0, 1).copy()), saved(colour, "P"), saved(grey),
                 npy(grey), saved(deep), colour):  # fmt: skip
        pixels = read_image(data, STRAIGHT).pixels
        assert pixels.shape == (4, 48, 48) and pixels[3].eq(255).all()
    assert torch.equal(read_image(saved(colour), STRAIGHT).pixels[:3], torch.from_numpy(colour).permute(2, 0, 1))
    assert torch.equal(read_image(saved(deep), STRAIGHT).pixels[:3], torch.from_numpy(grey).expand(3, -1, -1))


def test_alpha_is_the_fourth_of_four_channels() -> None:
    with refused(UsageError, "alpha"):
        Decoding(3, alpha=True)
    with refused(UsageError, "alpha"):
        preparation_of({"grey": AutoencoderConfig(**SHAPE | {"in_channels": 1}).build()}, DataFlags(alpha=True))


def crops(image: torch.Tensor, with_alpha: bool) -> dict[str, torch.Tensor]:
    """The same crops by every way from an image to a network."""
    draw = partial(np.random.default_rng, 3)
    cutting = Cutting((20,), ("", "top_left"), alpha=with_alpha)(image, (48, 48))
    return {
        "centre": centre_crop(image, 20, alpha=with_alpha).pixels,
        "larger": centre_crop(image, 80, alpha=with_alpha).pixels,
        "as it is": centre_crop(image, 64, resize="none", alpha=with_alpha).pixels,
        "training": random_crop(image, 20, TransformConfig(scale=(1, 2)), draw(), None, with_alpha).pixels,
        "store": cutting[0].pixels, "corner": cutting[1].pixels,
    }  # fmt: skip


@pytest.mark.parametrize("grey", [0, 255])
def test_resizing_and_compositing_can_be_exchanged(grey: int) -> None:
    """Premultiplied, invisible colour has no part: the resized image over a ground is the image over it, resized."""
    image = torch.from_numpy(cut()).permute(2, 0, 1).contiguous()
    rows, columns = torch.meshgrid(*[torch.arange(48) - 23.5] * 2, indexing="ij")
    image[3] = ((19.5 - (rows**2 + columns**2).sqrt()).clamp(0, 1) * 200).round()  # an edge of one pixel
    image[:3, image[3] == 0] = torch.tensor([[0], [255], [0]], dtype=torch.uint8)
    flat = over(image, grey).round().to(torch.uint8)
    found, wanted, wrong = crops(image, True), crops(flat, False), crops(image, False)
    for name, pixels in found.items():
        error, other = ((over(one, grey) - wanted[name]).abs() for one in (pixels, wrong[name]))
        # bicubic weights overshoot, below no opacity at all where an edge is enlarged
        assert error.mean() < 0.3 and error.max() <= (6 if pixels.shape[1] == 20 else 20), name
        assert other.mean() > 3 * error.mean() and other.max() > 25, name  # invisible green in the edge
        assert not pixels[:3, pixels[3] == 0].any()


def test_an_equivariant_target_mixes_in_no_invisible_colour() -> None:
    image = torch.from_numpy(cut()).permute(2, 0, 1)[None]
    part = Equivariance(probability=1.0, scales=(0.5,)).build(0)
    latents = torch.zeros(1, 4, 24, 24)
    shown = partial(Draw, torch.zeros(1, 0, 24, 24), to_pixels(image.clone()), 0)
    _, target = part(latents, to_pixels(image.clone()), shown(alpha=True))
    _, flat = part(latents, to_pixels(over(image, 255).float()), shown())
    assert (alpha.composite(target, 1.0) - flat).abs().max() < 0.05
    assert torch.equal(read_hidden(target), torch.full_like(read_hidden(target), -1))


def test_equivariance_is_measured_of_composites() -> None:
    """Hidden colour has no part in the target; the latents here are those of nothing."""
    image = torch.from_numpy(cut()).permute(2, 0, 1)[None]
    other = torch.where(image[:, 3:] > 0, image, 200 * (torch.arange(4) < 3).view(1, 4, 1, 1).to(torch.uint8))
    torch.manual_seed(0)
    vae = AutoencoderConfig(**SHAPE).build().eval()
    vae.encode, found = Exact(vae).encode, []
    for with_alpha in (True, False):
        pair = [equivariance_error(vae, to_pixels(one.clone()), alpha=with_alpha)["scale_0.5"].psnr
                for one in (image, other)]  # fmt: skip
        found.append((pair[0] - pair[1]).abs().item())
    assert found[0] == 0 < found[1]


class Exact:
    """Encodes to latents that know nothing, so that only the target tells two images apart."""

    def __init__(self, vae: Any) -> None:
        self.inner = vae.encode

    def encode(self, images: torch.Tensor) -> Any:
        return self.inner(torch.zeros_like(images))


def read_hidden(pixels: torch.Tensor) -> torch.Tensor:
    return pixels[:, :3].permute(1, 0, 2, 3)[:, pixels[:, 3] == -1]


# --- the record -------------------------------------------------------------------------------------------------------


def test_alpha_is_recorded_and_four_channels_alone_are_not_it() -> None:
    said = {one: Preprocessing.of(Decoding(4, alpha=one)) for one in (True, False)}
    assert [said[one].alpha for one in (True, False)] == ["straight", "channel"]
    for one, found in said.items():
        assert parse(found.to_bytes(), "here") == found and found.decoding == Decoding(4, alpha=one)
    assert preprocessing_identity(Decoding(4)) == "1 channels=4"
    assert preprocessing_identity(STRAIGHT) == "1 channels=4 alpha=True"
    assert decoding_of("1 channels=4 alpha=True") == STRAIGHT
    with refused(UsageError, "alpha"):
        parse(said[True].to_bytes().replace(b'"channels": 4', b'"channels": 3'), "here")


def test_a_network_says_whether_its_images_have_alpha() -> None:
    unknown, qwen = AutoencoderConfig(**SHAPE).build(), tiny("AutoencoderKLQwenImage21")
    assert not preparation_of({"": unknown}).decoding.alpha
    assert preparation_of({"": unknown}, DataFlags(alpha=True)).decoding == STRAIGHT
    assert preparation_of({"": qwen}).decoding == STRAIGHT  # by its class
    assert not preparation_of({"": qwen}, DataFlags(alpha=False)).decoding.alpha
    known, other = (
        record(AutoencoderConfig(**SHAPE).build(), Preprocessing.of(Decoding(4, alpha=one))) for one in (1, 0)
    )
    assert preparation_of({"": known}).decoding == STRAIGHT
    with refused(UsageError, "alpha"):
        preparation_of({"one": known, "two": other})


# --- the objective ----------------------------------------------------------------------------------------------------


def batch(count: int = 2) -> torch.Tensor:
    return torch.stack([to_pixels(read_image(saved(cut(32, seed)), STRAIGHT).pixels) for seed in range(count)])


class FrozenOptimizer(torch.optim.SGD):
    """Leaves weights and gradients as they are."""

    def step(self, closure: Any = None) -> None:
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        return None


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def build_step(terms: dict[str, Any]) -> TrainingStep:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    network = TrainableAutoencoder(AutoencoderConfig(**SHAPE).build().double(), alpha=True)
    objective = Objective(terms).double()
    critic = PatchGAN(width=8, layers=1).build().double()
    return TrainingStep(
        accelerator, accelerator.prepare(network), objective,
        accelerator.prepare(FrozenOptimizer(network.parameters(), lr=1.0)),
        Adversary(AdversaryConfig(weight=0.5)), accelerator.prepare(critic),
        accelerator.prepare(FrozenOptimizer(critic.parameters(), lr=1.0)),
    )  # fmt: skip


def seen(pixels: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    opacity = (pixels[:, 3:] + 1) / 2
    return pixels[:, :3] * opacity + background * (1 - opacity)


def test_the_step_equals_its_textbook_form() -> None:
    step = build_step({"l1": L1(), "haar": Haar(weight=0.7), "alpha": Alpha(weight=2.0), "kl": KL()})
    images = batch().double()
    noise = posterior_noise(3, range(2), step.model.noise_shape(32, 32)).double()
    r = step.model(images, noise)
    assert r.background is not None and r.background.shape == (2, 3, 1, 1)
    fake, real = seen(r.pixels, r.background), seen(images, r.background)
    rec = (fake - real).abs().mean() + 0.7 * step.objective.terms["haar"](fake, real)
    rec = rec + 2.0 * (r.pixels[:, 3] - images[:, 3]).abs().mean()
    judged = step.adversary.generator_loss(step.discriminator(fake))
    last = step.model.vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rec, judged)]
    weight = 0.5 * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4 / images[0].numel()).detach()
    (rec + step.objective.latent_terms(r)[0] + weight * judged).backward()
    generator = gradients(step.model)
    step.discriminator.zero_grad()
    step.adversary.discriminator_loss(step.discriminator(real), step.discriminator(fake.detach())).backward()
    critic = gradients(step.discriminator)
    for module in (step.model, step.discriminator):
        module.zero_grad()
    logs = step(images, noise)
    assert logs["adversary/weight"].item() == pytest.approx(weight.item(), rel=1e-10)
    assert logs["loss/alpha"].item() == pytest.approx((r.pixels[:, 3] - images[:, 3]).abs().mean().item(), rel=1e-12)
    for module, expected in ((step.model, generator), (step.discriminator, critic)):
        ours = gradients(module)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-14, msg=name)


def test_backgrounds_are_drawn_by_the_image_and_move_no_other_draw() -> None:
    torch.manual_seed(0)
    vae = AutoencoderConfig(**SHAPE).build()
    network, plain = TrainableAutoencoder(vae, alpha=True), TrainableAutoencoder(vae)
    noise = posterior_noise(3, range(64), network.noise_shape(32, 32))
    images = batch(1).expand(64, -1, -1, -1)
    found = network(images, noise)
    assert found.background is not None
    alone = network(images[:1], posterior_noise(3, [17], network.noise_shape(32, 32)))
    assert torch.equal(alone.background[0], found.background[17])  # neither rank, neighbours nor a resume matter
    assert not torch.equal(found.background[0], found.background[1])
    assert abs(found.background.mean()) < 0.2 and found.background.std() == pytest.approx(1 / 3**0.5, rel=0.1)
    assert found.background.abs().max() <= 1
    own = posterior_noise(3, range(64), plain.noise_shape(32, 32))
    assert torch.equal(noise[:, :4], own) and plain(images, own).background is None
    # all frames of a clip are seen over one
    of_clips = network(images[:2, :, None].expand(-1, -1, 3, -1, -1), noise[:2, :, None].expand(-1, -1, 3, -1, -1))
    assert torch.equal(of_clips.background, found.background[:2].repeat_interleave(3, dim=0))
    assert of_clips.seen(of_clips.pixels).shape == (6, 3, 32, 32)


def test_nothing_rewards_invisible_colour() -> None:
    objective = Objective({"l1": L1(), "alpha": Alpha()})
    target, pixels = batch(), batch().requires_grad_()
    background = torch.tensor([0.2, -0.7, 1.0]).view(1, 3, 1, 1).expand(2, -1, -1, -1)
    hidden = target[:, 3:] == -1
    other = torch.where(hidden & (torch.arange(4) < 3).view(1, 4, 1, 1), 0.5, target)
    noisy = pixels + torch.cat([torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)], dim=1)
    moments = Moments.point(target)
    losses = [
        objective.pixel_terms(noisy, Reconstruction(one, noisy, one, moments, one, (), background=background))[0]
        for one in (target, other)
    ]
    assert torch.equal(*losses) and losses[0] > 0
    losses[0].backward()
    assert not (pixels.grad[:, :3] * hidden).any() and (pixels.grad[:, :3] * ~hidden).any()


def test_terms_that_do_not_suit_are_refused() -> None:
    vae = AutoencoderConfig(**SHAPE).build()
    with refused(UsageError, "losses.alpha"):
        Objective({"l1": L1(), "alpha": Alpha()}).attach(TrainableAutoencoder(vae))
    with refused(UsageError, "losses.gaussian_nll"):
        Objective({"gaussian_nll": GaussianNLL()}).attach(TrainableAutoencoder(vae, alpha=True))
    with refused(UsageError, "losses"):
        Objective({"alpha": Alpha()})


# --- metrics ----------------------------------------------------------------------------------------------------------


def pair_of(with_alpha: bool = True) -> Any:
    original = batch()
    noise = 0.2 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    return PINNED.pair(original, original + noise, alpha=with_alpha)


def test_metrics_of_colour_are_means_over_composites() -> None:
    pair = pair_of()
    expected = torch.stack([psnr(*(over(one, grey).round() for one in (pair.original, pair.reconstruction)))
                            for grey in (0, 255)]).mean(dim=0)  # fmt: skip
    found = {metric.name: metric.update(pair) for metric in build_metrics(
        ("psnr", "ssim", "l1", "alpha_psnr", "alpha_l1"), torch.device("cpu"), 32, alpha=True)}  # fmt: skip
    torch.testing.assert_close(found["psnr"], expected)
    difference = (pair.original[:, 3] - pair.reconstruction[:, 3]).double()
    torch.testing.assert_close(found["alpha_l1"], difference.abs().mean(dim=(1, 2)))
    torch.testing.assert_close(found["alpha_psnr"], 10 * torch.log10(255**2 / difference.square().mean(dim=(1, 2))))
    # four channels that are no RGBA are compared as they are
    (metric,) = build_metrics(("psnr",), torch.device("cpu"), 32)
    torch.testing.assert_close(metric.update(pair_of(False)), psnr(pair.original, pair.reconstruction))


def test_no_metric_sees_invisible_colour() -> None:
    original, pixels = batch(), batch() * 0.9
    pixels[:, 3] = original[:, 3]
    other = torch.where((original[:, 3:] == -1) & (torch.arange(4) < 3).view(1, 4, 1, 1), 0.5, pixels)
    names = ("psnr", "ssim", "l1", "delta_e", "alpha_psnr", "alpha_l1")
    one, two = ({metric.name: metric.update(PINNED.pair(original, pixels, alpha=True))
                 for metric in build_metrics(names, torch.device("cpu"), 32, alpha=True)}
                for pixels in (pixels, other))  # fmt: skip
    assert one.keys() == set(names) and all(torch.equal(one[name], two[name]) for name in names)


def test_perceptual_metrics_and_set_distances_see_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, shapes = TinyLPIPS(), []

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return (network.net(x)[0] - network.net(y)[0]).abs().mean(dim=(1, 2, 3))

    pair, whites = pair_of(), []
    values = [lpips_metric.lpips(distance, one.original / 127.5 - 1, one.reconstruction / 127.5 - 1)
              for one in pair.views]  # fmt: skip
    assert set(shapes) == {(2, 3, 32, 32)} and not torch.equal(*values)

    def features(one: Any) -> tuple[torch.Tensor, torch.Tensor]:
        whites.append(one)
        return one.original.mean(dim=(2, 3)), one.reconstruction.mean(dim=(2, 3))

    FrechetDistance("fd", features, 3).update(pair)
    torch.testing.assert_close(whites[0].original, over(pair.original, 255).round().float())
    with refused(UsageError, "channels"):
        lpips_metric.lpips(distance, pair.original, pair.reconstruction)


def test_alphas_own_metrics_are_of_images_that_have_it(tmp_path: Path) -> None:
    assert "alpha_psnr" in default_names(True) and "alpha_psnr" not in default_names(False)
    with refused(UsageError, "alpha_psnr"):
        build_metrics(("psnr", "alpha_psnr"), torch.device("cpu"), 32)
    source = open_source(write_cut_outs(tmp_path / "images", 3), channels=4, alpha=True)
    assert next(image_batches(source, None, 32, batch_size=3)).alpha
    with refused(UsageError, "protocol"):
        next(image_batches(source, None, 32, batch_size=3, protocol=by_name("eq-vae")))
    vae = AutoencoderConfig(**SHAPE).build().eval()
    code = fit_code(vae, source, range(3), 0, 1, resolution=32, batch_size=3)
    assert code is not None and code.decode(code.encode(batch())).shape == (2, 4, 32, 32)


def test_a_picture_lies_over_a_checkerboard() -> None:
    clear = torch.zeros(4, 32, 32, dtype=torch.uint8)
    board = alpha.visible(clear, True)
    assert board.shape == (3, 32, 32) and board.unique().tolist() == [204, 255]
    assert board[0, 0, 0] == board[0, 8, 8] == 255 and board[0, 0, 8] == 204
    opaque = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8)
    opaque[3] = 255
    assert torch.equal(alpha.visible(opaque, True), opaque[:3]) and alpha.visible(opaque, False) is opaque
