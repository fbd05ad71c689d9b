"""What reading a video takes, by arithmetic and as measured in processes of their own."""

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from published_sizes import PUBLISHED, published_config
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import run_python
from configuration_videonsa import VideoNSAConfig
from memory_videonsa import (
    cache_bytes,
    chunk_bytes,
    count_parameters,
    estimate_memory,
    layer_copy_bytes,
    weight_bytes,
)
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "tiny"
FLOAT32 = 4
OPTIONS = {"fps": 1, "max_pixels_per_frame": 112 * 112}
# Of the process: buffers of decoders and of torch's libraries, and what the allocator keeps for later.
PROCESS_BYTES = 100e6

CHILD = """
import json, sys, torch
from pathlib import Path
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

checkpoint, warm, film, options = *sys.argv[1:4], json.loads(sys.argv[4])
torch.set_num_threads(1)
model = VideoNSAForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=True)
processor = VideoNSAProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model.read(processor, warm, progress=False, **options)  # libraries are loaded at first use
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
reading = model.read(processor, film, progress=False, **options)
peak = status("VmHWM") - before
plan = reading.plan
print(json.dumps({"peak": peak, "tokens": reading.num_tokens, "working": plan.memory.working,
                  "cache": plan.memory.cache, "total": plan.memory.total, "weights": plan.memory.weights}))
"""


def make_film(path, seconds: int, side: int) -> str:
    """One frame a second of noise in blocks of 28 pixels."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "ultrafast", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(seconds):
            blocks = random.integers(0, 256, (side // 28, side // 28, 3), dtype=np.uint8)
            picture = blocks.repeat(28, 0).repeat(28, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def measured(warm: str, film: str, environment: dict | None = None, **options) -> dict:
    done = run_python(CHILD, TINY, warm, film, json.dumps(options), **(environment or {}))
    return json.loads(done.splitlines()[-1])


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Films of so many seconds, 112 pixels wide: 16 tokens for two frames."""
    folder = tmp_path_factory.mktemp("films")
    return {seconds: make_film(folder / f"{seconds}.mp4", seconds, 112) for seconds in (60, 200, 800, 3600)}


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "tiny"])
def test_parameters_are_counted_as_they_are(size):
    if size == "tiny":
        config = VideoNSAConfig.from_pretrained(TINY)
    else:
        config = VideoNSAConfig.from_dict(published_config(size) | {"model_type": "videonsa"})
    with torch.device("meta"):
        model = VideoNSAForConditionalGeneration(config)
    model.tie_weights()
    counts = count_parameters(config)
    linear = [layer for layer in model.model.language_model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    gates = [one for name, one in model.named_parameters() if "g_proj" in name]
    assert counts.total == sum(one.numel() for one in model.parameters())
    assert counts.vision == sum(one.numel() for one in model.model.visual.parameters())
    assert counts.gates == sum(one.numel() for one in gates)
    assert counts.decoder == sum(one.weight.numel() for one in linear) - sum(
        one.numel() for one in gates if one.ndim > 1
    )
    assert weight_bytes(config) == 2 * counts.total
    if size != "tiny":  # the published weights, and the gates
        assert weight_bytes(config) == PUBLISHED[size]["bytes"] + 2 * counts.gates
    # With eight bits, a byte less for each weight of the decoder; with four, a half more and a scale for 64.
    assert weight_bytes(config) - weight_bytes(config, 8) == counts.decoder
    assert weight_bytes(config, 8) - weight_bytes(config, 4) == counts.decoder // 2 - counts.decoder // 64 * 2


def test_cache_of_an_hour():
    """28 layers, keys and values, 4 heads of 128 numbers, 2 bytes each: 57,344 bytes a token."""
    config = VideoNSAConfig.from_dict(published_config("7B") | {"model_type": "videonsa"})
    assert cache_bytes(config, 115_200) == 115_200 * 57_344
    assert cache_bytes(config, 115_200, bits=4) == 115_200 * 57_344 * (4 + 32 / 64) / 16


@linux
def test_memory_grows_by_the_cache(films):
    """What the arithmetic says of 4,800 more tokens, as the process has it.

    The allocator gives larger tensors back at once here, so that the process holds what is in use.
    """
    chunk = 128
    environment = {"MALLOC_MMAP_THRESHOLD_": "262144"}
    short, long = (
        measured(films[60], films[seconds], environment, chunk_tokens=chunk, **OPTIONS) for seconds in (200, 800)
    )
    config = VideoNSAConfig.from_pretrained(TINY)
    added = long["tokens"] - short["tokens"]
    assert added == 4800
    expected = cache_bytes(config, added, 32) + layer_copy_bytes(config, added, FLOAT32)
    # What either run may have or not have at its peak: the piece that is being made, at most four copies in float32
    # and three in uint8; scores of blocks, probabilities and importance of one layer's chunk; indices of tokens.
    text, piece = config.text_config, chunk // 4 * 4 * 1176
    group = text.num_attention_heads // text.num_key_value_heads
    scores = 3 * group * chunk * added // config.block_size * FLOAT32
    allowance = (4 * FLOAT32 + 3) * piece + scores + 128 * added
    assert allowance < cache_bytes(config, added, 32)  # so that the cache is seen
    assert abs(long["peak"] - short["peak"] - expected) <= allowance
    for run in short, long:
        assert run["peak"] <= run["total"] - run["weights"] + PROCESS_BYTES


class LargeTensors(TorchDispatchMode):
    """Sizes in bytes of new tensors of at least so many bytes."""

    def __init__(self, at_least: int):
        super().__init__()
        self.at_least, self.sizes = at_least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        outputs = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(outputs):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given and x.nbytes >= self.at_least:
                self.sizes.append(x.nbytes)
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("videos", [1, 2])
def test_what_a_layer_copies(films, dtype, videos):
    """Of one video in float32, nothing as long as the keys of a head; else what `layer_copy_bytes` says, at most."""
    model = VideoNSAForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    processor = VideoNSAProcessor.from_pretrained(TINY, trust_remote_code=True)
    parts = [{"type": "video", "video": films[800]}] * videos
    options = OPTIONS | {"progress": False}
    reading = model.read(processor, [{"role": "user", "content": parts}], **options)
    config, tokens = model.config, reading.num_tokens
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    head = tokens * head_dim * dtype.itemsize
    with LargeTensors(head // 2) as new:
        reading.extend(np.zeros((2, 112, 112, 3), np.uint8), progress=False)
    copies = [size for size in new.sizes if size > 8 * tokens]  # ids and types are copied, as 8 bytes a token
    assert sum(copies) > 0 if videos == 2 or dtype == torch.bfloat16 else not copies
    layers, heads = config.text_config.num_hidden_layers, config.text_config.num_key_value_heads
    expected = layer_copy_bytes(config, tokens + 64, dtype.itemsize, videos == 1)
    if videos == 2 or dtype == torch.bfloat16:  # of the heads of a layer, one at a time is there
        one_head = 2 * tokens * head_dim * FLOAT32
        assert sum(copies) / layers - (heads - 1) * one_head <= expected


@linux
def test_an_hour_is_read_in_less_than_300_megabytes_over_model_and_cache(films):
    """1,800 frames of 112 pixels, of which it has 3,600; with the allocator as it is."""
    run = measured(films[60], films[3600], **OPTIONS | {"fps": 0.5})
    assert run["tokens"] > 900 * 16
    assert run["peak"] - run["cache"] < 300e6
    assert run["peak"] <= run["total"] - run["weights"] + PROCESS_BYTES


def test_estimate_is_in_the_plan():
    """Of a quantised cache, what is unpacked is one layer's; what a chunk takes grows with it, and with its frames."""
    config = VideoNSAConfig.from_dict(published_config("7B") | {"model_type": "videonsa"})
    full, packed = (estimate_memory(config, 115_200, chunk_tokens=1024, cache_bits=bits) for bits in (16, 4))
    assert packed.working - full.working == full.cache // 28
    assert full.total == full.weights + full.cache + full.working
    assert chunk_bytes(config, 2048, 2) > 1.5 * chunk_bytes(config, 1024, 2)
    assert chunk_bytes(config, 64, 2, step_tokens=1024) > chunk_bytes(config, 64, 2)
