"""Distances between sets of features: scipy's sqrtm, torch-fidelity's arithmetic, streaming, and the networks."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from ldm_vae.errors import UsageError, WorkError
from ldm_vae.metrics import features as trunks
from ldm_vae.metrics import kid
from ldm_vae.metrics.frechet import FrechetDistance, Gaussian, frechet_distance
from ldm_vae.metrics.kid import KernelDistance
from ldm_vae.metrics.metric import Unmeasured
from ldm_vae.metrics.protocol import PINNED, Pair
from ldm_vae.metrics.select import Weights, build_metrics

CPU = torch.device("cpu")


def two_sets(count: int, dimensions: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(0)
    mixing = draw.normal(size=(dimensions, dimensions))
    x = draw.normal(size=(count, dimensions)) @ mixing
    y = 0.9 * x + draw.normal(0.3, 0.5, size=x.shape)
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def gaussian(features: torch.Tensor, batch: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    stream = Gaussian()
    for part in features.split(batch):
        stream.update(part)
    _, mean, covariance = stream.compute(features.shape[1])
    return mean, covariance


def pair_of(count: int, start: int = 0, padding: int = 0) -> Pair:
    """Random images; the features below are taken of their mean colours."""
    draw = torch.Generator().manual_seed(start)
    images = [torch.rand(count + padding, 3, 4, 4, generator=draw) * 2 - 1 for _ in range(2)]
    return PINNED.pair(*images, range(start, start + count))


def colours(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    both = (image[: pair.count].mean(dim=(2, 3)) for image in (pair.original, pair.reconstruction))
    first, second = both
    return first, second


def test_streaming_gaussian_is_numpys() -> None:
    x, _ = two_sets(50, 6)
    mean, covariance = gaussian(x)
    assert mean.numpy() == pytest.approx(x.double().mean(dim=0).numpy())
    assert covariance.numpy() == pytest.approx(np.cov(x.double().numpy(), rowvar=False))


@pytest.mark.parametrize(("count", "dimensions"), [(500, 16), (40, 64)])  # more images than features, and fewer
def test_frechet_agrees_with_torch_fidelity_and_scipy(count: int, dimensions: int) -> None:
    x, y = two_sets(count, dimensions)
    ours = frechet_distance(*gaussian(x), *gaussian(y))
    statistics = [fid_features_to_statistics(features.double()) for features in (x, y)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-3)

    (mean_x, covariance_x), (mean_y, covariance_y) = gaussian(x), gaussian(y)
    if count > dimensions:  # sqrtm of a singular product is not exact
        root = scipy.linalg.sqrtm((covariance_x @ covariance_y).numpy()).real
        distance = (mean_x - mean_y).square().sum() + covariance_x.trace() + covariance_y.trace() - 2 * np.trace(root)
        assert ours == pytest.approx(float(distance), rel=1e-3)


def test_frechet_of_equal_sets_is_zero() -> None:
    x, _ = two_sets(30, 8)
    assert frechet_distance(*gaussian(x), *gaussian(x)) == pytest.approx(0.0, abs=1e-6)


def test_kernel_distance_agrees_with_torch_fidelity() -> None:
    x, y = two_sets(60, 16)
    theirs = kernel_mmd(
        x.double().numpy(), y.double().numpy(), kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0,
    )  # fmt: skip
    assert kid.squared_mmd(x, y) == pytest.approx(theirs, rel=1e-3)


def test_a_set_metric_counts_images_and_not_padding() -> None:
    metric = FrechetDistance("fd", colours, 3)
    for pair in (pair_of(8), pair_of(5, 8, padding=3)):
        assert metric.update(pair) is None
    summary = metric.compute()
    assert summary.n == 13
    assert summary.mean is not None and summary.mean > 0
    assert summary.note == "biased: compare at N = 13 only"


def test_kernel_distance_keeps_the_same_images_in_any_order() -> None:
    pairs = [pair_of(6), pair_of(6, 6), pair_of(6, 12)]
    found = []
    for order in (pairs, pairs[::-1]):
        metric = KernelDistance("kid", colours, 3, kept=10)
        for pair in order:
            metric.update(pair)
        assert len(metric.rows) == 10
        found.append(metric.compute())
    assert found[0] == found[1]
    assert found[0].n == 10


def test_two_ranks_keep_what_one_would_have_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(*pairs: Pair) -> KernelDistance:
        metric = KernelDistance("kid", colours, 3, kept=10)
        for pair in pairs:
            metric.update(pair)
        return metric

    pairs = [pair_of(7), pair_of(4, 7), pair_of(6, 11)]
    alone = filled(*pairs).compute()
    ranks = [filled(*pairs[:2]), filled(pairs[2])]
    longest = max(len(rank.rows) for rank in ranks)

    def gather(value: torch.Tensor) -> torch.Tensor:  # what each rank would have sent
        if value.ndim == 0:
            return torch.tensor([len(rank.rows) for rank in ranks])
        missing = [torch.full((longest - len(rank.rows), 7), torch.inf) for rank in ranks]
        return torch.stack([torch.cat([rank.rows, rest]) for rank, rest in zip(ranks, missing, strict=True)])

    monkeypatch.setattr(kid, "gather", gather)
    assert ranks[0].compute() == ranks[1].compute() == alone


def test_efficientnet_knows_coffee_and_cat() -> None:
    """Its own classifier on top of the features: ImageNet's espresso (967) and Egyptian cat (285)."""
    from skimage.data import chelsea, coffee

    network = trunks.efflite0(CPU)
    assert network is not None
    for photograph, label in ((coffee(), 967), (chelsea(), 285)):
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float()
        side = min(image.shape[2:])
        left = (image.shape[3] - side) // 2
        with torch.inference_mode():
            features = network.trunk(image[:, :, :, left : left + side])
            assert features.shape == (1, network.dimensions)
            assert network.trunk.fc(features).argmax().item() == label


def test_features_are_computed_once_for_all_distances() -> None:
    calls = []

    def trunk(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.mean(dim=(2, 3))

    network = trunks.Features(trunk, 3)
    pair = pair_of(4)
    for metric in (FrechetDistance("rfid", network, 3), KernelDistance("kid", network, 3)):
        metric.update(pair)
    assert calls == [4, 4]


def test_without_inception_the_row_says_so() -> None:
    (metric,) = build_metrics(["rfid", "kid"], CPU, 32)
    assert isinstance(metric, Unmeasured)
    assert metric.compute().to_json() == {"mean": None, "ci95": None, "n": 0, "note": "weights not supplied"}


@pytest.mark.slow
def test_inception_from_a_file(tmp_path: Path) -> None:
    """The network is torch-fidelity's; weights of our own stand in for the published ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    published = torch.nn.Module.load_state_dict
    try:  # build it without weights, to have some
        torch.nn.Module.load_state_dict = lambda *_: None  # type: ignore[assignment]
        empty = tmp_path / "empty.pth"
        torch.save({}, empty)
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], empty)
    finally:
        torch.nn.Module.load_state_dict = published  # type: ignore[method-assign]
    file = tmp_path / "inception.pth"
    torch.save(network.state_dict(), file)
    with pytest.raises(WorkError, match="not the 2015-12-05 Inception"):
        build_metrics(["rfid"], CPU, 32, weights=Weights(inception=file))
    ours = trunks.inception(file, CPU, sha256="")
    images = torch.randint(0, 256, (2, 3, 40, 40))
    with torch.inference_mode():
        assert torch.equal(ours.trunk(images.float()), network(images.to(torch.uint8))[0])


def test_a_missing_inception_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"inception_weights: .*nothing\.pth: no such file"):
        build_metrics(["rfid"], CPU, 32, weights=Weights(inception=tmp_path / "nothing.pth"))


def test_dinov2_from_a_folder(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 224}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(tmp_path / "dinov2")
    (metric,) = build_metrics(["fd_dinov2"], CPU, 32, weights=Weights(dinov2=str(tmp_path / "dinov2")))
    metric.update(pair_of(4))
    summary = metric.compute()
    assert (metric.name, summary.n) == ("fd_dinov2", 4)
    assert summary.mean is not None
    with pytest.raises(UsageError, match="dinov2"):
        build_metrics(["fd_dinov2"], CPU, 32, weights=Weights(dinov2=str(tmp_path)))


def test_features_do_not_depend_on_the_network_being_shared() -> None:
    network = trunks.efflite0(CPU)
    assert network is not None
    pair = pair_of(2)
    first = copy.deepcopy(network)(pair)
    network(pair_of(2, 2))
    again = network(pair)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
