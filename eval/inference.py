"""Answers to prompts: batches of them, or one after the other about the same media, which are then read once."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts

import baselines
from attention_budget_videonsa import attention_budget
from generation_videonsa import CACHE_NAME

from .prompts import GenerationSettings

Messages = list[dict[str, Any]]

ATTENTION_SETTINGS = ("nsa_mode", "block_size", "block_counts", "window_size")


@dataclass
class PromptTokenCounts(TokenCounts):
    """lmms-eval's counts, which it logs with every sample, and what the reports need beside them.

    Attributes:
        vision_tokens: image and video tokens of the prompt.
        attention_share: pairs of query and key that the prompt costs, as a share of dense causal attention's; `None`
            for the variant "released", whose pairs are not counted. With a method of `baselines`, what it took.
        attention: the model's settings, by name (`ATTENTION_SETTINGS`); with a method, that and its options.
    """

    vision_tokens: int | None = None
    attention_share: float | None = None
    attention: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("vision_tokens", "attention_share", "attention")}
        return {**super().to_dict(), **own}


class Inference:
    """A model and its processor.

    Args:
        video_options: keywords of `processor.apply_chat_template` for every prompt.
        reading_options: further keywords of `model.read`.
        method: the method of `baselines` that the model is configured with, and its options; `None` without.
    """

    def __init__(
        self,
        model,
        processor,
        video_options: dict[str, Any],
        reading_options: dict[str, Any] | None = None,
        method: dict[str, Any] | None = None,
    ):
        self.model, self._processor, self.method = model, processor, method
        self.video_options, self.reading_options = video_options, reading_options or {}
        processor.tokenizer.padding_side = "left"
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
        if self.method is not None:  # chooses by the whole prompt, and what follows it is no part of it
            return True
        return self.model.config.nsa_variant == "released" and self.model.config.nsa_mode == "sparse"

    @torch.inference_mode()
    def generate(
        self, inputs: dict[str, Any], settings: GenerationSettings, types: torch.Tensor | None = None
    ) -> list[GenerationResult]:
        """Answer a batch of prompts, or one prompt about what was read.

        Args:
            inputs: of `prepare`, or of `Reading.prompt`.
            types: token types of what was read.
        """
        tokenizer = self.own_processor.tokenizer
        inputs = self._to_device(inputs)
        types = self._types(inputs, types)
        baselines.reset_pairs(self.model)
        rows = self.model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **settings.options)
        answers = rows[:, inputs["input_ids"].shape[1] :]
        several = len(rows) // len(inputs["input_ids"])  # num_return_sequences; the first counts
        texts = tokenizer.batch_decode(answers[::several], skip_special_tokens=True)
        counts = self._count(types, (answers[::several] != tokenizer.pad_token_id).sum(1).tolist())
        return [GenerationResult(settings.finish(text), count) for text, count in zip(texts, counts, strict=True)]

    @torch.inference_mode()
    def loss(
        self, inputs: dict[str, Any], continuations: Sequence[list[int]], types: torch.Tensor | None = None
    ) -> list[GenerationResult]:
        """How unlikely continuations of a batch of prompts are.

        Args:
            inputs, types: as in `generate`.
            continuations: token ids for each prompt, at least one.
        Returns:
            for each, as its `text`, the sum of its tokens' negative log-probabilities, and whether greedy decoding
            would give it.
        """
        inputs = self._to_device(inputs)
        types = self._types(inputs, types)
        before, cache = [], inputs.get(CACHE_NAME)
        if cache is None and self.reads_prompts_whole:
            baselines.reset_pairs(self.model)
            prompt = self.model(**inputs, use_cache=True, logits_to_keep=1)
            cache, before = prompt[CACHE_NAME], [prompt.logits]
        counts = self._count(types, [0] * len(continuations))
        device, prompts = inputs["input_ids"].device, len(continuations)
        most = max(map(len, continuations))
        ids = torch.zeros(prompts, most, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, continuation in enumerate(continuations):
            ids[row, : len(continuation)] = torch.tensor(continuation, device=device)
            mask[row, : len(continuation)] = 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.to(inputs["attention_mask"])], 1)
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, most))
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

    def read(self, messages: Messages):
        """Let the model read a prompt up to its last image or video: a `Reading`, to be asked `messages` and others."""
        options = self.video_options | self.reading_options
        return self.model.read(self.own_processor, messages, progress=False, **options)

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    @staticmethod
    def _types(inputs: dict[str, Any], read: torch.Tensor | None) -> list[torch.Tensor]:
        """Token types of each prompt, without padding; read: those of what is in the cache."""
        if read is None:
            masks = inputs["attention_mask"].bool().cpu()
            return [row[mask] for row, mask in zip(inputs["mm_token_type_ids"].cpu(), masks, strict=True)]
        asked = inputs["input_ids"].shape[1] - inputs[CACHE_NAME].get_seq_length()
        return [torch.nn.functional.pad(read, (0, asked))]

    def _count(self, types: Sequence[torch.Tensor], num_generated: Sequence[int]) -> list[PromptTokenCounts]:
        if self.method is not None:
            return self._count_of_method(types, num_generated)
        settings = {name: getattr(self.model.config, name) for name in ATTENTION_SETTINGS}
        sizes = {name: value for name, value in settings.items() if name != "nsa_mode"}
        counts = []
        for row, generated in zip(types, num_generated, strict=True):
            share = 1.0
            if settings["nsa_mode"] == "sparse":
                share = None if self.reads_prompts_whole else attention_budget(row, **sizes).fraction
            counts.append(PromptTokenCounts(len(row), generated, None, int((row != 0).sum()), share, settings))
        return counts

    def _count_of_method(self, types, num_generated) -> list[PromptTokenCounts]:
        """With the pairs since `reset_pairs`, of which generation with several rows a prompt has several a prompt."""
        pairs, settings = baselines.pairs_by_sample(self.model), {"nsa_mode": "dense", **self.method}
        every = max(1, len(pairs) // max(1, len(types)))
        counts = []
        for row, generated, taken in zip(types, num_generated, pairs[::every], strict=True):
            share = taken.fraction
            counts.append(PromptTokenCounts(len(row), generated, None, int((row != 0).sum()), share, settings))
        return counts
