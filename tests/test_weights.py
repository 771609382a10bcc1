"""Weights as people have them: prefixes, averages, variants, shards, 8-bit floats, pointers, pages, pieces. Each is
loaded to the bit, or refused in one sentence that names it; never a traceback, whatever the verb."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderTiny, VQModel
from images import write_images
from placeholder_files import PAGE, POINTER
from safetensors.torch import load_file, save_file
from tiny_networks import to_ldm

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.load import load_autoencoder
from ldm_vae.core.errors import UsageError

Tensors = dict[str, torch.Tensor]
STEM = "diffusion_pytorch_model"


def small(kind: str) -> Any:
    """f = 2, random weights."""
    torch.manual_seed(0)
    if kind == "kl":
        return AutoencoderConfig(block_out_channels=(32, 64), layers_per_block=1).build().eval()
    if kind == "vq":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return VQModel(
            **blocks, block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=8, scaling_factor=1.0
        ).eval()
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()


KINDS = ("kl", "vq", "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A diffusers folder of `small("kl")`."""
    small("kl").save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change the weights of a folder in place."""
    path = folder / f"{STEM}.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    changed = change(tensors)
    save_file(tensors if changed is None else changed, path)
    return folder


def same(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as refused:
        call()
    said = str(refused.value)
    assert said and "\n" not in said and len(said) < 1000
    assert "weights_only=False" not in said and "to `False`" not in said and "set to" not in said
    return said


# --- names ------------------------------------------------------------------------------------------------------------


def dotless(tensors: Tensors) -> Tensors:
    return {f"model_ema.{name.replace('.', '')}": value for name, value in tensors.items()} | {
        "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(5)
    }  # fmt: skip


def wrapped(tensors: Tensors, first: str, inner: str) -> Tensors:
    """`inner` stands behind the first part of each name: a compiled encoder, a DDP decoder."""
    return {f"{first}{name.replace('.', f'.{inner}.', 1)}": value for name, value in tensors.items()}


PREFIXES = (
    "module.", "_orig_mod.", "module._orig_mod.", "vae.", "first_stage_model.", "ema.", "ema_model.", "model_ema.",
    "shadow_params.", "ema_model.module.", "model.vae._orig_mod.", "autoencoder.",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_taken_away_when_that_makes_the_network_whole(
    kind: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = small(kind)
    vae.save_pretrained(tmp_path / "vae")
    rewrite(tmp_path / "vae", lambda tensors: {f"{prefix}{name}": value for name, value in tensors.items()})
    assert same(load_autoencoder(tmp_path / "vae"), vae)
    said = capsys.readouterr().err
    assert len(said.splitlines()) == said.count("note: ") >= 1 and prefix.split(".")[0] in said
    file = shutil.copy(tmp_path / "vae" / f"{STEM}.safetensors", tmp_path / "one.safetensors")
    assert same(load_autoencoder(file, tmp_path / "vae"), vae)
    if kind == "kl":
        assert same(load_autoencoder(file), vae)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: wrapped(t, "", "_orig_mod"),
        lambda t: wrapped(t, "module.", "_fsdp_wrapped_module"),
        dotless,
        lambda t: dotless(to_ldm(t, 2)),
        lambda t: {f"ema_model.{name}": value for name, value in to_ldm(t, 2).items()},
        lambda t: {name.replace("to_q", "query").replace("to_out.0", "proj_attn"): value for name, value in t.items()},
    ],
)
def test_names_that_other_programs_write(change: Callable[[Tensors], Tensors], folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(folder)
    rewrite(folder, lambda t: {name: value.contiguous() for name, value in change(t).items()})
    assert same(load_autoencoder(folder), vae)


def test_a_network_comes_before_its_average(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = load_autoencoder(folder)
    rewrite(folder, lambda t: t | {f"ema.{name}": value + 1 for name, value in t.items()})
    assert same(load_autoencoder(folder), vae)
    assert "ema." in capsys.readouterr().err  # that it was left out is said
    rewrite(folder, lambda t: {n: v for n, v in t.items() if n.startswith("ema.") or "quant" not in n})
    averaged = load_autoencoder(folder)
    assert torch.equal(averaged.quant_conv.bias, vae.quant_conv.bias + 1)


def test_averages_are_ranked_behind_whatever_they_are_of(folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(folder)
    rewrite(
        folder,
        lambda t: {f"{at}{n}": v + plus for at, plus in (("ema.", 1), ("generator.vae.", 0)) for n, v in t.items()},
    )
    file = shutil.copy(folder / f"{STEM}.safetensors", tmp_path / "one.safetensors")
    for loaded in (load_autoencoder(folder), load_autoencoder(file), load_autoencoder(file, folder)):
        assert same(loaded, vae)


def test_two_networks_are_not_chosen_between(folder: Path) -> None:
    rewrite(folder, lambda t: {f"{one}.{n}": v.clone() for one in ("student", "teacher") for n, v in t.items()})
    said = refusal(lambda: load_autoencoder(folder))
    assert "student." in said and "teacher." in said


@pytest.mark.parametrize("kind", ["kl", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_what_is_missing_left_over_or_misshapen_is_named(kind: str, tmp_path: Path) -> None:
    vae = small(kind)
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / f"{STEM}.safetensors"
    whole = load_file(path)
    for name, value in [*list(whole.items())[::8], *list(whole.items())[-1:]]:
        extra = name.replace("coder.", "coder.extra.", 1)
        changed = {name: {n: v for n, v in whole.items() if n != name}}
        changed |= {extra: whole | {extra: torch.zeros(3)}} if extra != name else {}
        for named, tensors in [*changed.items(), (name, whole | {name: torch.zeros(len(value) + 1, 7)})]:
            save_file(tensors, path)
            said = refusal(lambda: load_autoencoder(tmp_path / "vae"))
            assert named in said and str(tmp_path / "vae") in said


@pytest.mark.parametrize("where", ["encoder.{}.weight", "{}.encoder.conv_in.weight", "{}"])
def test_names_of_a_stranger_end_no_line(where: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = where.format("a\n\x1b[2J" + "b" * 5000)
    rewrite(folder, lambda t: t | {name: torch.zeros(2)})
    if where.startswith("encoder"):
        refusal(lambda: load_autoencoder(folder))
    else:
        load_autoencoder(folder)
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and "\x1b" not in said
    rewrite(folder, lambda t: {f"a\nb.{one}": value for one, value in t.items() if one != name})
    load_autoencoder(folder)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_many_are_counted(folder: Path) -> None:
    rewrite(folder, lambda t: {name: value for name, value in t.items() if not name.startswith("decoder.")})
    gone = sum(name.startswith("decoder.") for name in small("kl").state_dict())
    said = refusal(lambda: load_autoencoder(folder))
    assert f"{gone} of" in said and said.count("decoder.") <= 4
    rewrite(folder, lambda t: {"encoder.conv_in.weight": t["encoder.conv_in.weight"]})
    assert len(refusal(lambda: load_autoencoder(folder))) < 1000


@pytest.mark.parametrize("part", ["quant_conv", "post_quant_conv"])
def test_quant_conv_is_named_with_its_field(part: str, folder: Path) -> None:
    rewrite(folder, lambda t: {name: value for name, value in t.items() if not name.startswith(f"{part}.")})
    said = refusal(lambda: load_autoencoder(folder))
    assert f"{part}.weight" in said and f"use_{part}" in said
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {f"use_{part}": False}))
    assert getattr(load_autoencoder(folder), part) is None  # what the sentence says does
    small("kl").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {f"use_{part}": False}))
    assert f"use_{part}" in refusal(lambda: load_autoencoder(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_out_channels", [32, 32]), ("latent_channels", 8), ("in_channels", 1), ("layers_per_block", 2)],
)
def test_a_config_of_another_shape_is_named_by_its_field(field: str, value: object, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    said = refusal(lambda: load_autoencoder(folder))
    assert field in said and str(value) in said and str(config[field]) in said
    file = shutil.copy(folder / f"{STEM}.safetensors", folder.parent / "one.safetensors")
    assert field in refusal(lambda: load_autoencoder(file, folder))


def test_tensors_of_other_things_are_left_out_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = load_autoencoder(folder)
    rewrite(folder, lambda t: t | {"loss.discriminator.main.0.weight": torch.zeros(2), "global_step": torch.tensor(3)})
    assert same(load_autoencoder(folder), vae)
    said = capsys.readouterr().err
    assert "loss.discriminator" in said and "2 tensors" in said


# --- variants, shards, folders ----------------------------------------------------------------------------------------


def variant(folder: Path, name: str = "fp16", shards: str | None = None) -> None:
    """Write weights beside the full ones, or only them where there are none."""
    more = {} if shards is None else {"max_shard_size": shards}
    small("kl").half().save_pretrained(folder, variant=name, **more)


@pytest.mark.parametrize("shards", [None, "100KB"])
@pytest.mark.parametrize("name", ["fp16", "bf16", "ours"])
def test_a_variant_is_taken_where_there_is_nothing_else(
    name: str, shards: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant(tmp_path, name, shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shards is not None)
    assert same(load_autoencoder(tmp_path), small("kl").half().float())
    said = capsys.readouterr().err
    assert name in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("full", [None, "100KB"])
@pytest.mark.parametrize("shards", [None, "100KB"])
def test_the_full_weights_come_first(
    full: str | None, shards: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = small("kl")
    vae.save_pretrained(tmp_path, **({} if full is None else {"max_shard_size": full}))
    variant(tmp_path, "fp16", shards)
    assert same(load_autoencoder(tmp_path), vae) and capsys.readouterr().err == ""
    if full is None:
        (tmp_path / f"{STEM}.safetensors").unlink()
        variant(tmp_path, "bf16")
        assert same(load_autoencoder(tmp_path), small("kl").half().float())
        assert "bf16" in capsys.readouterr().err  # what was not taken


def test_shards(tmp_path: Path) -> None:
    vae = small("kl")
    vae.save_pretrained(tmp_path, max_shard_size="100KB")
    assert same(load_autoencoder(tmp_path), vae)
    index = tmp_path / f"{STEM}.safetensors.index.json"
    content = index.read_text()
    shard = sorted(tmp_path.glob("*-of-*"))[0]
    kept = shard.read_bytes()
    for damage in (b"", POINTER, PAGE, kept[:-9], b"\0" * 4096):
        shard.write_bytes(damage)
        assert shard.name in refusal(lambda: load_autoencoder(tmp_path))
    shard.unlink()
    assert shard.name in refusal(lambda: load_autoencoder(tmp_path))
    shard.write_bytes(kept)
    for hostile in ("", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', POINTER.decode(), "[" * 100_000):
        index.write_text(hostile)
        assert index.name in refusal(lambda: load_autoencoder(tmp_path))
    outside = tmp_path.parent / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    for place in (str(outside), "../outside.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        assert index.name in refusal(lambda: load_autoencoder(tmp_path))
    index.unlink()
    assert "index.json" in refusal(lambda: load_autoencoder(tmp_path))
    index.write_text(content)
    assert same(load_autoencoder(tmp_path), vae)


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
@pytest.mark.parametrize("name", [f"{STEM}.bin", f"{STEM}.fp16.bin", "pytorch_model.bin", "vae weights.pt"])
def test_a_pickle_is_named_with_the_command_that_works(kind: str, name: str, tmp_path: Path) -> None:
    vae = small(kind)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / f"{STEM}.safetensors").unlink()
    torch.save({"state_dict": vae.state_dict(), "epoch": 3}, tmp_path / "vae" / name)
    said = refusal(lambda: load_autoencoder(tmp_path / "vae"))
    assert name in said
    command = shlex.split(said.split("`")[1])
    assert command[:2] == ["ldm-vae", "export"]
    assert run_cli(*[str(tmp_path / "out") if word == "OUT" else word for word in command[1:]]) == 0
    assert same(load_autoencoder(tmp_path / "out"), vae)


def test_nested_pickles_and_averages_in_them(folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(folder)
    path = tmp_path / "last.ckpt"
    torch.save({"model": {"module.vae." + n: v for n, v in vae.state_dict().items()}, "optimizer": {"state": {}}}, path)
    assert run_cli("export", path, tmp_path / "out", "--weights_only_pickle", "--config", folder) == 0
    assert same(load_autoencoder(tmp_path / "out"), vae)


def test_shadow_params_without_names_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda t: {f"shadow_params.{k}": value for k, value in enumerate(t.values())})
    assert "shadow_params" in refusal(lambda: load_autoencoder(folder))


def test_a_pipeline_is_taken_by_its_vae(folder: Path, tmp_path: Path) -> None:
    vae = load_autoencoder(folder)
    root = tmp_path / "pipeline"
    shutil.copytree(folder, root / "vae")
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert same(load_autoencoder(root), vae)
    (root / "config.json").write_text('{"architectures": ["CLIPTextModel"], "model_type": "clip"}')
    assert same(load_autoencoder(root), vae)
    (root / "vae").rename(root / "movq")
    (root / "config.json").unlink()
    said = refusal(lambda: load_autoencoder(root))
    assert str(root / "movq") in said
    assert same(load_autoencoder(root / "movq"), vae)


@pytest.mark.parametrize("inside", ["", "vae"])
@pytest.mark.parametrize("shards", [None, "100KB"])
def test_a_variant_in_the_hubs_cache(
    inside: str, shards: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some-lab--some-vae"
    snapshot = cached / "snapshots" / ("a" * 40)
    variant(snapshot / inside, "fp16", shards)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    assert same(load_autoencoder("some-lab/some-vae"), small("kl").half().float())
    for path in snapshot.rglob("*fp16*"):
        path.unlink()
    (snapshot / inside / f"{STEM}.bin").write_bytes(b"")
    assert STEM in refusal(lambda: load_autoencoder("some-lab/some-vae"))


def test_a_config_beside_a_folder_is_not_dropped_in_silence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_autoencoder(folder, folder)
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vae.safetensors", "model.safetensors"])
def test_weights_by_another_name_are_named(name: str, folder: Path) -> None:
    vae = load_autoencoder(folder)
    (folder / f"{STEM}.safetensors").rename(folder / name)
    assert name in refusal(lambda: load_autoencoder(folder))
    assert same(load_autoencoder(folder / name, folder), vae)
    (folder / "config.json").unlink()
    assert str(folder / name) in refusal(lambda: load_autoencoder(folder))
    assert same(load_autoencoder(folder / name), vae)


# --- 8-bit floats and what is quantised -------------------------------------------------------------------------------

EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)


def in_eight_bits(tensors: Tensors, dtype: torch.dtype, scaled: str | None, outputs: bool = False) -> Tensors:
    """Weights of layers as people round them; with a scale beside them if `scaled` names it."""
    found = {}
    for name, value in tensors.items():
        if value.ndim < 2 or scaled is None:
            found[name] = value.to(dtype) if value.ndim > 1 else value
            continue
        rest = list(range(1, value.ndim))
        largest = value.abs().amax(dim=rest, keepdim=True) if outputs else value.abs().max()
        scale = largest / torch.finfo(dtype).max
        found[name] = (value / scale).to(dtype)
        found[name.removesuffix("weight") + scaled] = scale.flatten(1) if outputs else scale
    return found | ({} if scaled != "scale_weight" else {"scaled_fp8": torch.zeros(0).to(dtype)})


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize(("scaled", "outputs"), [(None, False), ("scale_weight", False), ("weight_scale", True)])
def test_eight_bit_floats_are_read_and_their_cost_is_said(
    dtype: torch.dtype, scaled: str | None, outputs: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = load_autoencoder(folder)
    rewrite(folder, lambda t: in_eight_bits(t, dtype, scaled, outputs))
    loaded = load_autoencoder(folder)
    (said,) = capsys.readouterr().err.splitlines()
    assert str(dtype).removeprefix("torch.") in said
    told = [float(number) for number in said.replace("(PSNR)", "").split() if number.isdigit()]
    below, psnr = told[-2:]
    weights, rounded = vae.state_dict(), loaded.state_dict()
    signal = sum(float(value.square().sum()) for value in weights.values() if value.ndim > 1)
    noise = sum(float((value - rounded[name]).square().sum()) for name, value in weights.items())
    assert abs(10 * torch.log10(torch.tensor(signal / noise)) - below) < 1.0
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        first, second = (latents.decode(one, latents.encode(one, x).mean) for one in (vae, loaded))
    true = 10 * torch.log10(4 / (first - second).square().mean())
    assert abs(true - psnr) < 6.0, (true, psnr)
    assert rounded["encoder.conv_in.weight"].dtype == torch.float32


def test_what_is_quantised_is_refused(folder: Path) -> None:
    whole = load_file(folder / f"{STEM}.safetensors")
    name = "encoder.conv_out.weight"
    nf4 = {name: torch.zeros(whole[name].numel() // 2, 1, dtype=torch.uint8)}
    cases: list[tuple[str, Tensors]] = [
        (name, {name: whole[name].to(torch.int8)}),
        ("absmax", nf4 | {f"{name}.absmax": torch.zeros(4), f"{name}.quant_map": torch.zeros(16)}),
        ("quant_state", nf4 | {f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        ("SCB", {name: whole[name].to(torch.int8), "encoder.conv_out.SCB": torch.zeros(8)}),
        ("weight_scale", {name: whole[name].to(torch.float8_e4m3fn), "encoder.conv_out.weight_scale": torch.ones(3)}),
        ("weight_scale", {"encoder.conv_out.weight_scale": torch.ones(())}),  # of a weight that is not rounded
    ]
    for named, change in cases:
        save_file(whole | change, folder / f"{STEM}.safetensors")
        assert named in refusal(lambda: load_autoencoder(folder))
        assert named in refusal(lambda: load_autoencoder(folder / f"{STEM}.safetensors"))
    save_file(whole, folder / f"{STEM}.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    assert "quantization_config" in refusal(lambda: load_autoencoder(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_news(dtype: torch.dtype, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda t: {name: value.to(dtype) for name, value in t.items()})
    assert same(load_autoencoder(folder), small("kl").to(dtype).float())
    assert capsys.readouterr().err == ""


# --- files that are something else, in every verb ---------------------------------------------------------------------


def put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    size = path.stat().st_size
    put(path, path.read_bytes()[: min(int(share * size), size - 4)])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/0f3a")


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: put(path, b""),
    "pointer": lambda path: put(path, POINTER),
    "annex": lambda path: put(path, b"/annex/objects/SHA256E-s33--4d7a.safetensors\n"),
    "page": lambda path: put(path, PAGE),
    "answer": lambda path: put(path, b"Entry not found"),
    "zeros": lambda path: put(path, bytes(4096)),
    "text": lambda path: put(path, b"See the other repository for the weights."),
    "cut in half": lambda path: cut(path, 0.5),
    "cut at its end": lambda path: cut(path, 0.999),
    "cut in the header": lambda path: cut(path, 0.001),
    "folder": as_folder,
    "link into nowhere": nowhere,
    "gguf": lambda path: put(path, b"GGUF\x03\0\0\0" + bytes(100)),
    "pickle": lambda path: torch.save({}, path),
    "absent": lambda path: path.unlink(),
}
SOME_FILES = ("pointer", "page", "cut in half", "absent", "pickle", "folder")
CONFIGS: dict[str, Any] = {
    "UNet2DConditionModel": {"_class_name": "UNet2DConditionModel"},
    "_class_name": {"architectures": ["CLIPModel"]},
    "AutoencoderDC": {"_class_name": "AutoencoderDC"},
    "DDIMScheduler": {"_class_name": "DDIMScheduler"},
}


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("name", [f"{STEM}.safetensors", "config.json"])
def test_a_file_that_is_something_else_is_named(name: str, damage: str, folder: Path) -> None:
    FILES[damage](folder / name)
    said = refusal(lambda: load_autoencoder(folder))
    assert str(folder) in said and name in said
    if damage == "pointer":
        assert "git lfs pull" in said
    if name != "config.json" and damage not in ("absent", "folder", "link into nowhere"):
        assert "one.safetensors" in refusal(
            lambda: load_autoencoder(shutil.copy(folder / name, folder / "one.safetensors"))
        )


@pytest.mark.parametrize("named", CONFIGS)
def test_a_config_of_another_class_is_named(named: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIGS[named]))
    assert named in refusal(lambda: load_autoencoder(folder))
    assert named in refusal(lambda: load_autoencoder(folder / f"{STEM}.safetensors"))


def without_a_bias(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != "quant_conv.bias"}


VERBS: dict[str, tuple[object, ...]] = {
    "export": ("export", "VAE", "OUT"),
    "encode": ("encode", "VAE", "IMAGES", "OUT", "--resolution", "32"),
    "reconstruct": ("reconstruct", "VAE", "PICTURE", "OUT"),
    "drift": ("drift", "GOOD", "VAE", "IMAGES", "--no_lpips", "--resolution", "32"),
    "fp16": ("fp16", "audit", "VAE"),
    "tiling": ("tiling", "VAE", "PICTURE"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_in_one_sentence(
    verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """(corruption x verb): each file in turn, and a tensor that is missing."""
    images = write_images(tmp_path / "images", 2)
    shutil.copytree(folder, tmp_path / "good")
    places = {"OUT": tmp_path / "out", "IMAGES": images, "PICTURE": images / "img_0000.png", "GOOD": tmp_path / "good"}
    some = {"config.json": ("pointer", "cut in half", "absent"), f"{STEM}.safetensors": SOME_FILES}
    damages = {f"{name} {how}": (name, FILES[how]) for name, damaged in some.items() for how in damaged}
    damages["a tensor"] = ("", lambda path: rewrite(path, without_a_bias))
    for number, (what, (name, damage)) in enumerate(damages.items()):
        vae = Path(shutil.copytree(folder, tmp_path / f"damaged {number}"))
        damage(vae / name if name else vae)
        capsys.readouterr()
        status = run_cli(*[vae if word == "VAE" else places.get(str(word), word) for word in VERBS[verb]])
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and "Traceback" not in said, (what, status, said)
        assert str(vae) in lines[0] and not (tmp_path / "out").exists()
