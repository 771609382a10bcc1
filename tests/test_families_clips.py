"""Every autoencoder class of clips of the installed diffusers passes the battery of those of images, with time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pipeline_lines import shown
from sentences import refused
from tiny_classes import CLIP_CONFIGS, VIDEOS, pixels_for, small_clips_for, tiny

from ldm_vae.autoencoder import latents, signals
from ldm_vae.autoencoder.checkpointing import enable_checkpointing
from ldm_vae.autoencoder.fine_tuning import idle_parameters
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.lengths import lengths_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import give, held_by, normalisation_of, own_normalisation, take_away
from ldm_vae.autoencoder.preparation import has_alpha
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.training.adaptive_weight import last_layer_gradient
from ldm_vae.training.config import Training, learning
from ldm_vae.training.state import build_state

# AutoencoderKLMiniMaxH3 computes its norms in fp32, whatever its weights are
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
NETWORKS = sorted(CLIP_CONFIGS)
NORMALISED = [name for name in NETWORKS if "VidTok" not in name and "KVAE" not in name]
NO_IMAGES = ["AutoencoderKLAllegro", "AutoencoderKLMiniMaxH3", "AutoencoderVidTok fsq"]
ANY_LENGTH = ["AutoencoderKLHunyuanImageRefiner", "AutoencoderKLTemporalDecoder"]
ONE_FRAME = ["AutoencoderKLQwenImage21"]


def test_every_class_of_clips_has_a_tiny_instance() -> None:
    assert sorted({name.partition(" ")[0] for name in CLIP_CONFIGS}) == VIDEOS


# --- sizes and moments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_are_those_of_an_encode(name: str) -> None:
    vae = tiny(name)
    geometry, lengths, clips = geometry_of(vae), lengths_of(vae), small_clips_for(vae)
    with torch.no_grad():
        moments = latents.encode(vae, clips)
        decoded = latents.decode(vae, moments.mean)
    side, frames = clips.shape[-1] // geometry.factor, lengths.latent_frames(clips.shape[2])
    expected = (2, geometry.latent_channels, frames, side, side)
    assert moments.mean.shape == moments.logvar.shape == expected and moments.is_point == geometry.is_point
    assert decoded.shape == clips.shape and (frames > 2 or name in ONE_FRAME)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_clip_is_encoded_as_its_class_does_it(name: str) -> None:
    vae = tiny(name)
    clips = small_clips_for(vae, 1)
    with torch.no_grad():
        moments, encoded = latents.encode(vae, clips), vae.encode(signals.enter(vae, clips))
        found = signals.held_by(encoded)
        mean = found if torch.is_tensor(found) else found.mode()
        mean = signals.clips_of(mean, clips.shape[2]) if signals.is_by_frame(vae) else mean
        assert torch.equal(moments.mean, mean)
        if not moments.is_point:
            assert isinstance(found, DiagonalGaussianDistribution)
            logvar = signals.clips_of(found.logvar, clips.shape[2]) if signals.is_by_frame(vae) else found.logvar
            assert torch.equal(moments.logvar, logvar)
        # a second call finds nothing of the first
        assert torch.equal(latents.encode(vae, clips).mean, mean)
        assert torch.equal(latents.decode(vae, mean), latents.decode(vae, mean))


@pytest.mark.parametrize("name", NETWORKS)
def test_neighbours_do_not_matter(name: str) -> None:
    vae = tiny(name)
    clips = small_clips_for(vae)
    other = torch.cat([clips[:1], -clips[1:]])
    with torch.no_grad():
        one, two = latents.encode(vae, clips).mean, latents.encode(vae, other).mean
        assert torch.equal(one[0], two[0]) and not torch.equal(one[1], two[1])
        assert torch.equal(latents.decode(vae, one)[0], latents.decode(vae, two)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_is_a_clip_of_one_frame(name: str) -> None:
    vae = tiny(name)
    pixels = pixels_for(vae, 1)
    with torch.no_grad():
        if name in NO_IMAGES:
            with refused(UsageError, "T"):
                latents.encode(vae, pixels)
            return
        image, clip = latents.encode(vae, pixels), latents.encode(vae, pixels[:, :, None])
        assert image.mean.ndim == 4 and torch.equal(image.mean, clip.mean[:, :, 0])
        assert torch.equal(latents.decode(vae, image.mean), latents.decode(vae, clip.mean)[:, :, 0])


def test_a_class_of_images_takes_clips_frame_by_frame() -> None:
    vae = tiny("AutoencoderKL")
    clips = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        moments = latents.encode(vae, clips)
        decoded = latents.decode(vae, moments.mean)
        for frame in range(3):
            image = latents.encode(vae, clips[:, :, frame]).mean
            torch.testing.assert_close(moments.mean[:, :, frame], image, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(decoded[:, :, frame], latents.decode(vae, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {*ANY_LENGTH}))
def test_a_length_that_would_not_come_back_is_refused(name: str) -> None:
    vae = tiny(name)
    clips, lengths = small_clips_for(vae, 1), lengths_of(vae)
    with torch.no_grad():
        with refused(UsageError, "T"):
            latents.encode(vae, torch.cat([clips, clips[:, :, :2]], 2))
        if (short := lengths.first - 1) > 0:
            with refused(UsageError, "T"):
                latents.encode(vae, clips[:, :, :short])
        if lengths.latent_step != 1:
            z = latents.encode(vae, clips).mean
            with refused(UsageError, "t"):
                latents.decode(vae, torch.cat([z, z[:, :, :1]], 2))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_failed_call_leaves_nothing_behind(name: str) -> None:
    vae = tiny(name)
    clips = small_clips_for(vae)
    with torch.no_grad():
        z = latents.encode(vae, clips).mean
        decoded = latents.decode(vae, z)
        for wrong, call in ((torch.cat([clips, clips], 1), latents.encode), (z[:, 1:], latents.decode)):
            with pytest.raises((RuntimeError, ValueError)):
                call(vae, wrong)
        assert torch.equal(latents.encode(vae, clips).mean, z) and torch.equal(latents.decode(vae, z), decoded)
        # of another number of clips too
        assert latents.encode(vae, clips[:1]).mean.shape == z[:1].shape


def test_noise_that_a_decoder_injects_is_the_same_at_every_call() -> None:
    vae = tiny("AutoencoderKLLTXVideo timestep", decoder_inject_noise=(True,) * 4)
    for name, one in vae.named_parameters():
        if "per_channel_scale" in name:
            one.fill_(1.0)
    with torch.no_grad():
        z, state = latents.encode(vae, small_clips_for(vae)).mean, torch.get_rng_state()
        decoded = latents.decode(vae, z)
        assert torch.equal(decoded, latents.decode(vae, z)) and torch.equal(state, torch.get_rng_state())
        assert torch.equal(decoded[1:], latents.decode(vae, z[1:]))
        assert not torch.equal(vae.decode(z, z.new_zeros(2)).sample, decoded)
    with refused(UsageError, "AutoencoderKLLTXVideo"):
        TrainableAutoencoder(vae)


# --- normalisation: the lines of diffusers' pipelines -----------------------------------------------------------------


def per_channel(values: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values).view(1, z.shape[1], -1, 1, 1)[:, :, : z.shape[2]].to(z)


def pipelines_way(name: str, vae: Any, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a diffusion model sees of z, and the z that is decoded of that, as the pipelines of a class have it."""
    config = vae.config
    if "LTX" in name:
        law = diffusers.LTX2Pipeline if "LTX2" in name else diffusers.LTXPipeline
        seen = law._normalize_latents(z, vae.latents_mean, vae.latents_std)
        return seen, law._denormalize_latents(seen, vae.latents_mean, vae.latents_std, config.scaling_factor)
    if "Cosmos" in name:  # pipeline_cosmos_video2world.py, prepare_latents and __call__
        sigma_data = diffusers.EDMEulerScheduler().config.sigma_data
        mean, std = per_channel(config.latents_mean, z), per_channel(config.latents_std, z)
        seen = (z - mean) * sigma_data / std
        return seen, seen * std / sigma_data + mean
    if config.get("latents_mean") is None:
        return z * config.scaling_factor, z * config.scaling_factor / config.scaling_factor
    mean, std = per_channel(config.latents_mean, z), per_channel(config.latents_std, z)
    if name in ("AutoencoderKLWan", "AutoencoderKLWan 2.2", "AutoencoderKLQwenImage"):
        seen = (z - mean) * (1.0 / std)
        return seen, seen / (1.0 / std) + mean
    scale = config.get("scaling_factor", 1.0)
    seen = (z - mean) * scale / std
    return seen, seen * std / scale + mean


@pytest.mark.parametrize("name", NORMALISED)
def test_clips_are_normalised_as_their_pipelines_do_it(name: str) -> None:
    vae = tiny(name)
    z = torch.randn(2, geometry_of(vae).latent_channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen, back = pipelines_way(name, vae, z)
    found = normalisation_of(vae)
    assert torch.equal(found.apply(z), seen) and torch.equal(found.undo(seen), back)
    assert found.shape(tuple(z.shape[1:])) == z.shape[1:] and not torch.equal(seen, z)
    torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted({*NETWORKS} - {*NORMALISED}))
def test_a_class_without_a_law_is_measured(name: str) -> None:
    assert own_normalisation(tiny(name)) is None
    with refused(UsageError, "VAE"):
        normalisation_of(tiny(name))


def test_a_clip_longer_than_its_law_is_refused() -> None:
    vae = tiny("AutoencoderKLCosmos", latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    found = normalisation_of(vae)
    assert found.apply(torch.ones(1, 4, 2, 2, 2)).shape == (1, 4, 2, 2, 2)
    assert found.apply(torch.ones(1, 4, 2, 2)).shape == (1, 4, 2, 2)  # an image: the first frame's
    with refused(UsageError, "normalisation"):
        found.apply(torch.ones(1, 4, 3, 2, 2))


@pytest.mark.parametrize(
    ("name", "pipeline", "more"),
    [
        ("AutoencoderKLMochi", diffusers.MochiPipeline, {}),
        ("AutoencoderKLWan", diffusers.WanPipeline, {}),
        ("AutoencoderKLHunyuanVideo", diffusers.HunyuanVideoPipeline, {}),
    ],
)
def test_latents_are_decoded_as_by_the_lines_of_a_pipeline(name: str, pipeline: Any, more: dict[str, Any]) -> None:
    vae = tiny(name)
    z = torch.randn(1, geometry_of(vae).latent_channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = latents.decode(vae, normalisation_of(vae).undo(z))
    assert torch.equal(shown(pipeline, vae, z, **more), ours)


@pytest.mark.parametrize("name", NORMALISED)
def test_an_export_is_read_back_with_its_normalisation(name: str, tmp_path: Path) -> None:
    vae = tiny(name)
    own, clips = normalisation_of(vae), small_clips_for(vae, 1)
    for wanted in (None, held_by(vae, Normalisation(0.5))):
        back = load_autoencoder(write_vae(vae, tmp_path / str(wanted is None), wanted))
        found, expected = normalisation_of(back), wanted or own
        assert type(back) is type(vae)
        z = torch.randn(1, geometry_of(vae).latent_channels, 2, 4, 4)
        torch.testing.assert_close(found.apply(z), expected.apply(z), rtol=1e-6, atol=1e-6)
        if wanted is not None:
            torch.testing.assert_close(found.apply(z), 0.5 * z, rtol=1e-6, atol=1e-6)
        same = {key: value for key, value in vae.state_dict().items() if not key.startswith("latents_")}
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in same.items())
        with torch.no_grad():
            assert torch.equal(latents.encode(back, clips).mean, latents.encode(vae, clips).mean)


def test_a_clip_alone_is_not_taken_for_a_batch_of_images() -> None:
    law, clip = normalisation_of(tiny("AutoencoderKLWan")), torch.randn(16, 3, 4, 4)
    for call in (law.apply, law.undo):
        with refused(UsageError, "normalisation"):
            call(clip)
    assert law.apply(clip[None]).shape == (1, 16, 3, 4, 4) and law.apply(clip[:, 0]).shape == (16, 4, 4)


def test_what_no_pipeline_of_a_class_reads_is_no_normalisation() -> None:
    vae = tiny("AutoencoderKLCogVideoX")  # whose config has the keys of an AutoencoderKL
    for law in (Normalisation(0.5, 0.25), Normalisation(1.0, None, (0.0,) * 4, (1.0,) * 4)):
        with refused(UsageError, "normalisation"):
            held_by(vae, law)
    vae.register_to_config(shift_factor=0.25, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert normalisation_of(vae) == Normalisation(vae.config.scaling_factor)


@pytest.mark.parametrize("name", NORMALISED)
def test_a_law_that_was_taken_away_is_refused(name: str) -> None:
    vae = tiny(name)
    take_away(vae)
    with refused(UsageError, "VAE"):
        normalisation_of(vae)
    give(vae, Normalisation(0.5))
    z = torch.randn(1, geometry_of(vae).latent_channels, 2, 4, 4)
    torch.testing.assert_close(normalisation_of(vae).apply(z), 0.5 * z, rtol=1e-6, atol=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_layers_gradient_is_the_textbooks(name: str) -> None:
    vae = tiny(name).double().requires_grad_(True)
    network = TrainableAutoencoder(vae)
    clips = small_clips_for(vae).double()
    found = network(clips, torch.zeros(2, *network.noise_shape(*clips.shape[2:]), dtype=torch.float64))
    # image terms see frames
    assert found.pixels.shape == found.target.shape == signals.frames_of(clips).shape
    cotangent = torch.randn(found.pixels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight: Any = network.last_layer.weight
    (expected,) = torch.autograd.grad(found.pixels, weight, cotangent, retain_graph=True)
    ours = last_layer_gradient(network.last_layer, found.last_calls, found.pixels, cotangent)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert float(expected.abs().max()) > 0
    found.pixels.sum().backward()  # the graph is still there


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_moves_what_has_a_part_and_nothing_else(name: str, tmp_path: Path) -> None:
    vae, clips = tiny(name), small_clips_for(tiny(name))
    channels, frames = geometry_of(vae).in_channels, clips.shape[2]
    of_clips = {"ssim": {"frames": 2}, "time": {"kind": "temporal_difference"}} if frames > 1 else {"ssim": {}}
    settings = Training(
        output_dir=tmp_path, max_train_images=8, train_batch_size=2, learning_rate=1e-3, resolution=clips.shape[-1],
        seed=0, init_from="none", model={"kind": "pretrained", "in_channels": channels}, losses={"l1": {}, **of_clips},
        adversary={"weight": 0.5},
        discriminator={"kind": "patchgan", "width": 8, "layers": 1, "dimensions": 3 if frames > 1 else 2},
        data={"kind": "folder", "path": "none", "channels": channels, "alpha": has_alpha(vae), "frames": frames},
    )  # fmt: skip
    vae = learning(vae, ["*"], frames)
    state = build_state(settings, Accelerator(cpu=True), vae)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    noise = torch.randn(2, *state.network.noise_shape(*clips.shape[2:]), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        logs = state.step(clips, noise, 2, None)
    assert torch.isfinite(logs["adversary/weight"]) and logs["adversary/weight"] > 0 and logs["loss/ssim"] > 0
    assert frames == 1 or logs["loss/time"] > 0
    expected = {key for key, one in vae.named_parameters() if one.requires_grad}
    moved = {key for key, value in vae.state_dict().items() if not torch.equal(value, before[key])}
    # a bias before a norm of single channels moves by rounding or not at all
    assert moved <= expected and len(moved) > 0.9 * len(expected) > 0
    frozen = {key for key, _ in vae.named_parameters()} - expected
    # of a clip later frames have a part too: what an image leaves idle learns
    assert "Wan" not in name or (not frozen and len(idle_parameters(vae)) > 0)


@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan",
                                  "AutoencoderKLWan 2.2"])  # fmt: skip
def test_a_decode_that_clamps_is_drawn_back(name: str) -> None:
    """A network all of whose pixels lie outside [-1, 1] gets the gradient that leads inside, and none that leads on."""
    vae = tiny(name)
    vae.decoder.conv_out.bias.fill_(-9.0)
    network, clips = TrainableAutoencoder(vae.requires_grad_(True)), small_clips_for(vae, 1)
    noise = torch.zeros(1, *network.noise_shape(*clips.shape[2:]))
    pixels = network(clips, noise).pixels
    with torch.no_grad():
        z = latents.encode(vae, clips).mean
        assert torch.equal(pixels, signals.frames_of(latents.decode(vae, z))) and bool((pixels == -1.0).all())
    for sign, learns in ((-1.0, True), (1.0, False)):  # descent lifts, descent lowers
        (gradient,) = torch.autograd.grad((sign * pixels).sum(), vae.decoder.conv_out.bias, retain_graph=True)
        assert bool(gradient.any()) == learns


def gradients(vae: Any, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    vae.zero_grad()
    moments = latents.encode(vae, clips)
    (latents.decode(vae, moments.mean).square().mean() + moments.logvar.mean()).backward()
    return {name: value.grad.clone() for name, value in vae.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    vae = tiny(name).double().requires_grad_(True).train()
    clips = small_clips_for(vae, 1).double()
    torch.manual_seed(0)  # of AutoencoderKLAllegro's dropout
    plain = gradients(vae, clips)
    enable_checkpointing(vae)
    assert vae.is_gradient_checkpointing
    torch.manual_seed(0)
    again = gradients(vae, clips)
    assert plain.keys() == again.keys()
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-10, atol=1e-10)
