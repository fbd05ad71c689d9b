"""What the local benchmark's tasks share; `draw_benchmark.py` draws their data."""

import re
from pathlib import Path

DATA = Path("eval/data")  # as in the tasks' `data_files`
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def doc_to_visual(doc):
    path = DATA / doc["video"]
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video; draw the benchmark: python -m videonsa_eval.draw_benchmark")
    return [str(path)]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def parse_answer(response, choices):
    """The choice that a response names first, as a word of its own; digits may be spelt out. "" if it names none."""
    words = re.findall(r"[a-z]+|\d+", response.lower())
    words = [str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word for word in words]
    return next((word for word in words if word in choices), "")


def process_results(doc, results):
    answer = parse_answer(results[0], doc["choices"])
    return {"accuracy": float(answer == doc["answer"]), "parsed_answer": answer}
