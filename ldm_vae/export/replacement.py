"""Replacement rule of exports: an older export may be replaced, anything else may not."""

from __future__ import annotations

from pathlib import Path

from ldm_vae.core.errors import UsageError

# what an export may consist of; a folder that holds anything else is somebody's own and is not replaced
_OURS = (
    "config.json",
    "README.md",
    "latent_statistics.json",
    "latent_preview.json",
    "preprocessing.json",
    "quantizer.json",
    "preprocessor_config.json",
    ".gitattributes",
    "pictures",
    "vae",
)
_OUR_SUFFIXES = (".safetensors", ".safetensors.index.json", ".safetensors.index.fp16.json", ".onnx", ".onnx.data")


def check_replaceable(out: Path) -> None:
    """Raises UsageError unless `out` is free, an empty folder, or an older export and nothing else."""
    if not out.exists():
        return
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"OUT {out}: expected a new folder or an older export, found a file or a link")
    strange = sorted(
        entry.name for entry in out.iterdir() if entry.name not in _OURS and not entry.name.endswith(_OUR_SUFFIXES)
    )
    if strange:
        raise UsageError(f"OUT {out}: holds {strange[0]}, which is not part of an export; choose another folder")
