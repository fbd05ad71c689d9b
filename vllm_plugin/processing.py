"""Images and videos of a request: VideoNSA's processor does what it does in transformers, in the order of vLLM.

vLLM processes and caches every item for itself. How many frames of a video are read, and how large, depends on the
others of the prompt, which share a budget. So all videos of a prompt are planned and read first; what vLLM hashes,
caches and hands on are the frames that were chosen, at the size that was chosen.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature

from .internals import Qwen2_5_VLDummyInputsBuilder, Qwen2_5_VLMultiModalProcessor, Qwen2_5_VLProcessingInfo
from .loader import FILE_MARK
from .videonsa import SAMPLING_OPTIONS, VideoNSAProcessor, VideoOptions

OPTIONS = (*SAMPLING_OPTIONS, "max_total_tokens")
# Frames that are decoded at a time; each may be a few hundred kilobytes.
BATCH = 32
_METADATA = ("total_num_frames", "fps", "duration", "video_backend", "frames_indices")


class VideoNSAProcessingInfo(Qwen2_5_VLProcessingInfo):
    """What vLLM asks about the processor before it has seen a request."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The checkpoint's, with the options of the server's start. Those of a request go into calls."""
        return self.ctx.get_hf_processor(VideoNSAProcessor)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Most tokens of an image and of a video, by which vLLM sizes the cache of their embeddings.

        vLLM's own answer for videos comes from a processor that shrinks no frame and has no budget.
        """
        tokens = {"image": self.get_max_image_tokens(), "video": self.get_max_video_tokens(seq_len, mm_counts)}
        return {kind: tokens[kind] for kind in tokens if kind in mm_counts}

    def get_max_video_tokens(self, seq_len: int, mm_counts: Mapping[str, int]) -> int:
        """A video can be as long as a prompt, or as the budget that the checkpoint or the server's start sets."""
        budget = self.video_options({}).get("max_total_tokens") or self.get_hf_processor().max_total_tokens
        return max(1, min(seq_len, budget))

    def video_options(self, asked: Mapping[str, object]) -> dict[str, Any]:
        """The processor's options for a request: those of the server's start, and over them what is asked.

        Raises:
            ValueError: one that the processor does not have.
        """
        server = self.ctx.get_merged_mm_kwargs({})
        for name in server | asked:
            if name not in OPTIONS:
                raise ValueError(f"`mm_processor_kwargs` has {name!r}: VideoNSA takes {', '.join(OPTIONS)}")
        mine, theirs = (
            VideoOptions(**{name: given.get(name) for name in SAMPLING_OPTIONS}) for given in (asked, server)
        )
        chosen = mine.over(theirs)
        options = {name: getattr(chosen, name) for name in SAMPLING_OPTIONS}
        budgets = (given.get("max_total_tokens") for given in (asked, server))
        options["max_total_tokens"] = next((budget for budget in budgets if budget is not None), None)
        return {name: value for name, value in options.items() if value is not None}


class VideoNSADummyInputs(Qwen2_5_VLDummyInputsBuilder):
    """The largest inputs, with which vLLM measures memory."""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping) -> dict[str, Any]:
        """Frames as large as the processor leaves them, and as many as `seq_len` tokens hold."""
        data = super().get_dummy_mm_data(seq_len, {**mm_counts, "video": 0}, mm_options)
        videos = mm_counts.get("video", 0)
        if videos:
            processor = self.info.get_hf_processor()
            size = self.info.get_image_size_with_most_features(processor.max_pixels_per_frame)
            per_step = size.width * size.height // processor.video_processor.patch_size**2
            per_step //= processor.video_processor.merge_size**2
            tokens = self.info.get_max_video_tokens(seq_len, mm_counts) // videos
            steps = max(1, tokens // per_step)
            data["video"] = self._get_dummy_videos(
                width=size.width,
                height=size.height,
                num_frames=steps * processor.video_processor.temporal_patch_size,
                num_videos=videos,
                overrides=mm_options.get("video"),
            )
        return data


class VideoNSAMultiModalProcessor(Qwen2_5_VLMultiModalProcessor):
    """vLLM's steps from a prompt with images and videos to tensors, with ours in their places."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM's, after all videos of the prompt were planned together and read.

        Raises:
            ValueError: as a call of the processor; or an option that it does not have.
        """
        with timing_ctx.record("read_videos"):
            self._check_places(inputs)
            options = self.info.video_options(inputs.hf_processor_mm_kwargs)
            items = inputs.mm_data_items.copy()
            uuids = dict(inputs.mm_uuid_items or {})
            # One name for a video would stand for whatever frames each prompt leaves it.
            uuids.pop("video", None)
            if items.get_count("video", strict=False):
                items["video"] = self.read_videos(items["video"], options)
            inputs = dataclasses.replace(
                inputs, mm_data_items=items, mm_uuid_items=uuids, hf_processor_mm_kwargs={}, media_io_kwargs={}
            )
        return super().apply(inputs, timing_ctx)

    def _check_places(self, inputs: Any) -> None:
        """Raise ValueError unless the prompt has one place for each image and video: text can name their tokens, too.

        vLLM puts an item where it finds the first.
        """
        processor = self.info.get_hf_processor()
        for kind in ("image", "video"):
            places = inputs.prompt.count(getattr(processor, f"{kind}_token_id"))
            number = inputs.mm_data_items.get_count(kind, strict=False)
            if places != number:
                token = getattr(processor, f"{kind}_token")
                raise ValueError(f"the prompt has {places} {token}, and {number} {kind}s")

    def read_videos(self, videos: Any, options: Mapping[str, Any]) -> Any:
        """Items with the frames that the processor chooses, (T, 3, H, W) uint8, and their metadata."""
        files, metadata = [], []
        for index in range(len(videos)):
            item = videos.get(index)
            if item is None:
                raise ValueError(f"video {index + 1} was given by its uuid alone: VideoNSA needs the video")
            frames, known = item
            is_file = known.get(FILE_MARK, False)
            files.append(frames.tobytes() if is_file else frames)
            # vLLM's way to say that frames are all that there are, and not yet sampled.
            unsampled = {"frames_indices"} if known.get("do_sample_frames") else set()
            names = [name for name in _METADATA if name in known and name not in unsampled]
            metadata.append(None if is_file else {name: known[name] for name in names})
        planned = self.info.get_hf_processor()(
            videos=files, video_metadata=metadata, stream_videos=True, return_metadata=True, **options
        )
        read = [
            (_frames(stream), {name: getattr(known, name) for name in _METADATA})
            for stream, known in zip(planned["video_streams"], planned["video_metadata"], strict=True)
        ]
        return self.info.parse_mm_data({"video": read}, validate=False)["video"]

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Tensors of items that vLLM had not cached: images as they came, videos as `read_videos` left them."""
        processor, outputs = self.info.get_hf_processor(), BatchFeature()
        if hf_data.get("images"):
            outputs.update(processor(images=hf_data["images"], return_tensors="pt"))
        if hf_data.get("videos"):
            videos = hf_data["videos"]
            fixed = {"do_resize": False, "do_sample_frames": False}  # all of that was done when they were read,
            fixed["max_total_tokens"] = sum(frames.numel() for frames in videos)  # within their prompt's budget
            metadata = hf_data["video_metadata"]
            outputs.update(processor(videos=videos, video_metadata=metadata, return_tensors="pt", **fixed))
            # vLLM would round them as it does pixels, and positions with them.
            outputs["second_per_grid_ts"] = torch.as_tensor(outputs["second_per_grid_ts"], dtype=torch.float32)
        dtype = self.info.ctx.model_config.dtype
        for name in outputs.keys() & {"pixel_values", "pixel_values_videos"}:
            outputs[name] = outputs[name].to(dtype)
        return outputs


def _frames(stream: Any) -> torch.Tensor:
    """All frames of a `VideoStream`, resized while they are decoded: (T, 3, H, W) uint8."""
    plan = stream.plan
    frames = torch.empty(len(plan.frame_indices), 3, plan.height, plan.width, dtype=torch.uint8)
    done = 0
    for piece in stream.frames(BATCH):
        frames[done : done + len(piece)] = piece
        done += len(piece)
    return frames
