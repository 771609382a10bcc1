"""Location of the programs and configs: beside the package in a clone, inside it (as `programs/`) in a wheel."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ldm_vae.core.errors import UsageError
from ldm_vae.core.paths import nearest_path
from ldm_vae.core.text import nearest

# programs that are verbs of `ldm-vae`, which is there in a clone and from a wheel
VERBS = {
    "train.autoencoder": "train",
    "train.diffusion": "diffuse",
    "train.prior": "prior",
    "eval.reconstruction": "evaluate",
    "eval.latent_space": "latent_space",
    "eval.diffusability": "probe",
}
PACKAGE = Path(__file__).parent.parent


def root() -> Path:
    """The folder that holds train/, eval/ and configs/."""
    for folder in (PACKAGE / "programs", PACKAGE.parent):
        if (folder / "train" / "autoencoder.py").is_file():
            return folder
    raise UsageError("the programs train/ and eval/ are neither in the installed package nor beside it; reinstall it")


def words_of(program: str) -> list[str]:
    """The words by which a user starts a program (`eval.reconstruction`); what is no verb is there in a clone alone."""
    return ["ldm-vae", VERBS[program]] if program in VERBS else ["python", "-m", program]


def run(program: str, arguments: list[str]) -> None:
    """Run a program such as `train/autoencoder.py` as `python -m` would, in this process."""
    path = root() / program
    sys.argv = [str(path), *arguments]
    # by path: a folder `train` of the user's own cannot come in the way, and the programs import ldm_vae only
    runpy.run_path(str(path), run_name="__main__")


def run_with_config(program: str, arguments: list[str]) -> None:
    """Run a program whose first argument is a config, by its path or name; its own help where there is none."""
    first, *rest = arguments or ["--help"]
    run(program, [first if first.startswith("-") else str(find_config(first)), *rest])


def shipped_configs() -> dict[str, Path]:
    """The configs that ship with the project, by name: `demo`, `diffusion/demo`."""
    home = root() / "configs"
    files = [*sorted(home.glob("*.yaml")), *sorted(home.glob("diffusion/*.yaml")), *sorted(home.glob("prior/*.yaml"))]
    return {path.relative_to(home).with_suffix("").as_posix(): path for path in files}


def find_config(name: str) -> Path:
    """A config by its path, or by the name of one that ships with the project (`demo`, `kl_f8_d4.yaml`)."""
    path = Path(name)
    if path.is_file():
        return path
    if (found := find_shipped(name)) is not None:
        return found
    exist = shipped_configs()
    meant = nearest(name.removeprefix("configs/").removesuffix(".yaml"), exist) or nearest_path(name)
    raise UsageError(
        f"config {name}: no such file, and none that ships with the project; these do: {', '.join(exist)}{meant}"
    )


def find_shipped(name: str) -> Path | None:
    """A config that ships with the project, by its name (`demo`, `profiles/small_gpu.yaml`)."""
    home = root() / "configs"
    candidates = (home / name, home / f"{name}.yaml", home / name.removeprefix("configs/"))
    return next((path for path in candidates if path.is_file()), None)
