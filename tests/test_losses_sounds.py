"""Terms of sounds: auraloss and Descript Audio Codec's published formula, silence, precision, sounds too short."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from auraloss.freq import MultiResolutionSTFTLoss
from sentences import refused
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_vae.core.config import options, validate
from ldm_vae.core.errors import UsageError
from ldm_vae.losses.l1 import Config as L1
from ldm_vae.losses.l2 import Config as L2
from ldm_vae.losses.multi_resolution_stft import Config as STFT
from ldm_vae.losses.multi_scale_mel import Config as Mel

RATE, LENGTH = 24_000, 4096
TERMS: dict[str, Any] = {"multi_resolution_stft": STFT(), "multi_scale_mel": Mel(sample_rate=RATE)}
SMALL: dict[str, Any] = {
    "multi_resolution_stft": STFT(sizes=(32, 16), hops=(8, 5), windows=(24, 16)),
    "multi_scale_mel": Mel(sample_rate=RATE, windows=(16, 32), bands=(3, 5)),
}


def sounds(count: int = 2, channels: int = 2, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    target = 0.3 * torch.randn(count, channels, length, generator=draw)
    target *= torch.tensor([1.0, 0.02, 0.4][:count]).view(-1, 1, 1)  # one is faint
    return target + 0.05 * torch.randn(target.shape, generator=draw), target


def test_spectral_convergence_and_log_magnitude_are_aurasloss() -> None:
    pixels, target = sounds(3)
    theirs = MultiResolutionSTFTLoss()
    # of each sound by itself, since they divide the norms of a whole batch
    expected = torch.stack([theirs(x[None], y[None]) for x, y in zip(pixels, target, strict=True)]).mean()
    assert STFT().build()(pixels, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert theirs(pixels, target).item() != pytest.approx(expected.item(), rel=1e-3)
    mine = STFT(sizes=(256,), hops=(64,), windows=(200,)).build()
    one = MultiResolutionSTFTLoss(fft_sizes=[256], hop_sizes=[64], win_lengths=[200])
    assert mine(pixels[:1], target[:1]).item() == pytest.approx(one(pixels[:1], target[:1]).item(), rel=1e-5)


def mel_of_librosa(rate: int, window: int, bands: int) -> np.ndarray:
    """Slaney's Auditory Toolbox as librosa.filters.mel has it, in fp64: [bands, window / 2 + 1]."""
    step, corner = 200 / 3, 1000.0
    logstep = np.log(6.4) / 27

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < corner / step, step * mel, corner * np.exp(logstep * (mel - corner / step)))

    top = corner / step + np.log(rate / 2 / corner) / logstep
    edges = hertz(np.linspace(0, top, bands + 2))
    found = np.linspace(0, rate / 2, window // 2 + 1)
    rising = (found - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - found) / np.diff(edges)[1:, None]
    return np.clip(np.minimum(rising, falling), 0, None) * (2 / (edges[2:] - edges[:-2]))[:, None]


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_multi_scale_mel_is_descripts(rate: int) -> None:
    pixels, target = sounds()
    expected = 0.0
    for window, bands in zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 160, 320), strict=True):
        shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        logs = []
        for one in (pixels, target):
            padded = np.pad(one.double().numpy(), ((0, 0), (0, 0), (window // 2, window // 2)), mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1)[:, :, :: window // 4]
            magnitudes = np.abs(np.fft.rfft(frames * shape))
            mel = magnitudes @ mel_of_librosa(rate, window, bands).T
            logs.append(np.log10(np.clip(mel, 1e-5, None)))  # pow 1, no term of plain magnitudes: conf/base.yml
        expected += np.abs(logs[0] - logs[1]).mean()
    assert Mel(sample_rate=rate).build()(pixels, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", TERMS)
def test_silence_has_a_gradient(kind: str) -> None:
    term, (pixels, target) = TERMS[kind].build(), sounds()
    for x, y in ((0 * pixels, target), (pixels, 0 * target), (0 * pixels, 0 * target), (target, target)):
        x = x.clone().requires_grad_()
        value = term(x, y)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.isfinite() and gradient.isfinite().all()
        assert (value == 0) == (x is not y and bool((x == y).all()))


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    pixels, target = (one.double() for one in sounds(2, 1, 40))
    assert torch.autograd.gradcheck(lambda x: SMALL[kind].build()(x, target), pixels.requires_grad_())


@pytest.mark.parametrize("kind", TERMS)
def test_precision_is_single_under_autocast_and_of_halves(kind: str) -> None:
    term, (pixels, target) = TERMS[kind].build(), sounds()
    plain = term(pixels, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term(pixels, target), plain) and plain.dtype == torch.float32
    half = term(pixels.bfloat16(), target.bfloat16())
    assert half.dtype == torch.float32 and half.item() == term(pixels.bfloat16().float(), target.bfloat16().float())


@pytest.mark.parametrize("kind", TERMS)
def test_a_batch_is_the_mean_of_its_sounds(kind: str) -> None:
    term, (pixels, target) = TERMS[kind].build(), sounds(3)
    alone = torch.stack([term(x[None], y[None]) for x, y in zip(pixels, target, strict=True)])
    assert term(pixels, target).item() == pytest.approx(alone.mean().item(), rel=1e-5)


@pytest.mark.parametrize("config", [L1(), L2()], ids=lambda one: one.kind)
def test_waveform_terms_take_sounds(config: Any) -> None:
    pixels, target = sounds()
    expected = np.abs((pixels - target).numpy()) ** {"l1": 1, "l2": 2}[config.kind]
    assert config.build()(pixels, target).item() == pytest.approx(expected.mean(), rel=1e-5)


def test_what_cannot_be_is_one_sentence() -> None:
    assert {*TERMS} <= {*options("ldm_vae.losses")}
    for kind, samples in (("multi_resolution_stft", 512), ("multi_scale_mel", 16)):
        with refused(UsageError, f"losses.{kind}"):
            TERMS[kind].build()(*sounds(1, 1, samples))
    with refused(UsageError, "losses.multi_scale_mel"):
        TERMS["multi_scale_mel"].build()(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    for config, wrong, named in (
        (STFT, {"hops": [4]}, "sizes, hops, windows"),
        (STFT, {"hops": [1, 1, 1]}, "hops.0"),
        (STFT, {"windows": [600, 1200, 1024]}, "windows"),
        (STFT, {"sizes": []}, "sizes"),
        (Mel, {"bands": [5]}, "bands"),
        (Mel, {"windows": [32, 65], "bands": [5, 5]}, "windows"),
        (Mel, {"windows": [32], "bands": [0]}, "bands"),
    ):
        with refused(UsageError, named):
            validate(config, wrong, "config")


def test_the_rate_is_the_models() -> None:
    def model(**config: int) -> Any:
        return SimpleNamespace(vae=SimpleNamespace(config=config))

    given, target = sounds()
    expected = Mel(sample_rate=RATE).build()(given, target)
    term = Mel().build()
    with refused(UsageError, "losses.multi_scale_mel.sample_rate"):
        term(given, target)
    with refused(UsageError, "losses.multi_scale_mel.sample_rate"):
        term.attach(model())
    term.attach(model(sampling_rate=RATE))
    assert [*term.buffers()] == []  # an average of the weights, made before, has none of it
    assert torch.equal(term(given, target), expected)
    with refused(UsageError, "losses.multi_scale_mel.sample_rate"):
        term.attach(model(sampling_rate=44_100))
    outline = Mel().outline()  # of a dry run, which attaches it too
    with FakeTensorMode(allow_non_fake_inputs=True):
        outline.attach(model(sampling_rate=RATE))
        assert outline(given, target).shape == ()


def test_without_torchaudio_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with refused(UsageError, "sounds"):
        TERMS["multi_scale_mel"].build()(*sounds())
