"""Build hook: a standard wheel carries train/, eval/ and configs/ as ldm_vae/programs/, so that people who only
`pip install` can train and evaluate too. An editable install does not: there they lie beside the package."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Programs(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            for folder in ("train", "eval", "configs"):
                build_data["force_include"][folder] = f"ldm_vae/programs/{folder}"
