"""ONNX graphs: onnxruntime does what the network does, at other batches and sizes too, and all else is said."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from cli_call import run_cli
from diffusers import AutoencoderTiny
from sentences import refused
from tiny_classes import IMAGES, tiny

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.geometry import geometry_of, step_of
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.autoencoder.preparation import record
from ldm_vae.core.errors import UsageError
from ldm_vae.data.preprocessing import FILE, Preprocessing
from ldm_vae.export import onnx_folder
from ldm_vae.export.diffusers_folder import configured_copy
from ldm_vae.export.onnx_folder import metadata_of, write_onnx

QUICK = {"AutoencoderRAE", "AutoencoderTiny"}  # the others take 10 to 60 s each
GRAPHS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in IMAGES
    if name != "ConsistencyDecoderVAE"
]
# more levels trace more of the same; of classes with the blocks of another, one
ONE = {"norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
CHANGES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"scaling_factor": 0.5},
    "VQModel": ONE | {"block_out_channels": (8,)},
    "AutoencoderKLFlux2": ONE | {"block_out_channels": (8,)},
    "AsymmetricAutoencoderKL": ONE | {"down_block_out_channels": (8,), "up_block_out_channels": (8,)},
    "AutoencoderKLKVAE": {"ch_mult": (1,)},
    "AutoencoderKLWan": {"dim_mult": [1, 1], "temperal_downsample": [True]},
    "AutoencoderKLQwenImage": {"dim_mult": [1], "temperal_downsample": [], "num_res_blocks": 0},
    "AutoencoderKLQwenImage21": {"dim_mult": [1], "num_res_blocks": 0},
}


def run(file: Path, given: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(one) for one in session.run(None, {session.get_inputs()[0].name: given.numpy()})]


def agree(came: torch.Tensor, expected: torch.Tensor) -> bool:
    return came.shape == expected.shape and bool((came - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_onnxruntime_does_what_the_network_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    trace = onnx_folder._traced
    monkeypatch.setattr(onnx_folder, "_traced", lambda side, *rest: traced.append(rest[1]) or trace(side, *rest))
    vae = configured_copy(tiny(name, **CHANGES.get(name, {})))
    graphs = write_onnx(vae, tmp_path / "out", "card", {})
    assert traced == ["pixels", "z"]  # each at the first attempt: a second one takes as long
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["README.md", "decoder.onnx", "encoder.onnx"]
    geometry, step = geometry_of(vae), step_of(vae)
    # a batch and a size that the export did not try, of every class that has more than one
    varies = ("batch",) if geometry.side is not None else ("batch", "height", "width")
    assert [graph.axes for graph in graphs] == [varies, varies]
    height, width = (geometry.side, geometry.side) if geometry.side is not None else (2 * step, 5 * step)
    draw = torch.Generator().manual_seed(7)
    pixels = torch.rand(1, geometry.in_channels, height, width, generator=draw) * 2 - 1
    moments, came = latents.encode(vae, pixels), run(tmp_path / "out" / "encoder.onnx", pixels)
    assert len(came) == (1 if geometry.is_point else 2) and agree(came[0], moments.mean)
    assert geometry.is_point or agree(came[1], torch.exp(0.5 * moments.logvar))
    (decoded,) = run(tmp_path / "out" / "decoder.onnx", came[0])
    assert agree(decoded, latents.decode(vae, came[0]))


def test_the_epsilon_of_dc_ae_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linear attention divides by a sum that may be 0, and 1e-15."""
    monkeypatch.setattr(onnx_folder, "AXES", ({},))
    graphs = write_onnx(configured_copy(tiny("AutoencoderDC")), tmp_path / "out", "card", {})
    assert all(graph.difference < 1e-5 for graph in graphs)


def test_metadata_names_the_normalisation_and_the_images(tmp_path: Path) -> None:
    vae = tiny("AutoencoderTiny")
    record(vae, Preprocessing(channels=3, value_range=(0.0, 4095.0)))
    write_onnx(configured_copy(vae), tmp_path / "out", "card", {})
    for name in ("encoder", "decoder"):
        found = {one.key: one.value for one in onnx.load(tmp_path / "out" / f"{name}.onnx").metadata_props}
        assert found["ldm_vae.class"] == "AutoencoderTiny" and found["ldm_vae.sides"] == "multiples of 2"
        assert json.loads(found["ldm_vae.normalisation"])["scaling_factor"] == vae.config.scaling_factor
        assert json.loads(found["ldm_vae.preprocessing"])["value_range"] == [0.0, 4095.0]
    assert (tmp_path / "out" / FILE).is_file()
    # laws of other classes, without the time that their graphs take
    flux = tiny("AutoencoderKLFlux2")
    told, own = json.loads(metadata_of(flux)["ldm_vae.normalisation"]), own_normalisation(flux)
    assert own is not None and own.latents_mean is not None
    assert (told["kind"], told["patch"]) == ("channel", 2) and told["latents_mean"] == list(own.latents_mean)
    assert metadata_of(tiny("AutoencoderRAE"))["ldm_vae.sides"] == "32 only"


def test_export_as_a_user_calls_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae, out = tiny("AutoencoderTiny"), tmp_path / "mine"
    vae.save_pretrained(tmp_path / "vae")
    call = ("export", tmp_path / "vae", out, "--target", "onnx")
    assert run_cli(*call) == 0
    said = capsys.readouterr().out
    assert "encoder.onnx: onnxruntime differs by" in said and "batch, height, width may vary" in said
    card = (out / "README.md").read_text()
    assert "library_name: onnx" in card and "from_pretrained" not in card and "multiples of 2" in card
    # the card's own lines run
    code = card.split("```python\n")[1].split("```")[0].replace('"mine/', f'"{out}/')
    names: dict[str, Any] = {"pixels": torch.zeros(1, 3, 32, 32).numpy()}
    exec(code, names)
    assert agree(torch.from_numpy(names["decoded"]), vae.decode(vae.encode(torch.zeros(1, 3, 32, 32)).latents).sample)
    # an older export is replaced, also by a folder of diffusers
    (out / "README.md").write_text("older")
    assert run_cli("export", tmp_path / "vae", out) == 0
    assert type(AutoencoderTiny.from_pretrained(out)) is AutoencoderTiny and not (out / "encoder.onnx").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_class_that_samples_is_refused(tmp_path: Path) -> None:
    with refused(UsageError, "decodes by sampling"):
        write_onnx(tiny("ConsistencyDecoderVAE"), tmp_path / "out", "card", {})


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with refused(UsageError, "needs onnxscript"):
        write_onnx(tiny("AutoencoderTiny"), tmp_path / "out", "card", {})


def test_fp16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", tmp_path / "vae", tmp_path / "out", "--target", "onnx", "--variant", "fp16") == 2
    assert "--target onnx is written in fp32" in capsys.readouterr().err


def test_a_graph_that_differs_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is another one when the graph is compared with it."""
    save = torch.onnx.ONNXProgram.save

    def moved(program: Any, path: Path, **options: Any) -> None:
        save(program, path, **options)
        vae.encoder.layers[0].bias.add_(0.1)

    vae = configured_copy(tiny("AutoencoderTiny"))
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", moved)
    monkeypatch.setattr(onnx_folder, "AXES", ({},))
    with pytest.raises(UsageError, match="onnxruntime differs from it by"):  # by how much: not golden
        write_onnx(vae, tmp_path / "out", "card", {})
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_cannot_do_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("step 1 of 3") from ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with refused(UsageError, "no such operator"):
        write_onnx(configured_copy(tiny("AutoencoderTiny")), tmp_path / "out", "card", {})
    assert list(tmp_path.iterdir()) == []


def test_axes_are_given_up_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = onnx_folder._traced

    def square(side: Any, given: Any, name: str, outputs: Any, axes: dict[int, str]) -> Any:
        if axes:
            raise ValueError("a size that is a number")
        return traced(side, given, name, outputs, axes)

    monkeypatch.setattr(onnx_folder, "_traced", square)
    graphs = write_onnx(configured_copy(tiny("AutoencoderTiny")), tmp_path / "out", "card", {})
    assert [graph.axes for graph in graphs] == [(), ()] and "its shape is fixed" in graphs[0].describe()
