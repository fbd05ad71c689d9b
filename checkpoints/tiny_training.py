"""How the tiny checkpoint learns, in three stages.

1. The vision tower alone learns to tell single cards apart, and stays as it is from then on.
2. The first half of the decoder learns to take notes: linear heads on the states of video tokens ask for what they
   should know of the video so far (the card before, the last flash, all flashes, how many stars, whether a digit comes
   again and what was before it then, which flash a digit answers, which shape is the more frequent), and a head on the
   token before each answer for what is asked.
3. Everything after the vision tower learns to answer. The heads keep a fifth of their weight, and are thrown away at
   the end. Videos grow in the first half, and their speed varies late, so that longer ones can be read.

All questions of a video are one conversation, as in a chat; only answers count in the loss. The cards' features come
from a bank, since the tower is frozen, and the attention from `masked_attention.py`, since the batches are regular:
both are for speed alone.
"""

import math
from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch
import torch.distributed as dist
from masked_attention import masked_attention
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from positions_videonsa import mrope_position_ids
from synthetic.drawing import draw_card
from synthetic.scenes import (
    COLOURS,
    DIGITS,
    DIRECTIONS,
    FILLER_SHAPES,
    KINDS,
    LONG_KINDS,
    MAJORITY_SHAPES,
    MIN_CARDS,
    ORDINALS,
    Card,
    Question,
    Scene,
    clear_majority,
    make_scene,
)

SIZE, PATCH, MERGE = 56, 14, 2
TOKENS_PER_CARD = (SIZE // PATCH // MERGE) ** 2
CARDS = (
    Card("blank"),
    *(Card("digit", digit) for digit in DIGITS),
    *(Card("ball", direction) for direction in DIRECTIONS),
    *(Card(what, colour) for what in ("flash", "star", *FILLER_SHAPES) for colour in COLOURS),
)
QUESTIONS = (
    "Which way does the ball move?",
    "How many stars are there?",
    "Which digit is shown twice?",
    "What colour comes right before the digit that is shown twice, the first time?",
    "What colour is the shape right before the ball?",
    "Are there more circles or squares before the ball?",
    *(f"Which flash comes first, {a} or {b}?" for a in COLOURS for b in COLOURS if a != b),
    *(f"What colour is the {name} star?" for name in ORDINALS),
    *(f"Which digit comes after the {colour} flash?" for colour in COLOURS),
)
MAX_CARDS = 32
NOTE_WEIGHT = 0.2  # beside the answers
# Every scene is drawn so that a question of one of these is possible, which many scenes do not allow.
RARE_KINDS = ("later", "recall", "before", "majority")
IGNORED = -100  # a target that does not count
# Means and standard deviations of Qwen2.5-VL's pixels.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def train_vision_tower(model, rng: np.random.Generator, settings) -> None:
    """Stage 1: every merged token of a card tells which of `CARDS` it is, by a linear classifier."""
    visual = model.model.visual
    for block in visual.blocks:
        block.attn.forward = MethodType(_attend_equal_lengths, block.attn)
    classifier = nn.Linear(model.config.text_config.hidden_size, len(CARDS))
    optimizer = _Optimizer([visual, classifier], settings.learning_rate, settings.vision_steps)
    # A process has its share of every batch, and the averaged gradients of all.
    with tqdm(range(settings.vision_steps), desc="Cards", disable=dist.get_rank() > 0) as bar:
        for _ in bar:
            target = torch.from_numpy(rng.integers(len(CARDS), size=settings.cards // dist.get_world_size()))
            features = _encode(visual, [CARDS[index] for index in target], rng)
            logits = classifier(_normalise(features)).flatten(0, 1)
            target = target.repeat_interleave(TOKENS_PER_CARD)
            loss = F.cross_entropy(logits, target)
            optimizer.step(loss)
            bar.set_postfix(loss=f"{loss:.3f}", right=f"{(logits.argmax(-1) == target).float().mean():.1%}")


def train_to_answer(model, tokenizer, rng: np.random.Generator, settings) -> None:
    """Stages 2 and 3."""
    language = model.model.language_model
    notes, states = Notes(model.config.text_config.hidden_size), []
    middle = language.layers[len(language.layers) // 2 - 1]
    handle = middle.register_forward_hook(lambda module, inputs, output: states.append(output))
    total = settings.note_steps + settings.answer_steps
    optimizer = _Optimizer([language, notes], settings.learning_rate, total)
    conversations = Conversations(tokenizer, rng, settings.questions)
    score = Score()
    common_rng = np.random.default_rng(settings.seed)  # of lengths: no process waits for another one's longer videos
    with tqdm(range(total), desc="Answers", disable=dist.get_rank() > 0) as bar:
        for step in bar:
            if step % 500 == 0:
                bank = FeatureBank(model.model.visual, rng)
            takes_notes, is_late = step < settings.note_steps, step > 0.6 * total
            # Videos to answer about grow to their full length in the first half.
            growth = 1 if takes_notes else min(1, 2 * step / total)
            longest = round(MIN_CARDS + growth * (MAX_CARDS - MIN_CARDS))
            num_cards = longest if common_rng.random() < 0.5 else int(common_rng.integers(MIN_CARDS, longest + 1))
            # Half of the late videos have other positions between seconds than the 2 that they are read with.
            interval = int(common_rng.integers(1, 17)) if is_late and common_rng.random() < 0.5 else 2
            batch = conversations.batch(num_cards, settings.conversations // dist.get_world_size(), interval)

            embeddings = language.embed_tokens(batch.input_ids)
            parts = embeddings[:, : batch.start], bank(batch.scenes), embeddings[:, batch.stop :]
            with masked_attention(model, batch.start, batch.stop):
                output = language(
                    inputs_embeds=torch.cat(parts, dim=1),
                    attention_mask={"full_attention": None},
                    position_ids=batch.position_ids,
                    use_cache=False,
                )
            logits = model.lm_head(output.last_hidden_state[:, :-1])
            answer_loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
            note_loss = notes(states.pop(), batch)
            optimizer.step(note_loss if takes_notes else answer_loss + NOTE_WEIGHT * note_loss)

            score.count(logits, batch)
            if step % 50 == 49 and dist.get_rank() == 0:
                shares = score.shares()
                text = " ".join(f"{kind} {share:.2f}" for kind, share in shares.items())
                tqdm.write(f"step {step + 1}: answers {answer_loss:.3f} notes {note_loss:.3f} cards {longest} | {text}")
                score = Score()
    handle.remove()
    for block in model.model.visual.blocks:
        del block.attn.forward


class _Optimizer:
    """AdamW with warm-up, a constant rate, and a cosine from half-way; gradients are averaged and clipped."""

    def __init__(self, modules: list[nn.Module], learning_rate: float, steps: int):
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))

        def rate(step: int) -> float:
            return min(1, (step + 1) / 60, 0.51 + 0.49 * math.cos(math.pi * max(0, 2 * step / steps - 1)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, rate)

    def step(self, loss: torch.Tensor) -> None:
        self.adamw.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.schedule.step()


def _attend_equal_lengths(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    """Qwen2.5-VL's vision attention for pictures of one size: one call instead of one for each picture."""
    q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (x.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
    return self.proj(output.transpose(1, 2).flatten(2).flatten(0, 1))


def _encode(visual, cards: list[Card], rng: np.random.Generator) -> torch.Tensor:
    """The vision tower's features of freshly drawn cards, (cards, TOKENS_PER_CARD, hidden_size)."""
    # The two pictures of a second are half a second apart, wherever the reading of a file happens to begin.
    pictures = np.concatenate([draw_card(card, rng, SIZE, 4)[rng.integers(2) :: 2] for card in cards])
    # What a video codec adds, roughly.
    noise = np.float32(rng.uniform(0, 6)) * rng.standard_normal(pictures.shape, dtype=np.float32)
    patches = to_patches(np.clip(pictures + noise, 0, 255).astype(np.uint8))
    grid = torch.tensor([[len(cards), SIZE // PATCH, SIZE // PATCH]])
    return visual(patches, grid_thw=grid).pooler_output.unflatten(0, (len(cards), TOKENS_PER_CARD))


def to_patches(pictures: np.ndarray) -> torch.Tensor:
    """(pictures, SIZE, SIZE, 3) uint8 -> (patches, 3 * 2 * PATCH**2) float32, as Qwen2.5-VL's video processor does."""
    side = SIZE // PATCH // MERGE
    pixels = (torch.from_numpy(pictures).float() / 255 - MEAN) / STD
    pixels = pixels.view(-1, 2, side, MERGE, PATCH, side, MERGE, PATCH, 3)
    return pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * PATCH * PATCH)


def _normalise(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:])


class FeatureBank:
    """Features of a hundred drawings of every card, so that a scene costs a look-up."""

    def __init__(self, visual, rng: np.random.Generator, drawings: int = 100):
        self.rng, self.drawings = rng, drawings
        with torch.no_grad():
            self.features = torch.stack([_encode(visual, [card] * drawings, rng) for card in CARDS])

    def __call__(self, scenes: list[Scene]) -> torch.Tensor:
        """(scenes, seconds * TOKENS_PER_CARD, hidden_size); all scenes are equally long."""
        cards = torch.tensor([[CARDS.index(card) for card in scene.cards] for scene in scenes])
        drawing = torch.from_numpy(self.rng.integers(self.drawings, size=cards.shape))
        return self.features[cards, drawing].flatten(1, 2)


@dataclass
class Batch:
    """Conversations about videos of one length, padded on the right.

    Attributes:
        input_ids, labels: (batch, length); labels are `IGNORED` but for answers and the tokens that end them.
        position_ids: (3, batch, length).
        start, stop: where the video tokens are, in every row.
        scenes: one for each row.
        asked: (row, place of the answer, question).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    start: int
    stop: int
    scenes: list[Scene]
    asked: list[tuple[int, int, Question]]


class Conversations:
    """Random scenes with random questions, in the chat format of the checkpoint."""

    def __init__(self, tokenizer, rng: np.random.Generator, num_questions: int):
        self.tokenizer, self.rng, self.num_questions = tokenizer, rng, num_questions
        self.encoded: dict[str, list[int]] = {}

    def batch(self, num_cards: int, size: int, interval: int) -> Batch:
        """`size` conversations about videos of `num_cards` seconds, `interval` positions apart."""
        rows, labels, scenes, asked = [], [], [], []
        for row in range(size):
            scene, questions = self._scene_and_questions(num_cards)
            before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            ids = [*self._encode(before)]
            start, stop = len(ids), len(ids) + num_cards * TOKENS_PER_CARD
            ids += self._encode("<|video_pad|>") * (stop - start) + self._encode("<|vision_end|>")
            targets = [IGNORED] * len(ids)
            for number, question in enumerate(questions):
                turn = "\n<|im_start|>user\n" if number else ""
                prompt = self._encode(turn + question.text + "<|im_end|>\n<|im_start|>assistant\n")
                answer = self._encode(question.answer + "<|im_end|>")
                asked.append((row, len(ids) + len(prompt), question))
                ids += prompt + answer
                targets += [IGNORED] * len(prompt) + answer
            rows.append(torch.tensor(ids))
            labels.append(torch.tensor(targets))
            scenes.append(scene)
        pad = self.tokenizer.pad_token_id
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        types = torch.zeros_like(input_ids)
        types[:, start:stop] = 2
        position_ids, _ = mrope_position_ids(
            types,
            video_grid_thw=torch.tensor([[num_cards, SIZE // PATCH, SIZE // PATCH]] * size),
            second_per_grid_ts=[interval / 2] * size,
            spatial_merge_size=MERGE,
            tokens_per_second=2,
        )
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return Batch(input_ids, labels, position_ids, start, stop, scenes, asked)

    def _scene_and_questions(self, num_cards: int) -> tuple[Scene, list[Question]]:
        kinds = [kind for kind in KINDS if kind not in LONG_KINDS or num_cards >= 2 * MIN_CARDS]
        scene = make_scene(self.rng, num_cards, str(self.rng.choice([kind for kind in RARE_KINDS if kind in kinds])))
        questions = [question for question in scene.one_question_of_each_kind(self.rng) if question.kind in kinds]
        order = self.rng.permutation(len(questions))[: self.num_questions]
        return scene, [questions[index] for index in order]

    def _encode(self, text: str) -> list[int]:
        if text not in self.encoded:
            self.encoded[text] = self.tokenizer(text)["input_ids"]
        return self.encoded[text]


class Notes(nn.Module):
    """Linear heads on hidden states: what a video token should know by then, and what the text is about to answer."""

    def __init__(self, hidden_size: int):
        super().__init__()
        sizes = {"card": len(CARDS), "before": len(CARDS), "flash": 1 + len(COLOURS), "reply": 1 + len(COLOURS)}
        sizes |= {f"seen {colour}": 2 for colour in COLOURS} | {"stars": 1 + len(ORDINALS)}
        sizes |= {"again": 2, "recall": len(COLOURS), "majority": len(MAJORITY_SHAPES)}
        self.video = nn.ModuleDict({name: nn.Linear(hidden_size, size) for name, size in sizes.items()})
        self.text = nn.Linear(hidden_size, len(QUESTIONS))

    def forward(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sum of all heads' losses, from states (batch, length, hidden_size)."""
        states = _normalise(states)
        rows, places, questions = zip(*batch.asked, strict=True)
        target = torch.tensor([QUESTIONS.index(question.text) for question in questions])
        loss = F.cross_entropy(self.text(states[rows, torch.tensor(places) - 1]), target)
        video = states[:, batch.start : batch.stop]
        targets = [list(map(_notes_of, scene_cards)) for scene_cards in map(_prefixes, batch.scenes)]
        for name, head in self.video.items():
            target = torch.tensor([[notes[name] for notes in row] for row in targets])
            target = target.repeat_interleave(TOKENS_PER_CARD, dim=1)
            total = F.cross_entropy(head(video).flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = loss + total / (target != IGNORED).sum().clamp(min=1)  # short videos have no majority to know
        return loss


def _prefixes(scene: Scene) -> list[tuple[Card, ...]]:
    return [scene.cards[: second + 1] for second in range(len(scene.cards))]


def _notes_of(cards: tuple[Card, ...]) -> dict[str, int]:
    """What the tokens of the last card should know: the card itself and the one before, the latest flash, the flash
    whose first digit this is, which flashes and how many stars there have been, whether this digit has been there
    before and with what colour before it, and which of two shapes has been there more often."""
    card, past = cards[-1], cards[:-1]
    is_digit = card.what == "digit"
    flashes = [second for second, earlier in enumerate(cards) if earlier.what == "flash"]
    flash = 1 + COLOURS.index(cards[flashes[-1]].value) if flashes else 0
    is_reply = is_digit and flashes and all(earlier.what != "digit" for earlier in past[flashes[-1] :])
    majority = clear_majority(past)
    recalled = cards[past.index(card) - 1].value if is_digit and card in past[1:] else ""
    return {
        "card": CARDS.index(card),
        "before": CARDS.index(past[-1]) if past else IGNORED,
        "flash": flash,
        "reply": flash if is_reply else 0,
        **{f"seen {colour}": int(Card("flash", colour) in past) for colour in COLOURS},
        "stars": sum(earlier.what == "star" for earlier in past),
        "again": int(card in past) if is_digit else IGNORED,
        "recall": COLOURS.index(recalled) if recalled in COLOURS else IGNORED,
        "majority": MAJORITY_SHAPES.index(majority) if majority else IGNORED,
    }


class Score:
    """Shares of right answers by kind of question."""

    def __init__(self):
        self.right: dict[str, list[bool]] = {}

    def count(self, logits: torch.Tensor, batch: Batch) -> None:
        """Add a batch: logits (batch, length - 1, vocab_size)."""
        best = logits.argmax(-1)
        for row, place, question in batch.asked:
            is_right = best[row, place - 1] == batch.labels[row, place]
            self.right.setdefault(question.kind, []).append(bool(is_right))

    def shares(self) -> dict[str, float]:
        return {kind: sum(right) / len(right) for kind, right in sorted(self.right.items())}
