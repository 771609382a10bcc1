"""Binary codes, lookup-free and on the sphere: signs, as a VQModel and beside another class, and their entropies, which
are those of all codes enumerated in fp64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from sentences import refused

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.bottleneck import Codes
from ldm_vae.autoencoder.codebooks import Shape, put_beside
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.losses.code_entropy import Config as CodeEntropy
from ldm_vae.losses.commitment import Config as Commitment
from ldm_vae.models.vq import Config as VQ
from ldm_vae.prior.generator import CodeGenerator
from ldm_vae.prior.sampling import SamplingConfig
from ldm_vae.quantizers.bsq import Config as BSQ
from ldm_vae.quantizers.lfq import Config as LFQ

SHAPE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 5}
KINDS = {"lfq": LFQ, "bsq": BSQ}


def network(kind: str, beside: bool = False, **options: Any) -> TrainableAutoencoder:
    torch.manual_seed(0)
    config = KINDS[kind](**options)
    if beside:
        vae = put_beside(AutoencoderConfig(**SHAPE).build(), config.beside(5))
        return TrainableAutoencoder(vae, config.build(vae))
    vq = VQ(**SHAPE, num_vq_embeddings=32, quantizer={"kind": kind, **options})
    vae = vq.build()
    return TrainableAutoencoder(vae, vq.bottleneck(vae))


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def forward(model: TrainableAutoencoder, count: int = 4) -> Any:
    return model(images(count), torch.zeros(count, *model.noise_shape(16, 16)))


@pytest.mark.parametrize("beside", [False, True], ids=["VQModel", "beside"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_are_signs_and_inference_takes_the_same(kind: str, beside: bool, tmp_path: Path) -> None:
    model = network(kind, beside)
    edge = 1.0 if kind == "lfq" else 5**-0.5
    z, r = model.vae.encode(images()), forward(model)
    z = z.latent_dist.mean if beside else z.latents
    assert torch.equal(r.codes.after, torch.where(z > 0, edge, -edge)) and len(r.codes.indices.unique()) > 4
    before = F.normalize(z, dim=1) if kind == "bsq" else z
    assert torch.equal(r.codes.before, before)
    weights = 2 ** torch.arange(4, -1, -1).view(1, 5, 1, 1)
    expected = ((z > 0) * weights).sum(dim=1)
    assert torch.equal(r.codes.indices, expected[:, None] if beside else expected)
    (of_z,) = torch.autograd.grad((r.latents * 2.0).sum(), r.codes.before, retain_graph=True)
    assert torch.equal(of_z, torch.full_like(of_z, 2.0))
    # what is written gives the same indices, to the bit: of a VQModel by diffusers alone
    path = write_vae(model.vae.eval(), tmp_path / "vae", None)
    vae = load_autoencoder(path)
    mean = latents.encode(vae, images()).mean
    assert torch.equal(latents.nearest_codes(vae, mean), r.codes.indices)
    if not beside:
        theirs = VQModel.from_pretrained(path, local_files_only=True)
        assert torch.equal(theirs.quantize(mean)[2][2].view_as(expected), expected)
        corners = torch.tensor([*itertools.product([-edge, edge], repeat=5)])
        assert torch.equal(theirs.quantize.embedding.weight, corners)
    with torch.no_grad():
        pixels = latents.decode(vae, mean)
    torch.testing.assert_close(pixels, r.pixels.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents.decode_indices(vae, r.codes.indices), pixels, rtol=1e-4, atol=1e-5)
    assert 1 < model.bottleneck.after_update(model.vae)["codes/perplexity"] <= 32


@pytest.mark.parametrize("positions", [(7,), (2, 3), (2, 3, 2)], ids=["sounds", "images", "clips"])
def test_beside_a_network_any_number_of_positions_is_coded(positions: tuple[int, ...]) -> None:
    books = Shape(kind="lfq", channels=18, codes=2**18).build()
    z = torch.randn(2, 18, *positions)
    found = books.indices(z)
    assert found.shape == (2, 1, *positions) and found.max() < 2**18
    assert torch.equal(books.vectors(found), z.sign()) and books.state_dict() == {} and len(books.files()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("bits", [4, 5])
def test_entropies_are_those_of_all_codes(kind: str, temperature: float, bits: int) -> None:
    """Of softmax(-|vector - code|^2 / temperature) over the enumerated codes, in fp64; and its gradient."""
    torch.manual_seed(0)
    z, edge = torch.randn(2, bits, 3, 2, dtype=torch.float64), 1.0 if kind == "lfq" else bits**-0.5
    vae = put_beside(torch.nn.Module(), Shape(kind=kind, channels=bits, codes=2**bits).build())
    vae.config, vae.encode = {}, lambda x: SimpleNamespace(latents=x)
    codes = KINDS[kind](temperature=temperature).build(vae).encode(vae, z, torch.empty(0), 0).codes
    vectors = codes.before.requires_grad_()
    torch.testing.assert_close(codes.logits, 4 * edge / temperature * vectors)
    codes = replace(codes, logits=4 * edge / temperature * vectors)
    corners = edge * torch.tensor([*itertools.product([-1.0, 1.0], repeat=bits)], dtype=torch.float64)
    rows = vectors.movedim(1, -1).reshape(-1, 1, bits)
    q = torch.softmax(-(rows - corners).square().sum(dim=2) / temperature, dim=1)
    each, mean = torch.special.entr(q).sum(dim=1).mean(), q.mean(dim=0)
    one = (corners > 0).double().T @ mean
    bit = torch.stack([one, 1 - one])
    for batch, together in (("codes", torch.special.entr(mean).sum()), ("bits", torch.special.entr(bit).sum())):
        term = CodeEntropy(diversity=0.7, batch=batch).build()
        loss = term(SimpleNamespace(codes=codes))
        expected = each - 0.7 * together
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(term.figures()["of_all"], together, rtol=1e-10, atol=1e-12)
        ours, theirs = (torch.autograd.grad(value, vectors, retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        assert together >= torch.special.entr(mean).sum() - 1e-12, "bit by bit it is an upper bound"


def test_the_term_spreads_codes() -> None:
    """Descent on the entropies alone brings all codes into use, each vector at one."""
    torch.manual_seed(0)
    z = (torch.randn(64, 4, 1, 1) * 0.1 + 0.5).requires_grad_()
    term, optimizer = CodeEntropy().build(), torch.optim.Adam([z], lr=0.05)
    before = (z > 0).flatten(1).unique(dim=0)
    for _ in range(200):
        optimizer.zero_grad()
        term(SimpleNamespace(codes=Codes(z, z, z, logits=4 * z))).backward()
        optimizer.step()
        term.after_update()
    after = (z > 0).flatten(1).unique(dim=0)
    assert len(before) <= 2 and len(after) >= 14 and z.abs().min() > 0.3


def test_what_cannot_be_is_one_sentence() -> None:
    with refused(UsageError, "model.num_vq_embeddings"):
        network_of = VQ(**SHAPE, num_vq_embeddings=16, quantizer={"kind": "lfq"})
        network_of.bottleneck(network_of.build())
    with refused(UsageError, "quantizer.kind"):
        LFQ().beside(31)
    with refused(UsageError, "losses.code_entropy"):
        CodeEntropy().build()(SimpleNamespace(codes=Codes(*[torch.zeros(1, 2, 1, 1)] * 3)))
    wide = torch.zeros(1, 21, 1, 1)
    with refused(UsageError, "losses.code_entropy.batch"):
        CodeEntropy().build()(SimpleNamespace(codes=Codes(wide, wide, wide, logits=wide)))


def test_commitment_is_to_the_corners() -> None:
    r = forward(network("bsq"))
    torch.testing.assert_close(Commitment().build()(r), F.mse_loss(r.codes.before, r.codes.after))


def test_a_generator_decodes_one_codebook_beside_a_network() -> None:
    vae = network("lfq", beside=True).vae.eval().requires_grad_(False)
    indices = torch.randint(0, 32, (2, 1, 8, 8))
    generator = CodeGenerator(None, None, vae, 32, (1, 8, 8), SamplingConfig())
    assert torch.equal(generator.decode(indices), latents.decode_indices(vae, indices))
