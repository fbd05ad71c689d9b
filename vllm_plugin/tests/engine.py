"""One engine of vLLM in a process of its own: answers cases of the reference, and writes what it said and did.

    python vllm_plugin/tests/engine.py TASK.json RESULT.json

The task has `model`, `engine` (arguments of `LLM`), `cases`, and `calls`: lists of numbers of cases, each of which is
one call of `LLM.chat`. The result has `answers`, in the order of the calls, the plug-in's `counters` of every rank,
the number of `preemptions`, and `is_compiled`. With `sabotage`, something is broken first.
"""

import dataclasses
import json
import sys
from pathlib import Path

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 4096,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "limit_mm_per_prompt": {"image": 2, "video": 3},
    "skip_mm_profiling": True,
    "trust_remote_code": True,
    "allowed_local_media_path": "/",
    "disable_log_stats": False,
}


def main(task: dict) -> dict:
    from vllm import LLM

    if "sabotage" in task:
        SABOTAGE[task["sabotage"]]()
    engine = LLM(task["model"], **(DEFAULTS | task["engine"]))
    answers = []
    for numbers in task["calls"]:
        cases = [task["cases"][number] for number in numbers]
        options = [case.get("options", {}) for case in cases]
        if any(one != options[0] for one in options):
            raise ValueError(f"the options of a call are those of all its cases, got {options}")
        outputs = engine.chat(
            [[{"role": "user", "content": case["content"]}] for case in cases],
            [sampling(case, task["new_tokens"]) for case in cases],
            use_tqdm=False,
            mm_processor_kwargs=options[0],
        )
        answers += map(answer, numbers, outputs)
    preemptions = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
    return {
        "answers": answers,
        "counters": engine.collective_rpc(read_counters),
        "preemptions": sum(preemptions),
        "is_compiled": engine.llm_engine.vllm_config.compilation_config.mode != 0,
    }


def sampling(case: dict, new_tokens: int):
    from vllm import SamplingParams

    forced = case.get("forced")
    bias = None if forced is None else {forced: 100.0}  # log-probabilities are those without it
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, logit_bias=bias)


def answer(number: int, output) -> dict:
    (completion,) = output.outputs
    steps = zip(completion.logprobs, completion.token_ids, strict=True)
    return {
        "case": number,
        "prompt": list(output.prompt_token_ids),
        "tokens": list(completion.token_ids),
        "logprobs": [step[token].logprob for step, token in steps],
        "cached": output.num_cached_tokens,
    }


def read_counters(worker) -> dict:
    """What a rank has counted; called in its process."""
    from videonsa_vllm.attention import COUNTERS

    return dataclasses.asdict(COUNTERS)


def skip_a_layer() -> None:
    """One layer goes round the operator, as it would in a graph that was captured without vision tokens."""
    from videonsa_vllm import model

    def forward(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]

    class Dense(model.VideoNSAAttention):
        def __init__(self, dense, config, prefix):
            super().__init__(dense, config, prefix)
            if ".layers.1." in prefix:
                self.forward = forward.__get__(self)

    model.VideoNSAAttention = Dense


def swap_keys_and_values() -> None:
    """A cache that is laid out in another way than we think."""
    from videonsa_vllm import attention

    read = attention.CACHE_READERS["CPU_ATTN"]
    attention.CACHE_READERS["CPU_ATTN"] = lambda *arguments: read(*arguments)[::-1]


def forget_vision() -> None:
    """An engine that embeds images and videos without telling the model."""
    from videonsa_vllm.model import VideoNSAForConditionalGeneration as Model

    embed = Model.embed_input_ids

    def silent(self, *args, **kwargs):
        embedded = embed(self, *args, **kwargs)
        self.embedded = None
        return embedded

    Model.embed_input_ids = silent


SABOTAGE = {"layer": skip_a_layer, "cache": swap_keys_and_values, "embedding": forget_vision}


if __name__ == "__main__":  # workers of tensor parallelism import this file
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
