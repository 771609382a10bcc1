"""A choice that does not exist: the sentence names the key, all that there are, and the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_call import call
from sentences import names

from ldm_vae.core import config
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import nearest, not_among
from ldm_vae.diffusion.config import DiffusionTraining
from ldm_vae.metrics import protocol, select
from ldm_vae.prior.config import PriorTraining
from ldm_vae.run.trackers import check_tracker
from ldm_vae.training.config import Training

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("flags", "key", "choices", "meant"),
    [
        (("--model.kind", "kll"), "model", ("kl", "vq", "tiny"), "kl"),
        (("--losses.lpisp.kind", "lpisp"), "losses.lpisp", ("l1", "lpips"), "lpips"),
        (("--losses.lpisp.weight", "1"), "losses.lpisp", ("l1", "lpips"), "lpips"),
        (("--losses.lpips.net", "vggg"), "losses.lpips.net", ("vgg", "alex"), "vgg"),
        (("--losses.lpips.nett", "vgg"), "--losses.lpips.nett", (), "--losses.lpips.net"),
        (("--discriminator.kind", "patchgann"), "discriminator", ("features", "patchgan"), "patchgan"),
        (("--adversary.loss", "hing"), "adversary.loss", ("hinge", "vanilla", "non_saturating"), "hinge"),
        (("--data.kind", "fodler"), "data", ("folder", "hub", "zip"), "folder"),
        (("--lr_schedule", "cosin"), "lr_schedule", ("constant", "cosine"), "cosine"),
        (("--mixed_precision", "fp61"), "mixed_precision", ("no", "bf16", "fp16"), "fp16"),
        (("--validation_metrics", "pnsr"), "validation_metrics", ("psnr", "ssim"), "psnr"),
        (("--optimizer.kind", "adamm"), "optimizer.kind", ("adam", "adamw"), "adam"),
        (("--transform.crop", "center"), "transform.crop", ("random", "centre"), "centre"),
        (("--torch_compile", "--torch_compile_backend", "inductr"), "torch_compile_backend", ("inductor",), "inductor"),
        (("--batch_size", "8"), "--batch_size", (), "--train_batch_size"),
    ],
)
def test_of_a_training_config(flags: tuple[str, ...], key: str, choices: tuple[str, ...], meant: str) -> None:
    with pytest.raises(UsageError) as refusal:
        config.load(Training, CONFIGS / "demo.yaml", flags)
    _check(str(refusal.value), key, choices, meant)


def test_of_a_diffusion_config() -> None:
    for flags, key, choices, meant in (
        (("--denoiser.kind", "ditt"), "denoiser", ("dit", "unet"), "dit"),
        (("--sampling.method", "huen"), "sampling.method", ("euler", "heun"), "heun"),
    ):
        with pytest.raises(UsageError) as refusal:
            config.load(DiffusionTraining, CONFIGS / "diffusion" / "demo.yaml", flags)
        _check(str(refusal.value), key, choices, meant)


def test_of_a_prior_config() -> None:
    for flags, key, choices, meant in (
        (("--model.kind", "transfomer"), "model", ("masked", "transformer"), "transformer"),
        (("--sampling.topk", "5"), "--sampling.topk", (), "--sampling.top_k"),
    ):
        with pytest.raises(UsageError) as refusal:
            config.load(PriorTraining, CONFIGS / "prior" / "demo.yaml", flags)
        _check(str(refusal.value), key, choices, meant)


@pytest.mark.parametrize(
    ("words", "key", "choices", "meant"),
    [
        (("trian",), "VERB", ("train", "encode"), "train"),
        (("store", "verfy", "x"), "ACTION", ("verify", "repair"), "verify"),
        (("fp16", "adit", "x"), "ACTION", ("audit", "fix"), "audit"),
        (("encode", "v", "d", "o", "--store", "moment"), "--store", ("moments", "mean"), "moments"),
        (("encode", "v", "d", "o", "--resoluton", "3"), "--resoluton", (), "--resolution"),
        (("export", "v", "o", "--target", "comfy"), "--target", ("comfyui", "kohya"), "comfyui"),
        (("inspect", "d", "--alpha", "strait"), "--alpha", ("straight", "channel"), "straight"),
        (("inspect", "tests", "--kind", "foldr"), "data", ("folder", "zip"), "folder"),
        (("config", "kl_f8d4"), "config", ("kl_f8_d4", "demo"), "kl_f8_d4"),
        (("train", "configs/dmeo.yaml"), "config", ("demo", "tiny"), "demo"),
        (("store", "convert", "s", "o", "--to", "webdatset"), "--to", ("webdataset", "parquet"), "webdataset"),
        (("assets", "lpisp"), "ACTION", ("lpips",), "lpips"),
    ],
)
def test_of_the_command_line(words: tuple[str, ...], key: str, choices: tuple[str, ...], meant: str) -> None:
    with pytest.raises(UsageError) as refusal:
        call(*words)
    _check(str(refusal.value), key, choices, meant)


def test_of_names_in_programs() -> None:
    for key, meant, check in (
        ("metrics", "psnr", lambda: select.check(["pnsr"], 256)),
        ("protocol", "lavinal712", lambda: protocol.by_name("lavinal")),
        ("report_to", "wandb", lambda: check_tracker("wandbb")),
    ):
        with pytest.raises(UsageError) as refusal:
            check()
        _check(str(refusal.value), key, (meant,), meant)


def test_a_word_like_none_is_answered_with_the_choices_alone() -> None:
    assert nearest("zzz", ["adam", "adamw"]) == ""
    assert not_among("zzz", ["adam", "adamw"]) == "expected one of adam, adamw, got zzz"


def _check(sentence: str, key: str, choices: tuple[str, ...], meant: str) -> None:
    assert "\n" not in sentence and names(sentence, key), sentence
    assert all(names(sentence, choice) for choice in choices), sentence
    assert f"did you mean `{meant}`" in sentence, sentence
