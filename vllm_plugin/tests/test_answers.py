"""Every way in which vLLM can run a prompt gives the very tokens that transformers gives."""

import pytest

NUM_LAYERS = 4
CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 8}
# name: checkpoint, whether the cases of a call are asked at once, how often all is asked, arguments of the engine
ENGINES = {
    "one by one": ("tiny", False, 1, {}),
    "batched": ("noisy", True, 1, {}),
    "chunked": ("noisy", True, 1, CHUNKS),
    "prefix caching": ("noisy", True, 2, CHUNKS | {"enable_prefix_caching": True}),
    "compiled": ("noisy", True, 1, {"enforce_eager": False}),
    "tensor parallel": ("noisy", True, 1, {"tensor_parallel_size": 2}),
}
DENSE = {"hf_overrides": {"text_config": {"nsa_mode": "dense"}}}


def calls_of(cases: list[dict], at_once: bool, times: int) -> list[list[int]]:
    """The cases one by one, or those without options of their own in one call."""
    numbers = range(len(cases))
    if not at_once:
        return [[number] for number in numbers] * times
    plain = [number for number in numbers if not cases[number].get("options")]
    return [plain, *([number] for number in numbers if number not in plain)] * times


@pytest.fixture(scope="module", params=ENGINES)
def run(request, reference, ask):
    checkpoint, at_once, times, engine = ENGINES[request.param]
    cases = reference.answers[checkpoint]
    return request.param, cases, ask(checkpoint, calls_of(cases, at_once, times), **engine)


def distance(ours: list[float], theirs: list[float]) -> float:
    """Of log-probabilities of the same tokens, the largest difference."""
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def rounding_of(cases: list[dict]) -> float:
    """How far float32 takes transformers from the truth, which is transformers in float64."""
    return max(distance(case["logprobs"], case["exact_logprobs"]) for case in cases)


def test_tokens_are_those_of_transformers(run):
    _, cases, result = run
    assert len(result["answers"]) >= len(cases)
    for answer in result["answers"]:
        case = cases[answer["case"]]
        assert answer["prompt"] == case["prompt"], case["name"]
        assert answer["tokens"] == case["tokens"], case["name"]


def test_probabilities_are_as_exact_as_those_of_transformers(run, record_property):
    """Both are in float32 and add up in different orders."""
    name, cases, result = run
    errors = [distance(answer["logprobs"], cases[answer["case"]]["exact_logprobs"]) for answer in result["answers"]]
    record_property(name, f"{max(errors):.2g}, transformers {rounding_of(cases):.2g}")  # docs/serving.md has them
    assert max(errors) <= 3 * rounding_of(cases)


def test_sparse_attention_is_what_ran(run):
    """Counted in every rank; where each prompt is a step of its own, every layer of every prompt with vision."""
    name, cases, result = run
    assert result["is_compiled"] == (name == "compiled")
    assert len(result["counters"]) == (2 if name == "tensor parallel" else 1)
    for counters in result["counters"]:
        assert counters["sparse"] >= NUM_LAYERS * 6 and counters["sparse"] % NUM_LAYERS == 0
        if name == "one by one":
            # The only prompt without images and videos has its answer alone.
            assert counters["sparse"] == NUM_LAYERS * (len(cases) - 1)
        is_cut = name in ("chunked", "prefix caching")
        assert (counters["cached"] > 0) == is_cut


def test_the_prefix_cache_is_what_answered(run):
    """Whole blocks of a prompt that was asked before are cached, if its last token is not in them."""
    name, cases, result = run
    is_cached = name == "prefix caching"
    assert len(result["answers"]) == len(cases) * (2 if is_cached else 1)
    for answer in result["answers"][-len(cases) :]:
        assert answer["cached"] == is_cached * ((len(answer["prompt"]) - 1) // 32 * 32)


def test_demo_answers(reference):
    """The reference itself: the checkpoint knows its video, and dense attention would say something else."""
    demo = [case for case in reference.answers["tiny"] if case["name"].startswith("demo")]
    assert len(demo) == 10
    assert all(case["text"] == case["answer"] for case in demo)
    assert sum(case["tokens"] != case["dense_tokens"] for case in demo) >= 5


@pytest.mark.parametrize("checkpoint", ["tiny", "noisy"])
def test_dense_attention_answers_otherwise(reference, ask, checkpoint):
    """vLLM's own attention under the same weights: transformers' dense answers, and not those of above, nor their
    probabilities."""
    cases = reference.answers[checkpoint]
    result = ask(checkpoint, calls_of(cases, at_once=True, times=1), **DENSE)
    assert result["counters"] == [{"dense": 0, "sparse": 0, "cached": 0}]
    assert all(answer["tokens"] == cases[answer["case"]]["dense_tokens"] for answer in result["answers"])
    for answer in result["answers"]:
        case = cases[answer["case"]]
        far = distance(answer["logprobs"], case["exact_logprobs"])
        # What is sparse is within three times the rounding.
        assert (far > 10 * rounding_of(cases)) == (case["name"] != "text"), case["name"]


def test_bfloat16(reference, ask):
    """Whose cache vLLM may lay out in another way: vision keys are read back from it, and the demo's answers right."""
    cases = reference.answers["tiny"]
    numbers = [number for number, case in enumerate(cases) if "answer" in case]
    result = ask("tiny", [numbers], dtype="bfloat16", **CHUNKS)
    assert result["counters"][0]["cached"] > 0
    assert [answer["tokens"][0] for answer in result["answers"]] == [cases[number]["tokens"][0] for number in numbers]


def test_one_token_at_a_time(reference, ask):
    """A chunk of one vision token is no generated token, though it comes like one."""
    cases = reference.answers["noisy"]
    calls = [reference.cases("noisy", name) for name in ("short video", "side by side")]
    settings = {"enable_chunked_prefill": True, "max_num_batched_tokens": 1, "max_num_seqs": 1}
    result = ask("noisy", calls, **settings)
    for answer in result["answers"]:
        assert answer["tokens"] == cases[answer["case"]]["tokens"]
    num_vision = sum(cases[number]["prompt"].count(411) for (number,) in calls)
    assert result["counters"][0]["sparse"] == NUM_LAYERS * num_vision


def test_preempted_requests(reference, ask):
    """A cache too small for its requests: some are thrown out and computed again, with what they had generated, a video
    token among it."""
    cases = reference.answers["noisy"]
    numbers = reference.cases("noisy", "generated video tokens") * 6
    length = len(cases[numbers[0]]["prompt"])
    blocks = 6 * (length // 32 + 1) + 2  # the first block is vLLM's own
    settings = CHUNKS | {"num_gpu_blocks_override": blocks, "max_model_len": 32 * (blocks - 1)}
    result = ask("noisy", [numbers], new_tokens=64, **settings)
    assert result["preemptions"] > 0
    undisturbed = ask("noisy", [numbers[:1]], new_tokens=64)
    assert undisturbed["preemptions"] == 0
    (expected,) = undisturbed["answers"]
    for answer in result["answers"]:
        assert answer["tokens"] == expected["tokens"]
        # Each is within three of the truth.
        assert distance(answer["logprobs"], expected["logprobs"]) <= 6 * rounding_of(cases)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("layer", "3 of 4 layers ran sparse attention"),
        ("cache", "what is read is not what was written"),
        ("embedding", "a step came without saying"),
    ],
)
def test_what_would_be_silent_is_an_error(reference, ask, sabotage, message):
    with pytest.raises(RuntimeError, match=message):
        ask("tiny", [reference.cases("tiny", "short video", "long")], sabotage=sabotage, **CHUNKS)
