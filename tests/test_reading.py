"""Readings: the answers of a prompt read in chunks are those of the whole prompt, and nothing changes them unseen."""

import copy
import itertools
import json
import threading
from pathlib import Path

import av
import numpy as np
import peft
import pytest
import torch
from conftest import ROOT, build_released, noisy_checkpoint
from transformers import AutoModel, DynamicCache, GenerationConfig, QuantizedCache, TextIteratorStreamer

from cache_videonsa import RoomyCache
from generation_videonsa import CACHE_NAME
from kv_budget_videonsa import KV_METHODS
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor

TINY = ROOT / "checkpoints" / "tiny"
# Sums in another order, in float64; the logits are about 20.
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture(scope="module")
def processor():
    return VideoNSAProcessor.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture
def model():
    return noisy_checkpoint()


def frames(count: int, seed: int = 0, height: int = 56, width: int = 84) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def write_video(path: Path, pictures: np.ndarray, rate: int, gop: int = 12) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"g": str(gop), "bf": "0", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def video(count: int, seed: int = 0, **size: int) -> dict:
    return {"type": "video", "video": frames(count, seed, **size), "fps": 2}


def image(seed: int) -> dict:
    return {"type": "image", "image": frames(1, seed)[0]}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


PROMPTS = {
    "video": [video(41)],
    "text before": [text("Look: "), video(12)],
    "two videos": [video(8), text("and"), video(9, 1, height=84)],
    "side by side": [video(6), video(4, 1)],
    "images and videos": [image(2), video(10), text("so"), image(3), image(4)],
}


def user(parts: list[dict]) -> list[dict]:
    return [{"role": "user", "content": parts}]


def inputs_of(processor, messages: list[dict]) -> dict:
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options)


@torch.no_grad()
def logits_of(model, inputs) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1).logits[0, -1]


def asked_logits(reading, question=None) -> torch.Tensor:
    with reading.prompt(question) as inputs, torch.no_grad():
        new = inputs["input_ids"][:, inputs[CACHE_NAME].get_seq_length() :]
        return reading.model(**inputs | {"input_ids": new}, logits_to_keep=1).logits[0, -1]


def answer_of(model, processor, messages, new_tokens: int) -> tuple[int, ...]:
    inputs = inputs_of(processor, messages)
    rows = model.generate(**inputs, max_new_tokens=new_tokens)
    return tuple(rows[0, inputs["input_ids"].shape[1] :].tolist())


def assert_same_cache(one, other) -> None:
    assert torch.equal(one.ids, other.ids) and torch.equal(one.types, other.types)
    assert one.next_position == other.next_position
    for mine, theirs in zip(one.cache.layers, other.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, **CLOSE)
        torch.testing.assert_close(mine.values, theirs.values, **CLOSE)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS)
def test_answers_are_those_of_the_whole_prompt(model, processor, parts, mode):
    """Chunks of a block, of odd sizes, and of everything; asked twice, each question alone."""
    model.config.nsa_mode = mode
    questions = ["What is it?", "How many are there now?"]
    messages = [user([*parts, text(question)]) for question in questions]
    expected = [logits_of(model, inputs_of(processor, one)) for one in messages]
    answers = [answer_of(model, processor, one, 5) for one in messages]
    assert not torch.allclose(*expected)
    for chunk_tokens in (model.config.block_size, 7, 33, 10**6):
        reading = model.read(processor, messages[0], chunk_tokens=chunk_tokens)
        assert reading.num_tokens == reading.plan.tokens == reading.cache.get_seq_length()
        for question, logits, answer in [
            *zip(questions, expected, answers, strict=True),
            (None, expected[0], answers[0]),
        ]:
            torch.testing.assert_close(asked_logits(reading, question), logits, **CLOSE)
            assert reading.ask(question, max_new_tokens=5).token_ids == answer
        torch.testing.assert_close(asked_logits(reading, messages[1]), expected[1], **CLOSE)


def test_an_adapter_counts(model, processor):
    messages = user([*PROMPTS["two videos"], text("What is it?")])
    plain = logits_of(model, inputs_of(processor, messages))
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "g_proj_2"], init_lora_weights=False)
    whole = peft.get_peft_model(model, adapter).eval()
    expected, answer = logits_of(whole, inputs_of(processor, messages)), answer_of(whole, processor, messages, 5)
    assert not torch.allclose(plain, expected, **CLOSE)
    reading = whole.read(processor, messages, chunk_tokens=33)
    torch.testing.assert_close(asked_logits(reading), expected, **CLOSE)
    assert reading.ask(max_new_tokens=5).token_ids == answer


def test_eager_attention(model, processor):
    """transformers' function takes the softmax in float32: a reading is no further off than twice the whole prompt."""
    messages = user([*PROMPTS["two videos"], text("What is it?")])
    truth = logits_of(model, inputs_of(processor, messages))
    model.set_attn_implementation("eager")
    whole = (logits_of(model, inputs_of(processor, messages)) - truth).abs().max()
    reading = model.read(processor, messages, chunk_tokens=33)
    assert 0 < (asked_logits(reading) - truth).abs().max() <= 2 * whole


def test_bfloat16(model, processor):
    """A chunked reading is no further from float64 than twice what the whole prompt is in bfloat16."""
    messages = user([*PROMPTS["video"], text("What is it?")])
    half = copy.deepcopy(model).to(torch.bfloat16)
    model.load_state_dict(half.state_dict())  # the same numbers, in float64
    truth = logits_of(model, inputs_of(processor, messages))
    whole = (logits_of(half, inputs_of(processor, messages)).double() - truth).abs().max()
    reading = half.read(processor, messages, chunk_tokens=33)
    assert reading.cache.layers[0].keys.dtype == torch.bfloat16
    assert 0 < (asked_logits(reading).double() - truth).abs().max() <= 2 * whole


def test_answers_are_streamed(model, processor):
    """Token by token, the question left out; the joined text is the answer's."""
    reading = model.read(processor, user(PROMPTS["video"]))
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = reading.ask("What is it?", max_new_tokens=6, streamer=streamer)
    pieces = list(streamer)
    assert len(pieces) > 2 and "".join(pieces) == answer.text
    assert answer.token_ids == reading.ask("What is it?", max_new_tokens=6).token_ids


def test_a_conversation_goes_on(model, processor):
    """Kept turns are part of the prompt; others leave no trace; `forget` goes back."""
    reading = model.read(processor, user([video(20)]), chunk_tokens=16)
    first = reading.ask("First?", keep=True, max_new_tokens=4)
    reading.ask("Not kept", max_new_tokens=4)
    second = reading.ask("Second?", keep=True, max_new_tokens=4)
    said = [
        *user([video(20), text("First?")]),
        {"role": "assistant", "content": [text(first.text)]},
        *user([text("Second?")]),
    ]
    whole = inputs_of(processor, said)
    torch.testing.assert_close(logits_of(model, whole), asked_logits_of_second(model, processor, first), **CLOSE)
    assert second.token_ids == answer_of(model, processor, said, 4)
    reading.forget()
    assert reading.ask("First?", max_new_tokens=4).token_ids == first.token_ids
    reading.forget()  # nothing to forget


def asked_logits_of_second(model, processor, first) -> torch.Tensor:
    reading = model.read(processor, user([video(20)]), chunk_tokens=5)
    assert reading.ask("First?", keep=True, max_new_tokens=4).token_ids == first.token_ids
    return asked_logits(reading, "Second?")


@pytest.mark.parametrize("cuts", [(1,), (2,), (7,), (40,), (3, 4), (2, 20, 21)], ids=str)
def test_footage_that_arrives_later_continues_the_video(model, processor, cuts):
    """As if it had been there: also where a frame waits for the other of its step."""
    film = frames(41)
    whole = model.read(processor, user([{"type": "video", "video": film, "fps": 2}]))
    first, *more = np.split(film, cuts)
    reading = model.read(processor, user([{"type": "video", "video": first, "fps": 2}]), chunk_tokens=5)
    for part in more:
        reading.extend(part)
    assert_same_cache(reading, whole)
    assert reading.seconds == whole.seconds == 21
    assert reading.ask("What?", max_new_tokens=4).token_ids == whole.ask("What?", max_new_tokens=4).token_ids


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("first", [12, 13])
def test_footage_that_is_interrupted_can_be_completed(model, processor, first, chunks):
    """Whole steps stay; where not even one came, a frame that waited for its other waits on."""
    film = frames(40, height=112, width=112)  # 16 tokens for a step
    options = {"fps": 2, "max_pixels_per_frame": 112 * 112}
    reading = model.read(processor, film[:first], **options)
    with pytest.raises(StopError):
        reading.extend(film[first:], chunk_tokens=10, callback=stop_after(chunks, StopError))
    frames_read = first if chunks == 1 else 2 * reading.video.steps
    assert_same_cache(reading, model.read(processor, film[:frames_read], **options))
    reading.extend(film[frames_read:])
    assert_same_cache(reading, model.read(processor, film, **options))


def test_footage_comes_in_files_too(model, processor, tmp_path):
    for number, seed in enumerate((0, 1)):
        write_video(tmp_path / f"{number}.mp4", frames(16, seed, height=112, width=112), rate=4)
    reading = model.read(processor, tmp_path / "0.mp4", fps=2)
    reading.extend(tmp_path / "1.mp4")
    assert reading.video.steps == 8 and reading.seconds == 8
    assert reading.ask("What?", max_new_tokens=2).token_ids


def test_extend_refuses(model, processor):
    reading = model.read(processor, user([video(4), image(1)]))
    with pytest.raises(ValueError, match="ends with an image"):
        reading.extend(frames(4))
    reading = model.read(processor, user([video(4)]))
    reading.ask("Who?", keep=True, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"forget\(\)"):
        reading.extend(frames(4))
    before = reading.num_tokens
    reading.forget()
    with pytest.raises(ValueError, match="no such video file"):
        reading.extend("missing.mp4")
    assert reading.num_tokens < before
    reading.extend(frames(4))
    for value in (-5, 0, "a"):
        with pytest.raises(ValueError, match="`chunk_tokens`"):
            reading.extend(frames(4), chunk_tokens=value)
    with pytest.raises(ValueError, match="with do_normalize"):
        model.read(processor, user([video(4)]), do_normalize=False).extend(frames(4))


class StopError(Exception):
    pass


def stop_after(chunks: int, error: type[BaseException]):
    counter = itertools.count(1)

    def callback(progress):
        if next(counter) == chunks:
            raise error("enough")

    return callback


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopError])
def test_what_was_read_before_an_interruption_is_usable(model, processor, error):
    """Whole steps of the video stay, and can be continued."""
    film = frames(40, height=112, width=112)  # 16 tokens for a step
    options = {"fps": 2, "max_pixels_per_frame": 112 * 112}
    with pytest.raises(error) as caught:
        model.read(processor, film, chunk_tokens=12, callback=stop_after(7, error), **options)
    reading = caught.value.reading
    steps = (12 * 7 - int((reading.types == 0).sum())) // 16
    assert steps == 4
    expected = model.read(processor, film[: 2 * steps], **options)
    assert_same_cache(reading, expected)
    assert reading.ask("Well?", max_new_tokens=3).token_ids == expected.ask("Well?", max_new_tokens=3).token_ids
    reading.extend(film[2 * steps :])
    assert_same_cache(reading, model.read(processor, film, **options))


@pytest.mark.parametrize("make_cache", [None, DynamicCache], ids=str)
def test_an_interruption_inside_the_model_leaves_whole_chunks(model, processor, make_cache):
    """Some layers have the chunk in their cache, others do not: all give it back. The same while it answers."""
    calls = itertools.count(1)

    def interrupt(*_):
        if next(calls) == 2:
            raise KeyboardInterrupt

    layer = model.model.language_model.layers[2]
    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        model.read(processor, user([video(40)]), chunk_tokens=20, cache=make_cache and make_cache())
    handle.remove()
    reading = caught.value.reading
    assert {part.get_seq_length() for part in reading.cache.layers} == {reading.num_tokens}
    expected = model.read(processor, user([video(reading.video.steps * 2)]))
    assert_same_cache(reading, expected)
    calls = itertools.count(1)
    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        reading.ask("What?", keep=True, max_new_tokens=4)
    handle.remove()
    assert_same_cache(reading, expected)
    assert reading.ask("What?", max_new_tokens=4).token_ids == expected.ask("What?", max_new_tokens=4).token_ids


def test_an_interruption_before_the_first_frame_leaves_nothing(model, processor):
    messages = user([text("A long story. " * 9), video(4)])
    with pytest.raises(StopError) as caught:
        model.read(processor, messages, chunk_tokens=4, callback=stop_after(1, StopError))
    assert not hasattr(caught.value, "reading")


def test_an_image_that_was_read_in_part_is_dropped(model, processor):
    messages = user([video(8), text("between"), image(1)])
    chunks = model.plan_reading(processor, messages).tokens - 2
    with pytest.raises(StopError) as caught:
        model.read(processor, messages, chunk_tokens=1, callback=stop_after(chunks, StopError))
    expected = model.read(processor, user([video(8)]))
    assert caught.value.reading.text == expected.text
    assert_same_cache(caught.value.reading, expected)


def test_a_damaged_file_is_read_up_to_the_damage(model, processor, tmp_path):
    """Overwritten from its middle on: the error says where, and what came before answers."""
    path = tmp_path / "film.mp4"
    write_video(path, frames(64, height=112, width=112), rate=2, gop=4)
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half : half + len(data) // 4] = bytes(len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged at .*; read until second") as caught:
        model.read(processor, path, fps=2, chunk_tokens=16)
    reading = caught.value.reading
    assert 4 < reading.seconds < 24
    assert f"read until second {reading.seconds:.2f}" in str(caught.value)
    assert reading.ask("What?", max_new_tokens=2).token_ids


@pytest.mark.parametrize("method", KV_METHODS)
def test_budgets(model, processor, method, tmp_path):
    """The whole as budget changes nothing; a part is kept, is asked, is saved, and takes footage where it may."""
    film = frames(160)
    messages = user([{"type": "video", "video": film, "fps": 2}, text("What?")])
    whole = model.read(processor, messages, chunk_tokens=16, kv_budget=1.0, kv_method=method)
    torch.testing.assert_close(asked_logits(whole), logits_of(model, inputs_of(processor, messages)), **CLOSE)
    options = {"chunk_tokens": 16, "kv_budget": 100, "kv_method": method}
    plan = model.plan_reading(processor, messages, **options)
    reading = model.read(processor, messages, **options)
    lengths = [layer.get_seq_length() for layer in reading.cache.layers]
    assert sum(lengths) == 100 * len(lengths) and plan.kept_tokens == 100 and reading.num_tokens == plan.tokens
    answer = reading.ask(max_new_tokens=4)
    assert answer.token_ids == reading.ask(max_new_tokens=4).token_ids
    reading.ask("First?", keep=True, max_new_tokens=4)
    follow = reading.ask("And?", max_new_tokens=4)
    reading.save(tmp_path / "kept")
    loaded = model.load_reading(tmp_path / "kept", processor)
    assert loaded.ask("And?", max_new_tokens=4).token_ids == follow.token_ids
    loaded.forget()
    reading.forget()
    assert loaded.ask("What?", max_new_tokens=4).token_ids == answer.token_ids
    if reading.is_kept:
        with pytest.raises(ValueError, match=f"`kv_method` = '{method}' takes no new footage"):
            reading.extend(film[:4])
    else:
        for one in (reading, loaded):
            one.extend(film[:8])
        assert_same_cache(reading, loaded)
        assert {layer.get_seq_length() for layer in reading.cache.layers} == {100}


@pytest.mark.parametrize("saved", [False, True])
def test_an_interruption_of_a_budgeted_reading_leaves_whole_steps(model, processor, saved, tmp_path):
    """A frame that was read in part waits at the end of a compressed cache, where it is cut."""
    film = frames(120, height=112, width=112)  # 16 tokens for a step
    options = {"fps": 2, "max_pixels_per_frame": 112 * 112, "kv_budget": 200, "kv_method": "infinipot-v"}
    with pytest.raises(StopError) as caught:
        model.read(processor, film, chunk_tokens=10, callback=stop_after(40, StopError), **options)
    reading = caught.value.reading
    read = 2 * reading.video.steps
    assert 0 < read < len(film) and len(reading.frames) == read // 2 and reading.seconds == read / 2
    assert reading.num_tokens > len(reading.cache_types) == reading.cache.get_seq_length()
    if saved:
        reading.save(tmp_path / "kept")
        reading = model.load_reading(tmp_path / "kept", processor)
    reading.extend(film[read:], chunk_tokens=10)
    assert reading.num_tokens == model.plan_reading(processor, film, **options).tokens
    assert reading.ask("What?", max_new_tokens=2).token_ids


def test_an_image_read_in_part_into_a_compressed_cache_leaves_nothing(model, processor):
    messages = user([video(200), text("between"), image(1)])
    options = {"chunk_tokens": 1, "kv_budget": 100, "kv_method": "infinipot-v"}
    chunks = model.plan_reading(processor, messages, **options).tokens - 2
    with pytest.raises(StopError) as caught:
        model.read(processor, messages, callback=stop_after(chunks, StopError), **options)
    assert not hasattr(caught.value, "reading")


def test_one_method_never_holds_much_more_than_its_budget(model, processor):
    film, held = frames(400), []
    options = {"chunk_tokens": 16, "kv_budget": 100, "kv_method": "infinipot-v", "fps": 2}
    plan = model.plan_reading(processor, film, **options)
    handle = model.model.language_model.register_forward_hook(
        lambda module, args, output: held.append(output[CACHE_NAME].get_seq_length())
    )
    reading = model.read(processor, film, **options)
    handle.remove()
    assert plan.cached_tokens < plan.tokens / 3 and max(held) <= plan.cached_tokens
    assert reading.plan == plan


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chunk_tokens": 0}, "`chunk_tokens` must be a positive integer, got 0"),
        ({"chunk_tokens": 2.5}, "`chunk_tokens` must be a positive integer, got 2.5"),
        ({"kv_method": "snapkv"}, "`kv_method` = 'snapkv' needs a `kv_budget`"),
        ({"kv_budget": 1.5}, "`kv_budget` must be a share"),
        ({"kv_budget": 0.5, "kv_method": "best"}, "`kv_method` must be one of pyramidkv.*got 'best'"),
        ({"kv_budget": 3}, "`kv_budget` = 3 keeps 3 of"),
        ({"frames_per_second": 3}, "`frames_per_second`"),
        ({"cache": RoomyCache(4), "kv_budget": 0.5}, "`kv_budget` = 0.5 goes without `cache` = RoomyCache"),
    ],
    ids=str,
)
def test_bad_arguments(model, processor, options, error):
    with pytest.raises(ValueError, match=error):
        model.read(processor, user([video(80)]), **options)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (user([text("Hello")]), "neither image nor video"),
        ([{"role": "user", "content": "Hello"}], "neither image nor video"),
        ([user([video(4)]), user([video(4)])], "holds 2 conversations"),
        ("missing.mp4", "missing.mp4"),
    ],
    ids=["text", "a string", "two", "missing"],
)
def test_bad_prompts(model, processor, messages, error):
    with pytest.raises(ValueError, match=error):
        model.read(processor, messages)


def test_a_cache_that_is_used_or_fixed_is_refused(model, processor):
    cache = DynamicCache(config=model.config.text_config)
    model.read(processor, user([video(4)]), cache=cache)
    with pytest.raises(ValueError, match="`cache` must be empty"):
        model.read(processor, user([video(4)]), cache=cache)


@pytest.mark.parametrize("backend", ["fp8", "hqq", "quanto"])
def test_quantised_caches(processor, backend):
    """Answers are right, and the same when asked again: a question leaves no trace in a cache that cannot be cut."""
    needed = {"fp8": "transformers.cache_utils", "hqq": "hqq", "quanto": "optimum.quanto"}[backend]
    if not hasattr(pytest.importorskip(needed), "Fp8QuantizedLayer") and backend == "fp8":
        pytest.skip("this transformers has no fp8 cache")
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    options = {} if backend == "fp8" else {"nbits": 4, "q_group_size": 32, **axes}
    model = VideoNSAForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    cache = QuantizedCache(backend=backend, config=model.config.text_config, **options)
    reading = model.read(processor, ROOT / "demo" / "scene.mp4", chunk_tokens=64, cache=cache)
    assert reading.cache is cache
    questions = json.loads((ROOT / "demo" / "scene.json").read_text())
    first, second = ([reading.ask(asked["question"], max_new_tokens=4).text for asked in questions] for _ in range(2))
    assert first == second
    right = sum(answer.startswith(asked["answer"]) for answer, asked in zip(first, questions, strict=True))
    assert right >= len(questions) - 2, first
    reading.ask("What?", keep=True, max_new_tokens=4)
    reading.forget()
    assert reading.ask(questions[0]["question"], max_new_tokens=4).text == first[0]
    with pytest.raises(ValueError, match="`cache` = QuantizedCache cannot be saved"):
        reading.save("nowhere")


class NoStream:
    """A stream of a device that has none: what is put on it is done at once."""

    def __init__(self, *_):
        pass

    def wait_stream(self, *_):
        pass

    def __enter__(self):
        pass

    __exit__ = wait_stream


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_cache_that_is_offloaded(model, processor, device, monkeypatch):
    """transformers moves layers between the devices; without a GPU, the same steps move them nowhere."""
    if device == "cpu":
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", NoStream)
    messages = user([video(12), text("What?")])
    expected = model.read(processor, messages).ask(max_new_tokens=4).token_ids
    model.to(device)
    cache = DynamicCache(config=model.config.text_config, offloading=True)
    reading = model.read(processor, messages, chunk_tokens=16, cache=cache)
    for _ in range(2):  # a question leaves no trace
        assert reading.ask(max_new_tokens=4).token_ids == expected
    reading.extend(frames(4, 1))
    longer = {**video(0), "video": np.concatenate([frames(12), frames(4, 1)])}
    both = model.read(processor, user([longer]))
    assert reading.ask("And?", max_new_tokens=4).token_ids == both.ask("And?", max_new_tokens=4).token_ids


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"use_cache": False}, "use_cache"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams"),
        ({"past_key_values": None}, "past_key_values"),
    ],
    ids=str,
)
def test_ways_to_generate_that_do_not_go_on_from_a_cache_are_refused(model, processor, options, name):
    reading = model.read(processor, user([video(4)]))
    with pytest.raises(ValueError, match=f"`{name}`"):
        reading.ask("What?", **options)
    with pytest.raises(ValueError, match="`chat_template`"):
        model.read(processor, user([video(4)]), chat_template="{{ messages }}")


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.5}], ids=str)
def test_keywords_of_generate_mean_the_same(model, processor, options):
    messages = user([video(20), text("What?")])
    inputs = inputs_of(processor, messages)
    torch.manual_seed(0)
    expected = model.generate(**inputs, max_new_tokens=6, **options)[0, inputs["input_ids"].shape[1] :]
    torch.manual_seed(0)
    answer = model.read(processor, messages, chunk_tokens=16).ask(max_new_tokens=6, **options)
    assert answer.token_ids == tuple(expected.tolist())


def test_a_reading_leaves_the_number_of_threads(model, processor):
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        model.read(processor, user([video(4)]))
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_gradient_checkpointing_keeps_no_cache(model, processor):
    model.train()
    reading = model.read(processor, user([video(4)]))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for attempt in (lambda: model.read(processor, user([video(4)])), lambda: reading.ask("What?")):
        with pytest.raises(ValueError, match="gradient checkpointing"):
            attempt()
    model.eval()
    assert reading.ask("What?", max_new_tokens=2).token_ids


def test_messages_of_every_form(model, processor):
    parts = [video(6), text("What?")]
    expected = model.read(processor, user(parts))
    forms = (parts, parts[0], [user(parts)], np.array(user(parts), dtype=object), user(parts)[0], tuple(user(parts)))
    for form in forms:
        assert_same_cache(model.read(processor, form), expected)


def test_the_released_variant_is_refused(model, processor):
    with pytest.raises(ValueError, match="nsa_variant='released'"):
        build_released().read(processor, user([video(4)]))


def test_bad_questions(model, processor):
    reading = model.read(processor, user([video(4)]))
    for question, error in (
        (None, "`question` is missing"),
        ([], "`question` must be a text"),
        (3, "`question` must be a text"),
        ([video(4)], "`question` shows an image or a video"),
        ("Is <|video_pad|> it?", "`question` shows something new"),
        (user([text("No video")]), "neither image nor video"),
        (user([text("Other"), video(4), text("?")]), "does not begin with what was read"),
        (user([video(4, 1), text("?")]), "about other images or videos"),
    ):
        with pytest.raises(ValueError, match=error):
            reading.ask(question)
    for name in ("num_beams", "num_return_sequences"):
        with pytest.raises(ValueError, match=f"`{name}` = 2"):
            reading.ask("What?", **{name: 2})
    with pytest.raises(ValueError, match="max_position_embeddings"):
        reading.ask("a" * 140_000)
    with pytest.raises(ValueError, match="in use"):
        reading.ask("What?", streamer=Reentering(reading))
    assert reading.ask("What?", max_new_tokens=2).token_ids


class Reentering:
    def __init__(self, reading):
        self.reading = reading

    def put(self, value):
        self.reading.ask("And me?")

    def end(self):
        pass


def test_what_changes_after_the_reading_is_noticed(model, processor, tmp_path):
    reading = model.read(processor, user([video(4)]))
    before = reading.ask("What?", max_new_tokens=2)
    reading.save(tmp_path / "kept")
    model.config.text_config.rms_norm_eps *= 2
    with pytest.raises(ValueError, match=r"text_config\.rms_norm_eps"):
        reading.ask("What?")
    model.config.text_config.rms_norm_eps /= 2
    for name, value in (("block_counts", 1), ("nsa_mode", "dense"), ("window_size", 3)):
        old = getattr(model.config, name)
        setattr(model.config, name, value)
        for attempt in (lambda: reading.ask("What?"), lambda: model.load_reading(tmp_path / "kept", processor)):
            with pytest.raises(ValueError, match=f"{name}.*{value!r}"):
                attempt()
        setattr(model.config, name, old)
    model.config.nsa_backend = "reference"  # computes the same
    assert reading.ask("What?", max_new_tokens=2).token_ids == before.token_ids
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(1.5)
    with pytest.raises(ValueError, match="weights have changed"):
        reading.ask("What?")
    with pytest.raises(ValueError, match="other weights"):
        model.load_reading(tmp_path / "kept", processor)


def test_a_moved_model_is_noticed(model, processor):
    reading = model.read(processor, user([video(4)]))
    for layer in reading.cache.layers:  # as if the model had moved on
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    with pytest.raises(ValueError, match="layer 0 is on meta, and the model's on cpu"):
        reading.ask("What?")


def test_readings_are_kept_on_disk(model, processor, tmp_path):
    messages = user([image(1), video(9), text("What?")])
    reading = model.read(processor, messages)
    answer = reading.ask(max_new_tokens=4)
    reading.save(tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        *(f"layer_{index:03}.safetensors" for index in range(len(reading.cache.layers))),
        "reading.json",
        "tokens.safetensors",
    ]
    loaded = model.load_reading(tmp_path / "kept", messages_or_video=messages)
    assert loaded.ask(max_new_tokens=4).token_ids == answer.token_ids and loaded.plan == reading.plan
    for one in (reading, loaded):
        one.extend(frames(5, 7))
    assert_same_cache(reading, loaded)
    with pytest.raises(ValueError, match=r"`folder` .* exists"):
        reading.save(tmp_path / "kept")
    reading.save(tmp_path / "kept", overwrite=True)
    assert model.load_reading(tmp_path / "kept", processor).num_tokens == reading.num_tokens
    with pytest.raises(ValueError, match="image or video 1 is not what"):
        model.load_reading(tmp_path / "kept", processor, user([image(1), video(9, seed=5)]))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="exists; it holds no reading"):
        reading.save(tmp_path / "other", overwrite=True)


def test_a_copy_is_a_reading_of_its_own(model, processor):
    reading = model.read(processor, user([video(10)]))
    once = reading.ask("What?", max_new_tokens=4)
    copied = copy.deepcopy(reading)
    assert copied.model is model and copied.processor is processor
    copied.ask("And then?", keep=True, max_new_tokens=4)
    copied.forget()
    copied.extend(frames(6, 3))
    assert reading.ask("What?", max_new_tokens=4).token_ids == once.token_ids
    assert reading.num_tokens < copied.num_tokens
    both = model.read(processor, user([{**video(0), "video": np.concatenate([frames(10), frames(6, 3)])}]))
    assert copied.ask("What?", max_new_tokens=4).token_ids == both.ask("What?", max_new_tokens=4).token_ids


def test_damaged_folders_are_refused(model, processor, tmp_path):
    reading = model.read(processor, user([video(9)]))
    with pytest.raises(ValueError, match="holds no reading"):
        model.load_reading(tmp_path / "missing", processor)

    def damage(change) -> None:
        reading.save(tmp_path / "kept", overwrite=True)
        change(tmp_path / "kept")
        with pytest.raises(ValueError, match=r"`folder` .*kept"):
            model.load_reading(tmp_path / "kept", processor)

    for name in ("tokens.safetensors", "layer_000.safetensors", "layer_003.safetensors"):
        damage(lambda folder, name=name: (folder / name).unlink())
        damage(lambda folder, name=name: (folder / name).write_bytes(b"x" * 100))
    damage(lambda folder: (folder / "reading.json").write_text("{"))
    damage(lambda folder: (folder / "reading.json").write_text("[]"))
    damage(lambda folder: edit(folder, lambda content: content.pop("plan")))
    damage(lambda folder: edit(folder, lambda content: content.update(format=99)))
    damage(lambda folder: edit(folder, lambda content: content.update(settings=[])))
    damage(lambda folder: edit(folder, lambda content: content.update(frames=[[]])))
    damage(lambda folder: edit(folder, lambda content: content.update(next_position="5")))
    damage(lambda folder: edit(folder, lambda content: content["conversation"].pop("text")))
    damage(lambda folder: edit(folder, lambda content: content.update(method=["best", 1.0, False])))


def edit(folder, change) -> None:
    content = json.loads((folder / "reading.json").read_text())
    change(content)
    (folder / "reading.json").write_text(json.dumps(content))


def test_a_failed_save_leaves_the_old_one(model, processor, tmp_path, monkeypatch):
    reading = model.read(processor, user([video(9)]))
    reading.save(tmp_path / "kept")
    before = (tmp_path / "kept" / "reading.json").read_text()
    reading.media.append(object())  # no JSON
    with pytest.raises(TypeError):
        reading.save(tmp_path / "kept", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "reading.json").read_text() == before


def test_threads_are_answered_one_after_the_other(model, processor):
    readings = [model.read(processor, user([video(8, seed)])) for seed in range(2)]
    questions = ["What?", "Who is it?", "How many?"]
    pairs = [(reading, question) for reading in readings for question in questions] * 2
    expected = [reading.ask(question, max_new_tokens=6).token_ids for reading, question in pairs]
    got = [None] * len(pairs)

    def run(number: int) -> None:
        reading, question = pairs[number]
        got[number] = reading.ask(question, max_new_tokens=6).token_ids

    assert expected[:3] != expected[3:6] and len(set(expected)) > 3  # a mix-up would be seen
    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(pairs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_progress(model, processor, capsys):
    seen = []
    reading = model.read(processor, user([video(41)]), chunk_tokens=16, callback=seen.append)
    assert [one.tokens for one in seen] == [*range(16, reading.num_tokens, 16), reading.num_tokens]
    assert seen[-1].frames == seen[-1].total_frames == 41 and seen[-1].remaining == 0
    assert all(one.remaining > 0 and one.total_tokens == reading.num_tokens for one in seen[:-1])
    assert "Reading" not in capsys.readouterr().err  # a bar appears after two seconds


def test_the_plan_tells_before_anything_is_decoded(model, processor, tmp_path, monkeypatch):
    write_video(tmp_path / "film.mp4", frames(64, height=112, width=112), rate=4)
    messages = user([{"type": "video", "video": str(tmp_path / "film.mp4")}, text("What?")])
    opened = model.plan_reading(processor, messages, fps=2)
    whole = inputs_of(processor, user([{"type": "video", "video": str(tmp_path / "film.mp4"), "fps": 2}]))
    assert opened.vision_tokens == int((whole["mm_token_type_ids"] != 0).sum()) and opened.seconds == 16
    assert opened.attention_share < 1 and opened.kept_tokens == opened.tokens
    reading = model.read(processor, messages, fps=2)
    assert reading.plan == opened and "tokens" in str(opened)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in reading.cache.layers) * 8
    assert opened.memory.cache == held
    model.config.nsa_mode = "dense"
    assert model.plan_reading(processor, messages, fps=2).attention_share == 1


def test_it_comes_with_remote_code():
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True, dtype=torch.float32)
    questions = json.loads((ROOT / "demo" / "scene.json").read_text())
    processor = VideoNSAProcessor.from_pretrained(TINY, trust_remote_code=True)
    reading = model.read(processor, ROOT / "demo" / "scene.mp4")
    answers = [reading.ask(asked["question"], max_new_tokens=8).text for asked in questions]
    right = sum(answer.startswith(asked["answer"]) for answer, asked in zip(answers, questions, strict=True))
    assert right >= len(questions) - 1, answers
