"""Files of weights: the choice among a folder's, the real format of each, and its tensors one by one.

safetensors alone; a pickle where it is asked for, tensors alone. In a folder of diffusers the full weights come before
a variant (`diffusion_pytorch_model.fp16.safetensors`), one file before shards.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ldm_vae.autoencoder.weights import ldm_keys
from ldm_vae.core.errors import UsageError
from ldm_vae.core.files import open_plain, read_bytes
from ldm_vae.core.terminal import print_note
from ldm_vae.core.validation import (
    disguised_file,
    first_line,
    load_pickle,
    parse_json,
)

STEM = "diffusion_pytorch_model"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
VARIANTS = ("fp32", "fp16", "bf16")  # the first of a folder's is taken; others after them, by name
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANT = re.compile(rf"{STEM}(?:\.([^.]+)\.safetensors|\.safetensors\.index\.([^.]+)\.json)")
# what quantisers leave beside a weight; it is then no number that a network of floats could take
_QUANTISED = re.compile(
    r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+|SCB|qweight|qzeros|g_idx|weight_scale_inv)$"
)


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Tensors by name, none of them read yet; `place` opens every sentence about them ("VAE my-vae"); a prefix of
    `usual` is taken from names without a word."""

    place: str
    entries: Mapping[str, Entry]
    header: Mapping[str, str] = field(default_factory=dict)
    usual: tuple[str, ...] = ldm_keys.PREFIXES


# --- one file ---------------------------------------------------------------------------------------------------------


def open_weights(path: Path, place: str, *, allow_pickle: bool = False) -> Weights:
    """The tensors of a .safetensors file; of a .ckpt, .pt, .pth or .bin where `allow_pickle` says so.

    Raises:
        UsageError: it is another file than its name says, damaged, or quantised to something that is no float.
    """
    refuse_disguise(path, place)
    if path.suffix.lower() in PICKLES:
        weights = Weights(place, _read_pickle(path, place, allow_pickle))
    else:
        weights = _open_safetensors([path], place)
    # before the shapes are compared: packed weights have shapes of their own and would give a misleading sentence
    quantised = sorted(name for name in weights.entries if _QUANTISED.search(name))
    if quantised:
        raise UsageError(
            f"{place}: its weights are quantised ({few(quantised)}), which is not read; give the file in fp32, fp16 "
            "or bf16"
        )
    return weights


def refuse_disguise(path: Path, place: str) -> None:
    """Raises UsageError for a file that is an LFS pointer, a web page, empty, a GGUF, a folder."""
    try:
        what = disguised_file(path)
        if what is None:
            with open_plain(path) as file:
                if file.read(4) == b"GGUF":
                    what = "is a GGUF file, whose weights are quantised; give the safetensors file"
    except OSError as error:
        raise UsageError(f"{place}: {path.name} cannot be read: {error.strerror or error}") from error
    if what is not None:
        raise UsageError(f"{place}: {path.name} {what}")


def _open_safetensors(paths: list[Path], place: str) -> Weights:
    entries: dict[str, Entry] = {}
    header: dict[str, str] = {}
    for path in paths:
        refuse_disguise(path, place)
        try:
            file: Any = safe_open(path, framework="pt")
            header |= file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (no mapping)
                # from the header: no value is read before it is known to be wanted
                entries[name] = Entry(tuple(file.get_slice(name).get_shape()), _reader(file, name, path, place))
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(_unreadable(path, place, error)) from error
    return Weights(place, entries, header)


def _reader(file: Any, name: str, path: Path, place: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except Exception as error:  # a dtype that torch does not have: any kind
            raise UsageError(_unreadable(path, place, error)) from error
        return tensor

    return read


def _unreadable(path: Path, place: str, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(2)
    if head in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return (
            f"{place}: {path.name} cannot be read as a safetensors file: it is a pickle of torch; name it .ckpt, and "
            "`ldm-vae export FILE.ckpt OUT --weights_only_pickle` reads its tensors alone"
        )
    return (
        f"{place}: {path.name} cannot be read as a safetensors file, it is cut off or damaged ({first_line(error)}); "
        "fetch or export it again"
    )


# --- pickles ----------------------------------------------------------------------------------------------------------


def _read_pickle(path: Path, place: str, allowed: bool) -> dict[str, Entry]:
    if not allowed:
        raise UsageError(
            f"{place}: is a pickle, which is not read unasked; {export_command(path)} reads its tensors and nothing "
            "else and writes a safe file"
        )
    try:
        content = load_pickle(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{place}: {path.name} cannot be read as tensors alone: {first_line(error)}") from error
    return {name: Entry(tuple(value.shape), lambda value=value: value) for name, value in _tensors(content)}  # type: ignore[misc]


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dicts by their path; `state_dict`, of which Lightning makes the outermost, is no part."""
    if isinstance(content, torch.Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _tensors(value, prefix if name == "state_dict" else f"{prefix}{name}.")


def export_command(path: Path, config: Path | None = None) -> str:
    """The command that makes a safe file of a pickle."""
    more = "" if config is None else f" --config {shlex.quote(str(config))}"
    return f"`ldm-vae export {shlex.quote(str(path))} OUT{more} --weights_only_pickle`"


# --- a folder ---------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, place: str) -> Weights:
    """The weights of a diffusers folder; which variant it is where the full ones are not there is said.

    Raises:
        UsageError: there are none, or they cannot be read; what is there is named, with what would do.
    """
    names = sorted(path.name for path in folder.iterdir())
    variants: dict[str | None, str] = {}
    for name in reversed(names):  # of one file and shards the file wins: `.safetensors` is after `.safetensors.index`
        match = _VARIANT.fullmatch(name)
        if name in (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"):
            variants[None] = min(name, variants.get(None, name), key=len)
        elif match is not None and not _SHARD.search(name):
            key = match[1] or match[2]
            variants[key] = min(name, variants.get(key, name), key=lambda one: one.endswith(".json"))
    if not variants:
        raise UsageError(_no_weights(folder, names, place))
    # full weights first, then the most exact variant
    order = (None, *VARIANTS)
    chosen = min(variants, key=lambda one: (order.index(one) if one in order else len(order), one or ""))
    if chosen is not None:
        others = ", ".join(sorted(str(one) for one in variants if one != chosen))
        print_note(
            f"{place} has no full weights: its variant {chosen} is taken" + (f", not {others}" if others else "")
        )
    file = folder / variants[chosen]
    weights = open_weights(file, place) if file.suffix != ".json" else _open_shards(file, place)
    return replace(weights, usual=("",))


def read_index(index: Path, place: str) -> list[str]:
    """The names of the shards that an index.json has. Raises UsageError unless they are files of its own folder."""
    refuse_disguise(index, place)
    try:
        shards = sorted(set(parse_json(read_bytes(index))["weight_map"].values()), key=str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{place}: {index.name} cannot be read as an index of shards: {first_line(error)}") from error
    strange = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if strange or not shards:
        raise UsageError(f"{place}: {index.name} names {strange[0] if strange else 'no shard'}, no file of its folder")
    return shards


def _open_shards(index: Path, place: str) -> Weights:
    shards = read_index(index, place)
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise UsageError(
            f"{place}: {len(absent)} of the {len(shards)} shards in {index.name} are missing ({few(absent)})"
        )
    return _open_safetensors([index.parent / shard for shard in shards], place)


def _no_weights(folder: Path, names: list[str], place: str) -> str:
    """Name the files in the place of weights, and what would do."""
    wanted = f"{place}: expected {STEM}.safetensors in {folder}"
    single = [name for name in names if name.endswith(".safetensors") and not _SHARD.search(name)]
    pickles = [name for name in names if name.endswith(PICKLES)]
    divided = [name for name in names if _SHARD.search(name)]
    if divided:
        return f"{wanted}, found {few(divided)} without {STEM}.safetensors.index.json, which says what is in them"
    if single:
        file = folder / single[0]
        return f"{wanted}, found {single[0]}; name it so, or give {file} itself with --config {folder}"
    if pickles:
        return (
            f"{wanted}, found {few(pickles)}: a pickle, which is not read unasked; "
            f"{export_command(folder / pickles[0], folder)} reads its tensors and nothing else and writes a safe folder"
        )
    other = [name for name in names if name != "config.json"]
    return f"{wanted}, found {few(other) if other else 'no other file than config.json'}"


def few(names: list[str]) -> str:
    """The first three of many names; they are a stranger's: no line ends, nothing endless."""
    shown = ["".join(letter if letter.isprintable() else "?" for letter in name[:100]) for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
