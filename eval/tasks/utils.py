"""What the local benchmark's tasks share; `draw_benchmark.py` draws their data."""

from pathlib import Path

from synthetic.scenes import parse_answer

DATA = Path("eval/data")  # as in the tasks' `data_files`


def doc_to_visual(doc):
    path = DATA / doc["video"]
    if not path.is_file():
        raise ValueError(f"{path}: there is no such video; draw the benchmark: python -m videonsa_eval.draw_benchmark")
    return [str(path)]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def process_results(doc, results):
    answer = parse_answer(results[0], doc["choices"])
    return {"accuracy": float(answer == doc["answer"]), "parsed_answer": answer}
