"""What `transformers serve` needs to run a model whose code comes with its weights, and does not ask for.

The one place for work-arounds of transformers' server (5.20 to 5.23, `transformers/cli/serving`); nothing is replaced
in it. Each can go when the server changes:

- it looks `architectures[0]` and the model's modality up among names that transformers ships. `register` adds ours, so
  that it loads the model through `AutoModelForMultimodalLM`, as it loads all others;
- it asks a model of that kind for the sound of every video (`load_audio_from_video=True`), and wants 32 frames of each
  unless somebody said otherwise. There is no sound in this model, and how many frames it wants stands in its
  `processor_config.json`: `drop_guesses` removes both;
- it answers every `ValueError` with a bare status 500, which clients take for a failure of the server and try again.
  `bad_request` makes it a status 400 that says what is wrong.
"""

import sys
from typing import Any

from transformers.models.auto import modeling_auto

# What the server sends as `num_frames` of a request that says nothing, whatever the model.
GUESSED_NUM_FRAMES = 32


def register() -> None:
    """Add the model to the names of multimodal models that transformers' command line knows."""
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["videonsa"] = "VideoNSAForConditionalGeneration"


def is_server_call(kwargs: dict[str, Any]) -> bool:
    """Whether keywords of `apply_chat_template` are the server's, which names this one in every call."""
    return "load_audio_from_video" in kwargs


def drop_guesses(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a server's call without what it wants of every model."""
    kwargs = {name: value for name, value in kwargs.items() if name != "load_audio_from_video"}
    if kwargs.get("num_frames") == GUESSED_NUM_FRAMES:
        del kwargs["num_frames"]
    return kwargs


def bad_request(error: ValueError) -> ValueError:
    """The error, as one that FastAPI answers with status 400 and its text; itself where no FastAPI is loaded."""
    fastapi = sys.modules.get("fastapi")
    if fastapi is None:
        return error

    class BadRequest(ValueError, fastapi.HTTPException):
        __str__ = ValueError.__str__

        def __init__(self, text: str):
            fastapi.HTTPException.__init__(self, status_code=400, detail=text)
            self.args = (text,)

    return BadRequest(str(error))
