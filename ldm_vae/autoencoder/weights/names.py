"""Names of tensors in a file: a network's own tensors, found behind the prefixes of wrappers and averages, in
diffusers' names of any age or those of the class's layout.

    module.encoder.conv_in.weight, _orig_mod.…          DDP, FSDP, torch.compile: taken away wherever it stands
    vae.…, first_stage_model.…, anything.…              a part of something larger: what makes the network whole
    ema.…, ema_model.…, shadow_params.…, model_ema.…    an average: taken where the network's own tensors are not whole
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL

from ldm_vae.autoencoder.weights import layouts, ldm_keys, rounding
from ldm_vae.autoencoder.weights.files import Entry, Weights, few
from ldm_vae.autoencoder.weights.rounding import Rounding
from ldm_vae.autoencoder.weights.shape import told_by
from ldm_vae.core.errors import UsageError

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
AVERAGES = frozenset({"ema", "ema_model", "model_ema", "shadow_params", "averaged_model", "ema_state_dict"})
DOTLESS = "model_ema"  # LDM's LitEma keeps names without their dots
OPTIONAL = ("quant_conv", "post_quant_conv")  # parts that an autoencoder has or has not


@dataclass(frozen=True)
class Fitted:
    """A network's state dict; what was done to get it, in words; which tensors were 8-bit floats."""

    state: dict[str, torch.Tensor]
    notes: list[str]
    rounded: dict[str, Rounding]


def fit(network: torch.nn.Module, weights: Weights) -> Fitted:
    """The tensors of a file as the state dict of `network`, whose shapes are all that is asked of it.

    Raises:
        UsageError: tensors are missing, left over, of another shape, no floats, or two networks are there to choose.
    """
    places = network.state_dict()
    spelled = _spellings(network)
    weights = replace(weights, entries=layouts.divided(network, weights.entries))
    plain = unwrapped(weights.entries)
    copies = _copies(plain, spelled)
    prefix = _choose(copies, len(places), weights.place)
    chosen = copies.get(prefix, {})
    # scales and marks of 8-bit floats belong to weights that are taken: neither left over nor tensors of their own
    companions = {name for original in chosen.values() for name in rounding.companions(original, weights.entries)}
    taken = companions | set(chosen.values()) | {name for name in plain.values() if name.endswith(rounding.MARK)}
    left = {name: original for name, original in plain.items() if original not in taken}
    # behind the same prefix, but not the network's: an error where it looks like one of its parts, else left out with a
    # note
    inside = {name.removeprefix(prefix): original for name, original in left.items() if name.startswith(prefix)}
    parts = {name.split(".")[0] for name in [*spelled, *OPTIONAL]}
    unexpected = sorted(original for name, original in inside.items() if name.split(".")[0] in parts)
    missing = [name for name in places if name not in chosen]
    misshapen = [
        name for name, original in chosen.items()
        if not _same_shape(weights.entries[original].shape, tuple(places[name].shape))
    ]  # fmt: skip
    if missing or unexpected or misshapen:
        raise UsageError(f"{weights.place}: {_misfit(network, weights, chosen, missing, unexpected, misshapen)}")
    state, rounded = _read(places, weights, chosen)
    return Fitted(state, _notes(prefix, plain, weights, chosen, sorted(set(inside.values()))), rounded)


def find_autoencoder(entries: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """The tensors, without prefix, of the KL autoencoder in a file whose shape nobody has told; None if it has none."""
    plain = unwrapped(entries)
    anchor = "encoder.conv_in.weight"
    prefixes = [name.removesuffix(anchor) for name in plain if name == anchor or name.endswith(f".{anchor}")]
    if not prefixes:
        return None
    # the network's own before an average
    prefix = min(prefixes, key=_rank)
    return {name.removeprefix(prefix): entries[plain[name]] for name in plain if name.startswith(prefix)}


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without wrappers => the names themselves; where two would become one, both are left as they are."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(part for part in name.split(".") if part not in WRAPPERS), []).append(name)
    return {
        name: original
        for short, originals in found.items()
        for name, original in (
            [(short, originals[0])] if len(originals) == 1 else zip(originals, originals, strict=True)
        )
    }


# --- where the network is ---------------------------------------------------------------------------------------------


def _spellings(network: torch.nn.Module) -> dict[str, str]:
    """Every name that a file may have for a tensor of the network => its own."""
    own = {name: name for name in network.state_dict()}
    # tensors that are one in the file have their own names by now
    stacks = layouts.fused(network)
    return {there: name for name, there in layouts.file_names(network).items() if there not in stacks} | own


def _copies(plain: Mapping[str, str], spelled: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Every prefix behind which tensors of the network stand => its tensors there, each with its name in the file."""
    found: dict[str, dict[str, str]] = {}
    dotless = {name.replace(".", ""): own for name, own in spelled.items()}
    for name, original in plain.items():
        # every suffix of the name is tried, so any prefix is found, however deep
        parts = ldm_keys.current_name(name).split(".")
        for start in range(len(parts)):
            own = spelled.get(".".join(parts[start:]))
            # LitEma: one part without dots behind `model_ema`
            if own is None and start == len(parts) - 1 and start and parts[start - 1] == DOTLESS:
                own = dotless.get(parts[start])
            if own is not None:
                found.setdefault("".join(f"{part}." for part in parts[:start]), {}).setdefault(own, original)
    return found


def _choose(copies: Mapping[str, Mapping[str, str]], size: int, place: str) -> str:
    """The prefix of the whole network in the file, or of the one that comes nearest."""
    whole = sorted((prefix for prefix in copies if len(copies[prefix]) == size), key=_rank)
    if not whole:
        return max(copies, key=lambda prefix: (len(copies[prefix]), [-part for part in _rank(prefix)]), default="")
    # equal in kind: nothing says which of them is meant
    if len(whole) > 1 and _rank(whole[0])[:2] == _rank(whole[1])[:2]:
        raise UsageError(
            f"{place}: holds {len(whole)} such networks, behind {few(whole)}; save the one that is meant by itself"
        )
    return whole[0]


def _rank(prefix: str) -> tuple[int, int, int]:
    """The network's own tensors before an average's, the usual prefixes before others, short before long."""
    known = ldm_keys.PREFIXES.index(prefix) if prefix in ldm_keys.PREFIXES else len(ldm_keys.PREFIXES)
    return (int(is_average(prefix)), known, len(prefix))


def is_average(prefix: str) -> bool:
    """True when a prefix says that an average of weights stands behind it."""
    return not AVERAGES.isdisjoint(prefix.split("."))


def _notes(
    prefix: str, plain: Mapping[str, str], weights: Weights, chosen: Mapping[str, str], inside: list[str]
) -> list[str]:
    notes = []
    wrapped = sorted({part for original in chosen.values() for part in original.split(".")} & WRAPPERS)
    gone = [f"`{few([part])}.`" for part in [*wrapped, *([prefix[:-1]] if prefix not in weights.usual else [])]]
    if gone:
        notes.append(f"{weights.place}: {' and '.join(gone)} taken from the names of its {len(chosen)} tensors")
    if is_average(prefix):
        notes.append(f"{weights.place}: the average behind `{few([prefix])}` is taken, no other whole network is in it")
    if inside:
        notes.append(f"{weights.place}: {len(inside)} tensors that are not the network's are left out ({few(inside)})")
    return notes


# --- what does not fit ------------------------------------------------------------------------------------------------


def _same_shape(came: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Files of every layout, and of older diffusers, hold the attention's matrices as 1x1 convolutions."""
    return came == expected or (len(expected) == 2 and came == (*expected, 1, 1))


def _misfit(
    network: torch.nn.Module,
    weights: Weights,
    chosen: Mapping[str, str],
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
) -> str:
    total = len(network.state_dict())
    kind = type(network).__name__
    if not chosen:
        first = sorted(weights.entries)
        return (
            f"holds none of the {total} tensors of the {kind} that its config describes, but {few(first) or 'nothing'}"
        )
    ldm = {own: name for name, own in _spellings(network).items() if name != own}
    # missing tensors are named as the file names its others
    in_ldm = not any(".down_blocks." in name for name in weights.entries)
    said = []
    if missing:
        said.append(
            f"{len(missing)} of the {total} tensors are missing "
            f"({few([ldm.get(name, name) if in_ldm else name for name in missing])})"
        )
    if unexpected:
        said.append(f"{len(unexpected)} have no place in the {kind} of its config ({few(unexpected)})")
    if misshapen:
        name = misshapen[0]
        came, expected = weights.entries[chosen[name]].shape, tuple(network.state_dict()[name].shape)
        more = f" and {len(misshapen) - 1} more" if len(misshapen) > 1 else ""
        said.append(f"tensor {few([chosen[name]])}{more}: the weights have {came}, the config asks for {expected}")
    return f"{'; '.join(said)}; {_advice(network, weights, missing, unexpected)}"


def _advice(network: torch.nn.Module, weights: Weights, missing: list[str], unexpected: list[str]) -> str:
    """A hint from the tensors about their own config."""
    positional = [name for name in weights.entries if "shadow_params." in name and name.rsplit(".")[-1].isdigit()]
    if positional:
        return "shadow_params without names are read by the program that wrote them: save the averaged model itself"
    if isinstance(network, AutoencoderKL):
        blocks = len(network.config["block_out_channels"])
        shapes = {
            ldm_keys.to_ldm_name(ldm_keys.current_name(name), blocks): entry.shape
            for name, entry in (find_autoencoder(weights.entries) or {}).items()
        }
        with contextlib.suppress(UsageError, IndexError, ValueError):
            told = told_by(shapes, weights.place)
            differ = [name for name, value in told.items() if _plain(network.config[name]) != _plain(value)]
            if differ:
                wanted = ", ".join(f"{name} {_plain(told[name])}" for name in differ[:4])
                has = ", ".join(f"{_plain(network.config[name])}" for name in differ[:4])
                return f"the weights are those of a config.json with {wanted}, it says {has}"
    what = "whole weights" if missing else "the config.json that they were saved with"
    return f"give {what}" + (", or the class and shape that they are of" if unexpected else "")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


# --- the values -------------------------------------------------------------------------------------------------------


def _read(
    places: Mapping[str, torch.Tensor], weights: Weights, chosen: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, Rounding]]:
    state, rounded = {}, {}
    for name, place in places.items():
        value = weights.entries[chosen[name]].read()
        if rounding.is_eight_bit(value):
            value, rounded[name] = rounding.restored(value, chosen[name], weights)
        # a scale beside other numbers: some quantisation that this reader would get wrong
        elif scaled := rounding.scale_of(chosen[name], weights.entries):
            raise UsageError(
                f"{weights.place}: tensor {few([scaled])} scales {name}, which is {value.dtype} and no float of 8 "
                "bits; such files are not read"
            )
        elif not value.is_floating_point() and place.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise UsageError(
                f"{weights.place}: tensor {few([chosen[name]])} is {kind}: quantised, which is not read; give the "
                "file in fp32, fp16 or bf16"
            )
        state[name] = value.reshape(place.shape)
    return state, rounded
