"""Kinds of numbers in a config, each with the largest that means anything: a slip of the keyboard is no allocation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

LARGEST = 2**53  # of any whole number: beyond it a float skips some

Count = Annotated[int, Field(ge=0)]
"""Images, steps."""
Side = Annotated[int, Field(gt=0, le=2**16)]
"""Pixels; AutoencoderKL at 2^16 would already take terabytes."""
Channels = Annotated[int, Field(gt=0, le=2**16)]
Layers = Annotated[int, Field(ge=0, le=256)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""Range of the seeds of torch's generators."""
Momentum = Annotated[float, Field(ge=0, lt=1)]
"""Of an average that is kept."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
