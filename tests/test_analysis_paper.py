"""The main table and the page: verdicts against results made by hand, intervals against what they promise."""

import json
import math

import numpy as np
import pytest

import baselines
from analysis import findings, main_table, paper
from analysis.figure import command, paired_difference, wilson, write
from videonsa_eval.draw_benchmark import draw_benchmark


def row(scores, videos, dense=None):
    """A row of a table of one kind of question."""
    low, high = wilson(sum(scores), len(scores))
    mean = {"share": sum(scores) / len(scores), "low": low, "high": high}
    of_row = {"scores": scores, "mean": mean, "attention": {"exact": 1.0}, "kinds": {"order": mean}, "cpu_seconds": 1.0}
    return of_row | {"difference": paired_difference(scores, dense or scores, videos)}


def table(videonsa, baseline, dense, run_dense):
    videos = [f"{number}.mp4" for number in range(len(dense))]
    named = {"dense": dense, "xattention": baseline, "VideoNSA": videonsa}
    named |= {"VideoNSA, static gates": baseline, "VideoNSA, run dense": run_dense}
    return {
        "questions": {"videos": videos, "kinds": ["order"] * len(dense)},
        "rows": {name: row(scores, videos, dense) for name, scores in named.items()},
    }


def scores(right, total=100):
    return [int(number < right) for number in range(total)]


@pytest.mark.parametrize(
    ("videonsa", "baseline", "dense", "verdict"),
    [
        (90, 60, 70, findings.SHOWS),
        (50, 80, 90, findings.CONTRARY),
        (90, 60, 90, findings.OPEN),
        (80, 60, 95, findings.CONTRARY),  # better than one, worse than the other
    ],
)
def test_the_comparison_wants_all(videonsa, baseline, dense, verdict):
    results = table(*map(scores, (videonsa, baseline, dense, 50)))
    assert findings.comparison(results).verdict == verdict


@pytest.mark.parametrize(("run_dense", "verdict"), [(95, "shows it"), (30, "shows the contrary"), (70, "cannot tell")])
def test_weights_run_densely(run_dense, verdict):
    assert findings.dense_weights(table(*map(scores, (90, 60, 70, run_dense)))).verdict == verdict


def test_all_branches_must_beat_every_part():
    def verdict(whole, part, static):
        named = {"as trained": whole, "compression": part, "selection + window": 0, "static gates": static, "none": 99}
        rows = {name: {"scores": scores(right)} for name, right in named.items()}
        return findings.together({"rows": rows, "questions": {"videos": list(range(100))}}).verdict

    assert verdict(90, 50, 60) == findings.SHOWS
    assert verdict(90, 50, 90) == findings.OPEN
    assert verdict(60, 90, 50) == findings.CONTRARY


@pytest.mark.parametrize(
    ("within", "beyond", "verdict"),
    [(99, 99, findings.SHOWS), (50, 80, findings.SHOWS), (90, 50, findings.CONTRARY), (90, 85, findings.OPEN)],
)
def test_scaling_is_what_is_kept_beyond_the_training(within, beyond, verdict):
    """Of 100 videos each; what the dense model does, decides nothing."""
    seconds, videos = [32] * 100 + [64] * 100, [f"{number}.mp4" for number in range(200)]
    named = {"sparse": scores(within) + scores(beyond), "trained dense": scores(10) + scores(99)}
    rows = {
        name: {
            "scores": of_row,
            "by_seconds": {
                "32": row(of_row[:100], videos[:100])["mean"],
                "64": row(of_row[100:], videos[100:])["mean"],
            },
        }
        for name, of_row in named.items()
    }
    results = {"questions": {"seconds": seconds, "videos": videos}, "cells": [{"rows": rows}]}
    assert findings.scaling(results, 32).verdict == verdict


def test_an_allocation_must_beat_all_others_of_its_budget():
    videos = [f"{number}.mp4" for number in range(100)]

    def verdict(*right):
        splits = [
            {"block_counts": count, "window_size": 56 - 16 * count, "alpha": 0.5} | row(scores(share), videos)
            for count, share in enumerate(right, 1)
        ]
        results = {"questions": {"videos": videos}, "budgets": [{"budget": 56, "splits": splits}]}
        return findings.allocation(results | {"trained": {"block_counts": 2, "window_size": 24}}).verdict

    assert verdict(60, 90, 70) == findings.SHOWS
    assert verdict(60, 90) == findings.OPEN, "two splits have no optimum between them"
    assert verdict(90, 60, 50) == findings.CONTRARY
    assert verdict(90, 90, 50) == findings.OPEN


def test_sinks_need_fewer_than_dense_and_the_papers_order():
    def verdict(compression, selection, window, everything, dense):
        shares = {
            "compression": compression,
            "selection": selection,
            "window": window,
            "all": everything,
            "dense": dense,
        }
        total = {branch: {"sum": {"sinks": share}, "mean": {"sinks": share}} for branch, share in shares.items()}
        prompts = {
            branch: {name: [share, share] if share is None else [share * 0.9, share * 1.1] for name in ("sum", "mean")}
            for branch, share in shares.items()
        }
        return findings.sinks({"total": total, "prompts": prompts, "videos": ["a", "b"]}).verdict

    assert verdict(0.012, 0.001, 0.003, 0.003, 0.02) == findings.SHOWS
    assert verdict(0.001, 0.012, 0.003, 0.003, 0.02) == findings.OPEN
    assert verdict(0.012, 0.001, 0.003, 0.02, 0.003) == findings.CONTRARY
    assert verdict(0.012, 0.001, 0.003, 0.003, 0.003) == findings.OPEN
    assert verdict(None, 0.001, 0.003, 0.003, 0.02) == findings.OPEN


def draw_losses(rng, depends: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 20 videos with a question of each of five kinds, whose chances to be guessed differ."""
    kinds, videos = np.tile(np.arange(5), 20), np.repeat(np.arange(20), 5)
    missed = rng.random((100, 3)) < (0.9 - 0.15 * kinds)[:, None]  # without a branch, none is known: kinds are guessed
    return (missed & (np.arange(3) == kinds[:, None] % 3) if depends else missed).astype(float), kinds, videos


def test_interaction_is_found_and_kinds_that_are_harder_to_guess_are_none():
    """Of level 5 %: 2 false alarms in 40 on average; more than 9 have a chance under 1 in 10,000 (binomial)."""
    rng, before = np.random.default_rng(0), findings.PERMUTATIONS
    findings.PERMUTATIONS = 199
    try:
        assert findings.interaction(*draw_losses(rng, depends=True)) == 1 / 200
        alarms = sum(
            findings.interaction(*draw_losses(rng, depends=False), seed=number) <= 0.05 for number in range(40)
        )
    finally:
        findings.PERMUTATIONS = before
    assert alarms <= 9


def test_gates_by_depth_leave_the_last_layer_out():
    def verdict(selection, window):
        layers = [
            {"compression": {"mean": 0.5}, "selection": {"mean": a}, "window": {"mean": b}}
            for a, b in zip(selection, window, strict=True)
        ]
        return findings.by_depth({"all": layers}).verdict

    assert verdict([0.5, 0.4, 0.3, 0.9], [0.6, 0.5, 0.1, 0.9]) == findings.SHOWS
    assert verdict([0.3, 0.4, 0.5, 0.0], [0.1, 0.5, 0.6, 0.0]) == findings.CONTRARY
    assert verdict([0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]) == findings.OPEN


def test_the_slowest_branch_is_the_bottleneck():
    def verdict(compression, choice, selection, window):
        parts = {"compression": compression, "block choice": choice, "selection": selection, "window": window}
        longest = {name: {"seconds": value} for name, value in (parts | {"nsa": 1, "dense": 2}).items()}
        short = {name: {"seconds": 1.0} for name in longest}
        lengths = [longest | {"tokens": 4096}, short | {"tokens": 1024}]
        return findings.bottleneck({"threads": 1, "lengths": lengths}).verdict

    assert verdict(3, 2, 1, 1) == findings.SHOWS
    assert verdict(1, 1, 3, 0) == findings.CONTRARY
    assert verdict(2, 2, 3, 0) == findings.OPEN, "its scores are counted twice, or not at all"


def test_wilson_is_its_defining_equation():
    """Its ends are the shares p with |right / total - p| = z sqrt(p (1 - p) / total)."""
    for right, total in ((0, 10), (3, 10), (10, 10), (190, 400)):
        for end in wilson(right, total):
            distance = abs(right / total - end)
            assert math.isclose(distance, 1.96 * math.sqrt(end * (1 - end) / total), abs_tol=1e-12)
    with pytest.raises(ValueError, match="total"):
        wilson(0, 0)


def test_questions_of_one_video_count_once():
    """Ten copies of every question, of the same video, say no more than one does."""
    first, second = [1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0]
    once = paired_difference(first, second, range(6))
    again = paired_difference(np.repeat(first, 10), np.repeat(second, 10), np.repeat(range(6), 10))
    assert again == pytest.approx(once)
    values = np.subtract(first, second)
    assert once["high"] - once["mean"] == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(6))
    alone = paired_difference(first, second, ["one.mp4"] * 6)
    assert (alone["low"], alone["high"]) == (-1, 1), "of one video nothing is known"
    with pytest.raises(ValueError, match="one length"):
        paired_difference([1], [1, 0], [0])


def test_lists_of_numbers_are_one_line(tmp_path):
    record = {"a": [1, 2.5, None], "b": [{"c": [1, 2]}], "d": ["x", "y [1,\n 2]"], "e": []}
    write(record, tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text()
    assert json.loads(text) == record and '"a": [ 1, 2.5, null ]' in text


def test_options_are_those_of_the_methods_and_every_method_has_a_row():
    assert set(paper.METHODS) == set(baselines.METHODS)
    for name, options in paper.METHODS.items():
        baselines.check(name, **options)


def test_main_table_from_the_command_line(tmp_path):
    """Two methods, one of each family, on two videos; dense weights run densely are the dense row's own."""
    draw_benchmark(tmp_path / "data", lengths=(16,), videos=1, seed=3)
    (tmp_path / "methods.json").write_text(json.dumps({"xattention": paper.METHODS["xattention"], "fastv": {}}))
    arguments = ["checkpoints/tiny", "--config_args", "nsa_mode=dense", "--videonsa", "checkpoints/tiny"]
    arguments += ["--questions", str(tmp_path / "data"), "--methods", str(tmp_path / "methods.json")]
    arguments += ["--limit", "1", "--max_new_tokens", "2", "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "table.json"), "--plot", str(tmp_path / "table.png")]
    command(main_table.run, main_table.plot, main_table.__doc__, main_table.add_arguments, arguments)
    results = json.loads((tmp_path / "table.json").read_text())["results"]
    rows = results["rows"]
    assert list(rows) == ["dense", "xattention", "fastv", "VideoNSA", "VideoNSA, static gates", "VideoNSA, run dense"]
    assert rows["VideoNSA, run dense"]["scores"] == rows["dense"]["scores"] != rows["VideoNSA"]["scores"]
    assert rows["fastv"]["attention"]["exact"] < rows["dense"]["attention"]["exact"] == 1
    assert (tmp_path / "table.png").stat().st_size > 0
    markdown = main_table.to_table(results)
    assert len({line.count("|") for line in markdown.splitlines()}) == 1 and "`fastv`" in markdown


def test_the_page_is_that_of_the_results():
    """Every number of docs/paper.md is in the results beside it."""
    assert (paper.ROOT / "docs" / "paper.md").read_text() == paper.page(paper.read_results())
