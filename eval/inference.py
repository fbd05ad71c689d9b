"""Answers to prompts: batches of them, or one after the other about the same video, which is then read once."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from transformers import DynamicCache

from generation_videonsa import CACHE_NAME
from nsa_kernels.attention_budget import attention_budget

from .prompts import GenerationSettings

Messages = list[dict[str, Any]]

_PIXELS = ("pixel_values", "pixel_values_videos")
ATTENTION_SETTINGS = ("nsa_mode", "block_size", "block_counts", "window_size")


@dataclass
class PromptTokenCounts(TokenCounts):
    """lmms-eval's counts, which it logs with every sample, and what the reports need beside them.

    Attributes:
        vision_tokens: image and video tokens of the prompt.
        attention_share: pairs of query and key that the prompt costs, as a share of dense causal attention's; `None`
            for the variant "released", whose pairs are not counted.
        attention: the model's settings, by name (`ATTENTION_SETTINGS`).
    """

    vision_tokens: int | None = None
    attention_share: float | None = None
    attention: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("vision_tokens", "attention_share", "attention")}
        return {**super().to_dict(), **own}


@dataclass
class ReadVideo:
    """Prompts up to their last image or video, read by the model once for all of them.

    Attributes:
        text: of the prompt, before placeholders are repeated.
        inputs: `input_ids`, `attention_mask`, `mm_token_type_ids` (1, length), grids and timing.
        cache: keys and values of these tokens.
    """

    text: str
    inputs: dict[str, torch.Tensor]
    cache: DynamicCache

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]


class Inference:
    """A model and its processor.

    Args:
        video_options: keywords of `processor.apply_chat_template` for every prompt.
    """

    def __init__(self, model, processor, video_options: dict[str, Any]):
        self.model, self._processor, self.video_options = model, processor, video_options
        processor.tokenizer.padding_side = "left"
        self.vision_end = processor.tokenizer.convert_ids_to_tokens(model.config.vision_end_token_id)
        self._own, self._copying = threading.local(), threading.Lock()

    def prepare(self, conversations: Sequence[Messages]) -> dict[str, torch.Tensor]:
        """Read images and videos; safe to call from several threads.

        Returns:
            what `model.generate` takes for this batch, on the CPU.
        """
        return dict(
            self.own_processor.apply_chat_template(
                list(conversations),
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
                **self.video_options,
            )
        )

    def render(self, messages: Messages) -> str:
        """The text of a prompt with one placeholder for each image or video."""
        return self.own_processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a piece of a prompt."""
        return self.own_processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def own_processor(self):
        """This thread's copy of the processor: fast tokenizers do not bear use by two threads at a time."""
        if not hasattr(self._own, "processor"):
            with self._copying:
                self._own.processor = copy.deepcopy(self._processor)
        return self._own.processor

    @property
    def reads_prompts_whole(self) -> bool:
        """Whether a prompt with media may not be split, nor anything be added to it, without changing what it means."""
        return self.model.config.nsa_variant == "released" and self.model.config.nsa_mode == "sparse"

    @torch.inference_mode()
    def generate(
        self, inputs: dict[str, torch.Tensor], settings: GenerationSettings, cache: DynamicCache | None = None
    ) -> list[GenerationResult]:
        """Answer a batch of prompts, or one prompt whose beginning is in `cache`."""
        tokenizer = self.own_processor.tokenizer
        inputs = self._to_device(inputs)
        options = settings.options if cache is None else settings.options | {CACHE_NAME: cache}
        rows = self.model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **options)
        answers = rows[:, inputs["input_ids"].shape[1] :]
        several = len(rows) // len(inputs["input_ids"])  # num_return_sequences; the first counts
        texts = tokenizer.batch_decode(answers[::several], skip_special_tokens=True)
        counts = self._count(inputs, (answers[::several] != tokenizer.pad_token_id).sum(1).tolist())
        return [GenerationResult(settings.finish(text), count) for text, count in zip(texts, counts, strict=True)]

    @torch.inference_mode()
    def loss(
        self, inputs: dict[str, torch.Tensor], continuations: Sequence[list[int]], cache: DynamicCache | None = None
    ) -> list[GenerationResult]:
        """How unlikely continuations of a batch of prompts are.

        Args:
            continuations: token ids for each prompt, at least one.
            cache: holds the beginning of the only prompt.
        Returns:
            for each, as its `text`, the sum of its tokens' negative log-probabilities, and whether greedy decoding
            would give it.
        """
        inputs = self._to_device(inputs)
        counts = self._count(inputs, [0] * len(continuations))
        before = []
        if cache is None and self.reads_prompts_whole:
            prompt = self.model(**inputs, use_cache=True, logits_to_keep=1)
            cache, before = prompt[CACHE_NAME], [prompt.logits]
        device, prompts = inputs["input_ids"].device, len(continuations)
        most = max(map(len, continuations))
        ids = torch.zeros(prompts, most, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, continuation in enumerate(continuations):
            ids[row, : len(continuation)] = torch.tensor(continuation, device=device)
            mask[row, : len(continuation)] = 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"])], 1)
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, most))
        if cache is not None:
            # The media are in the cache, and positions continue from there.
            new = inputs["input_ids"][:, cache.get_seq_length() :]
            inputs = {"input_ids": new, "attention_mask": inputs["attention_mask"], CACHE_NAME: cache}
        keep = most + 1 - len(before)
        after = self.model(**inputs, use_cache=cache is not None, logits_to_keep=keep).logits
        logits = torch.cat([*before, after], 1)[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # [prompts, most]
        is_greedy = (logits.argmax(-1) == ids) | (mask == 0)
        losses = -(chosen * mask).sum(1)
        pairs = zip(losses.tolist(), is_greedy.all(1).tolist(), strict=True)
        return [GenerationResult(pair, count) for pair, count in zip(pairs, counts, strict=True)]

    @torch.inference_mode()
    def read(self, messages: Messages, inputs: dict[str, torch.Tensor]) -> ReadVideo:
        """Let the model read a prompt up to its last image or video.

        Args:
            inputs: of the whole prompt, a batch of one.
        """
        types = inputs["mm_token_type_ids"][0]
        length = int(types.nonzero()[-1]) + 2  # with the token that ends the media
        text = self.render(messages)
        num_media = sum(part["type"] != "text" for message in messages for part in message["content"])
        is_ended = int(inputs["input_ids"][0, length - 1]) == self.model.config.vision_end_token_id
        if not is_ended or text.count(self.vision_end) != num_media:
            raise ValueError(f"`video_cache`=True needs one {self.vision_end} behind each image or video: {text!r}")

        start = {
            name: value[:, :length] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else value
            for name, value in self._to_device(inputs).items()
        }
        cache = DynamicCache(config=self.model.config.text_config)
        self.model(**start, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        kept = {name: value for name, value in start.items() if name not in _PIXELS}
        end = text.rindex(self.vision_end) + len(self.vision_end)
        return ReadVideo(text[:end], kept, cache)

    def follow(self, video: ReadVideo, messages: Messages) -> dict[str, torch.Tensor]:
        """Inputs of another prompt about the same media, whose files are not opened again.

        Raises:
            ValueError: the prompt does not begin like the one that was read.
        """
        text = self.render(messages)
        if not text.startswith(video.text):
            raise ValueError(f"the prompt {text!r} does not begin with {video.text!r}")
        # A special token ends the first part, so that the rest is tokenised as it would be in place.
        rest = torch.tensor([self.tokenize(text[len(video.text) :])], device=video.inputs["input_ids"].device)
        added = {
            "input_ids": rest,
            "attention_mask": torch.ones_like(rest),
            "mm_token_type_ids": torch.zeros_like(rest),
        }
        return video.inputs | {
            name: torch.cat([video.inputs[name], value.to(video.inputs[name])], 1) for name, value in added.items()
        }

    @staticmethod
    def rewind(video: ReadVideo) -> None:
        """Forget what came after the media."""
        added = video.cache.get_seq_length() - video.length
        if added:  # what `crop(0)` means depends on the version of transformers
            video.cache.crop(-added)

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def _count(self, inputs: dict[str, torch.Tensor], num_generated: list[int]) -> list[PromptTokenCounts]:
        settings = {name: getattr(self.model.config, name) for name in ATTENTION_SETTINGS}
        sizes = {name: value for name, value in settings.items() if name != "nsa_mode"}
        counts = []
        for row, generated in enumerate(num_generated):
            types = inputs["mm_token_type_ids"][row, inputs["attention_mask"][row].bool()].cpu()
            share = 1.0
            if settings["nsa_mode"] == "sparse":
                share = None if self.reads_prompts_whole else attention_budget(types, **sizes).fraction
            counts.append(PromptTokenCounts(len(types), generated, None, int((types != 0).sum()), share, settings))
        return counts
