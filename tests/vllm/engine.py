"""One engine of vLLM in a process of its own: answers cases of the reference, and writes what it said and did.

    python tests/vllm/engine.py TASK.json RESULT.json

The task has `model`, `engine` (arguments of `LLM`), `cases`, and `calls`: lists of numbers of cases, each of which is
one call of `LLM.chat`. The result has `answers`, in the order of the calls, and the plug-in's `counters`.
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
}


def main(task: dict) -> dict:
    from vllm import LLM, SamplingParams

    from videonsa_vllm.attention import COUNTERS

    engine = LLM(task["model"], **(DEFAULTS | task["engine"]))
    sampling = SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, logprobs=0)
    answers = []
    for numbers in task["calls"]:
        cases = [task["cases"][number] for number in numbers]
        options = [case.get("options", {}) for case in cases]
        if any(one != options[0] for one in options):
            raise ValueError(f"the options of a call are those of all its cases, got {options}")
        outputs = engine.chat(
            [[{"role": "user", "content": case["content"]}] for case in cases],
            sampling,
            use_tqdm=False,
            mm_processor_kwargs=options[0],
        )
        for number, output in zip(numbers, outputs, strict=True):
            (answer,) = output.outputs
            answers.append(
                {
                    "case": number,
                    "prompt": list(output.prompt_token_ids),
                    "tokens": list(answer.token_ids),
                    "logprobs": [
                        step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
                    ],
                    "cached": output.num_cached_tokens,
                }
            )
    return {"answers": answers, "counters": dataclasses.asdict(COUNTERS)}


if __name__ == "__main__":  # workers of tensor parallelism import this file
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
