"""The autoencoder classes of the installed diffusers: what each is, and which pipelines use it.

    python -m eval.families              # the table of docs/families.md
    python -m eval.families --count      # families of pipelines that have a VAE, and how many are served

Read from the classes and from the pipelines' sources: a family of pipelines is a folder of diffusers/pipelines, and it
has the classes that the type of an argument of one of its pipelines names.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers.models import autoencoders

from ldm_vae.autoencoder.families import Family, family_of
from ldm_vae.core.config import options
from ldm_vae.core.errors import run_program
from ldm_vae.core.request import Parser

PIPELINES = Path(diffusers.__file__).parent / "pipelines"
KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
LAWS = {
    "batch_norm": "per channel of {patch}x{patch} patches, in the buffers of `bn`",
    "inside": "inside `encode` and `decode`",
    "buffers": "buffers `latents_mean`, `latents_std`",
}


def classes() -> list[str]:
    """Names of the autoencoder classes, sorted."""
    return sorted(name for name, one in vars(autoencoders).items() if inspect.isclass(one))


def pipelines(argument: str = "") -> dict[str, set[str]]:
    """Autoencoder classes of each family of pipelines that has any (as an argument of that name)."""
    found: dict[str, set[str]] = {}
    for family, name, used in _arguments():
        if argument in ("", name):
            found.setdefault(family, set()).add(used)
    return found


@functools.cache
def _arguments() -> list[tuple[str, str, str]]:
    """Family, name and class of every argument of an __init__ that is an autoencoder."""
    known, found = classes(), list[tuple[str, str, str]]()
    mentioned = re.compile("|".join(known))
    for file in sorted(PIPELINES.glob("*/**/*.py")):
        text, family = file.read_text(encoding="utf-8"), file.relative_to(PIPELINES).parts[0]
        if mentioned.search(text):  # parsing is what takes the time
            found += [(family, name, used) for name, used in _argument_types(ast.parse(text)) if used in known]
    return found


def _argument_types(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each argument of every class's __init__ with each name in its annotation."""
    bodies = [one.body for one in tree.body if isinstance(one, ast.ClassDef)]
    for start in itertools.chain(*bodies):
        if isinstance(start, ast.FunctionDef) and start.name == "__init__":
            for one in start.args.args:
                for node in ast.walk(one.annotation) if one.annotation is not None else ():
                    if isinstance(node, ast.Name):
                        yield one.arg, node.id


def _law(name: str, family: Family) -> str:
    if family.signal == "audio" and family.law == "inside":
        return "z as it is"
    if family.law != "config":
        return LAWS[family.law].format(patch=family.patch)
    keys = inspect.signature(getattr(autoencoders, name).__init__).parameters
    return ", ".join(f"`{key}`" for key in KEYS if key in keys) or "none: measured on a store"


def _signal(family: Family) -> str:
    """The signal that it encodes, with the lengths of clips as `lengths.py` has them."""
    if family.signal != "video":
        return "sound" if family.signal == "audio" else family.signal
    step = "t" if family.step is None else family.step
    more = {0: "", 1: " or more"}.get(family.step, f" + {step} k")  # type: ignore[arg-type]
    return f"clip of {family.first}{more}"


def _kinds() -> dict[str, str]:
    """`model.kind` by the class that it builds from scratch."""
    kinds = {kind: importlib.import_module(f"ldm_vae.models.{kind}").Config for kind in options("ldm_vae.models")}
    with torch.device("meta"):
        built = {kind: config().build() for kind, config in kinds.items() if not hasattr(config, "build_from")}
    return {type(network).__name__: f"`{kind}`" for kind, network in built.items()}


def table() -> str:
    """Markdown, one row a class."""
    users, kinds = pipelines(), _kinds()
    rows = ["| class | of | pipelines of diffusers | normalisation | training |", "|---|---|---|---|---|"]
    for name in classes():
        family = family_of(name)
        using = sorted(one for one, used in users.items() if name in used)
        shown = ", ".join(using[:6]) + (f" and {len(using) - 6} more" if len(using) > 6 else "")
        if not family.is_served:
            rows.append(f"| {name} | {family.signal} | {shown or 'none'} | | refused |")
            continue
        law = _law(name, family)
        kind = kinds.get(name, "`pretrained`")
        rows.append(f"| {name} | {_signal(family)} | {shown or 'none'} | {law} | {'no' if family.noise else kind} |")
    return "\n".join(rows)


def count() -> str:
    """One sentence: families of pipelines with an argument `vae`, and those of which a class is served."""
    users = pipelines("vae")
    any_served = [one for one, used in users.items() if any(family_of(name).is_served for name in used)]
    return f"{len(any_served)} of {len(users)} families of pipelines with a `vae` use a class that is served"


def main() -> None:
    parser = Parser(program="eval.families", description=__doc__)
    parser.add_argument("--count", action="store_true", help="print the number of families only")
    options = parser.parse_args()
    print(count() if options.count else table())


if __name__ == "__main__":
    run_program(main)
