"""The lines of diffusers' pipelines that stand between a VAE and a diffusion model, run as they are, without the
other parts of a pipeline."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import torch

CLEAN = SimpleNamespace(  # a scheduler that adds no noise
    add_noise=lambda latents, noise, timestep: latents, scale_noise=lambda latents, timestep, noise: latents
)  # fmt: skip
VAES = {"vae", "movq", "vqvae"}  # names that pipelines give their autoencoder


def with_vae(pipeline: type, vae: Any, **parts: Any) -> Any:
    """A pipeline of that class with nothing but a VAE."""
    made = pipeline.__new__(pipeline)
    made.__dict__.update(dict.fromkeys(VAES, vae) | {"scheduler": CLEAN} | parts)
    return made


@torch.no_grad()
def shown(pipeline: type, vae: Any, latents: torch.Tensor, **known: Any) -> torch.Tensor:
    """The image that a pipeline's `__call__` decodes from the latents that its diffusion model leaves: its lines from
    `if output_type ...` to the decoding, with these values of its other variables (`self`'s: a dictionary of it)."""
    call: Any = inspect.unwrap(vars(pipeline)["__call__"])
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(call))).body
    assert isinstance(function, ast.FunctionDef)
    lines = _lines_to_decode(function.body)
    values = {
        "self": with_vae(pipeline, vae, **known.pop("parts", {})), "latents": latents, "output_type": "pt",
        "height": 0, "width": 0, "generator": None, "device": latents.device, **known,
    }  # fmt: skip
    exec(
        compile(ast.fix_missing_locations(ast.Module(lines, [])), f"<{pipeline.__name__}>", "exec"),
        call.__globals__,
        values,
    )
    last = [node for node in ast.walk(lines[-1]) if isinstance(node, ast.Assign) and _decodes(node)]
    image = values[last[0].targets[0].id]  # type: ignore[attr-defined]
    return image if torch.is_tensor(image) else image[0]


def _decodes(node: ast.AST) -> bool:
    return any(
        isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr == "decode"
        and isinstance(one.func.value, ast.Attribute) and one.func.value.attr in VAES
        for one in ast.walk(node)
    )  # fmt: skip


def _lines_to_decode(body: list[ast.stmt]) -> list[ast.stmt]:
    """From the branch of an image's output, or of those that have none the two last lines, to the decoding."""
    (place,) = (number for number, statement in enumerate(body) if _decodes(statement))
    found = body[place]
    if isinstance(found, ast.If):
        return _lines_from(found.body if any(map(_decodes, found.body)) else found.orelse)
    if isinstance(found, ast.With):
        return _lines_to_decode(found.body)
    return body[place - 1 : place + 1]


def _lines_from(branch: list[ast.stmt]) -> list[ast.stmt]:
    (place,) = (number for number, statement in enumerate(branch) if _decodes(statement))
    return branch[: place + 1]
