"""What test_hub_loading runs in fresh processes, which see this folder and the reference but not the repository's code.

Environment: `VIDEONSA_REFERENCE`, a file that `write_reference` wrote; `HF_*`, see `FakeHub.environment`.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

torch.set_num_threads(1)

AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
NEW_TOKENS = 4


def build_inputs(processor) -> dict[str, torch.Tensor]:
    """A question about 12 frames of noise; 24 tokens of the prompt are the video's."""
    frames = np.random.default_rng(0).integers(0, 256, (12, 56, 56, 3), dtype=np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[prompt], videos=[frames], return_tensors="pt"))


def align(model):
    """Move the weights out of the memory-mapped file, where they lie at odd addresses and BLAS may round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
def answer(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of the prompt, and the tokens of a greedy answer."""
    model = align(model.eval())
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {"logits": model(**inputs).logits, "tokens": tokens}


def write_reference(model, processor, file: Path) -> None:
    inputs = build_inputs(processor)
    save_file({"input_ids": inputs["input_ids"]} | answer(model, inputs), file)


def check(source: str | Path, *, same: bool = True, code: str | None = None, **kwargs):
    """Load model and processor in every way and compare their answer with the reference, bit by bit.

    Args:
        source: folder or Hub id.
        same: False where the code at this revision is known to compute something else.
        code: the code must come from a folder of the modules cache whose path contains this.
        kwargs: for `from_pretrained`, such as `revision`.
    Returns:
        The last model and the processor.
    """
    reference = load_file(os.environ["VIDEONSA_REFERENCE"])
    kwargs = {"trust_remote_code": True} | kwargs
    config = AutoConfig.from_pretrained(source, **kwargs)
    assert (type(config).__name__, config.block_size) == ("VideoNSAConfig", 4), config
    processor = AutoProcessor.from_pretrained(source, **kwargs)
    assert type(processor).__name__ == "VideoNSAProcessor"
    inputs = build_inputs(processor)
    assert torch.equal(inputs["input_ids"], reference["input_ids"])
    for name in AUTO_CLASSES:
        model, info = getattr(transformers, name).from_pretrained(source, output_loading_info=True, **kwargs)
        assert not any(info.values()), (name, info)
        assert type(model).__name__ == "VideoNSAForConditionalGeneration"
        result = answer(model, inputs)
        assert result["tokens"].shape == reference["tokens"].shape
        assert torch.equal(result["logits"], reference["logits"]) == same, name
        assert torch.equal(result["tokens"], reference["tokens"]) or not same, name

    package = type(model).__module__.rpartition(".")[0]
    kernels = Path(sys.modules[f"{package}.nsa_kernels.attention"].__file__)
    assert kernels.is_relative_to(os.environ["HF_MODULES_CACHE"]), kernels
    assert code is None or code in str(kernels), kernels
    assert "nsa_kernels" not in sys.modules, "the kernels of a checkout were used"
    return model, processor
