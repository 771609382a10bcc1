"""Checks of untrusted files: JSON that does not exhaust the stack, config.json whose numbers are those of a network and
not of a bomb, and files that are something else than their names say. Nothing is built, allocated or imported before it
was checked here."""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.files import open_plain

MOST_PARAMETERS = 10**10  # 40 GB in fp32; diffusers' largest autoencoder has 1.1e9
LARGEST = 2**24  # of any whole number in a config: widths, codes, sides
DEEPEST = 128  # of anything that is repeated: blocks, layers
MOST_LAYERS = 1024  # of an encoder; 128 blocks of 128 take two minutes to build, on no device
HEAD = 512  # bytes that tell what a file is; a git-LFS pointer has about 130
_POINTERS = {  # a line that a version control system left in the place of a large file => what fetches the file
    b"version https://git-lfs.github.com/spec/": ("git-LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
_HALVES = re.compile(r"\\u[dD][89a-fA-F]")  # escapes of surrogates: two make a character
_PAGES = (b"<!doctype html", b"<html", b"<head")
# what hubs answer in the place of a file, when a program saves the answer unseen
_ANSWERS = (
    b"entry not found",
    b"repository not found",
    b"invalid username or password",
    b"access to model",
    b'{"error"',
)


def parse_json(content: str | bytes) -> Any:
    """Parse JSON as json.loads does. Raises ValueError for whatever is wrong, 10^5 brackets too (Python's own is a
    RecursionError), and half a character, which nothing that is written again could hold."""
    try:
        tree = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if _HALVES.search(content if isinstance(content, str) else content.decode("latin-1")):
        check_text(tree)
    return tree


def check_text(tree: Any) -> None:
    """Raises ValueError for half of a character (a lone surrogate), which JSON can hold and no file or table can."""
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a character, {error.object[error.start]!r}") from error


def check_model_config(config: Any) -> None:
    """Raises ValueError unless a diffusers config.json describes a network that can exist.

    Its shape is diffusers' affair; here only what would exhaust the machine, or become NaN, before anybody notices.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected an object, got {type(config).__name__}")
    for name, value in config.items():
        if isinstance(value, list | tuple):
            _check_size(name, len(value), DEEPEST if "block" in name else LARGEST)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{name} is {number}")
                deep = name == "layers_per_block" or (name.startswith("num_") and name.endswith(("blocks", "layers")))
                _check_size(name, number, DEEPEST if deep else LARGEST)
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block")
    if isinstance(widths, list | tuple) and isinstance(layers, int):
        _check_size("layers_per_block of all block_out_channels", len(widths) * layers, MOST_LAYERS)
        if all(isinstance(width, int) for width in widths):
            check_parameters(widths, layers)
    for name in ("scaling_factor", "shift_factor"):
        if config.get(name) is not None and not isinstance(config[name], int | float):
            raise ValueError(f"{name}: expected a number, got {str(config[name])[:40]!r}")
    for name in ("scale_factor_spatial", "scale_factor_temporal"):  # by which Wan divides in every decode
        factor = config.get(name, 1)
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {str(factor)[:40]!r}")
    for name in ("down_block_types", "up_block_types"):
        # diffusers builds as many blocks as are named, and leaves the weights of the others out
        if name in config and widths is not None and len(config[name]) != len(widths):
            raise ValueError(f"{name}: expected one for each of block_out_channels, got {len(config[name])}")
    if config.get("norm_num_groups", 1) < 1:
        raise ValueError(f"norm_num_groups: expected at least 1, got {config['norm_num_groups']}")
    channels = config.get("latent_channels", config.get("z_dim", config.get("encoder_hidden_size")))
    for name in ("latents_mean", "latents_std"):
        per_channel = config.get(name)
        if per_channel is None:
            continue
        count = len(per_channel) if isinstance(per_channel, list | tuple) else 0
        # Cosmos has one for each channel and latent frame
        several = config.get("_class_name") == "AutoencoderKLCosmos" and isinstance(channels, int) and channels > 0
        if not count or (count % channels if several else count != channels):
            raise ValueError(f"{name}: expected one number for each of {channels} latent channels")


def check_parameters(widths: Sequence[int], layers: int, name: str = "block_out_channels") -> None:
    """Raises ValueError for widths whose 3x3 convolutions alone fill the memory of any machine: from the
    first allocations on, a system that promises more than it has would kill this process without a word."""
    # an encoder's and a decoder's residual blocks, of two convolutions each
    count = 2 * (2 * layers + 1) * 2 * 9 * sum(width * width for width in widths)
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"{name}: expected a network of at most {MOST_PARAMETERS / 1e9:.0f} billion parameters, got "
            f"about {count / 1e9:,.0f} billion"
        )


def _check_size(name: str, size: float, largest: int) -> None:
    if abs(size) > largest:
        # a whole number of JSON has any length, and no float for it beyond 1.8e308
        raise ValueError(f"{name}: expected at most {largest:,}, got {max(min(size, 1e300), -1e300):.4g}")


def load_pickle(file: str | Path | BinaryIO) -> Any:
    """Load a file of torch.save, tensors alone: no code of the file is run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds anything else, or is damaged; in one line.
    """
    import torch  # not for those who look at JSON only

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on the pickle's protocol
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes of itself
        raise ValueError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name; a file's own bytes in it are no control characters.

    Of torch's refusal of a pickle the reason alone: its first lines advise to run the file (weights_only=False).
    """
    said = str(error).strip() or type(error).__name__
    if "weights_only" in said or "Weights only load failed" in said:
        reason = re.search(r"WeightsUnpickler error:\s*(.+?)(?=\. Please|\.?$)", said, re.MULTILINE)
        said = f"it holds more than tensors, or is damaged{f' ({reason[1]})' if reason else ''}"
    return "".join(letter if letter.isprintable() else "?" for letter in said.splitlines()[0][:300])


def disguise(head: bytes) -> str | None:
    """The predicate of a file that is not what its name says, from its first HEAD bytes; None for any other.

    It completes a sentence that begins with the file's name: "is a git-LFS pointer ...".
    """
    if not head:
        return "is empty"
    for mark, (system, command) in _POINTERS.items():
        if head.startswith(mark):
            return f"is a {system} pointer in the place of the file; `{command}` in its repository fetches the file"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_PAGES):
        return "is a web page (HTML) in the place of the file; download the file itself"
    if text.startswith(_ANSWERS):
        answer = first_line(ValueError(head[:80].decode("utf-8", "replace")))
        return f"is a server's answer in the place of the file ({answer}); download it again"
    return "holds zeros alone, as what was never written does" if not any(head) else None


def disguised_file(path: Path) -> str | None:
    """Apply `disguise` to a file, or to what is in its place: a folder, a broken link."""
    if path.is_dir():
        return "is a folder, not a file"
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, and there is nothing"
    with open_plain(path) as file:
        return disguise(file.read(HEAD))


@contextlib.contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Around code that takes a file's content for what this program writes into it.

    Raises:
        WorkError: it is something else (a key is missing, text stands for a number), by the file's name.
    """
    try:
        yield
    except (UsageError, WorkError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        reason = why_unreadable(path, error)
        raise WorkError(f"{path}: is not as this program writes it ({type(error).__name__}: {reason})") from error


def why_unreadable(path: Path, error: BaseException) -> str:
    """The reason in "cannot be read: ...": what is in the place of the file, else the first line of the error."""
    with contextlib.suppress(OSError):
        if (what := disguised_file(path)) is not None:
            return f"it {what}"
    return first_line(error)
