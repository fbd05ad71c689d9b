"""Everything that the plug-in takes from VideoNSA itself: a name that changes there changes here, and nowhere else.

A name is imported when it is first asked for: `register` wants the configuration alone.
"""

import importlib
from typing import Any

_PLACES = {
    "SAMPLING_OPTIONS": "options_videonsa",
    "SequenceLengths": "nsa_kernels.attention",
    "VideoOptions": "budget_videonsa",
    "VideoNSAConfig": "configuration_videonsa",
    "VideoNSAProcessor": "processing_videonsa",
    "mrope_position_ids": "positions_videonsa",
    "nsa_attention": "nsa_kernels.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
