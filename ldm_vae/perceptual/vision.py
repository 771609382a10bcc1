"""Vision networks of transformers, from a folder or a hub: loaded whole, or their shape alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode, unset_fake_temporarily

from ldm_vae.core import hub
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.core.text import an
from ldm_vae.core.validation import disguised_file, first_line

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of pixels in [0, 1], by channel
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of networks that name none of their own


def transformers_library(name: str) -> Any:
    """The package. Raises WorkError where it is not installed; `name` is the argument that needs it."""
    try:
        import transformers
    except ImportError as error:
        raise WorkError(f"{name}: needs transformers: pip install 'ldm-vae[transformers]'") from error
    return transformers


def load_network(name: str, kind: str, source: str) -> Any:
    """The network of the argument `name`, of a class of transformers; no tensor of it is left at random, and a pooler
    that the file lacks is taken away.

    Raises:
        UsageError: `source` is no such network, or not whole.
        WorkError: transformers is not installed.
    """
    transformers, silent = transformers_library(name), None
    if not Path(source).exists():
        hub.check_id(source, f"{name} {source}")
        silent = hub.connect()
    for file in sorted(Path(source).glob("*.*")) if Path(source).is_dir() else ():
        if file.suffix in (".json", ".safetensors") and (what := disguised_file(file)) is not None:
            raise UsageError(f"{name}: {source}: {file.name} {what}")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a table of what is missing, or of a CLIP's text half: looked at below
    try:
        network, loaded = getattr(transformers, kind).from_pretrained(
            source, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # what a damaged or foreign folder makes of transformers: any kind
        raise UsageError(
            f"{name}: {source} cannot be loaded as {an(kind)}: {hub.failure(error, source, silent)}"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    # transformers leaves what a file of another network lacks at random
    absent = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if kind == "AutoModel" and any(key.startswith("pooler.") for key in absent):
        network.pooler, absent = None, [key for key in absent if not key.startswith("pooler.")]
    if absent:
        raise UsageError(
            f"{name}: {source} is no whole {kind}: {len(absent)} of its tensors are missing or of another shape, "
            f"{absent[0]} the first"
        )
    return network


def vision_network(name: str, source: str) -> Any:
    """A vision network of any class (AutoModel). Raises as `load_network`, and UsageError where it takes no images."""
    return _of_images(name, source, load_network(name, "AutoModel", source))


def vision_outline(name: str, source: str, layers: int) -> Any:
    """A network of the same shape with random weights, to count its cost; DINO's ViT-S/8, of at least so many layers,
    where `source` is a hub id whose config is not on this machine. Raises as `vision_network`."""
    transformers = transformers_library(name)
    if not Path(source).exists():
        hub.check_id(source, f"{name} {source}")
    try:
        shape = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception as error:  # as above
        if Path(source).exists():
            raise UsageError(f"{name}: {source} is no network of transformers: {first_line(error)}") from error
        small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 8}
        shape = transformers.ViTConfig(**small, image_size=224, num_hidden_layers=max(12, layers))
    with unset_fake_temporarily() as fake:  # weights cannot be drawn without content
        network = transformers.AutoModel.from_config(shape)
        if isinstance(fake, FakeTensorMode):
            with FakeCopyMode(fake):
                network = copy.deepcopy(network)
    return _of_images(name, source, network)


def _of_images(name: str, source: str, network: Any) -> Any:
    if network.main_input_name != "pixel_values":
        raise UsageError(
            f"{name}: expected a vision network, got {source}, {an(type(network).__name__)}, which takes "
            f"{network.main_input_name}"
        )
    return network


def pixel_statistics(source: str) -> Statistics:
    """Of preprocessor_config.json where a network has one, else ImageNet's."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        known, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except Exception:  # it has none: as above
        known = {}
    mean, std = known.get("image_mean"), known.get("image_std")
    return (tuple(mean), tuple(std)) if mean and std else IMAGENET
