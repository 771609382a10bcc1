"""The causal streaming codec: parts equal the whole, latency, what a state holds, round trips, and its option."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from sentences import refused

from ldm_vae.autoencoder.causal_oobleck import CausalOobleck, Convolution, Past, State, Transposed
from ldm_vae.core.config import validate
from ldm_vae.core.errors import UsageError
from ldm_vae.models.causal_oobleck import Config

SHAPES: dict[str, dict[str, Any]] = {
    "small": {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 6},
    "odd strides, stereo": {
        "encoder_hidden_size": 4, "decoder_channels": 6, "decoder_input_channels": 3, "audio_channels": 2,
        "downsampling_ratios": (3, 5), "channel_multiples": (2, 3),
    },
}  # fmt: skip


def codec(shape: str = "small", dtype: torch.dtype = torch.float64) -> CausalOobleck:
    torch.manual_seed(0)
    network = CausalOobleck(**SHAPES[shape])
    with torch.no_grad():  # snakes of different frequencies
        for name, parameter in network.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.normal_(0, 0.5)
    return network.to(dtype).eval().requires_grad_(False)


def sounds(network: CausalOobleck, hops: float = 12.4, seed: int = 1) -> torch.Tensor:
    length = int(hops * network.hop_length)
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, network.config.audio_channels, length, generator=draw).to(network.dtype)


def parts(x: torch.Tensor, most: int, seed: int) -> Iterator[torch.Tensor]:
    """Parts of random lengths, some of them empty."""
    draw, start = torch.Generator().manual_seed(seed), 0
    while start < x.shape[2]:
        length = int(torch.randint(0, most + 1, (), generator=draw))
        yield x[:, :, start : start + length]
        start += length


def stream(step: Callable[..., tuple[torch.Tensor, State]], pieces: Iterator[torch.Tensor], hops: int) -> torch.Tensor:
    state: State | None = None
    found = []
    for piece in pieces:
        one, state = step(piece, state, hops)
        found.append(one)
    return torch.cat(found, dim=2)


def encoding(network: CausalOobleck) -> Callable[..., tuple[torch.Tensor, State]]:
    def step(x: torch.Tensor, state: State | None, hops: int) -> tuple[torch.Tensor, State]:
        posterior, after = network.encode_part(x, state, hops)
        return posterior.parameters, after

    return step


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_parts_in_any_chunking_are_the_whole(shape: str, dtype: torch.dtype, bound: float) -> None:
    network = codec(shape, dtype)
    x = sounds(network)
    parameters = network.encode(x).latent_dist.parameters
    z = network.encode(x).latent_dist.mode()
    decoded = network.decode(z).sample
    assert parameters.shape[2] == 12 and decoded.shape[2] == 12 * network.hop_length
    for seed, (hops, most) in enumerate([(1, 1), (1, 37), (1, 3 * network.hop_length), (3, 2 * network.hop_length)]):
        found = stream(encoding(network), parts(x, most, seed), hops)
        assert found.shape[2] == 12 // hops * hops
        assert ((found - parameters).abs().max() / parameters.abs().max()).item() < bound
        found = stream(network.decode_part, parts(z, 1 + most % 5, seed), hops)
        assert ((found - decoded).abs().max() / decoded.abs().max()).item() < bound


@pytest.mark.parametrize("hops", [1, 3])
def test_at_one_chunk_the_parts_change_no_bit(hops: int) -> None:
    network = codec(dtype=torch.float32)
    x = sounds(network)
    whole, _ = network.encode_part(x, None, hops)
    z = whole.mode()
    decoded, _ = network.decode_part(z, None, hops)
    for seed, most in enumerate((1, 37, 900)):
        found = stream(encoding(network), parts(x, most, seed), hops)
        assert torch.equal(found, whole.parameters)
        assert torch.equal(stream(network.decode_part, parts(z, 1 + most % 4, seed), hops), decoded)


def test_a_state_is_all_that_a_stream_remembers() -> None:
    network = codec()
    x = sounds(network)
    _, state = network.encode_part(x[:, :, :1000])
    kept = [one.clone() for one in state]
    first, _ = network.encode_part(x[:, :, 1000:], state)
    other, _ = network.encode_part(sounds(network, seed=2), state)  # a stream that forks
    again, _ = codec().encode_part(x[:, :, 1000:], tuple(kept))  # in another process
    assert torch.equal(first.parameters, again.parameters) and not torch.equal(first.parameters, other.parameters)
    assert all(torch.equal(one, before) for one, before in zip(state, kept, strict=True))
    # it does not grow: less than a hop, and the ends of the layers' inputs
    _, later = network.encode_part(x.repeat(1, 1, 4), state)
    assert [one.shape[1:] for one in later[1:]] == [one.shape[1:] for one in state[1:]]
    assert all(one.shape[2] < network.hop_length for one in (later[0], state[0]))
    reach = sum(one.numel() for one in state[1:])
    kinds = [layer for layer in network.encoder.modules() if isinstance(layer, Convolution)]
    expected = sum((one.kernel_size[0] - 1) * one.dilation[0] + 1 - one.stride[0] for one in kinds)
    assert 0 < expected <= reach and all(one.untyped_storage().nbytes() == one.nbytes for one in state)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_output_before_the_latency_changes(shape: str) -> None:
    network = codec(shape)
    hop, rate = network.hop_length, network.config.sampling_rate
    x = sounds(network, 8)[:1]
    before = network(x).sample
    seen = set()
    for at in (0, hop - 1, 2 * hop, 2 * hop + 1, 4 * hop - 1, 5 * hop + hop // 2):
        moved = x.clone()
        moved[:, :, at] += 1
        changed = (network(moved).sample - before).abs().amax(dim=(0, 1)).nonzero()
        first = int(changed[0])
        assert at - first < network.latency * rate  # nothing before t - latency
        assert len(changed) > hop  # and something after it
        seen.add(at - first)
    assert max(seen) == hop - 1  # it is reached: no smaller latency holds


def test_the_published_size_waits_for_less_than_20_ms() -> None:
    network = Config().build()
    assert network.hop_length == 320 and network.latency == pytest.approx(0.01333, rel=1e-3) and network.latency < 0.02
    assert network.config.sampling_rate == 24_000 and network.config.audio_channels == 1
    assert sum(one.numel() for one in network.parameters()) == 2_036_225
    # a sample is given as soon as its hop is in
    x = sounds(network, 3)
    posterior, state = network.encode_part(x[:, :, :319])
    assert posterior.mode().shape[2] == 0
    posterior, _ = network.encode_part(x[:, :, 319:320], state)
    decoded, _ = network.decode_part(posterior.mode())
    assert decoded.shape == (2, 1, 320)


def test_gradients_are_those_of_the_formula_and_reach_every_weight() -> None:
    network = codec("odd strides, stereo").requires_grad_(True).train()
    x = sounds(network, 4)
    network(x).sample.square().sum().backward()
    idle = [name for name, one in network.named_parameters() if one.grad is None or not one.grad.any()]
    assert idle == []
    z = torch.randn(1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: network.decode(one).sample, z)


def test_transposed_convolutions_lose_nothing() -> None:
    """The kernel's halves: the sum of the outputs of a pulse is that of the kernel."""
    network = codec()
    layer = next(one for one in network.decoder.modules() if isinstance(one, Transposed))
    pulse = torch.zeros(1, layer.in_channels, 4, dtype=torch.float64)
    pulse[0, 2, 1] = 1.0
    found = layer(pulse, Past()) - layer(0 * pulse, Past())
    stride = layer.stride[0]
    torch.testing.assert_close(found[0, :, stride : 3 * stride], layer.weight[2])
    assert not found[0, :, :stride].any() and not found[0, :, 3 * stride :].any()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    network = codec("odd strides, stereo", torch.float32)
    network.save_pretrained(tmp_path)
    again = CausalOobleck.from_pretrained(tmp_path).eval()
    x = sounds(network)
    shape = SHAPES["odd strides, stereo"] | {"sampling_rate": 24_000}
    assert json.loads(json.dumps(shape)) == {name: again.config[name] for name in shape}
    assert torch.equal(again(x).sample, network(x).sample)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()


def test_its_option_builds_it_and_refuses_what_cannot_be() -> None:
    shape = {
        "downsampling_ratios": (2, 3),
        "channel_multiples": (1, 2),
        "audio_channels": 2,
        "decoder_input_channels": 5,
    }
    network = Config(**shape, encoder_hidden_size=4, decoder_channels=4, sampling_rate=8000).build()
    assert network.hop_length == 6 and network.latency == 6 / 8000
    assert network.encode(torch.zeros(1, 2, 20)).latent_dist.mode().shape == (1, 5, 3)
    with refused(UsageError, "channel_multiples"):
        validate(Config, {"downsampling_ratios": [2, 2]}, "config")
    for ratios in ([64, 64, 64], []):
        with refused(UsageError, "downsampling_ratios"):
            validate(Config, {"downsampling_ratios": ratios, "channel_multiples": [1] * len(ratios)}, "config")
    with refused(UsageError, "encoder_hidden_size"):
        validate(Config, {"encoder_hidden_size": 8192}, "config")
    with refused(UsageError, "encode"):
        network.encode(torch.zeros(1, 2, 5))


def test_the_documents_lines_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "audio.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "encode_part" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["samples"].shape == (1, 1, 640)  # 480 samples at the end of 500 are one hop more, or two
    assert len(names["before"]) > 1 and names["codec"].latency < 0.02


def test_silence_and_loudness_stay_finite() -> None:
    network = codec(dtype=torch.float32)
    for x in (0 * sounds(network), 1e3 * sounds(network)):
        posterior = network.encode(x).latent_dist
        assert posterior.mode().isfinite().all() and (posterior.std > 0).all()
        assert network(x).sample.isfinite().all()
    assert math.isclose(network.latency, network.hop_length / 24_000)
