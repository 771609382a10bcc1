"""ONNX: encoder and decoder as two graphs, run in onnxruntime and compared with the network before they are published.

    encoder.onnx   pixels [B, C, H, W] in [-1, 1] => latent_mean and latent_std [B, c, h, w]; latents where there is no
                   variance
    decoder.onnx   z [B, c, h, w], unscaled => pixels [B, C, H, W], not clamped

All is fp32. The normalisation is in neither graph: it stands in the metadata of both, and in the README.

Legend: B batch, C image channels, c latent channels, H W pixels, h w latent positions.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ldm_vae.autoencoder import latents
from ldm_vae.autoencoder.families import family_of
from ldm_vae.autoencoder.geometry import geometry_of, step_of
from ldm_vae.autoencoder.normalisation_law import own_normalisation
from ldm_vae.autoencoder.preparation import recorded
from ldm_vae.core import atomic_io
from ldm_vae.core.errors import UsageError
from ldm_vae.core.text import an
from ldm_vae.core.validation import first_line
from ldm_vae.data import preprocessing
from ldm_vae.export.replacement import check_replaceable

TOLERANCE = 1e-4  # of the largest value; measured: 1e-7 to 1e-5
LARGEST_FILE = 2**31 - 2**27  # bytes: a protobuf ends at 2 GiB; larger weights stand in a file beside the graph
NEEDED = ("onnx", "onnxruntime", "onnxscript")
# axes that may vary, tried in this order
AXES: tuple[dict[int, str], ...] = ({0: "batch", 2: "height", 3: "width"}, {0: "batch"}, {})


class _Encoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moments = latents.encode(self.vae, pixels)
        return (moments.mean,) if moments.is_point else (moments.mean, torch.exp(0.5 * moments.logvar))


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (latents.decode(self.vae, z),)


class _HeadsOfOne(TorchFunctionMode):
    """Attention over [B, n, d] as one head of [B, 1, n, d]: the exporter knows that form alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.scaled_dot_product_attention and args[0].ndim == 3:
            return function(*(one[:, None] for one in args), **(kwargs or {}))[:, 0]
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Graph:
    """A graph that was written: its file's name; the names of its input's axes that vary; the largest difference from
    the network, of the largest value, over all inputs that were tried."""

    name: str
    axes: tuple[str, ...]
    difference: float

    def describe(self) -> str:
        vary = f"{', '.join(self.axes)} may vary" if self.axes else "its shape is fixed"
        size = "" if "height" in self.axes or not self.axes else ", the size may not"
        return f"{self.name}: onnxruntime differs by {self.difference:.1g} of the largest value; {vary}{size}"


def check_exportable(vae: Any) -> None:
    """Raises UsageError where a package is missing, or the class has no graph."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(f"--target onnx: needs {', '.join(missing)}: pip install 'ldm-vae[onnx]'")
    if family_of(vae).noise:
        raise UsageError(
            f"--target onnx: {an(type(vae).__name__)} decodes by sampling from a generator, which no graph can hold"
        )


def write_onnx(vae: Any, out: Path, card: str, files: Mapping[str, bytes]) -> list[Graph]:
    """Write both graphs, the card, the record of preprocessing and `files` to the folder `out`, replacing an older
    export. `vae` is what `configured_copy` gave.

    Raises:
        UsageError: the class cannot be exported, or onnxruntime does not agree with it; nothing is written.
    """
    check_exportable(vae)
    everything = {"README.md": card.encode(), **files}
    if (found := recorded(vae)) is not None:
        everything[preprocessing.FILE] = found.to_bytes()
    geometry, factor, step = geometry_of(vae), geometry_of(vae).factor, step_of(vae)
    # `mean` alone would be the name of an operation inside, too
    outputs = ["latents"] if geometry.is_point else ["latent_mean", "latent_std"]
    with atomic_io.whole_folder(out, check_replaceable) as folder:
        # lengths: what sides are multiples of, and the only one that there is, in pixels and in positions
        pixels, positions = (step, geometry.side), (step // factor, geometry.side and geometry.side // factor)
        graphs = [
            _write(_Encoder(vae), folder / "encoder.onnx", "pixels", outputs, geometry.in_channels, *pixels),
            _write(_Decoder(vae), folder / "decoder.onnx", "z", ["pixels"], geometry.latent_channels, *positions),
        ]
        for name, content in everything.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return graphs


def metadata_of(vae: Any) -> dict[str, str]:
    """Metadata of both graphs: class, f, what sides are multiples of, and the normalisation and preprocessing."""
    geometry, normalisation, record = geometry_of(vae), own_normalisation(vae), recorded(vae)
    found = {
        "ldm_vae.class": type(vae).__name__,
        "ldm_vae.factor": str(geometry.factor),
        "ldm_vae.pixels": "[B, C, H, W] in [-1, 1]",
        "ldm_vae.sides": f"{geometry.side} only" if geometry.side is not None else f"multiples of {step_of(vae)}",
    }
    if normalisation is not None:
        values = {name: value for name, value in vars(normalisation).items() if value is not None}
        found["ldm_vae.normalisation"] = json.dumps({"kind": normalisation.kind} | values)
    return found if record is None else found | {"ldm_vae.preprocessing": record.to_bytes().decode()}


def usage(vae: Any, name: str) -> str:
    """The card's lines on running the graphs."""
    geometry = geometry_of(vae)
    encoded = "(z,)" if geometry.is_point else "mean, std"
    sides = f"{geometry.side} px" if geometry.side is not None else f"multiples of {step_of(vae)}"
    return (
        "```python\nimport onnxruntime\n"
        f'encoder = onnxruntime.InferenceSession("{name}/encoder.onnx")\n'
        f'decoder = onnxruntime.InferenceSession("{name}/decoder.onnx")\n'
        f'{encoded} = encoder.run(None, {{"pixels": pixels}})  # float32 [B, {geometry.in_channels}, H, W] in [-1, 1]\n'
        f'(decoded,) = decoder.run(None, {{"z": {"z" if geometry.is_point else "mean"}}})\n```\n\n'
        f"H and W are {sides}. z is not normalised in the graphs."
    )


@torch.no_grad()
def _write(side: Any, path: Path, name: str, outputs: list[str], channels: int, step: int, only: int | None) -> Graph:
    """The first export that onnxruntime runs as the network does, of those of AXES."""
    failed: BaseException | None = None
    for axes in AXES if only is None else AXES[1:]:
        try:
            inputs = list(_inputs(channels, step, only, axes))
            program = _traced(side, inputs[0], name, outputs, axes)
            program.model.metadata_props.update(metadata_of(side.vae))
            size = sum(value.nbytes for value in side.state_dict().values())
            program.save(path, external_data=size > LARGEST_FILE)
            difference = max(_difference(side, path, name, given) for given in inputs)
            if not difference <= TOLERANCE:
                raise UsageError(f"onnxruntime differs from it by {difference:.3g} of the largest value")
            return Graph(path.name, tuple(axes.values()), difference)
        except Exception as error:  # of the exporter, the graph or its run: any kind
            failed = failed or _root(error)
    assert failed is not None
    kind = type(side.vae).__name__
    raise UsageError(f"--target onnx: the {path.stem} of {an(kind)} cannot be exported: {first_line(failed)}")


def _inputs(channels: int, step: int, only: int | None, axes: Mapping[int, str]) -> Iterator[torch.Tensor]:
    """Keyed inputs: one that is traced, and, of every axis that may vary, another length."""
    draw = torch.Generator().manual_seed(0)
    side = only or 4 * step
    yield torch.rand((2, channels, side, side), generator=draw) * 2 - 1
    if axes:
        height, width = (8 * step, 6 * step) if 2 in axes else (side, side)
        yield torch.rand((3, channels, height, width), generator=draw) * 2 - 1


def _traced(side: Any, given: torch.Tensor, name: str, outputs: list[str], axes: Mapping[int, str]) -> Any:
    with warnings.catch_warnings(), _HeadsOfOne():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            side, (given,), input_names=[name], output_names=outputs, dynamic_shapes=(dict(axes),) if axes else None,
            dynamo=True, verbose=False,
            optimize=False,  # its optimiser takes DC-AE's epsilon of 1e-15 for 0, and what it divides becomes NaN
        )  # fmt: skip


def _difference(side: Any, path: Path, name: str, given: torch.Tensor) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of every constant that it does not fold
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    pairs = zip(side(given), session.run(None, {name: given.numpy()}), strict=True)
    return max(
        float((expected - torch.from_numpy(came)).abs().max() / expected.abs().max().clamp_min(1e-12))
        for expected, came in pairs
    )


def _root(error: BaseException) -> BaseException:
    """The first cause: the exporter's own sentences only say where it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
