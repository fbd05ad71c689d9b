"""`lmms_eval --model videonsa`: lmms-eval's model interface over `inference.py`."""

import contextlib
import difflib
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

import baselines
from budget_videonsa import check_positive
from kv_budget_videonsa import budget_method
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

from .inference import Inference
from .prompts import GenerationSettings, Job, answer_in_rounds, plan_jobs, shared_part, to_messages

# Pixels of a frame that become one token (two frames share it).
PIXELS_PER_TOKEN = 28 * 28
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class VideoNSA(lmms):
    """A VideoNSA checkpoint as a chat model of lmms-eval.

    Requests about the same video are answered one after the other from one KV cache of it. The others are batched.
    Files are decoded in the background. A sample that fails raises: nothing is scored as an empty answer.

    Args (each can be given in `--model_args`):
        pretrained: checkpoint folder or Hub id.
        batch_size: prompts about different videos that are answered together.
        device: of the model; default: the process's GPU, else the CPU.
        device_map: of `from_pretrained`, such as "auto", in place of `device`; for one process only.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        attn_implementation: of the dense part: "sdpa", "eager", "flash_attention_2", ...
        trust_remote_code: run the code in the checkpoint instead of this installation's.
        block_size, block_counts, window_size, nsa_mode, nsa_backend: as in `VideoNSATextConfig`; default: the
            checkpoint's.
        fps, num_frames, max_num_frames, min_pixels, max_pixels, max_total_tokens: `fps`, `num_frames`, `max_frames`,
            `min_pixels_per_frame`, `max_pixels_per_frame` and `max_total_tokens` of `VideoNSAProcessor`; default: the
            checkpoint's.
        tokens_per_frame: both pixel limits at once, in the paper's measure: this many times 28 * 28 pixels. As two
            frames share their tokens, a prompt has half as many times its frames.
        system_prompt: text or file; default: the task's, else the chat template's.
        video_cache: answer requests about the same video from one KV cache. In float32 greedy answers are the same
            without. Has no effect where the checkpoint's `nsa_variant` is "released", which reads prompts whole.
        kv_budget, kv_method: of `model.read`: what the cache keeps of each prompt with images or videos, which are then
            read one at a time; default: everything.
        decode_workers: threads that read videos ahead, one batch each; 0 reads when the model waits for it.
        allow_text_only: accept prompts without image or video.
        method: one of `baselines`, such as "xattention", in the place of the model's own attention; its options are
            further arguments, `method=xattention,threshold=0.9` (`block_size` among them). `nsa_mode` is "dense" then,
            and every prompt is read whole, without `video_cache`.
        row, preset: notes of which row and column of the paper's main table this is, for the report.
    Raises:
        ValueError: an unknown argument, a wrong value, arguments that contradict each other, or a checkpoint that lacks
            weights (gates may be missing with `nsa_mode="dense"`, which does not use them).
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        block_size: int | None = None,
        block_counts: int | None = None,
        window_size: int | None = None,
        nsa_mode: str | None = None,
        nsa_backend: str | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        max_num_frames: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        tokens_per_frame: int | None = None,
        max_total_tokens: int | None = None,
        system_prompt: str | None = None,
        video_cache: bool = True,
        kv_budget: float | int | None = None,
        kv_method: str | None = None,
        decode_workers: int = 2,
        allow_text_only: bool = False,
        method: str | None = None,
        row: str | None = None,
        preset: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        method_options = {}
        if method is not None:
            method_options, unknown = unknown, {}
            if block_size is not None:
                method_options["block_size"], block_size = block_size, None
            baselines.check(method, **method_options)
            if nsa_mode not in (None, "dense"):
                raise ValueError(f"`method` = {method!r} runs in the place of dense attention, not of {nsa_mode=}")
            if attn_implementation is not None:
                raise ValueError(f"`attn_implementation` = {attn_implementation!r} contradicts `method` = {method!r}")
            if kv_budget is not None:
                raise ValueError(f"`kv_budget` = {kv_budget!r}: with `method` = {method!r}, prompts are read whole")
            nsa_mode = "dense"
        for name, value in unknown.items():
            close = difflib.get_close_matches(name, inspect.signature(VideoNSA).parameters, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`{name}` = {value!r} is not an argument of --model videonsa{hint}")
        if pretrained is None:
            raise ValueError("`pretrained` is missing: --model_args pretrained=FOLDER_OR_HUB_ID")
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        positive = {"batch_size": self.batch_size, "num_frames": num_frames, "max_num_frames": max_num_frames}
        positive |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "tokens_per_frame": tokens_per_frame}
        positive |= {"max_total_tokens": max_total_tokens}
        for name, value in positive.items():
            check_positive(name, value)
        check_positive("fps", fps, (int, float))
        for name, value in {
            "video_cache": video_cache,
            "allow_text_only": allow_text_only,
            "trust_remote_code": trust_remote_code,
        }.items():
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, got {value!r}")
        if not isinstance(decode_workers, int) or decode_workers < 0:
            raise ValueError(f"`decode_workers` must be a number of threads, 0 or more, got {decode_workers!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if fps is not None and num_frames is not None:
            raise ValueError(f"`fps` = {fps!r} and `num_frames` = {num_frames!r} exclude each other")
        if max_num_frames is not None and num_frames is not None:
            raise ValueError(f"`max_num_frames` = {max_num_frames!r} limits `fps`, not `num_frames` = {num_frames!r}")
        if device is not None and device_map is not None:
            raise ValueError(f"`device` = {device!r} and `device_map` = {device_map!r} exclude each other")
        reading = {"kv_budget": kv_budget, "kv_method": kv_method}
        reading = {name: value for name, value in reading.items() if value is not None}
        budget_method(kv_budget, kv_method, num_layers=1)  # contradictions are found before the model is loaded
        if kv_budget is not None and not video_cache:
            raise ValueError(f"`kv_budget` = {kv_budget!r} contradicts `video_cache` = False: it is of that cache")
        if tokens_per_frame is not None:
            if max_pixels is not None or min_pixels is not None:
                raise ValueError(f"`tokens_per_frame` = {tokens_per_frame} sets `min_pixels` and `max_pixels` itself")
            min_pixels = max_pixels = tokens_per_frame * PIXELS_PER_TOKEN

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device_map is not None and self._world_size > 1:
            raise ValueError(f"`device_map` = {device_map!r} is for one process; {self._world_size} share the work")
        is_plain = device in (None, "cuda") and torch.cuda.is_available()  # without a number: the process's own
        self.device = torch.device(device or "cpu") if not is_plain else self.accelerator.device

        settings = {
            "block_size": block_size,
            "block_counts": block_counts,
            "window_size": window_size,
            "nsa_mode": nsa_mode,
            "nsa_backend": nsa_backend,
            "attn_implementation": attn_implementation,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        if trust_remote_code:
            settings["trust_remote_code"] = True
        model_class = AutoModel if trust_remote_code else VideoNSAForConditionalGeneration
        self.model, loaded = model_class.from_pretrained(
            str(pretrained),
            dtype=dtype,
            device_map=device_map or {"": self.device},
            output_loading_info=True,
            **settings,
        )
        _check_nothing_is_missing(str(pretrained), loaded["missing_keys"], self.model.config.nsa_mode)
        self.model.eval()
        if method is not None:
            baselines.configure(self.model, method, **method_options)
        options = {
            "fps": fps,
            "num_frames": num_frames,
            "max_frames": max_num_frames,
            "min_pixels_per_frame": min_pixels,
            "max_pixels_per_frame": max_pixels,
            "max_total_tokens": max_total_tokens,
        }
        options = {name: value for name, value in options.items() if value is not None}
        processor_class = AutoProcessor if trust_remote_code else VideoNSAProcessor
        # False, not left out: transformers would stop and ask, for a configuration that it does not need.
        processor = processor_class.from_pretrained(str(pretrained), trust_remote_code=trust_remote_code)
        # Contradictions are found now, not at the first video.
        processor.plan_video(np.zeros((4, 56, 56, 3), np.uint8), **options)
        method_settings = None if method is None else {"method": method, **method_options}
        self.inference = Inference(self.model, processor, options, reading, method_settings)
        self.kv_budget = kv_budget
        if kv_budget is not None and self.inference.reads_prompts_whole:
            raise ValueError(f"`kv_budget` = {kv_budget!r}: with nsa_variant='released', prompts are read whole")
        self.system_prompt = None if system_prompt is None else self._resolve_system_prompt(str(system_prompt))
        # What the released variant, and most methods, compute of a video depends on the whole prompt.
        self.video_cache = video_cache and not self.inference.reads_prompts_whole
        self.decode_workers, self.allow_text_only = decode_workers, allow_text_only

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "VideoNSA":
        """From `--model_args`; a process that cannot load the model ends all."""
        with _all_processes_end_on_error():
            return super().create_from_arg_string(arg_string, additional_config)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer to each request, in their order."""
        with _all_processes_end_on_error():
            questions, settings = [], []
            for request in requests:
                doc_to_messages, gen_kwargs, *where = self._chat_request(request)
                settings.append(GenerationSettings.of_task(gen_kwargs))
                questions.append(self._question(doc_to_messages, *where, settings[-1]))

            def run(indices: Sequence[int], inputs: dict, types: Any) -> list[GenerationResult]:
                return self.inference.generate(inputs, settings[indices[0]], types)

            start = time.perf_counter()
            results = self._answer(questions, run)
            self._log_speed(results, time.perf_counter() - start)
            return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds for each request."""
        with _all_processes_end_on_error():
            results = []
            for request in tqdm(requests, disable=self.rank != 0, desc="Answering in rounds"):
                doc_to_messages, gen_kwargs, doc_id, task, split = self._chat_request(request)
                settings = GenerationSettings.of_task(gen_kwargs)

                def answer(raw: Any, settings=settings) -> str:
                    return self.inference.generate(self.inference.prepare([self._messages(raw)]), settings)[0].text

                with _named(task, doc_id):
                    results.append(answer_in_rounds(doc_to_messages, self.task_dict[task][split][doc_id], answer))
            return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each request how unlikely its continuation is as the beginning of the model's answer.

        Returns:
            pairs of the sum of the continuation's negative log-probabilities, without the end of the turn, and whether
            greedy decoding would give it, each as the `text` of a `GenerationResult`: lmms-eval 0.7 makes strings of
            plain pairs, which it cannot score then. It takes the choice with the smallest first number.
        """
        with _all_processes_end_on_error():
            questions, continuations = [], []
            for request in requests:
                context, continuation, *rest = request.args
                if callable(continuation):
                    raise ValueError("tasks of the output type 'loglikelihood' are not supported; 'multiple_choice' is")
                if rest:
                    doc_to_visual, *where = rest
                    questions.append(self._question(_user_turn(context, doc_to_visual), *where))
                else:  # the unconditional likelihood that the metric acc_mutual_info asks for
                    questions.append(_Question(_messages_of_text(context), request.task_name))
                # An answer does not begin with the blank that lmms-eval puts between question and choice.
                continuations.append(self.inference.tokenize(continuation.lstrip()))
                if not continuations[-1]:  # nothing would be the likeliest of all answers
                    raise ValueError(
                        f"{request.task_name}, document {request.doc_id}: the choice {continuation!r} is empty"
                    )

            def run(indices: Sequence[int], inputs: dict, types: Any) -> list[GenerationResult]:
                return self.inference.loss(inputs, [continuations[index] for index in indices], types)

            return self._answer(questions, run)

    def _answer(self, questions: Sequence["_Question"], run: Callable[[Sequence[int], dict, Any], list]) -> list:
        """Answer questions in whichever order is fastest; returns the answers in the order of the questions.

        Args:
            run: from the numbers of questions, their inputs, and the token types of what the only one is about, or
                `None` for a batch, to their answers.
        """
        shared, keys = self._what_they_share(questions), [question.batch_key for question in questions]
        jobs = plan_jobs(shared, keys, self.batch_size, read_all=self.kv_budget is not None)
        results = [None] * len(questions)
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Answering") as bar:
            for job, inputs in self._prepared(jobs, questions):
                if job.is_read:
                    reading = self.inference.read(questions[job.indices[0]].messages())
                    for index in job.indices:
                        with reading.prompt(questions[index].messages()) as inputs:
                            (results[index],) = run([index], inputs, reading.types)
                        bar.update()
                    del reading, inputs  # the next one's cache needs the room
                else:
                    for index, answer in zip(job.indices, run(job.indices, inputs, None), strict=True):
                        results[index] = answer
                    del inputs
                    bar.update(len(job.indices))
        return results

    def _what_they_share(self, questions: Sequence["_Question"]) -> list[tuple | None]:
        if self.kv_budget is not None:
            return [self._what_is_read(index, question) for index, question in enumerate(questions)]
        shared: list[tuple | None] = [None] * len(questions)
        without_files = set()  # tasks whose documents hold pictures, which are not loaded twice
        for index, question in enumerate(questions):
            if self.video_cache and question.may_share and question.task not in without_files:
                shared[index] = shared_part(question.messages())
                if shared[index] is None:
                    without_files.add(question.task)
        return shared

    def _what_is_read(self, index: int, question: "_Question") -> tuple | None:
        """What a question has in common with others, or itself alone; `None` for prompts of text."""
        messages = question.messages()
        if all(part["type"] == "text" for message in messages for part in message["content"]):
            return None
        if not question.may_share:
            raise ValueError(f"`kv_budget` = {self.kv_budget!r}: no answer with {question.batch_key} from a kept cache")
        return shared_part(messages) or ("alone", index)

    def _prepared(self, jobs: Sequence[Job], questions: Sequence["_Question"]) -> Iterator[tuple[Job, dict]]:
        """Jobs with what their prompts become, prepared ahead by `decode_workers` threads; nothing for readings."""

        def prepare(job: Job) -> dict:
            if job.is_read:
                return {}  # a reading decodes by itself, bit by bit
            return self.inference.prepare([questions[index].messages() for index in job.indices])

        if not self.decode_workers:
            yield from ((job, prepare(job)) for job in jobs)
            return
        pending: deque = deque()

        def oldest() -> tuple[Job, dict]:
            job, future = pending.popleft()
            return job, future.result()

        with ThreadPoolExecutor(self.decode_workers, thread_name_prefix="decode") as pool:
            try:
                for job in jobs:
                    pending.append((job, pool.submit(prepare, job)))
                    if len(pending) > self.decode_workers:
                        yield oldest()
                while pending:
                    yield oldest()
            finally:
                for _, future in pending:
                    future.cancel()

    def _question(
        self,
        doc_to_messages: Callable,
        doc_id: int,
        task: str,
        split: str,
        settings: GenerationSettings | None = None,
    ) -> "_Question":
        def messages() -> list[dict[str, Any]]:
            with _named(task, doc_id):
                return self._messages(doc_to_messages(self.task_dict[task][split][doc_id]))

        return _Question(messages, task, str(settings), settings is None or settings.may_continue_cache)

    def _messages(self, raw: Any) -> list[dict[str, Any]]:
        return to_messages(raw, system_prompt=self.system_prompt, allow_text_only=self.allow_text_only)

    def _chat_request(self, request: Instance) -> tuple:
        """(doc_to_messages, generation_kwargs, doc_id, task, split)"""
        return request.args[1:]

    def _log_speed(self, results: Sequence[GenerationResult], seconds: float) -> None:
        counts = [result.token_counts for result in results]
        generated = sum(count.output_tokens for count in counts)
        logged = {"total_requests": len(results)}
        for name in ("input_tokens", "vision_tokens", "attention_share"):
            values = [getattr(count, name) for count in counts]
            if None not in values:
                logged[name] = sum(values) / max(1, len(values))
        log_metrics(seconds, generated, generated / max(seconds, 1e-9), logged)

    def clean(self) -> None:
        """Free the model, as lmms-eval asks before it scores answers."""
        self.inference = None
        super().clean()


@dataclass(frozen=True)
class _Question:
    """What is asked of the model.

    Attributes:
        messages: makes the prompt; an error in it names the document.
        batch_key: equal for questions that can be answered in one batch.
        may_share: whether it may be answered from a KV cache of its video.
    """

    messages: Callable[[], list[dict[str, Any]]]
    task: str
    batch_key: str = ""
    may_share: bool = True


class VideoNSASimple(VideoNSA):
    """The same behind `--force_simple`, which lmms-eval needs for tasks of the type `multiple_choice`."""

    is_simple = True

    def _chat_request(self, request: Instance) -> tuple:
        context, gen_kwargs, doc_to_visual, doc_id, task, split = request.args
        return _user_turn(context, doc_to_visual), gen_kwargs, doc_id, task, split

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        raise ValueError("tasks with several rounds run without --force_simple")


def _user_turn(context: str, doc_to_visual: Callable) -> Callable[[Any], list[dict[str, Any]]]:
    """As lmms-eval makes messages out of visuals and a text."""
    return lambda doc: ConfigurableMessagesTask._build_user_turn(doc_to_visual(doc), context)


def _messages_of_text(text: str) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{"role": "user", "content": [{"type": "text", "text": text}]}]


def _check_nothing_is_missing(pretrained: str, missing: Iterable[str], nsa_mode: str) -> None:
    """transformers fills what a checkpoint lacks with new weights, and the scores would be those of no model."""
    names = sorted(name for name in missing if not (nsa_mode == "dense" and ".self_attn.g_proj_" in name))
    if names:
        raise ValueError(
            f"`pretrained` = {pretrained!r} lacks {len(names)} weights, such as {names[0]}; convert_weights.py adds "
            "gates to a Qwen2.5-VL checkpoint, and nsa_mode=dense does without them"
        )


@contextlib.contextmanager
def _all_processes_end_on_error() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        processes = PartialState()
        if processes.num_processes == 1:
            raise
        # lmms-eval catches exceptions and would leave the other processes waiting for this one.
        logger.exception(f"process {processes.process_index} failed")
        raise SystemExit(1) from error


@contextlib.contextmanager
def _named(task: str, doc_id: int) -> Iterator[None]:
    """Say which document an error is about."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{task}, document {doc_id}: {error}") from error
