"""Every kind of model through the same programs: trained, resumed, exported as its diffusers class and loaded again to
the bit, reconstructed, measured; what does not fit it is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    AutoencoderTiny,
    AutoencoderVidTok,
    VQModel,
)
from fork_server import Finished, fork
from images import write_images
from safetensors.torch import load_file
from sentences import refused
from tiny_classes import CLIP_KINDS, SCRATCH
from training_runs import metrics, newest, one_sentence, run, write_config
from videos import write_video

from eval import reconstruction
from ldm_vae import cli
from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.fingerprint import decoder_fingerprint, encoder_fingerprint
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.autoencoder.normalisation_law import normalisation_of
from ldm_vae.core import config
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.rng import seeded
from ldm_vae.data.source import open_source
from ldm_vae.losses.gaussian_nll import Config as GaussianNLL
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.bound import evidence_bound
from ldm_vae.perceptual.pretrained import lpips_trunk
from ldm_vae.training.config import Training
from ldm_vae.training.objective import Objective

SHAPE = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
SHORT = {
    "max_train_images": 16, "log_every_images": 4, "checkpoint_every_images": 8,
    "adversary": {"weight": 0.5, "start_images": 4, "warmup_images": 4},
}  # fmt: skip
VQ = {"kind": "vq", **SHAPE, "num_vq_embeddings": 16, "latent_channels": 3}
TINY_SHAPE = {
    "kind": "tiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}


def clips_beside(images: Path) -> Path:
    """Videos of 11 frames, one of them an image, in a folder beside the images."""
    folder = images.parent / "clips"
    if images.parts and not folder.exists():
        folder.mkdir()
        for number in range(4):
            write_video(folder / f"{number}.mkv", 11 - number, (32, 32))
        (folder / "still.png").write_bytes(next(images.glob("*.png")).read_bytes())
    return folder


def kinds(teacher: Path, images: Path | str = "") -> dict[str, tuple[type, dict[str, Any]]]:
    restart = {"kind": "vq", "restart_images": 4}
    learned = {"kind": "vq", "codebook": "learned", "distance": "cosine", "restart_images": 4}
    gumbel = {"kind": "gumbel", "anneal_images": 16}
    schedule = {"images": 16}
    clips = {"data": {"kind": "folder", "path": str(clips_beside(Path(images))), "frames": 9}}
    posterior, saving = {"losses": {"l1": {}, "kl": {}}}, {"gradient_checkpointing": True}
    return {
        "kl": (AutoencoderKL, {"model": SCRATCH["kl"], "gradient_accumulation_steps": 2} | posterior),
        "dc": (AutoencoderDC, {"model": SCRATCH["dc"], "losses": {"l1": {}}} | saving),
        "flux2": (AutoencoderKLFlux2, {"model": SCRATCH["flux2"], "gradient_accumulation_steps": 2} | posterior),
        "asymmetric": (AsymmetricAutoencoderKL, {"model": SCRATCH["asymmetric"]} | posterior | saving),
        "hunyuan_image": (AutoencoderKLHunyuanImage, {"model": SCRATCH["hunyuan_image"]} | posterior | saving),
        "wan": (AutoencoderKLWan, {"model": SCRATCH["wan"]} | posterior | saving | clips),
        "ltx": (AutoencoderKLLTXVideo, {"model": SCRATCH["ltx"]} | posterior | clips),
        "vidtok": (AutoencoderVidTok, {"model": SCRATCH["vidtok"]} | posterior | clips),
        "vidtok_fsq": (
            AutoencoderVidTok,
            {"model": SCRATCH["vidtok"] | {"regularizer": "fsq"}, "losses": {"l1": {}}} | saving | clips,
        ),
        "vq": (VQModel, {"model": VQ | {"quantizer": restart}, "losses": {"l1": {}, "commitment": {}}}),
        "vq_learned_cosine": (
            VQModel,
            {"model": VQ | {"quantizer": learned}, "losses": {"l2": {}, "commitment": {}, "codebook": {}}},
        ),
        "fsq": (
            VQModel,
            {
                "model": VQ | {"num_vq_embeddings": 18, "quantizer": {"kind": "fsq", "levels": [3, 3, 2]}},
                "losses": {"l1": {}, "commitment": {}},
            },
        ),
        "dvae": (
            VQModel,
            {
                "model": VQ | {"quantizer": gumbel},
                "losses": {"gaussian_nll": {}, "code_kl": {"weight": 1.0, "schedule": schedule}},
            },
        ),
        "tiny": (
            AutoencoderTiny,
            {
                "model": TINY_SHAPE,
                "losses": {"l1": {}, "drift": {"teacher": str(teacher), "latents": "normalised"}},
                "perturbations": {"teacher_latents": {"teacher": str(teacher)}},
            },
        ),
        "kl_with_networks": (
            AutoencoderKL,
            {"losses": {"l1": {}, "lpips": {"net": "alex"}, "kl": {}, "alignment": {}}},
        ),
        "kl_of_many_terms": (
            AutoencoderKL,
            {
                "validation_data": {"kind": "folder", "path": str(images)},
                "validate_every_images": 8,
                "validation_metrics": ["psnr"],
                "best_metric": "psnr",
                "losses": {
                    "charbonnier": {},
                    "ssim": {},
                    "focal_frequency": {},
                    "haar": {"levels": 2},
                    "gaussian_nll": {"levels": 256},
                    "kl": {"weight": 1e-4, "schedule": {"kind": "cyclic", "images": 8}},
                    "kl_free_bits": {"weight": 1e-4},
                    "kl_delta": {"weight": 1e-4},
                    "kl_capacity": {"weight": 1e-4, "images": 16},
                    "kl_target": {"nats_per_pixel": 0.5},
                    "latent_range": {"limit": 1.0},
                    "activation_range": {"limit": 1.0},
                    "drift": {"teacher": str(teacher)},
                },
                "perturbations": {
                    "latent_noise": {},
                    "channel_dropout": {},
                    "eq": {"scales": [0.5, 1.0], "probability": 0.9},
                },
            },
        ),
    }


KINDS = (
    "vq",
    "tiny",
    *SCRATCH,
    "vidtok_fsq",
    "kl_with_networks",
    "kl_of_many_terms",
    "vq_learned_cosine",
    "fsq",
    "dvae",
)
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 11)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1).build()
    vae.register_to_config(scaling_factor=2.0)
    folder = tmp_path_factory.mktemp("teacher") / "vae"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    images: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A finished run of a kind, made once: (run folder, what its config changed)."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in made:
            if kind == "kl_with_networks":
                try:
                    lpips_trunk("alex")
                except WorkError as error:
                    pytest.skip(str(error))
            folder = tmp_path_factory.mktemp(kind)
            changes = SHORT | kinds(teacher, images)[kind][1]
            done = run(write_config(folder, images, **changes))
            assert done.returncode == 0, done.stderr
            made[kind] = (folder / "run", changes)
        return made[kind]

    return make


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS[:2], *SLOW[2:]])
def test_a_run_exports_its_diffusers_class_to_the_bit(kind: str, trained: Any, teacher: Path, images: Path) -> None:
    folder, _ = trained(kind)
    model = kinds(teacher)[kind][0]
    vae = model.from_pretrained(folder / "vae")
    tensors = load_file(newest(folder) / "tensors.safetensors")
    for name, value in vae.state_dict().items():
        assert name.startswith(("bn.", "latents_")) or torch.equal(value, tensors[f"ema.{name}"]), name
    loaded = load_autoencoder(folder)
    assert type(loaded) is model
    with torch.no_grad():
        z = latents.encode(loaded, pictures()).mean
        if kind not in (*CLIP_KINDS, "vidtok_fsq"):
            assert torch.equal(latents.decode(loaded, z), vae.eval().decode(z).sample)
    lines = metrics(folder)
    assert all(value == value for line in lines for value in line.values())
    logged = set(lines[-1])
    if model is VQModel:
        assert {"codes/perplexity", "codes/usage"} <= logged and "kl_nats_per_image" not in logged
        rows, frozen = vae.quantize.embedding.weight, tensors["autoencoder.quantize.embedding.weight"]
        if kind == "vq":  # an average already: not averaged again
            assert torch.equal(rows, frozen)
        if kind == "vq_learned_cosine":
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(16))
            assert torch.equal(rows, frozen)
        if kind == "fsq":  # a grid, which nothing has moved
            assert torch.equal(rows, frozen) and len(rows.unique()) == 3
        if kind == "dvae":
            assert lines[-1]["codes/temperature"] < lines[0]["codes/temperature"]
            assert lines[0]["weight/code_kl"] < lines[-1]["weight/code_kl"]
    if model is AutoencoderTiny:
        assert vae.config.scaling_factor == 1.0  # its latents are the teacher's, normalised
    if kind in SCRATCH and kind != "vidtok":
        measured = normalisation_of(vae)
        kept = "channel" if kind in ("flux2", "wan", "ltx") else "scale"
        assert measured != Normalisation(1.0) and measured.kind == kept
    if kind in CLIP_KINDS:  # what only later frames use has learned
        settings = config.load(Training, folder / "config.yaml")
        with seeded(settings.seed):
            fresh = settings.model.build().state_dict()
        assert all(not torch.equal(one, fresh[name]) for name, one in vae.named_parameters() if one.ndim > 1)
    if kind == "flux2":  # 4 channels of 2 x 2 positions, each by what was measured
        assert len({*vae.bn.running_mean.tolist()}) == len({*vae.bn.running_var.tolist()}) == 16
        assert not tensors["autoencoder.bn.running_mean"].any()  # no forward has run it
    if kind == "kl_with_networks":
        assert {"loss/lpips", "loss/alignment"} <= logged
        own = {name for name in tensors if name.startswith("objective.")}
        assert own == {"objective.terms.alignment.project.weight"}  # and neither AlexNet nor EfficientNet
        (name,) = own
        assert not torch.equal(tensors[name], tensors[f"ema_{name}"])  # it learns
    if kind == "kl_of_many_terms":
        logged = set(lines[-2])  # the last line is the validation's
        assert {"gaussian_nll/sigma", "kl_target/beta", "activation_range/largest", "elbo/bits_per_dimension"} <= logged
        assert {f"kl_nats_per_channel/{channel}" for channel in range(4)} <= logged
        assert "objective.terms.gaussian_nll.logvar" in tensors
        # the optimiser has moved it, its average follows, and with that one held-out images are measured
        sigma, averaged = (tensors[f"{name}.terms.gaussian_nll.logvar"] for name in ("objective", "ema_objective"))
        assert min(0.0, sigma) < averaged < max(0.0, sigma)
        likelihood = GaussianNLL(levels=256, logvar=averaged.item())
        batches = image_batches(open_source(images), None, 32, batch_size=2)
        bound = evidence_bound(vae.eval(), Objective({"gaussian_nll": likelihood}), batches, torch.device("cpu"))
        assert lines[-1]["validation/elbo_nats_per_image"] == pytest.approx(bound["elbo_nats_per_image"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_bit_equal(kind: str, trained: Any, images: Path, tmp_path: Path) -> None:
    """The codebook's statistics, the restarts, the controller and the learned variance go on where they were."""
    folder, changes = trained(kind)
    config = write_config(tmp_path, images, **changes | {"max_train_images": 8})
    assert run(config).returncode == 0
    done = run(config, "--max_train_images", "16")
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    ours, theirs = (load_file(newest(one) / "tensors.safetensors") for one in (tmp_path / "run", folder))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert metrics(tmp_path / "run")[2:] == metrics(folder)[2:]


def command(*arguments: str) -> Finished:
    return fork(cli.main, arguments).wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq", "tiny", "dc", "flux2"])
def test_the_other_programs_take_it(kind: str, trained: Any, images: Path, tmp_path: Path) -> None:
    folder, _ = trained(kind)
    done = command("export", str(folder), str(tmp_path / "vae"), "--stats", str(images), "--resolution", "32")
    assert done.returncode == 0, done.stderr
    name = type(load_autoencoder(tmp_path / "vae")).__name__
    assert f"{name}.from_pretrained" in done.stdout and "is not audited" in done.stdout
    theirs = load_autoencoder(tmp_path / "vae").state_dict()
    for key, ours in load_autoencoder(folder).state_dict().items():
        torch.testing.assert_close(ours, theirs[key], rtol=1e-5 if key.startswith("bn.") else 0, atol=0)
    # and its last checkpoint is the same network, with the same scaling
    done = command("export", str(folder), str(tmp_path / "last"), "--checkpoint", "last")
    assert done.returncode == 0, done.stderr
    ends = [load_autoencoder(one) for one in (folder, tmp_path / "last")]
    assert normalisation_of(ends[0]) == normalisation_of(ends[1])
    for one, other in zip(*(end.state_dict().values() for end in ends), strict=True):
        assert torch.equal(one, other)
    picture = str(next(images.glob("*.png")))
    done = command("reconstruct", str(folder), picture, str(tmp_path / "pictures"))
    assert done.returncode == 0, done.stderr
    call = [str(folder), str(images), "--output", str(tmp_path / "measured"), "--resolution", "32"]
    done = fork(reconstruction.main, [*call, "--metrics", "psnr", "--num_workers", "0"]).wait()
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    assert found["metrics"]["psnr"]["n"] == 11
    assert (found["latents"]["kl_nats_per_image"] is None) == (kind != "flux2")  # no variance, no KL
    done = command("report", str(tmp_path / "measured"))
    assert done.returncode == 0, done.stderr
    assert ("its latents have no KL" in (tmp_path / "measured" / "index.html").read_text()) == (kind != "flux2")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("export", "RUN", "OUT", "--target", "comfyui"), "ComfyUI reads no single file of a VQModel"),
        (("tiling", "RUN", "PICTURE"), "a VQModel has none"),
    ],
)
def test_what_is_not_for_codes_says_so(
    call: tuple[str, ...], says: str, trained: Any, images: Path, tmp_path: Path
) -> None:
    folder, _ = trained("vq")
    places = {"RUN": str(folder), "OUT": str(tmp_path / "out"), "PICTURE": str(next(images.glob("*.png")))}
    done = command(*[places.get(word, word) for word in call])
    assert says in one_sentence(done, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model": VQ, "losses": {"l1": {}, "kl": {}}},
            "losses.kl: expected a model that gives a posterior",
        ),
        (
            {"losses": {"l1": {}, "commitment": {}}},
            "losses.commitment: expected a model that gives codes",
        ),
        (
            {"model": VQ | {"quantizer": {"kind": "vq", "codebook": "learned"}}, "losses": {"l1": {}}},
            "model.quantizer.codebook: learned needs the term losses.codebook",
        ),
        (
            {"model": {"kind": "vqq"}},
            "`model`: unknown kind `vqq`; ldm_vae.models has asymmetric, causal_oobleck, dac, dc, flux2, ",
        ),
        ({"model": {**TINY_SHAPE, "num_encoder_blocks": [1]}}, "one f on both sides"),
        ({"losses": {"l1": {}, "drift": {"teacher": "no/such/folder"}}}, "VAE no/such/folder"),
        (
            {"losses": {"l1": {}, "activation_range": {}}, "gradient_checkpointing": True},
            "losses.activation_range: expected gradient_checkpointing false",
        ),
    ],
)
def test_what_does_not_fit_is_refused(images: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    done = run(write_config(tmp_path, images, **changes))
    assert says in one_sentence(done, 2)
    assert not (tmp_path / "run").exists()


def test_a_base_of_another_kind_is_refused(trained: Any, images: Path, tmp_path: Path) -> None:
    folder, _ = trained("vq")
    done = run(write_config(tmp_path, images, init_from=str(folder)))
    assert "expected the class of model.kind kl, AutoencoderKL, got VQModel" in one_sentence(done, 2)


@pytest.mark.slow
def test_a_codebook_is_fine_tuned_from_its_export(trained: Any, images: Path, tmp_path: Path) -> None:
    folder, changes = trained("vq")
    done = run(write_config(tmp_path, images, **changes | {"init_from": str(folder), "learning_rate": 1e-9}))
    assert done.returncode == 0, done.stderr
    first, tuned = load_autoencoder(folder), load_autoencoder(tmp_path / "run")
    torch.testing.assert_close(tuned.decoder.conv_out.weight, first.decoder.conv_out.weight, rtol=0, atol=1e-6)
    done = run(
        write_config(
            tmp_path,
            images,
            **changes | {"init_from": str(folder), "output_dir": str(tmp_path / "decoder")},
            trainable=["decoder.*", "post_quant_conv.*"],
        )
    )
    assert done.returncode == 0, done.stderr
    decoder = load_autoencoder(tmp_path / "decoder")
    assert encoder_fingerprint(decoder) == encoder_fingerprint(first)  # codebook and all: stores of indices stay valid
    assert decoder_fingerprint(decoder) != decoder_fingerprint(first)


def test_a_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan3"}))
    with refused(UsageError, "config.json"):
        load_autoencoder(tmp_path)
