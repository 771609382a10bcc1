"""Distances between sets of features: scipy's sqrtm, torch-fidelity's arithmetic, streaming, and the networks."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from sentences import refused
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kernel_mmd

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.metrics import cmmd, kept, kid
from ldm_vae.metrics.cmmd import ClipDistance
from ldm_vae.metrics.frechet import FrechetDistance, Gaussian, frechet_distance
from ldm_vae.metrics.kid import KernelDistance
from ldm_vae.metrics.metric import Unmeasured
from ldm_vae.metrics.protocol import PINNED, Pair
from ldm_vae.metrics.running import Summary
from ldm_vae.metrics.select import Weights, build_metrics
from ldm_vae.perceptual import features as trunks

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


def published_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """As the published code computes it (google-research/cmmd distance.py), of embeddings of unit norm: all n x n
    kernel values, the diagonals among them."""
    x, y = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (x, y))

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        squared = ((a[:, None] - b[None]) ** 2).sum(axis=2)
        return float(np.exp(-squared / (2 * 10**2)).mean())

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize("block", [7, 64, 2048])  # blocks with a rest, one that divides N, and a single one
def test_cmmd_is_the_published_formula(block: int) -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(64, 24)), draw.normal(0.3, 1, size=(50, 24))
    ours = cmmd.cmmd(torch.from_numpy(x), torch.from_numpy(y), block)
    assert ours == pytest.approx(published_cmmd(x, y), rel=1e-9)
    assert ours > 0.5  # so that the agreement is one of digits


def test_cmmd_keeps_its_digits_between_sets_that_hardly_differ() -> None:
    """A good autoencoder's: in fp32 the published form, a difference of numbers near 1, is rounding only."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40, 24))
    y = x + 1e-4 * draw.normal(size=x.shape)
    ours = cmmd.cmmd(torch.from_numpy(x), torch.from_numpy(y))
    assert 0 < ours < 1e-4
    assert ours == pytest.approx(published_cmmd(x, y), rel=1e-4)
    assert cmmd.cmmd(torch.from_numpy(x), torch.from_numpy(x)) == 0


METRICS_THAT_KEEP = {"kid": KernelDistance, "cmmd": ClipDistance}


@pytest.mark.parametrize("name", METRICS_THAT_KEEP)
def test_distances_keep_the_same_images_in_any_order(name: str) -> None:
    pairs = [pair_of(6), pair_of(6, 6), pair_of(6, 12)]
    found = []
    for order in (pairs, pairs[::-1]):
        metric = METRICS_THAT_KEEP[name](name, colours, 3, kept=10)
        for pair in order:
            metric.update(pair)
        found.append(metric.compute())
    assert found[0] == found[1]
    assert found[0].n == 10


def test_the_row_says_that_images_were_left_out() -> None:
    def summary(most: int) -> Summary:
        metric = ClipDistance("cmmd", colours, 3, kept=most)
        for start in (0, 6):
            metric.update(pair_of(6, start))
        return metric.compute()

    assert "10 of 12 images" in str(summary(10).note) and " of " not in str(summary(12).note)


@pytest.mark.parametrize("name", METRICS_THAT_KEEP)
def test_two_ranks_keep_what_one_would_have_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(*pairs: Pair) -> KernelDistance | ClipDistance:
        metric = METRICS_THAT_KEEP[name](name, colours, 3, kept=10)
        for pair in pairs:
            metric.update(pair)
        return metric

    pairs = [pair_of(7), pair_of(4, 7), pair_of(6, 11)]
    alone = filled(*pairs).compute()
    ranks = [filled(*pairs[:2]), filled(pairs[2])]
    sent = [{2: rank.kept._settle(), 1: torch.tensor([rank.kept.seen])} for rank in ranks]
    # what each rank would have sent
    monkeypatch.setattr(kept, "gather_rows", lambda rows: torch.cat([part[rows.ndim] for part in sent]))
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
    with refused(WorkError, "inception_weights"):
        build_metrics(["rfid"], CPU, 32, weights=Weights(inception=file))
    ours = trunks.inception(file, CPU, sha256="")
    images = torch.randint(0, 256, (2, 3, 40, 40))
    with torch.inference_mode():
        assert torch.equal(ours.trunk(images.float()), network(images.to(torch.uint8))[0])


def test_a_missing_inception_file_is_named(tmp_path: Path) -> None:
    with refused(UsageError, "inception_weights"):
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


def test_cmmd_with_a_clip_from_a_folder(clip_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    (metric,) = build_metrics(["cmmd"], CPU, 32, weights=Weights(clip=str(clip_folder)))
    assert "UNEXPECTED" not in capfd.readouterr().err  # the half that reads text is nobody's concern
    pair = pair_of(4, padding=2)
    metric.update(pair)
    summary = metric.compute()
    assert (metric.name, summary.n) == ("cmmd", 4)
    network = trunks.clip(str(clip_folder), CPU)
    embedded = [features.double().numpy() for features in network(pair)]
    assert [features.shape for features in embedded] == [(4, 8)] * 2
    assert np.linalg.norm(embedded[0], axis=1) == pytest.approx(np.ones(4), rel=1e-6)
    assert summary.mean == pytest.approx(published_cmmd(*embedded), rel=1e-6) and summary.mean > 0


def test_clip_sees_images_as_the_published_cmmd_prepares_them(clip_folder: Path) -> None:
    """Pillow's bicubic to the network's square, then CLIP's mean and deviation as transformers has them."""
    from PIL import Image
    from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    image = np.random.default_rng(0).integers(70, 180, (40, 40, 3), dtype=np.uint8)  # nothing to clip
    small = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    theirs = (small - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    network = trunks.clip(str(clip_folder), CPU)
    ours = network.trunk.prepared(torch.from_numpy(image).permute(2, 0, 1)[None])  # type: ignore[attr-defined]
    levels = np.abs(ours[0].permute(1, 2, 0).numpy() - theirs) * np.array(OPENAI_CLIP_STD) * 255
    assert levels.max() < 1.01 and levels.mean() < 0.25  # grey levels: Pillow rounds between its two passes


def test_without_a_clip_the_row_says_so() -> None:
    (metric,) = build_metrics(["cmmd"], CPU, 32)
    assert metric.compute().to_json() == {"mean": None, "ci95": None, "n": 0, "note": "weights not supplied"}


@pytest.mark.parametrize("name", ["dinov2", "clip"])
@pytest.mark.parametrize("what", ["nothing", "another", "pickle", "damaged"])
def test_a_network_that_is_not_whole_is_refused_by_its_argument(
    name: str, what: str, clip_folder: Path, tmp_path: Path
) -> None:
    """transformers would leave the tensors that a file of another network lacks at random."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    if what == "another":
        config = (folder / "config.json").read_text().replace("clip_vision_model", "x").replace('"clip"', '"x"')
        (folder / "config.json").write_text(config)
        tensors = load_file(folder / "model.safetensors")
        save_file({f"other.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    elif what == "damaged":
        (folder / "model.safetensors").write_bytes(b"damaged")
    else:
        (folder / "model.safetensors").unlink()
        if what == "pickle":
            torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=f"^{name}: ") as error:
        getattr(trunks, name)(str(folder), CPU)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_features_do_not_depend_on_the_network_being_shared() -> None:
    network = trunks.efflite0(CPU)
    assert network is not None
    pair = pair_of(2)
    first = copy.deepcopy(network)(pair)
    network(pair_of(2, 2))
    again = network(pair)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
