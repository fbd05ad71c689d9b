"""Evidence: shares are those of plain attention, blocks those that were chosen, and nothing changes but the answer."""

import copy
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from bench_evidence import head_sums
from conftest import ROOT, noisy_checkpoint
from PIL import Image
from transformers import DynamicCache, QuantizedCache, TextStreamer

import evidence_videonsa
import modeling_videonsa
from evidence_videonsa import Evidence, segments_of
from generation_videonsa import CACHE_NAME
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor
from storyboard_videonsa import clock
from synthetic.drawing import write_video

TINY = ROOT / "checkpoints" / "tiny"
compression = modeling_videonsa.kernel_module("compression")
# Sums of positive numbers up to 1, in another order, in float64.
CLOSE = {"atol": 1e-12, "rtol": 1e-9}
# Of the same in float32, in which transformers' eager softmax is: its unit is 6e-8, and a dozen are rounded.
CLOSE_TO_EAGER = {"atol": 1e-6, "rtol": 0}


@pytest.fixture(scope="module")
def processor():
    return VideoNSAProcessor.from_pretrained(TINY, trust_remote_code=True)


@pytest.fixture(scope="module")
def shared_model():
    return noisy_checkpoint()


@pytest.fixture
def model(shared_model):
    yield shared_model
    shared_model.config.nsa_mode = "sparse"
    shared_model.set_attn_implementation("sdpa")


def frames(count: int, seed: int = 0, height: int = 56, width: int = 84) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def video(count: int, seed: int = 0, **size: int) -> dict:
    return {"type": "video", "video": frames(count, seed, **size), "fps": 2}


def image(seed: int) -> dict:
    return {"type": "image", "image": frames(1, seed)[0]}


# As large as the frames here are; the small checkpoint's own limit is 56 x 56.
WHOLE = {"max_pixels_per_frame": 84 * 84}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def user(parts: list[dict]) -> list[dict]:
    return [{"role": "user", "content": parts}]


PROMPTS = {
    "text before": [text("Look: "), video(25)],
    "side by side": [video(8), video(9, 1, height=84)],
    "images and videos": [image(2), video(10), text("so"), image(3), video(4, 5)],
    "image": [image(2)],
}


def segment_numbers(reading, parts: list[dict]) -> list[int | str]:
    """What every token of a reading is, told from its frames: a moment's number, "image" or "text"."""
    media = [part for part in parts if part["type"] != "text"]
    steps = [-(-len(part["video"]) // 2) if part["type"] == "video" else 1 for part in media]
    kinds = [part["type"] for part, count in zip(media, steps, strict=True) for _ in range(count)]
    numbers, moment, sizes = [], 0, []
    for kind, (height, width) in zip(kinds, reading.frames, strict=True):
        sizes += [moment if kind == "video" else "image"] * (height * width)
        moment += kind == "video"
    vision = iter(sizes)
    for kind in reading.types.tolist():
        numbers.append(next(vision) if kind else "text")
    return numbers


def plain_shares(attentions, values, numbers: list, first: int, moments: int) -> np.ndarray:
    """The rule in loops.

    attentions, values: of each layer, (1, num_heads, rows, keys) and (1, num_kv_heads, keys, head_dim); rows begin at
    token `first`.
    """
    lengths = [layer[0].norm(dim=-1).repeat_interleave(2, 0) for layer in values]  # [num_heads, keys]
    taken = [(layer[0] * length[:, None]).sum(0).numpy() for layer, length in zip(attentions, lengths, strict=True)]
    rows = len(taken[0])
    places = {"image": moments, "text": moments + 1} | {number: number for number in range(moments)}

    def plain(layer: int, row: int) -> np.ndarray:
        sums = np.zeros(moments + 2)
        for key, weight in enumerate(taken[layer][row]):
            sums[places[numbers[key]] if key < first else moments + 1] += weight
        return sums

    result = np.zeros((rows, moments + 2))
    for row in range(rows):
        for layer in range(len(taken)):
            for key, weight in enumerate(taken[layer][row]):
                if key < first:
                    result[row, places[numbers[key]]] += weight
                elif layer == 0:
                    result[row, moments + 1] += weight
                elif weight:
                    earlier = sum(plain(before, key - first) for before in range(layer))
                    result[row] += weight * earlier / earlier.sum()
    return result / result.sum(1, keepdims=True)


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize("parts", PROMPTS.values(), ids=PROMPTS)
def test_shares_are_those_of_eager_attention(model, processor, parts, mode):
    """Of every token of the answer, by transformers' own attention weights and the rule written in loops."""
    model.config.nsa_mode = mode
    reading = model.read(processor, user(parts), chunk_tokens=20, progress=False)
    answer = reading.ask("What is it?", max_new_tokens=3, evidence=True)
    evidence, moments = answer.evidence, len(answer.evidence.moments)
    assert moments == sum(-(-len(part["video"]) // 2) for part in parts if part["type"] == "video")
    model.set_attn_implementation("eager")
    with reading.prompt("What is it?") as inputs, torch.no_grad():
        first = inputs[CACHE_NAME].get_seq_length()
        new = torch.cat([inputs["input_ids"][:, first:], torch.tensor([answer.token_ids[:-1]])], dim=1)
        inputs |= {"input_ids": new, "attention_mask": torch.ones(1, first + new.shape[1], dtype=torch.long)}
        attentions = model(**inputs, output_attentions=True).attentions
        values = [layer.values.clone() for layer in reading.cache.layers]
    expected = plain_shares(attentions, values, segment_numbers(reading, parts), first, moments)[
        -len(answer.token_ids) :
    ]
    for token, row in zip(evidence.tokens, expected, strict=True):
        np.testing.assert_allclose([*token.shares, token.images, token.text], row, **CLOSE_TO_EAGER)
        assert sum((*token.shares, token.images, token.text)) == pytest.approx(1, abs=1e-12)
    whole = [*(moment.share for moment in evidence.moments), evidence.images, evidence.text]
    np.testing.assert_allclose(whole, expected.mean(0), **CLOSE_TO_EAGER)
    assert [token.token_id for token in evidence.tokens] == list(answer.token_ids)


def test_special_tokens_do_not_count_for_the_whole(model, processor):
    reading = model.read(processor, user([video(8)]), progress=False)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in processor.tokenizer.all_special_ids
    inputs = {"max_new_tokens": 2, "evidence": True}
    free = reading.ask("What?", **inputs)
    ended = reading.ask("What?", forced_eos_token_id=end, **inputs)
    assert free.token_ids[0] == ended.token_ids[0] and ended.token_ids[1] == end
    assert [moment.share for moment in ended.evidence.moments] == list(ended.evidence.tokens[0].shares)
    assert [moment.share for moment in free.evidence.moments] != list(free.evidence.tokens[0].shares)


@pytest.mark.parametrize("tile", [1, 50, 1000, 1 << 24])
def test_tiles_change_nothing(monkeypatch, tile):
    """Tiles of keys and of rows, with scores so far apart that a maximum must be kept."""
    monkeypatch.setattr(evidence_videonsa, "_TILE", tile)
    generator = torch.Generator().manual_seed(1)
    query = 20 * torch.randn(1, 6, 7, 8, generator=generator, dtype=torch.float64)
    keys = torch.randn(1, 2, 41, 8, generator=generator, dtype=torch.float64)
    segments = torch.randint(0, 5, (41,), generator=generator)
    values = torch.randn(1, 2, 41, 8, generator=generator, dtype=torch.float64)
    shares = head_sums(query, keys, segments, 5, 34, 0.3)
    by_value = head_sums(query, keys, segments, 5, 34, 0.3, values)
    scores = query[0] @ keys[0].repeat_interleave(3, 0).mT * 0.3
    scores = scores.masked_fill(torch.arange(41) > 34 + torch.arange(7)[:, None], -torch.inf).softmax(-1)
    lengths = values[0].norm(dim=-1).repeat_interleave(3, 0)[:, None]
    for result, weights in ((shares, scores), (by_value, scores * lengths)):
        expected = torch.stack([weights[..., segments == number].sum(-1) for number in range(5)], -1)
        torch.testing.assert_close(result, expected, **CLOSE)


def cached(reading) -> list[torch.Tensor]:
    return [states.clone() for layer in reading.cache.layers for states in (layer.keys, layer.values)]


def test_answers_and_the_reading_stay_the_same(model, processor, monkeypatch):
    """Asked with a streamer, kept and followed up; after pictures; and after an error on the way."""
    parts = [video(20), text("and"), image(1), video(9, 2)]
    reading = model.read(processor, user(parts), progress=False)
    before, ids = cached(reading), reading.ids

    class Said(TextStreamer):
        tokens = ()

        def put(self, value):
            self.tokens = *self.tokens, *value.flatten().tolist()

    streamer = Said(processor.tokenizer)
    plain = reading.ask("What?", max_new_tokens=5)
    answer = reading.ask("What?", max_new_tokens=5, evidence=True, streamer=streamer)
    assert answer == copy.copy(answer) and plain.evidence is None
    assert answer.token_ids == plain.token_ids == streamer.tokens[-5:]
    answer.evidence.storyboard(3)
    answer.evidence.to_dict(second_hop=2)

    def unchanged():
        return torch.equal(reading.ids, ids) and all(map(torch.equal, before, cached(reading)))

    assert unchanged()
    with monkeypatch.context() as patch:
        patch.setattr(evidence_videonsa, "text_shares", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reading.ask("What?", max_new_tokens=2, evidence=True, keep=True)
    assert unchanged() and not any(layer.self_attn._forward_pre_hooks for layer in model.model.language_model.layers)

    kept = reading.ask("First?", max_new_tokens=3, keep=True, evidence=True)
    follow = reading.ask("And?", max_new_tokens=3, evidence=True)
    assert sum(moment.share for moment in follow.evidence.moments) + follow.evidence.text + follow.evidence.images == (
        pytest.approx(1, abs=1e-12)
    )
    again = model.read(processor, user(parts), progress=False)
    assert again.ask("First?", max_new_tokens=3, keep=True).token_ids == kept.token_ids
    assert again.ask("And?", max_new_tokens=3).token_ids == follow.token_ids
    assert kept.evidence.second_hop(1) and follow.evidence.frames(1)  # their moments are still there
    reading.forget()
    assert unchanged()


@pytest.mark.parametrize("parts", [[text("Look: "), video(33)], [image(2), video(13), image(3), video(14, 1)]], ids=len)
def test_blocks_are_those_chosen_in_a_forward_of_the_whole_prompt(model, processor, parts, monkeypatch):
    """Captured where the whole prompt's attention chooses them."""
    messages = user([*parts, text("What?")])
    calls = []
    choose = compression.choose_blocks

    def recorded(*args):
        calls.append((args[1], choose(*args)))
        return calls[-1][1]

    monkeypatch.setattr(compression, "choose_blocks", recorded)
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, **options, **WHOLE)
    with torch.no_grad():
        model(**inputs)
    starts = [number for number, (first, _) in enumerate(calls) if first == 0]  # of a layer's key/value head
    heads = [torch.cat([chosen for _, chosen in calls[a:b]]) for a, b in zip(starts, [*starts[1:], None], strict=True)]
    config = model.config.text_config
    assert len(heads) == config.num_hidden_layers * config.num_key_value_heads
    monkeypatch.setattr(compression, "choose_blocks", choose)

    reading = model.read(processor, messages, chunk_tokens=13, progress=False, **WHOLE)
    evidence = reading.ask(max_new_tokens=2, evidence=True).evidence
    hops = evidence.second_hop(len(evidence.moments))
    assert [hop.moment for hop in hops] == list(evidence.moments)
    vision = torch.cumsum(reading.types != 0, 0) - 1  # numbers of vision tokens
    seen = set()
    for hop in hops:
        read = reading.videos[hop.moment.video]
        tokens = read.shape.step_tokens(2)
        start = int(vision[read.first_token + hop.moment.step * tokens])
        chosen = torch.stack([head[start : start + tokens] for head in heads])
        own, count = start // model.config.block_size, chosen.shape[0] * tokens
        expected = {
            int(block): int((chosen == block).sum()) / count for block in chosen.unique() if 0 <= int(block) < own
        }
        assert {block.index: block.chosen for block in hop.blocks} == pytest.approx(expected)
        assert sum(block.weight for block in hop.blocks) == pytest.approx(float(bool(expected)))
        weights = [block.weight for block in hop.blocks]
        assert weights == sorted(weights, reverse=True) and all(weight > 0 for weight in weights)
        seen |= expected.keys()
    assert len(seen) > 2
    model.config.nsa_mode = "dense"
    with pytest.raises(ValueError, match="nsa_mode"):
        evidence.second_hop(1)


def test_places_of_blocks(model, processor):
    """16 tokens to a block, 6 to a frame of 2 x 3: the second block begins with the last 2 tokens of a third frame."""
    reading = model.read(processor, user([video(40)]), progress=False, **WHOLE)
    evidence = reading.ask("What?", max_new_tokens=2, evidence=True).evidence
    blocks = {block.index: block for hop in evidence.second_hop(20) for block in hop.blocks}
    places = blocks[1].places
    assert [(place.step, place.tokens) for place in places] == [(2, 2), (3, 6), (4, 6), (5, 2)]
    assert places[0].box == pytest.approx((1 / 3, 1 / 2, 1, 1)) and places[1].box == (0, 0, 1, 1)
    assert places[3].box == pytest.approx((0, 0, 2 / 3, 1 / 2))
    assert (places[0].start, places[0].end) == (2, 3)


def test_dense_mode_has_no_second_hop(model, processor):
    model.config.nsa_mode = "dense"
    evidence = (
        model.read(processor, user([video(12)]), progress=False).ask("?", max_new_tokens=1, evidence=True).evidence
    )
    assert [hop.blocks for hop in evidence.second_hop(2)] == [(), ()]
    assert isinstance(evidence.storyboard(2), Image.Image)


def test_frames_are_those_that_were_read(model, processor):
    """In the order of time, with the shares of their moments; of two videos each from its own."""
    first, second = frames(20), frames(9, 1)
    videos = [{"type": "video", "video": one, "fps": 2} for one in (first, second)]
    reading = model.read(processor, user(videos), progress=False, **WHOLE)
    evidence = reading.ask("What?", max_new_tokens=2, evidence=True).evidence
    shown = evidence.frames(15)
    assert len(shown) == len(evidence.moments) == 15
    for frame, moment in zip(shown, evidence.moments, strict=True):
        source = (first, second)[frame.video]
        assert np.array_equal(np.asarray(frame.image), source[2 * moment.step])
        assert (frame.time, frame.share, frame.video) == (moment.start, moment.share, moment.video)
    assert (shown[9].moment.end, shown[10].moment.start, shown[14].moment.end) == (10, 0, 4.5)
    strongest = sorted(evidence.moments, key=lambda moment: -moment.share)[:3]
    assert {frame.moment for frame in evidence.frames(3)} == set(strongest)
    times = [(frame.video, frame.time) for frame in evidence.frames(3)]
    assert times == sorted(times)
    for n in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="`n` must be a positive integer"):
            evidence.frames(n)
    with pytest.raises(ValueError, match="`video` must be a list of 2"):
        evidence.frames(2, video=first)
    swapped = evidence.frames(15, video=[first[::-1].copy(), second])  # found by time
    assert np.array_equal(np.asarray(swapped[0].image), first[-1])


def pictures(count: int) -> np.ndarray:
    """Grey levels that h264 keeps apart."""
    return np.broadcast_to(np.linspace(20, 235, count).astype(np.uint8)[:, None, None, None], (count, 56, 56, 3))


def test_times_of_a_variable_frame_rate(model, processor, tmp_path):
    ticks = [*range(0, 40, 10), *range(40, 80, 2)]  # of 1/20 second: 2 frames a second, then 10
    path = write_video(tmp_path / "vfr.mp4", pictures(len(ticks)), 20, times=ticks)
    reading = model.read(processor, path, num_frames=12, progress=False)
    seconds = [frame.time for frame in processor_frames(path)]
    indices = reading.plan.videos[0].frame_indices
    evidence = reading.ask("What?", max_new_tokens=1, evidence=True).evidence
    assert [moment.start for moment in evidence.moments] == pytest.approx([seconds[at] for at in indices[::2]])
    assert np.ptp(np.diff([moment.start for moment in evidence.moments])) > 0.1
    levels = [np.asarray(frame.image).mean() for frame in evidence.frames(6)]
    assert levels == pytest.approx(pictures(len(ticks))[list(indices[::2]), 0, 0, 0], abs=3)


def processor_frames(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def test_media_that_moved(model, processor, tmp_path):
    """A loaded reading finds its file; elsewhere it must be told where; what changed is not taken for it."""
    path = write_video(tmp_path / "film.mp4", pictures(16), 2)
    reading = model.read(processor, path, fps=2, progress=False)
    shown = [np.asarray(frame.image) for frame in reading.ask("?", max_new_tokens=1, evidence=True).evidence.frames(4)]
    reading.save(tmp_path / "kept")
    loaded = model.load_reading(tmp_path / "kept", processor)
    evidence = loaded.ask("?", max_new_tokens=1, evidence=True).evidence
    assert all(map(np.array_equal, shown, (np.asarray(frame.image) for frame in evidence.frames(4))))
    moved = path.rename(tmp_path / "moved.mp4")
    for missing in (lambda: evidence.frames(4), evidence.storyboard, lambda: evidence.to_dict(second_hop=1)):
        with pytest.raises(ValueError, match=r"film.mp4 is not there, or has changed since it was read: pass `video`"):
            missing()
    assert evidence.plot().size and evidence.to_dict()
    again = evidence.frames(4, video=moved)
    assert all(map(np.array_equal, shown, (np.asarray(frame.image) for frame in again)))
    assert evidence.storyboard(4, video=moved) and evidence.second_hop(2, video=moved)
    assert (
        model.load_reading(tmp_path / "kept", processor, moved)
        .ask("?", max_new_tokens=1, evidence=True)
        .evidence.frames(1)
    )
    write_video(path, pictures(15), 2)
    with pytest.raises(ValueError, match="has changed"):
        evidence.frames(4)
    short = write_video(tmp_path / "short.mp4", pictures(6), 2)
    with pytest.raises(ValueError, match=r"`video` = .*short.mp4 has 3.00 seconds"):
        evidence.frames(8, video=short)
    content = json.loads((tmp_path / "kept" / "reading.json").read_text())
    del content["footage"]  # as it was written before footage was kept
    (tmp_path / "kept" / "reading.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="without the times of its frames: read anew"):
        model.load_reading(tmp_path / "kept", processor).ask("?", evidence=True)


def test_frames_in_memory_that_have_changed(model, processor):
    """As a camera's buffer, which is used again."""
    film = np.ascontiguousarray(pictures(8))
    reading = model.read(processor, user([{"type": "video", "video": film, "fps": 2}]), progress=False)
    evidence, before = reading.ask("?", max_new_tokens=1, evidence=True).evidence, film.copy()
    shown = [np.asarray(frame.image) for frame in evidence.frames(2)]
    film[:] = 0
    for picture in (evidence.frames, evidence.second_hop):
        with pytest.raises(ValueError, match=r"the ndarray that was read is not there, or has changed"):
            picture(1)
    again = evidence.frames(2, video=before)
    assert all(map(np.array_equal, shown, (np.asarray(frame.image) for frame in again)))


def test_footage_that_was_added(model, processor, tmp_path):
    """Its times go on; a file's frames are found again, those of a camera with a recording of the whole."""
    film = np.ascontiguousarray(pictures(30))
    path = write_video(tmp_path / "more.mp4", film[20:], 2)
    reading = model.read(processor, user([{"type": "video", "video": film[:7], "fps": 2}]), progress=False)
    early = reading.ask("?", max_new_tokens=1, evidence=True).evidence
    assert early.frames(4)[-1].moment.end == 3.5
    reading.extend(film[7:20], progress=False)
    with pytest.raises(ValueError, match=r"the reading has changed at second 3.00 since then: ask anew"):
        early.second_hop(4)
    shares = [moment.share for moment in reading.ask("?", max_new_tokens=1, evidence=True).evidence.moments]
    whole = model.read(processor, film[:20], fps=2, progress=False).ask("?", max_new_tokens=1, evidence=True).evidence
    np.testing.assert_allclose(shares, [moment.share for moment in whole.moments], rtol=1e-9)
    reading.extend(path, progress=False)
    evidence = reading.ask("?", max_new_tokens=1, evidence=True).evidence
    assert [(moment.start, moment.end) for moment in evidence.moments] == [(at, at + 1) for at in range(15)]
    with pytest.raises(ValueError, match=r"the frames at second 4.00 were not kept, .* pass `video`"):
        evidence.frames(15)
    levels = [np.asarray(frame.image).mean() for frame in evidence.frames(15, video=film)]
    assert levels == pytest.approx(film[::2, 0, 0, 0])
    of_file = [moment for moment in evidence.moments if moment.start >= 10]
    assert [np.asarray(one).mean() for one in evidence.pictures(of_file)] == pytest.approx(film[20::2, 0, 0, 0], abs=3)


def test_copies_share_the_media(model, processor):
    film = frames(8)
    reading = model.read(processor, film, fps=2, progress=False)
    other = copy.deepcopy(reading)
    assert other.videos[0].footage[0].part["video"] is film
    other.extend(frames(4), progress=False)
    assert len(reading.videos[0].footage) == 1 and len(other.videos[0].times) == 12


def test_a_reading_that_was_interrupted(model, processor):
    def stop(progress):
        if progress.tokens > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        model.read(processor, frames(40), fps=2, chunk_tokens=8, callback=stop, progress=False)
    reading = caught.value.reading
    evidence = reading.ask("?", max_new_tokens=1, evidence=True).evidence
    assert len(evidence.moments) == reading.video.steps < 20
    assert evidence.moments[-1].end == reading.seconds


def test_caches_that_cannot_tell(model, processor):
    film = {"video": frames(160), "fps": 2, "type": "video"}
    for method in ("snapkv", "infinipot-v", "streamingllm"):
        reading = model.read(processor, user([film]), kv_budget=100, kv_method=method, progress=False)
        with pytest.raises(ValueError, match=f"`evidence` = True needs the whole cache, and kv_method='{method}'"):
            reading.ask("?", evidence=True)
    whole = model.read(processor, user([video(8)]), kv_budget=1.0, cache=None, progress=False)
    assert whole.ask("?", max_new_tokens=1, evidence=True).evidence.moments
    dynamic = model.read(processor, user([video(8)]), cache=DynamicCache(), progress=False)
    given = [
        [moment.share for moment in one.ask("?", max_new_tokens=1, evidence=True).evidence.moments]
        for one in (whole, dynamic)
    ]
    np.testing.assert_allclose(*given, rtol=1e-12)
    assert dynamic.ask("?", max_new_tokens=1, evidence=True).evidence.second_hop(1)


def test_quantised_caches_are_refused(processor):
    if not hasattr(pytest.importorskip("transformers.cache_utils"), "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    model = VideoNSAForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    cache = QuantizedCache(backend="fp8", config=model.config.text_config)
    reading = model.read(processor, user([video(8)]), cache=cache, progress=False)
    with pytest.raises(ValueError, match="`cache` = QuantizedCache holds them otherwise: read without `cache`"):
        reading.ask("?", evidence=True)


def test_what_cannot_be_shown(model, processor):
    pictured = (
        model.read(processor, user([image(1)]), progress=False).ask("?", max_new_tokens=1, evidence=True).evidence
    )
    assert pictured.moments == () and pictured.images > 0
    for draw in (pictured.frames, pictured.storyboard, pictured.plot):
        with pytest.raises(ValueError, match="no video was read"):
            draw()
    prepared = model.read(processor, user([video(8)]), do_normalize=False, progress=False)
    evidence = prepared.ask("?", max_new_tokens=1, evidence=True).evidence
    with pytest.raises(ValueError, match="with do_normalize: there is no second hop"):
        evidence.second_hop(1)
    assert evidence.storyboard(1, second_hop=False)


def test_numbers_are_json(model, processor):
    reading = model.read(processor, user([video(60)]), progress=False)
    evidence = reading.ask("What is it?", max_new_tokens=2, evidence=True).evidence
    values = evidence.to_dict(second_hop=25)
    assert json.loads(json.dumps(values)) == values
    assert values["question"] == "What is it?" and len(values["tokens"]) == 2
    assert [moment["share"] for moment in values["moments"]] == [moment.share for moment in evidence.moments]
    assert len(values["second_hop"]) == 25 and "second_hop" not in evidence.to_dict()
    last = values["second_hop"][-1]["blocks"][0]
    assert set(last) == {"index", "chosen", "weight", "places"} and len(last["places"][0]["box"]) == 4


def test_pictures_show_frames_and_strength(model, processor):
    """Each frame's colour is in the storyboard as often as it should be, and the plot is as high as the shares."""
    colours = [(0, 90 + 3 * number, 255 - 3 * number) for number in range(40)]
    film = np.stack([np.full((56, 56, 3), colour, np.uint8) for colour in colours])
    evidence = model.read(processor, film, fps=2, progress=False).ask("What?", max_new_tokens=2, evidence=True).evidence
    for n in (1, 5, 12):
        board = np.asarray(evidence.storyboard(n, second_hop=False))
        for frame in evidence.frames(n):
            shown = (board == np.asarray(frame.image)[0, 0]).all(-1).sum()
            assert shown == pytest.approx(168**2, rel=0.05)  # all but the line around it
        linked = np.asarray(evidence.storyboard(n))
        assert linked.shape[0] >= board.shape[0] and linked.shape[1] == board.shape[1]
    plot = np.asarray(evidence.plot())
    is_bar = (plot == (217, 72, 15)).all(-1)
    shares = np.array([moment.share for moment in evidence.moments])
    left, right = np.nonzero(is_bar.any(0))[0][[0, -1]]
    middles = (left + (np.arange(20) + 0.5) * (right - left) / 20).astype(int)
    np.testing.assert_allclose(is_bar[:, middles].sum(0), 150 * shares / shares.max(), atol=1)


def test_clocks():
    assert [clock(seconds) for seconds in (0, 59.97, 61.2, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert [clock(seconds, 0.5) for seconds in (0.25, 59.97)] == ["0:00.2", "1:00.0"]


def test_generation_that_feeds_something_else_is_refused(model, processor):
    reading = model.read(processor, user([video(8)]), progress=False)
    queries = evidence_videonsa.Queries()
    with pytest.raises(ValueError, match="`evidence`: `generation` fed 0 tokens in 0 rows"):
        Evidence.of(reading, queries, [1, 2], [3], "?", "!")
    assert segments_of(reading)[1] == 6
