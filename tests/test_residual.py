"""Residual codes: each codebook codes what is left, the first k are the code of k, for images, clips and sounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError
from sentences import refused
from tiny_classes import tiny
from torch import nn

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.codebooks import ResidualCodebooks, Shape, beside, put_beside
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.geometry import geometry_of
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.trainable import TrainableAutoencoder
from ldm_vae.core.errors import UsageError
from ldm_vae.export.diffusers_folder import write_vae
from ldm_vae.losses.codebook import Config as CodebookLoss
from ldm_vae.losses.commitment import Config as Commitment
from ldm_vae.models.vq import Config as VQ
from ldm_vae.quantizers import CodebookStatistics
from ldm_vae.quantizers.residual import Config

SHAPE = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
OPTIONS = {
    "plain": {},
    "cosine": {"distance": "cosine"},
    "factorised": {"code_dim": 2},
    "dac": {"code_dim": 2, "distance": "cosine", "codebook": "learned", "dropout": 0.5},
}


def books_of(channels: int = 4, codebooks: int = 3, codes: int = 16, **more: Any) -> ResidualCodebooks:
    torch.manual_seed(0)
    books = Shape(kind="residual", channels=channels, codebooks=codebooks, codes=codes, **more).build()
    assert isinstance(books, ResidualCodebooks)
    with torch.no_grad():  # rows of the size of what is left at each level
        books.rows.copy_(torch.randn_like(books.rows) / torch.arange(1, codebooks + 1).view(-1, 1, 1))
    return books.requires_grad_(False)


def network(**quantizer: Any) -> TrainableAutoencoder:
    torch.manual_seed(0)
    config = Config(**{"codebooks": 3, "codes": 16} | quantizer)
    vae = AutoencoderConfig(**SHAPE).build()
    put_beside(vae, config.beside(4))
    with torch.no_grad():
        vae.quantizer.rows.mul_(8)
    return TrainableAutoencoder(vae, config.build(vae))


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def forward(model: TrainableAutoencoder, count: int = 4, images_seen: int = 0, seed: int = 0) -> Any:
    noise = torch.randn(count, *model.noise_shape(16, 16), generator=torch.Generator().manual_seed(seed))
    return model(images(count, seed), noise, images_seen)


@pytest.mark.parametrize(
    "options", [{}, {"distance": "cosine"}, {"code_dim": 2}], ids=["plain", "cosine", "factorised"]
)
@pytest.mark.parametrize("positions", [(5,), (2, 3), (2, 3, 2)], ids=["sounds", "images", "clips"])
def test_the_first_k_codes_are_the_code_of_k(positions: tuple[int, ...], options: dict[str, Any]) -> None:
    books = books_of(**options)
    z = torch.randn(3, 4, *positions)
    whole = books.indices(z)
    assert whole.shape == (3, 3, *positions)
    for k in (1, 2, 3):
        fewer = Shape(**books.shape.model_dump() | {"codebooks": k}).build()
        kept = {name: value for name, value in books.state_dict().items() if name in fewer.state_dict()}
        fewer.load_state_dict(kept | {"rows": books.rows[:k]})
        assert torch.equal(fewer.indices(z), whole[:, :k])
        assert torch.equal(fewer.vectors(whole[:, :k]), books.vectors(whole[:, :k]))
        assert books.vectors(whole[:, :k]).shape == z.shape


def test_each_level_takes_the_nearest_row_of_what_is_left() -> None:
    books, z = books_of(), torch.randn(2, 4, 3, 2)
    left, found = z.movedim(1, -1).reshape(-1, 4), books.indices(z)
    for level in range(3):
        distances = (left[:, None] - books.rows[level]).square().sum(dim=2)
        assert torch.equal(distances.argmin(dim=1), found[:, level].flatten())
        left = left - books.rows[level][found[:, level].flatten()]
    torch.testing.assert_close(z - books.vectors(found), left.view(2, 3, 2, 4).movedim(-1, 1))


def test_by_cosine_the_smallest_angle_at_the_rows_own_length() -> None:
    books, z = books_of(codebooks=1, distance="cosine"), torch.randn(2, 4, 5)
    found = books.indices(z)
    cosines = F.cosine_similarity(z.movedim(1, -1)[:, :, None], books.rows[0], dim=-1)
    assert torch.equal(found[:, 0], cosines.argmax(dim=-1))
    assert torch.equal(books.vectors(found), books.rows[0][found[:, 0]].movedim(-1, 1))


@pytest.mark.parametrize("name", OPTIONS)
def test_training_sees_the_codes_that_inference_takes(name: str) -> None:
    model = network(**OPTIONS[name])
    model.eval()
    r = forward(model)
    assert r.codes.indices.shape == (4, 3, 8, 8) and len(r.codes.indices.unique()) > 4
    with torch.no_grad():
        mean = latents.encode(model.vae, images()).mean
        assert torch.equal(latents.nearest_codes(model.vae, mean), r.codes.indices)
        torch.testing.assert_close(latents.decode(model.vae, mean), r.pixels, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latents.decode_indices(model.vae, r.codes.indices), r.pixels, rtol=1e-4, atol=1e-5)
        fewer = latents.decode_indices(model.vae, r.codes.indices[:, :1])
        assert fewer.shape == r.pixels.shape and not torch.allclose(fewer, r.pixels)


def test_a_network_with_codes_beside_it_gives_points() -> None:
    vae = AutoencoderConfig(**SHAPE).build().eval()
    assert not geometry_of(vae).is_point
    put_beside(vae, books_of())
    assert geometry_of(vae).is_point and latents.encode(vae, images(1)).is_point
    put_beside(vae, None)
    assert not geometry_of(vae).is_point and beside(vae) is None


def test_the_losses_are_sums_over_levels() -> None:
    model = network(codebook="learned")
    r, books = forward(model), model.vae.quantizer
    left, commitment, codebook = r.moments.mean.movedim(1, -1).reshape(-1, 4), 0.0, 0.0
    for level in range(3):
        row = books.rows[level][r.codes.indices[:, level].flatten()]
        commitment, codebook = commitment + F.mse_loss(left, row.detach()), codebook + F.mse_loss(row, left.detach())
        left = left - row.detach()
    ours = Commitment().build()(r), CodebookLoss().build()(r)
    torch.testing.assert_close(ours, (commitment, codebook))
    # every level's commitment reaches the encoder, every level's rows the codebook's loss
    of_z = [torch.autograd.grad(loss, r.moments.mean, retain_graph=True)[0] for loss in (ours[0], commitment)]
    torch.testing.assert_close(*of_z)
    of_rows = torch.autograd.grad(ours[1], books.rows)[0]
    assert (of_rows.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["plain", "factorised"])
def test_the_gradient_goes_straight_through(name: str) -> None:
    model = network(**OPTIONS[name])
    r = forward(model)
    (of_z,) = torch.autograd.grad((r.latents * 2.0).sum(), r.moments.mean, retain_graph=True)
    if name == "plain":
        assert torch.equal(of_z, torch.full_like(of_z, 2.0))
    else:  # through the projections, as if each level had decoded what it saw
        z, left = r.moments.mean.detach().requires_grad_(), 0.0
        rows = z.movedim(1, -1).reshape(-1, 4)
        total = torch.zeros_like(rows)
        for into, out in zip(model.vae.quantizer.into, model.vae.quantizer.out, strict=True):
            share = out(into(rows - left))
            total, left = total + share, left + share
        torch.testing.assert_close(of_z, torch.autograd.grad((total * 2.0).sum(), z)[0], rtol=1e-4, atol=1e-5)
        r.latents.sum().backward()
        assert all(part.weight.grad.abs().sum() > 0 for part in [*model.vae.quantizer.into, *model.vae.quantizer.out])


def test_the_codebooks_follow_the_closed_form_average() -> None:
    model = network(decay=0.9, restart_images=None)
    books = model.vae.quantizer
    assert not books.rows.requires_grad and model.bottleneck.copied == ("quantizer.rows",)
    counts, sums = torch.ones(3, 16), books.rows.detach().clone()
    for seed in range(3):
        r = forward(model, seed=seed)
        seen = r.codes.before.detach().unflatten(1, (3, 4)).transpose(0, 1)
        for level in range(3):
            vectors, used = seen[level].movedim(1, -1).reshape(-1, 4), r.codes.indices[:, level].flatten()
            found = torch.zeros(16, 4).index_add_(0, used, vectors)
            counts[level] = 0.9 * counts[level] + 0.1 * torch.bincount(used, minlength=16)
            sums[level] = 0.9 * sums[level] + 0.1 * found
        figures = model.bottleneck.after_update(model.vae)
    assert {"codes/perplexity/1", "codes/usage/3"} <= figures.keys()
    torch.testing.assert_close(books.rows.detach(), sums / counts[:, :, None], rtol=1e-4, atol=1e-5)


def test_with_dropout_some_samples_have_fewer_levels_by_their_own_key() -> None:
    model = network(dropout=0.5)
    r = forward(model, count=64)
    levels = r.codes.before.detach().unflatten(1, (3, 4)).flatten(2).abs().sum(dim=2) > 0  # [B, 3]
    kept = levels.sum(dim=1)
    assert (levels == (torch.arange(3) < kept[:, None])).all(), "the first ones are kept"
    assert kept.min() == 1 and 20 < (kept < 3).sum() < 40  # a third of one half is whole too: 21 of 64 expected
    for number in (int(kept.argmin()), int(kept.argmax())):  # what is decoded is the code of so many
        code = model.vae.quantizer.vectors(r.codes.indices[[number], : kept[number]])
        torch.testing.assert_close(r.latents[[number]], code, rtol=1e-5, atol=1e-6)
    uses = [statistics.pending.sum[:, -1].sum() for statistics in model.bottleneck.levels]
    assert uses == [64 * int((kept > level).sum()) for level in range(3)], "a codebook that is left out does not move"
    noise = torch.randn(64, *model.noise_shape(16, 16), generator=torch.Generator().manual_seed(0))
    alone = model(images(64)[5:6], noise[5:6])
    torch.testing.assert_close(alone.latents[0], r.latents[5], rtol=1e-4, atol=1e-5)
    model.eval()
    assert (forward(model, count=64).codes.before.unflatten(1, (3, 4)).flatten(2).abs().sum(dim=2) > 0).all()


def test_dead_codes_of_every_level_come_back_to_life() -> None:
    model = network(restart_images=16)
    rows = model.vae.quantizer.rows
    with torch.no_grad():
        rows[:, 8:] += 100.0
        for level, statistics in enumerate(model.bottleneck.levels):
            statistics.sums.copy_(rows[level])
    for seen in (0, 4, 8, 12):
        forward(model, images_seen=seen, seed=seen)
        model.bottleneck.after_update(model.vae)
        assert (rows[:, 8:] > 50).all()
    r = forward(model, images_seen=16, seed=16)
    model.bottleneck.after_update(model.vae)
    left = r.codes.before.detach().unflatten(1, (3, 4)).movedim(2, -1).transpose(0, 1).flatten(1, -2)
    assert all((torch.cdist(rows[level, 8:], left[level]).amin(dim=1) < 1e-2).all() for level in range(3))
    fresh = [torch.cdist(rows[level, 8:], left[level]).argmin(dim=1) for level in range(3)]
    assert not torch.equal(fresh[0], fresh[1]), "each codebook has draws of its own"


def test_codes_that_are_restarted_together_are_distinct() -> None:
    """Of two equal rows rounding chooses the nearest, and with another batch another one."""
    book, vectors = torch.zeros(64, 2), torch.randn(80, 2)
    statistics = CodebookStatistics(book, 0.9, 16)
    statistics.see(vectors, torch.zeros(80, dtype=torch.long), 16)
    statistics.move(book, follows=False)
    restarted = {tuple(row) for row in book[1:].tolist()}
    assert len(restarted) == 63 and restarted <= {tuple(row) for row in vectors.tolist()}


def test_trained_on_a_toy_the_error_falls_with_every_codebook() -> None:
    """Vectors of two scales: a codebook of 8 codes cannot hold them, three can."""
    torch.manual_seed(0)
    vae = nn.Module()
    config = Config(codebooks=3, codes=8, restart_images=512, decay=0.9)
    put_beside(vae, config.beside(2))
    vae.config, vae.encode = {}, lambda x: SimpleNamespace(latents=x)
    quantizer = config.build(vae)
    for seen in range(0, 256 * 40, 256):
        x = torch.randn(256, 2, 1, 1) * torch.tensor([1.0, 0.3]).view(1, 2, 1, 1)
        quantizer.encode(vae, x, torch.empty(256, 0, 1, 1), seen)
        quantizer.after_update(vae)
    x = torch.randn(2048, 2, 1) * torch.tensor([1.0, 0.3]).view(1, 2, 1)
    found = vae.quantizer.indices(x)
    errors = [float((x - vae.quantizer.vectors(found[:, :k])).square().sum(dim=1).mean()) for k in (1, 2, 3)]
    variance = float(x.square().sum(dim=1).mean())
    assert errors[0] < 0.25 * variance and errors[1] < 0.4 * errors[0] and errors[2] < 0.4 * errors[1], errors
    assert all(len(found[:, level].unique()) == 8 for level in range(3))


def test_clips_are_coded_and_decoded_like_images() -> None:
    vae = tiny("AutoencoderKLWan").requires_grad_(True).train()
    config = Config(codebooks=2, codes=8)
    put_beside(vae, config.beside(16))
    model = TrainableAutoencoder(vae, config.build(vae))
    clips = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    r = model(clips, torch.randn(2, *model.noise_shape(5, 16, 16)))
    assert r.codes.indices.shape == (2, 2, 2, 2, 2)
    r.pixels.sum().backward()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0
    with torch.no_grad():
        pixels = latents.decode_indices(vae.eval(), r.codes.indices)
    torch.testing.assert_close(pixels.transpose(1, 2).flatten(0, 1), r.pixels, rtol=1e-4, atol=1e-4)


def test_a_vqmodel_has_one_codebook() -> None:
    config = VQ(**SHAPE, num_vq_embeddings=16, quantizer={"kind": "residual"})
    with refused(UsageError, "model.quantizer.kind"):
        config.bottleneck(config.build())


def test_a_hubs_copy_has_its_codes_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vae = put_beside(AutoencoderConfig(**SHAPE).build(), books_of())
    out, asked = write_vae(vae, tmp_path / "out", None), []

    def download(repo: str, name: str) -> str:
        asked.append(name)
        if not (out / name).is_file():
            raise EntryNotFoundError(name)
        return str(out / name)

    monkeypatch.setattr("ldm_vae.autoencoder.weights.networks.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert torch.equal(load_autoencoder("me/mine").quantizer.rows, vae.quantizer.rows)
    assert {"quantizer.json", "quantizer.safetensors"} < {*asked}
