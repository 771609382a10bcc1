"""preprocessing.json: the preparation of a network's images, recorded with its weights and applied wherever it is fed.

A network that was trained on 12-bit pictures read as [0, 4095] sees others when its user's next command reads them as
[0, 65535]: 9 dB instead of 32, and another scaling_factor. So training writes this record beside config.json, exports
carry it on (single files in their header), `load_autoencoder` attaches it to the network, and every verb with DATA asks
for it (preparation.py). A network without a record is fed as it always was: the defaults, the channels of its config.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ldm_vae.core.config import Section, validate
from ldm_vae.core.config_file import read_yaml
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import read_bytes
from ldm_vae.core.validation import first_line, parse_json
from ldm_vae.data.decoding import Decoding
from ldm_vae.data.flags import Resize
from ldm_vae.data.holdout import Holdout
from ldm_vae.data.transforms import PREPROCESSING_VERSION

logger = logging.getLogger(__name__)

FILE = "preprocessing.json"  # beside config.json
HEADER = "ldm_vae.data.preprocessing"  # in the header of our single files: the same JSON
FORMAT, VERSION = "ldm-vae preprocessing", 1

# what two networks of equally many channels may differ in
SETTABLE = ("value_range", "background", "resize", "alpha", "sample_rate")
# what flags may change beside: another clip of the same pixels, another excerpt of the same sound
OF_CLIPS, OF_SOUNDS = ("frames", "frame_rate", "frame_stride"), ("samples",)
OF_IMAGES = ("value_range", "background", "alpha", "colour", "resize", "interpolation", "crop")  # of clips too


class Preprocessing(Section):
    """Contents of preprocessing.json. Rules that this version knows one value of are in it as well: a reader must not
    guess them, and another value is refused."""

    format: Literal["ldm-vae preprocessing"] = "ldm-vae preprocessing"
    version: Literal[1] = 1
    signal: Literal["image", "video", "audio"] = "image"
    """Of what a sample is."""
    sample_rate: int | None = Field(None, gt=0)
    """Samples a second; this and the next of sounds alone."""
    samples: int | None = Field(None, gt=0)
    """Of an excerpt; no part of what fine-tuning may not change."""
    frames: int | None = Field(None, gt=0)
    """Of a clip; this and the next two of videos alone, and no part of what fine-tuning may not change."""
    frame_rate: float | None = Field(None, gt=0.0)
    """Frames a second, None: those of the video."""
    frame_stride: int = Field(1, gt=0)
    """Every so many frames of those."""
    channels: int = Field(ge=1, le=2**16)
    """Of the decoded sample: the network's in_channels."""
    value_range: tuple[float, float] | None = None
    """In the file: the values that become black and white. None: those of the file's number type."""
    input_range: tuple[float, float] = (-1.0, 1.0)
    """At the network: what black and white are there."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels."""
    alpha: Literal["background", "channel", "straight"] = "background"
    """Transparency is composited on the background, or is the fourth of four channels: one like the others, or straight
    alpha (ldm_vae/data/alpha.py)."""
    colour: Literal["srgb"] = "srgb"
    """Colour profiles (ICC) are converted to this space."""
    resize: Resize = "short_side"
    """Of whole images; `none`: pixels as they are, only what is too small is enlarged."""
    interpolation: Literal["bicubic"] = "bicubic"
    """Antialiased."""
    crop: Literal["centre"] = "centre"
    """The part of a whole image that is left. (Training's own crops: RUN/config.yaml, `transform`.)"""
    law: str = PREPROCESSING_VERSION
    """Version of decoding, resize and crop, as in the identity of a latent store."""
    holdout: Holdout | None = None
    """Split of the images that the network was trained on (`data.holdout`)."""

    @field_validator("value_range")
    @classmethod
    def _check_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] == value[1]:
            raise ValueError(f"expected two numbers, black's and white's, got {list(value)}")
        return value

    @field_validator("input_range")
    @classmethod
    def _check_input(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value != (-1.0, 1.0):
            raise ValueError(f"expected [-1, 1], got {list(value)}")
        return value

    @field_validator("background")
    @classmethod
    def _check_background(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if not all(0 <= one <= 255 for one in value):
            raise ValueError(f"expected three numbers from 0 to 255, got {list(value)}")
        return value

    @field_validator("alpha")
    @classmethod
    def _check_alpha(cls, value: str, known: ValidationInfo) -> str:
        if (value != "background") != (known.data.get("channels") == 4):
            raise ValueError(f"{value} does not go with {known.data.get('channels')} channels")
        return value

    @classmethod
    def of(cls, decoding: Decoding, holdout: Holdout | None = None) -> Preprocessing:
        """The record of how a source is decoded, and split. (A draft of JPEGs is a matter of speed in training:
        whatever is measured or encoded later is decoded exactly.)

        Raises:
            UsageError: nothing can be decoded so.
        """
        names = ("channels", *SETTABLE, *OF_CLIPS, *OF_SOUNDS)
        said = {name: getattr(decoding, name) for name in names if name != "alpha"}
        said |= {"signal": decoding.signal, "holdout": holdout}
        return _valid(said | ({"alpha": "straight"} if decoding.alpha else {}), "data")

    @property
    def decoding(self) -> Decoding:
        """The decoding that it records."""
        return Decoding(
            self.channels, self.background, self.value_range, resize=self.resize, alpha=self.alpha == "straight",
            frames=self.frames, frame_rate=self.frame_rate, frame_stride=self.frame_stride,
            sample_rate=self.sample_rate, samples=self.samples,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """Contents of the file."""
        absent = {"holdout"} if self.holdout is None else set()
        absent |= set(OF_CLIPS) if self.signal != "video" else set()
        absent |= set(OF_IMAGES) if self.signal == "audio" else {"sample_rate", *OF_SOUNDS}
        return (json.dumps(self.model_dump(mode="json", exclude=absent), indent=2) + "\n").encode()


def parse(content: bytes | str, where: object) -> Preprocessing:
    """A record from a file's contents; `where` names it in the sentence.

    Raises:
        UsageError: it is damaged, of another signal, or a newer version of this tool wrote it.
    """
    try:
        tree = parse_json(content)
    except ValueError as error:
        raise UsageError(f"{where}: damaged, not readable as JSON: {first_line(error)}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise UsageError(f"{where}: damaged, `format` is not `{FORMAT}`")
    if tree.get("version") != VERSION:
        raise UsageError(
            f"{where}: `version` is {str(tree.get('version'))[:20]}, this program reads version {VERSION}; use the "
            "version of ldm-vae that wrote it, or a newer one"
        )
    if tree.get("signal") not in ("image", "video", "audio"):
        raise UsageError(
            f"{where}: `signal` is {str(tree.get('signal'))[:20]}, this program reads images, videos and sounds"
        )
    for name, signal in (("frames", "video"), ("sample_rate", "audio")):
        if (tree["signal"] == signal) != (tree.get(name) is not None):
            raise UsageError(f"{where}: damaged, `{name}` does not go with `signal` {tree['signal']}")
    return _valid(tree, f"{where}: damaged")


def _valid(tree: dict[str, Any], where: object) -> Preprocessing:
    if "alpha" not in tree:
        tree = tree | {"alpha": "channel" if tree.get("channels") == 4 else "background"}
    return validate(Preprocessing, tree, str(where))


def read_beside(config: Path) -> Preprocessing | None:
    """The record beside a config.json; of a run that was trained before there was such a file, what its config says.

    Raises:
        UsageError: the file is damaged, or too new.
    """
    path = config.with_name(FILE)
    if path.exists():
        try:
            content = read_bytes(path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error
        return parse(content, path)
    folder = config.parent
    return _of_old_run(folder.parent) if folder.name == "vae" else None


def _of_old_run(run: Path) -> Preprocessing | None:
    """Read the record of an old run from RUN/config.yaml, which had all of it."""
    try:
        tree = read_yaml(run / "config.yaml")
    except UsageError:  # no run at all, or nobody's
        return None
    data, transform = tree.get("data"), tree.get("transform")
    if not (isinstance(data, dict) and isinstance(transform, dict) and "output_dir" in tree):
        return None
    model = tree.get("model")
    channels = model.get("in_channels", 3) if isinstance(model, dict) else 3
    given = {name: data[name] for name in ("value_range", "background") if name in data}
    known = {"channels": channels, "resize": transform.get("resize", "short_side")} | given
    return _valid(known, run / "config.yaml")


def read_hub(repo: str, subfolder: str | None = None) -> Preprocessing | None:
    """The record in a model repository of the hub, looked for once and then in the local cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = FILE if subfolder is None else f"{subfolder}/{FILE}"
    try:
        return parse(read_bytes(hf_hub_download(repo, name)), f"VAE {repo}: {name}")
    except UsageError:
        raise
    except Exception as error:  # the network's errors are requests', httpx' or its own, by version
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        kept = None if absent else try_to_load_from_cache(repo, name)
        if not absent and (kept is None or isinstance(kept, str)):
            logger.warning("VAE %s: whether it has a %s cannot be looked up now; the defaults are used", repo, name)
        return None
