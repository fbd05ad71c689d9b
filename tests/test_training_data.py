"""Training data: formats, the manifest and what it leaves out, labels, batches, samples that cannot be decoded."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import build_config, build_model, build_released
from datasets import Dataset
from training_data import as_messages, make_checkpoint, write_records, write_videos

from processing_videonsa import VideoNSAProcessor
from training import data as training_data_module
from training import records as records_module
from training.data import IGNORE_INDEX, Collator, EpochBatches, VideoDataset, answer_labels, plan_batches
from training.draw_data import draw_data
from training.manifest import DataOptions, load_or_build_manifests
from training.records import BadRecordError, parse_record, read_records

SECONDS = [8, 12, 9, 8, 16]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with `videos/`; their records."""
    folder = tmp_path_factory.mktemp("source")
    return folder, write_videos(folder / "videos", SECONDS)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return VideoNSAProcessor.from_pretrained(checkpoint, trust_remote_code=True)


@pytest.fixture
def build(source, processor, tmp_path):
    """Builds manifests of records, from a file of the given name."""

    def build(records, name="records.json", folder="data", must_be_unchanged=False, **options):
        options = DataOptions(**({"video_folder": str(source[0] / "videos"), "max_tokens": 1000} | options))
        path = write_records(tmp_path / name, records)
        manifests = load_or_build_manifests(
            [str(path)], tmp_path / folder, processor, options, must_be_unchanged=must_be_unchanged
        )
        return *manifests, options

    return build


# ---- Records ----


def turns(*texts):
    return [{"from": speaker, "value": text} for speaker, text in zip(("human", "gpt") * 9, texts, strict=False)]


def messages(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents, strict=False)]


VIDEO, OTHER = ({"type": "video", "video": name} for name in ("00000.mp4", "00001.mp4"))


def text(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("entry", "content"),
    [
        ({"video": "00000.mp4", "conversations": turns("<image>\nWhat?", "A")}, [VIDEO, text("What?")]),
        ({"video": "00000.mp4", "conversations": turns("<video>What?", "A")}, [VIDEO, text("What?")]),
        ({"video": "00000.mp4", "conversations": turns("What?\n<image>", "A")}, [text("What?"), VIDEO]),
        ({"video": "00000.mp4", "conversations": turns("What?", "A")}, [VIDEO, text("What?")]),
        (
            {"video": ["00000.mp4", "00001.mp4"], "conversations": turns("<image>\nthen <image>\nWhat?", "A")},
            [VIDEO, text("then "), OTHER, text("What?")],
        ),
        ({"video": "00000.mp4", "messages": messages("What?", "A")}, [VIDEO, text("What?")]),
        ({"messages": messages([VIDEO, text("What?")], [text("A")])}, [VIDEO, text("What?")]),
    ],
    ids=range(7),
)
def test_records_of_both_formats(entry, content, source):
    record = parse_record(entry, source[0] / "videos")
    paths = {name: str(source[0] / "videos" / name) for name in ("00000.mp4", "00001.mp4")}
    expected = [part | ({"video": paths[part["video"]]} if part["type"] == "video" else {}) for part in content]
    assert record.messages == [{"role": "user", "content": expected}, {"role": "assistant", "content": "A"}]


def test_records_of_a_table(source):
    """`datasets` gives every row every key of every other row; those that are None are absent."""
    rows = [
        {"messages": messages([VIDEO, text("What?")], [text("A")]), "video": None, "conversations": None},
        {"video": "00001.mp4", "conversations": turns("What?", "A")},
    ]
    table = Dataset.from_list(rows)
    assert table[0]["conversations"] is None and table[0]["messages"][0]["content"][1]["video"] is None
    for row, given in zip(table, rows, strict=True):
        assert parse_record(row, source[0] / "videos") == parse_record(given, source[0] / "videos")


GOOD = turns("Q", "A")
BAD = {
    "not a dict": ("malformed", ["Q", "A"]),
    "no conversation": ("malformed", {"video": "00000.mp4"}),
    "both": ("malformed", {"video": "00000.mp4", "conversations": GOOD, "messages": []}),
    "video is a number": ("malformed", {"video": 7, "conversations": GOOD}),
    "turns are no list": ("malformed", {"video": "00000.mp4", "conversations": "Q"}),
    "unknown speaker": ("malformed", {"video": "00000.mp4", "conversations": [{"from": "cat", "value": "Q"}]}),
    "no answer": ("malformed", {"video": "00000.mp4", "conversations": turns("Q", "A", "Q")}),
    "two questions": ("malformed", {"video": "00000.mp4", "conversations": [GOOD[0], *GOOD]}),
    "no turns": ("malformed", {"video": "00000.mp4", "conversations": []}),
    "two places": ("malformed", {"video": "00000.mp4", "conversations": turns("<image><image>Q", "A")}),
    "control token": ("malformed", {"video": "00000.mp4", "conversations": turns("Q<|im_end|>", "A")}),
    "image": ("malformed", {"messages": messages([VIDEO, {"type": "image", "image": "a.png"}], "A")}),
    "option of a video": ("malformed", {"messages": messages([VIDEO | {"fps": 9}, text("Q")], "A")}),
    "unknown role": ("malformed", {"video": "00000.mp4", "messages": [{"role": "tool", "content": "Q"}]}),
    "video in an answer": ("malformed", {"video": "00000.mp4", "messages": messages("Q", [VIDEO])}),
    "empty answer": ("empty_answer", {"video": "00000.mp4", "conversations": turns("Q", " \n")}),
    "empty second answer": ("empty_answer", {"video": "00000.mp4", "conversations": turns("Q", "A", "Q", "")}),
    "no video": ("no_video", {"conversations": GOOD}),
    "missing video": ("missing_video", {"video": "00007.mp4", "conversations": GOOD}),
}


@pytest.mark.parametrize(("reason", "entry"), BAD.values(), ids=BAD)
def test_bad_records_have_a_reason(reason, entry, source):
    with pytest.raises(BadRecordError) as error:
        parse_record(entry, source[0] / "videos", ["<|im_end|>"])
    assert error.value.reason == reason


def test_reading_takes_lists_and_lines(tmp_path, monkeypatch):
    entries = [{"id": number, "text": "]},{[" * number} for number in range(20)]
    for name in ("list.json", "lines.jsonl"):
        write_records(tmp_path / name, entries)
    (tmp_path / "indented.json").write_text(json.dumps(entries, indent=2))
    for size in (3, 1 << 20):
        monkeypatch.setattr(records_module, "_READ_CHARACTERS", size)
        for name in ("list.json", "lines.jsonl", "indented.json"):
            assert list(read_records(tmp_path / name)) == entries
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('\n{"id": 20\n\n{"id": 21}\n')
    *good, bad, last = read_records(tmp_path / "lines.jsonl")
    assert (good, bad.reason, last) == (entries, "malformed", {"id": 21})
    assert "line 21" in str(bad)


@pytest.mark.parametrize("content", ["{}", "", '[{"id": 1}', '[{"id": 1}, {"id', "[{'id': 1}]"])
def test_a_list_that_breaks_off_is_an_error(content, tmp_path):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=r"list.json"):
        list(read_records(tmp_path / "list.json"))


# ---- The manifest ----


def broken(source, name, content):
    """A record about a broken file."""
    (source[0] / "videos" / name).write_bytes(content)
    return {"id": name, "video": name, "conversations": GOOD}


def test_the_report_counts_what_is_left_out(build, source, tmp_path):
    folder, records = source
    whole = (folder / "videos" / "00000.mp4").read_bytes()
    bad = [
        broken(source, "garbage.mp4", b"no video" * 100),
        broken(source, "cut.mp4", whole[: len(whole) // 2]),
        broken(source, "empty.mp4", b""),
        {"id": "gone", "video": "gone.mp4", "conversations": GOOD},
        {"id": "silent", "video": "00000.mp4", "conversations": turns("Q", "")},
        {"id": "long", "video": "00001.mp4", "conversations": turns("Q" * 2000, "A")},
    ]
    with pytest.raises(ValueError, match=r"6 of 11 records are bad, more than max_bad_share=0.5.*3 unreadable_video"):
        build(records + bad, max_bad_share=0.5)
    assert not (tmp_path / "data" / "train.jsonl").exists()
    assert not list((tmp_path / "data").glob("*tmp*"))

    manifest, held_out, _ = build(records + bad, max_bad_share=0.6, min_frames=36, max_frames=48)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["bad"] == {"unreadable_video": 3, "missing_video": 1, "empty_answer": 1, "too_long": 1}
    assert "record 9: an answer is empty" in report["examples"]["empty_answer"][0]
    # At 4 pictures a second: 32, 48, 36, 32 and 64 of them.
    assert (report["records"], report["kept"], report["outside_frames"]) == (11, 2, 3)
    assert [manifest[index].id for index in range(len(manifest))] == ["scene-1", "scene-2"]
    assert held_out is None


def test_both_formats_make_one_manifest(build, source):
    records = source[1]
    first, _, _ = build(records, folder="a")
    second, _, _ = build([as_messages(record) for record in records], "records.jsonl", folder="b")
    assert [first[index] for index in range(5)] == [second[index] for index in range(5)]
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_a_manifest_is_kept_and_a_resumed_run_keeps_it(build, source, processor, tmp_path):
    manifest, _, options = build(source[1])
    before = manifest.path.stat()
    again = [[str(tmp_path / "records.json")], tmp_path / "data", processor, options]
    kept, _ = load_or_build_manifests(*again, must_be_unchanged=True)
    assert kept.path.stat().st_ino == before.st_ino and len(kept) == 5

    with pytest.raises(ValueError, match=r"made with other data: .* or one of .*fps"):
        build(source[1], fps=2.0, must_be_unchanged=True)
    write_records(tmp_path / "records.json", source[1][:3])
    with pytest.raises(ValueError, match=r"made with other data: a file of .*records.json"):
        load_or_build_manifests(*again, must_be_unchanged=True)
    rebuilt, _ = load_or_build_manifests(*again)
    assert len(rebuilt) == 3


def test_held_out_videos_are_not_trained_on(build, source):
    twice = source[1] + [record | {"id": f"again-{record['id']}"} for record in source[1]]
    manifest, held_out, _ = build(twice, eval_share=0.4)
    trained, evaluated = ({m[index].videos[0] for index in range(len(m))} for m in (manifest, held_out))
    assert (len(trained), len(evaluated)) == (3, 2) and not trained & evaluated
    assert (len(manifest), len(held_out)) == (6, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "`fps` must be positive, got 0"),
        ({"min_frames": 9, "max_frames": 8}, r"`min_frames` \(9\) must not exceed `max_frames` \(8\)"),
        ({"max_bad_share": 1.0}, "`max_bad_share` must be a share"),
        ({"video_folder": "/nowhere"}, "`video_folder`: there is no folder /nowhere"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)


def test_nothing_left_is_an_error(build, source):
    with pytest.raises(ValueError, match="no record is left to train on"):
        build(source[1], min_frames=500)


# ---- Samples ----


def test_labels_score_answers_alone(build, source, processor):
    manifest, _, options = build(source[1])
    sample = VideoDataset(manifest, processor, options)[1]
    assert len(sample["input_ids"]) == manifest.tokens[1]
    assert int((sample["mm_token_type_ids"] == 2).sum()) == 24 * 4  # 48 pictures
    answers = [message["content"] for message in manifest[1].messages if message["role"] == "assistant"]
    scored = sample["labels"] != IGNORE_INDEX
    assert torch.equal(sample["labels"][scored], sample["input_ids"][scored])
    assert processor.tokenizer.decode(sample["labels"][scored]) == "".join(f"{answer}<|im_end|>" for answer in answers)


def test_labels_need_the_chat_format(processor):
    for content, message in (
        ("no answer", "no <|im_start|>assistant"),
        ("<|im_start|>assistant\nA", "without <|im_end|>"),
    ):
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            answer_labels(torch.tensor(processor.tokenizer.encode(content)), processor.tokenizer)


def test_undecodable_samples_are_replaced_and_reported(build, source, processor, tmp_path):
    folder, records = source
    content = (folder / "videos" / "00001.mp4").read_bytes()
    copies = []
    for number in range(2):
        (folder / "videos" / f"copy-{number}.mp4").write_bytes(content)
        copies.append(records[1] | {"id": f"copy-{number}", "video": f"copy-{number}.mp4"})
    manifest, _, options = build([*records, *copies])
    dataset = VideoDataset(manifest, processor, options)
    # One file goes away; the frames in the middle of another are overwritten, its index is whole.
    (folder / "videos" / "copy-0.mp4").unlink()
    half = len(content) // 2
    (folder / "videos" / "copy-1.mp4").write_bytes(content[: half - 1000] + bytes(2000) + content[half + 1000 :])
    for index, error in ((5, "there is no such video file"), (6, "frames needed cannot be decoded")):
        sample = dataset[index]
        assert error in sample["failures"][index]
        assert sample["index"] not in (5, 6)
        assert len(sample["input_ids"]) <= manifest.tokens[index]

    # The shortest has no shorter one.
    shortest = int(np.argmin(manifest.tokens))
    path = folder / "videos" / f"{shortest:05}.mp4"
    content = path.read_bytes()
    path.unlink()
    sample = dataset[shortest]
    path.write_bytes(content)
    assert list(sample["failures"]) == [shortest] and sample["index"] != shortest


def test_a_changed_video_is_noticed(build, source, processor):
    folder, records = source
    (folder / "videos" / "changing.mp4").write_bytes((folder / "videos" / "00001.mp4").read_bytes())
    manifest, _, options = build([*records, records[1] | {"video": "changing.mp4"}])
    (folder / "videos" / "changing.mp4").write_bytes((folder / "videos" / "00004.mp4").read_bytes())
    with pytest.raises(ValueError, match="a video has changed"):
        VideoDataset(manifest, processor, options).load(5)


def test_storage_that_is_gone_ends_the_run(build, source, processor, monkeypatch):
    manifest, _, options = build(source[1])
    dataset = VideoDataset(manifest, processor, options)
    monkeypatch.setattr(training_data_module, "MAX_FAILURES_IN_A_ROW", 3)
    calls = []

    def fail(index):
        calls.append(index)
        raise OSError("Stale file handle")

    monkeypatch.setattr(dataset, "load", fail)
    with pytest.raises(RuntimeError, match=r"3 samples in a row could not be decoded.*Stale file handle"):
        dataset[0]
    assert len(set(calls)) == 3


# ---- Batches ----


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("batch_size", "packing"), [(1, False), (3, False), (1, True)])
def test_batches_hold_every_sample_once(batch_size, packing, shuffle):
    tokens = np.random.default_rng(0).integers(50, 400, size=100)
    settings = {"batch_size": batch_size, "packing": packing, "max_tokens": 1000, "shuffle": shuffle}
    batches = plan_batches(tokens, seed=1, **settings)
    assert sorted(index for batch in batches for index in batch) == list(range(100))
    assert batches == plan_batches(tokens, seed=1, **settings)
    assert (batches == plan_batches(tokens, seed=2, **settings)) == (not shuffle)
    if packing:
        lengths = [int(tokens[batch].sum()) for batch in batches]
        assert max(lengths) <= 1000
        assert len(batches) <= math.ceil(tokens.sum() / 1000) + 1  # hardly any room is left
    elif batch_size > 1 and shuffle:
        padding = sum(int(tokens[batch].max()) * len(batch) - int(tokens[batch].sum()) for batch in batches)
        assert padding < 0.05 * tokens.sum()


def test_ranks_share_an_epoch_and_epochs_differ():
    batches = [[index] for index in range(11)]

    def order(rank, epoch, shuffle=True, num_ranks=4):
        sampler = EpochBatches(batches, rank=rank, num_ranks=num_ranks, shuffle=shuffle, seed=3)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == math.ceil(11 / num_ranks)
        return [index for (index,) in sampler]

    seen = [order(rank, 0) for rank in range(4)]
    assert {index for part in seen for index in part} == set(range(11))
    assert order(0, 0, num_ranks=1) != order(0, 1, num_ranks=1) != order(0, 2, num_ranks=1)
    # What the ranks do together in a step is what one would do in as many.
    together = [index for step in zip(*(order(rank, 5) for rank in range(4)), strict=True) for index in step]
    assert together[:11] == order(0, 5, num_ranks=1)
    assert order(1, 7, shuffle=False) == [1, 5, 9]


def test_packed_and_padded_batches_hold_the_same(build, source, processor):
    manifest, _, options = build(source[1])
    dataset, config = VideoDataset(manifest, processor, options), build_config()
    samples = [dataset[index] for index in (0, 1)]
    packed, padded = (Collator(config, packing)(samples) for packing in (True, False))
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert packed["input_ids"].shape == packed["labels"].shape == (1, sum(lengths))
    assert packed["position_ids"].shape == (4, 1, sum(lengths))
    assert (packed["position_ids"][0, 0] == 0).nonzero().squeeze(-1).tolist() == [0, lengths[0]]
    assert "attention_mask" not in packed
    assert padded["input_ids"].shape == padded["labels"].shape == (2, max(lengths))
    assert padded["attention_mask"].sum(-1).tolist() == lengths
    assert torch.equal(
        padded["labels"][padded["labels"] != IGNORE_INDEX], packed["labels"][packed["labels"] != IGNORE_INDEX]
    )
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(packed[name], padded[name])
    positions = torch.cat([padded["position_ids"][:, row, :length] for row, length in enumerate(lengths)], dim=1)
    assert torch.equal(packed["position_ids"][1:, 0], positions)
    # What the model computes from the seconds, which are not in the batch: mixed precision would round them.
    model_inputs = {name: padded[name] for name in ("mm_token_type_ids", "video_grid_thw", "attention_mask")}
    seconds = torch.cat([sample["second_per_grid_ts"] for sample in samples])
    for model in (build_model(), build_released()):
        expected, _ = model.model.get_rope_index(None, second_per_grid_ts=seconds, **model_inputs)
        assert torch.equal(Collator(model.config, False)(samples)["position_ids"], expected)
    assert not [name for name, value in padded.items() if torch.is_tensor(value) and value.is_floating_point()][1:]
    assert packed["num_tokens"] == padded["num_tokens"] == sum(lengths)
    assert packed["indices"] == padded["indices"] == [0, 1]


def test_drawn_data_is_training_data(processor, tmp_path):
    draw_data(tmp_path / "drawn", videos=3, longest=9, seed=5)
    options = DataOptions(video_folder=str(tmp_path / "drawn" / "videos"), max_tokens=1000)
    manifest, _ = load_or_build_manifests(
        [str(tmp_path / "drawn" / "train.jsonl")], tmp_path / "data", processor, options
    )
    assert len(manifest) == 3 and not manifest.report.bad
    for arguments, message in (({"videos": 0}, "`videos` must be at least 1"), ({"longest": 7}, "at least 8 seconds")):
        with pytest.raises(ValueError, match=message):
            draw_data(tmp_path / "none", **({"videos": 1, "longest": 9} | arguments))
    with pytest.raises(ValueError, match="exists; `overwrite`"):
        draw_data(tmp_path / "drawn", videos=3, longest=9)
