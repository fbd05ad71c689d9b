"""`lmms_eval --model videonsa`: the same answers however they are computed, and no wrong use goes unnoticed."""

import importlib.metadata
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, build_released
from eval_testing import TASKS, about, answers, draw, evaluate, make_model, request, save_checkpoint
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from PIL import Image
from tiny_random import save_tiny_qwen2_5_vl

from generation_videonsa import CACHE_NAME
from synthetic.scenes import KINDS
from videonsa_eval.lmms_videonsa import VideoNSA, VideoNSASimple
from videonsa_eval.prompts import GenerationSettings, Job, answer_in_rounds, plan_jobs, shared_part, to_messages

QUESTIONS = ("Which way does the ball move?", "How many stars are there?", "Which digit is shown twice?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def task_manager():
    return TaskManager("ERROR", include_path=str(TASKS), include_defaults=False, model_name="videonsa")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder that lmms-eval runs in."""
    with pytest.MonkeyPatch.context() as patch:
        folder = draw(tmp_path_factory.mktemp("drawn"))
        patch.chdir(folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def videos(drawn):
    return sorted((drawn / "eval" / "data" / "videos").glob("*.mp4"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return make_model(checkpoint)


@pytest.fixture(scope="module")
def expected(checkpoint, drawn, task_manager):
    """Answers to the local benchmark, one by one, without the video cache."""
    return answers(evaluate(make_model(checkpoint, video_cache=False), ["synthetic_videos"], task_manager))


def test_the_small_checkpoint_is_scored_right(drawn, task_manager):
    """Answers that are known to be right mostly are counted as such: chance is about 0.3."""
    results = evaluate(make_model(ROOT / "checkpoints" / "tiny", fps=2), ["synthetic_videos"], task_manager)
    scores = [sample["accuracy"] for samples in results["samples"].values() for sample in samples]
    assert len(scores) == 4 * len(KINDS)
    assert sum(scores) / len(scores) > 0.8


def texts(results) -> list[str]:
    return [result.text for result in results]


def test_lmms_eval_finds_the_model():
    entry_points = importlib.metadata.entry_points(group="lmms_eval.models")
    assert "videonsa" in {entry_point.name for entry_point in entry_points}
    assert get_model("videonsa") is VideoNSA
    assert get_model("videonsa", force_simple=True) is VideoNSASimple


@pytest.mark.parametrize(
    "arguments",
    [{}, {"video_cache": False, "batch_size": 4}, {"batch_size": 3, "decode_workers": 0}, {"trust_remote_code": True}],
    ids=str,
)
def test_answers_do_not_depend_on_batches_or_the_video_cache(checkpoint, expected, task_manager, arguments):
    results = evaluate(make_model(checkpoint, **arguments), ["synthetic_videos"], task_manager)
    assert answers(results) == expected
    assert len({answer for [answer], _ in expected.values()}) > len(expected) // 2  # the model is no constant
    counts = expected["synthetic_needle", 1][1][0]
    assert counts["vision_tokens"] == 32 // 2 * 4 < counts["input_tokens"] and counts["output_tokens"] == 16
    assert 0 < counts["attention_share"] < 1
    assert counts["attention"] == {"nsa_mode": "sparse", "block_size": 4, "block_counts": 2, "window_size": 5}
    assert results["configs"]["synthetic_needle"]["task"] == "synthetic_needle"


def test_each_video_is_read_once(model, videos, monkeypatch):
    opened, encoded = [], []
    processor = type(model.inference._processor)
    original = processor._open
    monkeypatch.setattr(
        processor, "_open", lambda self, request, *a: opened.append(request.video) or original(self, request, *a)
    )
    handle = model.model.model.visual.register_forward_pre_hook(lambda *_: encoded.append(1))
    requests = [request(model, about(video, question)) for question in QUESTIONS for video in videos[:2]]
    results = texts(model.generate_until(requests))
    handle.remove()
    assert sorted(opened) == [str(video) for video in videos[:2]] and len(encoded) == 2
    assert results == [model.generate_until([single])[0].text for single in requests]


def test_one_cache_is_held_at_a_time(model, videos, monkeypatch):
    read, caches, held = model.inference.read, [], []

    def watched(*arguments):
        held.append(sum(cache() is not None for cache in caches))
        video = read(*arguments)
        caches.append(weakref.ref(video.cache))
        return video

    monkeypatch.setattr(model.inference, "read", watched)
    model.generate_until([request(model, about(video, q)) for video in videos[:3] for q in QUESTIONS[:2]])
    assert held == [0, 0, 0]


def test_videos_are_decoded_while_the_model_works(model, videos, monkeypatch):
    """The second video is being read before the first is answered; the answers keep their order all the same."""
    second_is_read = threading.Event()
    prepare, generate = model.inference.prepare, model.inference.generate

    def watched(conversations):
        if any(part.get("video") == str(videos[1]) for part in conversations[0][0]["content"]):
            assert threading.current_thread() is not threading.main_thread()
            second_is_read.set()
        return prepare(conversations)

    def wait_and_generate(*arguments):
        assert second_is_read.wait(timeout=300)
        return generate(*arguments)

    requests = [request(model, about(video, QUESTIONS[0])) for video in videos[:3]]
    expected = texts(model.generate_until(requests))
    monkeypatch.setattr(model.inference, "prepare", watched)
    monkeypatch.setattr(model.inference, "generate", wait_and_generate)
    assert texts(model.generate_until(requests)) == expected


def test_multiple_choice_by_likelihood(checkpoint, drawn, task_manager):
    """The score of each choice is what the logits of the whole conversation say, with and without batches."""
    results = [
        evaluate(make_model(checkpoint, simple=True, **arguments), ["synthetic_likelihood"], task_manager, limit=8)
        for arguments in ({}, {"video_cache": False, "batch_size": 3})
    ]
    cached, batched = (
        [sample["filtered_resps"] for sample in run["samples"]["synthetic_likelihood"]] for run in results
    )
    sample = results[0]["samples"]["synthetic_likelihood"][2]
    model = make_model(checkpoint, simple=True)
    for choice, (loss, is_greedy), (other_loss, other_greedy) in zip(
        sample["doc"]["choices"], cached[2], batched[2], strict=True
    ):
        prompt = model.inference.prepare(
            [to_messages(about(drawn / "eval/data" / sample["doc"]["video"], sample["doc"]["question"]))]
        )
        ids = torch.tensor([model.inference.tokenize(choice)])
        added = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
        with torch.no_grad():
            logits = model.model(
                **prompt | {name: torch.cat([prompt[name], part], 1) for name, part in added.items()}
            ).logits
        chosen = logits.log_softmax(-1)[0, -ids.shape[1] - 1 : -1].gather(1, ids.T)
        assert loss == pytest.approx(-float(chosen.sum()), abs=1e-4) == pytest.approx(other_loss, abs=1e-4)
        assert is_greedy == other_greedy == bool((logits[0, -ids.shape[1] - 1 : -1].argmax(-1) == ids).all())
    best = [min(range(len(losses)), key=lambda i: losses[i][0]) for losses in cached]
    right = [
        s["doc"]["choices"][i] == s["target"]
        for s, i in zip(results[0]["samples"]["synthetic_likelihood"], best, strict=True)
    ]
    assert results[0]["results"]["synthetic_likelihood"]["acc,none"] == sum(right) / len(right)


def test_likelihood_without_a_prompt(checkpoint):
    """What lmms-eval asks for the metric acc_mutual_info: choices that were not asked for."""
    model = make_model(checkpoint, simple=True)
    metadata = {"task": "made_up", "doc_id": 0, "repeats": 1}
    requests = [Instance("loglikelihood", ("", choice), 0, metadata) for choice in ("red", "green")]
    (first, _), (second, _) = texts(model.loglikelihood(requests))
    assert first > 0 and second > 0 and first != second


@pytest.mark.parametrize("choice", ["", " "])
def test_an_empty_choice_is_not_the_best(checkpoint, choice):
    model = make_model(checkpoint, simple=True)
    asked = Instance("loglikelihood", ("", choice), 0, {"task": "made_up", "doc_id": 3, "repeats": 1})
    with pytest.raises(ValueError, match=r"made_up, document 3: the choice '.*' is empty"):
        model.loglikelihood([asked])


def test_an_answer_is_likely(model, checkpoint, videos):
    """Greedy answers are greedy, and no other continuation of one token is more likely than their first."""
    asked = request(model, about(videos[0], QUESTIONS[0]), max_new_tokens=1)
    answer = model.generate_until([asked])[0].text
    if not answer.strip() or "\N{REPLACEMENT CHARACTER}" in answer:
        pytest.fail(f"choose another question: {answer!r} is not text")
    scored = []
    for continuation in (answer, "@", "~"):
        arguments = (QUESTIONS[0], continuation, lambda doc: [str(videos[0])], 0, "made_up", "test")
        scored.append(Instance("loglikelihood", arguments, 0, {"task": "made_up", "doc_id": 0, "repeats": 1}))
    (loss, is_greedy), *others = texts(model.loglikelihood(scored))
    assert is_greedy and all(loss < other for other, _ in others) and not any(greedy for _, greedy in others)


def test_released_checkpoints_read_each_prompt_whole(videos, tmp_path):
    """Answers are those of the prompts alone, and likelihoods those of the decoding steps behind them."""
    model = make_model(save_checkpoint(tmp_path, build_released))
    asked = [request(model, about(videos[0], question), max_new_tokens=3) for question in QUESTIONS]
    found = model.generate_until(asked)
    for question, result in zip(QUESTIONS, found, strict=True):
        prompt = model.inference.prepare([to_messages(about(videos[0], question))])
        with torch.no_grad():
            rows = model.model.generate(**prompt, max_new_tokens=3, do_sample=False)
        length = prompt["input_ids"].shape[1]
        assert model.inference.own_processor.decode(rows[0, length:], skip_special_tokens=True) == result.text
        assert result.token_counts.attention_share is None  # what is counted is another variant's

    prompts = model.inference.prepare([to_messages(about(videos[0], question)) for question in QUESTIONS[:2]])
    choices = [[5, 6, 7], [8]]
    for (loss, _), choice, question in zip(
        texts(model.inference.loss(prompts, choices)), choices, QUESTIONS[:2], strict=True
    ):
        expected = 0.0
        with torch.no_grad():
            step = model.model(**model.inference.prepare([to_messages(about(videos[0], question))]), use_cache=True)
            for token in choice:
                expected -= float(step.logits[0, -1].log_softmax(-1)[token])
                step = model.model(input_ids=torch.tensor([[token]]), **{CACHE_NAME: step[CACHE_NAME]})
        assert loss == pytest.approx(expected, abs=1e-4)


def test_rounds(model, videos):
    """Each round gets the answers of those before; the task's word on what they were counts."""
    seen = []

    def doc_to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        seen.append((round_idx, previous_output, previous_round_info))
        if round_idx is None:
            return about(videos[0], QUESTIONS[0])
        if round_idx == 3:
            return None, True, [*previous_output[:2], "the end"], None
        return about(videos[round_idx], QUESTIONS[round_idx]), False, previous_output, {"round": round_idx}

    asked = request(model, None)
    arguments = (asked.args[0], doc_to_messages, *asked.args[2:])
    rounds = Instance("generate_until_multi_round", arguments, 0, asked.metadata)
    singles = [request(model, about(videos[i], QUESTIONS[i])) for i in range(3)]
    first, second, third = texts(model.generate_until(singles))
    assert model.generate_until_multi_round([rounds]) == [[first, second, "the end"]]
    assert seen == [
        (None, None, None),
        (1, [first], None),
        (2, [first, second], {"round": 1}),
        (3, [first, second, third], {"round": 2}),
    ]


def test_a_task_that_never_ends_its_rounds():
    def doc_to_messages(doc, **round_options):
        return ("again", False, None, None) if round_options else "first"

    with pytest.raises(ValueError, match="did not end after 5 rounds"):
        answer_in_rounds(doc_to_messages, {}, lambda raw: raw, most=5)


def test_images_videos_and_text_in_one_batch(checkpoint, videos):
    model = make_model(checkpoint, allow_text_only=True, batch_size=4)
    picture = Image.new("RGB", (60, 90), "teal")
    mixed = about(videos[0], "And the picture?")
    mixed[0]["content"].insert(1, {"type": "image", "url": picture})
    text = [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}]
    image = [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": "What colour?"}]}]
    requests = [request(model, raw) for raw in (about(videos[1], "How many?"), text, mixed, image)]
    batch = texts(model.generate_until(requests))
    assert batch == [model.generate_until([single])[0].text for single in requests]
    assert len(set(batch)) == 4


def test_system_prompt(checkpoint, model, videos, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("You are an expert.\n")
    by_file = make_model(checkpoint, system_prompt=file)
    requests = [request(by_file, about(videos[0], question)) for question in QUESTIONS]
    assert by_file.inference.render(by_file._messages(about(videos[0], "?"))).startswith(
        "<|im_start|>system\nYou are an expert.<|im_end|>\n"
    )
    by_task = [
        [{"role": "system", "content": [{"type": "text", "text": "You are an expert."}]}, *about(videos[0], q)]
        for q in QUESTIONS
    ]
    assert texts(by_file.generate_until(requests)) == texts(
        model.generate_until([request(model, raw) for raw in by_task])
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"max_frames": 8}, "`max_frames` = 8 is not an argument .* did you mean `max_num_frames`"),
        ({"batch_size": "auto"}, "`batch_size`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"fps": -1}, "`fps`"),
        ({"fps": 2, "num_frames": 4}, "`num_frames` = 4"),
        ({"max_num_frames": 2.5}, "`max_num_frames`"),
        ({"max_num_frames": 8, "num_frames": 4}, "`max_num_frames` = 8"),
        ({"device": "cpu", "device_map": "auto"}, "`device_map` = 'auto'"),
        ({"tokens_per_frame": 4, "max_pixels": 3136}, "`tokens_per_frame`"),
        ({"max_total_tokens": 0}, "`max_total_tokens`"),
        ({"min_pixels": 6272, "max_pixels": 3136}, "min_pixels"),
        ({"dtype": "fp32"}, "`dtype`"),
        ({"decode_workers": -1}, "`decode_workers`"),
        ({"video_cache": "yes"}, "`video_cache`"),
        ({"nsa_mode": "sparce"}, "`nsa_mode`"),
        ({"block_counts": 0}, "`block_counts`"),
        ({"attn_implementation": "flash"}, "flash"),
        ({"pretrained": None}, "`pretrained`"),
    ],
)
def test_wrong_arguments(checkpoint, arguments, name):
    with pytest.raises(ValueError, match=name):
        VideoNSA(**{"pretrained": checkpoint} | arguments)


def test_arguments_reach_model_and_processor(checkpoint, videos):
    model = make_model(
        checkpoint, block_counts=3, window_size=7, nsa_mode="dense", attn_implementation="eager", dtype="bfloat16"
    )
    config = model.model.config
    assert (config.block_counts, config.window_size, config.nsa_mode) == (3, 7, "dense")
    assert config.text_config._attn_implementation == "eager" and model.model.dtype == torch.bfloat16
    model = make_model(checkpoint, fps=2, max_num_frames=12, tokens_per_frame=16)
    inputs = model.inference.prepare([to_messages(about(videos[0], "?"))])
    assert inputs["video_grid_thw"].tolist() == [[6, 8, 8]]
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([16 / 6])


@pytest.mark.parametrize("fault", ["missing", "broken"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_sample_that_fails_raises(model, videos, tmp_path, fault, place):
    path = tmp_path / "video.mp4"
    if fault == "broken":
        path.write_bytes(videos[0].read_bytes()[:1000])
    requests = [request(model, about(video, QUESTIONS[0])) for video in videos]
    requests.insert(place, request(model, about(path, QUESTIONS[0])))
    with pytest.raises(ValueError, match=r"video\.mp4"):
        model.generate_until(requests)


def test_with_several_processes_a_failure_ends_all(model, monkeypatch):
    """lmms-eval catches exceptions; the launcher ends the other processes when one exits."""
    processes = SimpleNamespace(num_processes=2, process_index=1)
    monkeypatch.setattr("videonsa_eval.lmms_videonsa.PartialState", lambda: processes)
    with pytest.raises(SystemExit) as stopped:
        model.generate_until([request(model, about("missing.mp4", QUESTIONS[0]))])
    assert stopped.value.code == 1
    with pytest.raises(SystemExit) as stopped:
        VideoNSA.create_from_arg_string("pretrained=a,fpss=4")
    assert stopped.value.code == 1


def test_a_checkpoint_without_gates(videos, tmp_path):
    save_tiny_qwen2_5_vl(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 8 weights, such as .*g_proj_1.bias"):
        VideoNSA(pretrained=tmp_path)
    model = VideoNSA(pretrained=tmp_path, nsa_mode="dense", fps=1, tokens_per_frame=4)
    assert len(model.generate_until([request(model, about(videos[0], QUESTIONS[0]))])) == 1


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (None, "made_up, document 0: the prompt has neither image nor video"),
        ({"type": "audio", "url": "a.wav"}, "audio"),
        ({"type": "video", "url": "a.mp4", "start_time": 3.0}, "cut out of a video"),
        ({"type": "video", "url": {"url": "a.mp4", "video_start": 1}}, "cut out of a video"),
    ],
)
def test_prompts_that_cannot_be_asked(model, part, message):
    raw = [{"role": "user", "content": [*([part] if part else []), {"type": "text", "text": "?"}]}]
    with pytest.raises(RuntimeError, match=message):
        model.generate_until([request(model, raw)])


@pytest.mark.parametrize(
    ("given", "options", "until"),
    [
        ({}, {"max_new_tokens": 128, "do_sample": False}, ()),
        ({"until": ["\n\n"], "top_p": 1.0}, {"max_new_tokens": 128, "top_p": None}, ()),
        ({"until": ["\n\n", "ASSISTANT:"]}, {"max_new_tokens": 128}, ("\n\n", "ASSISTANT:")),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": True, "temperature": 0.7}, ()),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False, "temperature": None}, ()),
        ({"do_sample": True}, {"do_sample": True}, ()),
        ({"until": "."}, {}, (".",)),
        ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}, ()),
        ({"temperature": 0, "max_new_tokens": 3}, {"do_sample": False, "temperature": None, "max_new_tokens": 3}, ()),
        ({"image_aspect_ratio": "original", "num_beams": 2}, {"num_beams": 2}, ()),
    ],
)
def test_generation_settings(given, options, until):
    settings = GenerationSettings.of_task(given)
    assert settings.options.items() >= options.items() and settings.until == until
    assert settings.may_continue_cache == (given.get("num_beams", 1) == 1)


def test_answers_end_where_the_task_says():
    assert GenerationSettings({}, ("stop", ".")).finish("a. b stop c") == "a"


def test_unknown_generation_settings():
    with pytest.raises(ValueError, match="`max_new_token`=3"):
        GenerationSettings.of_task({"max_new_token": 3})


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}], ids=str)
def test_what_goes_without_the_video_cache(model, videos, settings):
    requests = [request(model, about(videos[0], question), **settings) for question in QUESTIONS]
    assert texts(model.generate_until(requests)) == [model.generate_until([single])[0].text for single in requests]


def test_what_is_answered_together():
    a, b = ("a",), ("b",)
    assert plan_jobs([a, None, b, a, None, None], ["x", "x", "x", "y", "y", "x"], 2) == [
        Job((0, 3), True),
        Job((1, 2), False),
        Job((4,), False),
        Job((5,), False),
    ]


def test_what_prompts_share():
    first, second = (to_messages(about("a.mp4", question)) for question in QUESTIONS[:2])
    assert shared_part(first) == shared_part(second) != shared_part(to_messages(about("b.mp4", QUESTIONS[0])))
    before = [{"role": "user", "content": [{"type": "text", "text": "Look:"}, *first[0]["content"]]}]
    assert shared_part(before) != shared_part(first)
    picture = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}, *first[0]["content"]]}
    ]
    assert shared_part(picture) is None
    assert shared_part([{"role": "user", "content": [{"type": "text", "text": "?"}]}]) is None
