"""What becomes of images and videos on their way into vLLM, against a call of the processor, and their positions."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import AutoConfig
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import processor_only_cache_from_config
from vllm.multimodal.media import MediaWithBytes

from positions_videonsa import mrope_position_ids
from processing_videonsa import VideoNSAProcessor
from videonsa_vllm.internals import Qwen2_5_VLForConditionalGeneration
from videonsa_vllm.loader import VideoNSALoader
from videonsa_vllm.model import VideoNSAForConditionalGeneration

TINY = str(ROOT / "checkpoints" / "tiny")
SCENE = (ROOT / "demo" / "scene.mp4").read_bytes()
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def processor():
    return VideoNSAProcessor.from_pretrained(TINY, trust_remote_code=True)


class Inputs:
    """vLLM's processing with a cache, as its server has it."""

    def __init__(self, **arguments):
        defaults = {"dtype": "bfloat16", "block_size": 32, "max_model_len": 4096, "trust_remote_code": True}
        config = EngineArgs(model=TINY, **(defaults | arguments)).create_engine_config()
        with set_current_vllm_config(config):
            self.processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
            self.cache = processor_only_cache_from_config(config)

    def __call__(self, text: str, data: dict, uuids: dict | None = None, **options) -> dict:
        items = self.processor.info.parse_mm_data(data)
        return self.processor(text, items, uuids, hf_processor_mm_kwargs=options, cache=self.cache)


@pytest.fixture(scope="module")
def inputs():
    return Inputs()


def as_file(content: bytes) -> MediaWithBytes:
    """A video file as vLLM's connector hands it over."""
    return MediaWithBytes(VideoNSALoader.load_bytes(content), content)


def video_named(reference, name: str) -> bytes:
    return Path(reference.folder / "videos" / f"{name}.mp4").read_bytes()


def field(result: dict, kind: str, index: int, name: str) -> torch.Tensor:
    return result["mm_kwargs"][kind][index][name].data


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (f"What is <|video_pad|>? {VIDEO}", r"the prompt has 2 <\|video_pad\|>, and 1 videos"),
        (f"{VIDEO} What is <|image_pad|>?", r"the prompt has 1 <\|image_pad\|>, and 0 images"),
        ("What?", r"the prompt has 0 <\|video_pad\|>, and 1 videos"),
    ],
)
def test_text_that_names_the_places_of_videos(inputs, text, match):
    with pytest.raises(ValueError, match=match):
        inputs(text, {"video": [as_file(SCENE)]})


@pytest.mark.parametrize("options", [{}, {"fps": 3.7}, {"num_frames": 6}, {"max_pixels_per_frame": 12544}], ids=str)
def test_a_video_is_what_the_processor_makes_of_it(inputs, processor, options):
    result = inputs(f"{VIDEO} What?", {"video": [as_file(SCENE)]}, **options)
    expected = processor(text=f"{VIDEO} What?", videos=[SCENE], return_tensors="pt", **options)
    assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
    pixels = field(result, "video", 0, "pixel_values_videos")
    assert torch.equal(pixels, expected["pixel_values_videos"].to(torch.bfloat16))
    assert field(result, "video", 0, "video_grid_thw").tolist() == expected["video_grid_thw"][0].tolist()
    # In bfloat16 the seconds of 3.7 frames a second would be another number, and positions with them.
    seconds = field(result, "video", 0, "second_per_grid_ts")
    assert seconds.dtype == torch.float32
    assert float(seconds) == float(torch.tensor(expected["second_per_grid_ts"], dtype=torch.float32)[0])


def test_the_budget_is_shared_whatever_was_cached(inputs, processor, reference):
    """The same video alone and beside another: what vLLM cached of the first prompt is not for the second."""
    files = [video_named(reference, name) for name in ("21", "40")]
    for videos in (files[:1], files, files[1:], files[:1], files[::-1]):
        text = VIDEO * len(videos)
        result = inputs(text, {"video": list(map(as_file, videos))}, max_total_tokens=30)
        expected = processor(text=text, videos=videos, max_total_tokens=30, return_tensors="pt")
        assert result["prompt_token_ids"] == expected["input_ids"][0].tolist()
        grids = [field(result, "video", index, "video_grid_thw").tolist() for index in range(len(videos))]
        assert grids == expected["video_grid_thw"].tolist()
    assert int(expected["video_grid_thw"].prod(-1).sum()) // 4 <= 30


def test_frames(inputs, processor):
    """Arrays with metadata: those that were sampled are taken as they are, whole videos are sampled."""
    frames = np.random.default_rng(0).integers(0, 256, (24, 60, 90, 3), dtype=np.uint8)
    known = {"total_num_frames": 240, "fps": 30.0, "frames_indices": list(range(0, 240, 10)), "duration": 8.0}
    whole = {"total_num_frames": 24, "fps": 8.0, "frames_indices": list(range(24)), "do_sample_frames": True}
    for metadata, own, expected_steps in (
        (known, known, 12),
        (whole, {"total_num_frames": 24, "fps": 8.0}, 3),
    ):
        result = inputs(VIDEO, {"video": [(frames, metadata)]})
        expected = processor(text=VIDEO, videos=[frames], video_metadata=[own], return_tensors="pt")
        assert field(result, "video", 0, "video_grid_thw").tolist() == [expected_steps, 2, 4]
        pixels = field(result, "video", 0, "pixel_values_videos")
        assert torch.equal(pixels, expected["pixel_values_videos"].to(torch.bfloat16))
        assert float(field(result, "video", 0, "second_per_grid_ts")) == pytest.approx(
            expected["second_per_grid_ts"][0]
        )


def test_films_in_a_format_of_pictures(inputs):
    """They are videos, each of its own, and no frames of one."""
    pictures = [Image.new("RGB", (56, 56), (8 * index, 0, 0)) for index in range(16)]
    file = io.BytesIO()
    pictures[0].save(file, format="gif", save_all=True, append_images=pictures[1:], duration=500)
    result = inputs(VIDEO * 2, {"video": [as_file(file.getvalue())] * 2})
    assert [field(result, "video", index, "video_grid_thw").tolist() for index in (0, 1)] == [[8, 4, 4]] * 2


def test_options_of_the_servers_start(processor):
    """They are defaults, and a request's `fps` replaces the start's `num_frames`."""
    inputs = Inputs(mm_processor_kwargs={"num_frames": 6, "max_total_tokens": 20})
    for options, resolved in (
        ({}, {"num_frames": 6, "max_total_tokens": 20}),
        ({"fps": 1}, {"fps": 1, "max_total_tokens": 20}),
        ({"max_total_tokens": 9, "num_frames": 40}, {"num_frames": 40, "max_total_tokens": 9}),
        ({"max_frames": 4}, {"num_frames": 4, "max_total_tokens": 20}),  # as in transformers
    ):
        result = inputs(VIDEO, {"video": [as_file(SCENE)]}, **options)
        expected = processor(text=VIDEO, videos=[SCENE], return_tensors="pt", **resolved)
        assert field(result, "video", 0, "video_grid_thw").tolist() == expected["video_grid_thw"][0].tolist()


def test_what_is_refused(inputs):
    for count, options, message in (
        (1, {"fsp": 2}, "'fsp': VideoNSA takes fps"),
        (1, {"fps": -1}, "`fps` must be a positive number"),
        (1, {"fps": 1, "num_frames": 4}, "exclude each other"),
        (2, {"max_total_tokens": 1}, "too small"),
    ):
        with pytest.raises(ValueError, match=message):
            inputs(VIDEO * count, {"video": [as_file(SCENE)] * count}, **options)
    with pytest.raises(ValueError, match="cannot be opened as a video"):
        inputs(VIDEO, {"video": [as_file(b"no video" * 100)]})
    with pytest.raises(ValueError, match=r"video 1 was given by its uuid alone"):
        items = inputs.processor.info.parse_mm_data({"video": [None]}, validate=False)
        inputs.processor(VIDEO, items, {"video": ["a"]}, cache=inputs.cache)
    for options in ({"num_frames": 8}, {"fps": 1}):
        with pytest.raises(ValueError, match="`mm_processor_kwargs`"):
            VideoNSALoader.load_bytes(SCENE, **options)


def test_a_name_for_a_video_stands_for_no_frames(inputs):
    """Under one uuid, the frames of two requests are their own."""
    grids = [
        field(
            inputs(VIDEO, {"video": [as_file(SCENE)]}, {"video": ["mine"]}, num_frames=count),
            "video",
            0,
            "video_grid_thw",
        )
        for count in (4, 8)
    ]
    assert [int(grid[0]) for grid in grids] == [2, 4]


def test_largest_video(processor):
    """The cache of embeddings has room for the longest video, whatever frames vLLM would think of."""
    for length, options, most in ((4096, {}, 4096), (4096, {"max_total_tokens": 700}, 700)):
        inputs = Inputs(max_model_len=length, mm_processor_kwargs=options)
        counts = {"image": 1, "video": 1}
        assert inputs.processor.info.get_mm_max_tokens_per_item(length, counts) == {"image": 4, "video": most}
        dummy = inputs.processor.get_dummy_mm_inputs({"video": 1})
        assert field(dummy, "video", 0, "video_grid_thw").tolist() == [most // 4, 4, 4]


# Positions


def positions_in_vllm(model_class, prompt: list[int], result: dict) -> torch.Tensor:
    features = [
        SimpleNamespace(modality=kind, mm_position=place, data=item)
        for kind in result["mm_kwargs"]
        for place, item in zip(result["mm_placeholders"][kind], result["mm_kwargs"][kind], strict=True)
    ]
    model = SimpleNamespace(config=AutoConfig.from_pretrained(TINY, trust_remote_code=True))
    model.iter_mm_grid_thw = lambda features: Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw(model, features)
    return model_class.get_mrope_input_positions(model, prompt, features)


@pytest.mark.parametrize(
    ("options", "is_same"), [({}, True), ({"fps": 1}, True), ({"num_frames": 100}, False), ({"num_frames": 116}, False)]
)
def test_positions(inputs, processor, options, is_same):
    """At some rates vLLM's own positions are others, which is why there is a function of ours."""
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    text = f"Look: {IMAGE}{VIDEO} and {VIDEO}{IMAGE} so?"
    data = {"image": [image, image], "video": [as_file(SCENE)] * 2}
    result = inputs(text, data, **options)
    expected = processor(text=text, images=[image, image], videos=[SCENE, SCENE], return_tensors="pt", **options)
    prompt = expected["input_ids"][0].tolist()
    assert result["prompt_token_ids"] == prompt
    grids = {name: expected[name] for name in ("image_grid_thw", "video_grid_thw")}
    truth, deltas = mrope_position_ids(
        expected["mm_token_type_ids"],
        **grids,
        second_per_grid_ts=expected["second_per_grid_ts"],
        spatial_merge_size=2,
        tokens_per_second=2,
    )
    positions, delta = positions_in_vllm(VideoNSAForConditionalGeneration, prompt, result)
    assert torch.equal(positions, truth[:, 0]) and delta == int(deltas)
    theirs, _ = positions_in_vllm(Qwen2_5_VLForConditionalGeneration, prompt, result)
    assert torch.equal(theirs, truth[:, 0]) == is_same


def test_text_positions():
    positions, delta = positions_in_vllm(
        VideoNSAForConditionalGeneration, [1, 2, 3], {"mm_kwargs": {}, "mm_placeholders": {}}
    )
    assert positions.tolist() == [[0, 1, 2]] * 3 and delta == 0


def test_the_checkpoint_asks_for_the_plug_in():
    """The name under which vLLM looks the model up."""
    assert json.loads(Path(TINY, "config.json").read_text())["architectures"] == [
        VideoNSAForConditionalGeneration.__name__
    ]
