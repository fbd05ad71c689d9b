"""Shared fixtures: a tiny model with gates that matter, and prompts written as layouts."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import triton_testing  # noqa: F401  first: it decides how Triton runs, before transformers imports it

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "checkpoints"), str(ROOT / "benchmarks")]

from tiny_random import save_tiny_qwen2_5_vl, tiny_config, tiny_tokenizer  # noqa: E402

from configuration_videonsa import VideoNSAConfig  # noqa: E402
from modeling_videonsa import VideoNSAForConditionalGeneration  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def build_config(text: dict | None = None, **nsa_fields) -> VideoNSAConfig:
    """The tiny configuration with blocks and windows so small that a video of 30 tokens is long.

    `text` overrides fields of Qwen2.5-VL's text configuration.
    """
    qwen = tiny_config(tiny_tokenizer(), **(text or {})).to_dict()
    for part in (qwen, qwen["text_config"]):
        for key in ("model_type", "architectures", "transformers_version"):
            part.pop(key, None)
    return VideoNSAConfig(**qwen, **({"block_size": 4, "block_counts": 2, "window_size": 5} | nsa_fields))


def build_model(dtype=torch.float64, seed=0, attn_implementation="sdpa", text=None, **nsa_fields):
    """A random tiny model. Its weights are wide and its gates differ, so that every attention error shows."""
    config = build_config(text, **nsa_fields)
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VideoNSAForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                torch.nn.init.normal_(parameter, mean=float(parameter.mean() > 0.5), std=0.1)
    # No end-of-sequence token: every generation has the length it was asked for.
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def noisy_checkpoint() -> VideoNSAForConditionalGeneration:
    """The small checkpoint in float64 with noise, so that heads differ and it says something else of every video."""
    model = VideoNSAForConditionalGeneration.from_pretrained(ROOT / "checkpoints" / "tiny", dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * weight.std(), alpha=0.7)
    # Tokens that differ, as many as are asked for.
    model.generation_config.update(no_repeat_ngram_size=1, eos_token_id=10**6)
    return model


def build_released(dtype=torch.float64, text=None, **options):
    """`build_model` with `nsa_variant="released"`, which wants 28 heads."""
    shape = {"hidden_size": 448, "intermediate_size": 64, "num_attention_heads": 28, "num_key_value_heads": 4}
    nsa = {"nsa_variant": "released", "block_size": 8, "block_counts": 2, "window_size": 5}
    return build_model(dtype, text=shape | (text or {}), **(nsa | options))


class Prompts:
    """Builds model inputs from layouts such as `[5, ("video", 4, 4, 4), 3]`.

    A number is that many random text tokens; `("video", t, h, w)` and `("image", h, w)` are grids in patches (`h` and
    `w` even), of `t * h * w / 4` tokens.
    """

    def __init__(self, config: VideoNSAConfig, dtype=torch.float64):
        self.config, self.dtype = config, dtype

    def one(self, layout: list, seed: int = 0, seconds_per_grid: float = 1.0) -> dict:
        generator = torch.Generator().manual_seed(seed)
        ids, types = [], []
        inputs = {"pixel_values": [], "pixel_values_videos": [], "image_grid_thw": [], "video_grid_thw": []}
        for part in layout:
            if isinstance(part, int):
                ids.append(torch.randint(0, 250, (part,), generator=generator))
                types.append(torch.zeros(part, dtype=torch.long))
                continue
            kind, *grid = part
            grid = [1, *grid] if kind == "image" else grid
            num_patches = grid[0] * grid[1] * grid[2]
            token, number = (self.config.image_token_id, 1) if kind == "image" else (self.config.video_token_id, 2)
            ids.append(torch.full((num_patches // 4,), token))
            types.append(torch.full((num_patches // 4,), number))
            pixels = torch.randn(num_patches, 3 * 2 * 14 * 14, generator=generator, dtype=torch.float64)
            inputs["pixel_values" if kind == "image" else "pixel_values_videos"].append(pixels.to(self.dtype))
            inputs[f"{kind}_grid_thw"].append(grid)
        result = {
            "input_ids": torch.cat(ids)[None],
            "mm_token_type_ids": torch.cat(types)[None],
            "attention_mask": torch.ones(1, sum(map(len, ids)), dtype=torch.long),
        }
        for key in ("pixel_values", "pixel_values_videos"):
            if inputs[key]:
                result[key] = torch.cat(inputs[key])
        for key in ("image_grid_thw", "video_grid_thw"):
            if inputs[key]:
                result[key] = torch.tensor(inputs[key])
        if inputs["video_grid_thw"]:
            result["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), seconds_per_grid)
        return result

    @staticmethod
    def batch(prompts: list[dict], side: str = "left", pad_token_id: int = 256) -> dict:
        """Pad prompts to one length and stack them."""
        length = max(prompt["input_ids"].shape[1] for prompt in prompts)
        result = {}
        for key, fill in (("input_ids", pad_token_id), ("mm_token_type_ids", 0), ("attention_mask", 0)):
            rows = []
            for prompt in prompts:
                missing = length - prompt[key].shape[1]
                pad = (missing, 0) if side == "left" else (0, missing)
                rows.append(torch.nn.functional.pad(prompt[key], pad, value=fill))
            result[key] = torch.cat(rows)
        for key in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            parts = [prompt[key] for prompt in prompts if key in prompt]
            if parts:
                result[key] = torch.cat(parts)
        return result


def assert_padding_between_tokens_changes_nothing(model, prompts, video) -> None:
    """Holes in the mask, as a batched second turn leaves them, are no tokens."""
    single = prompts.one([5, video, 7])
    keep = torch.ones(single["input_ids"].shape[1] + 4, dtype=torch.bool)
    keep[[0, 3, 20, 49]] = False
    padded = dict(single)
    for key, fill in (("input_ids", 256), ("mm_token_type_ids", 0), ("attention_mask", 0)):
        padded[key] = torch.full((1, len(keep)), fill)
        padded[key][:, keep] = single[key]
    with torch.no_grad():
        # The vision tower's features are scattered by token id, so the holes may be anywhere.
        torch.testing.assert_close(model(**padded).logits[:, keep], model(**single).logits, atol=1e-9, rtol=1e-9)


def assert_batch_equals_singles(model, prompts: Prompts, layouts, side: str) -> None:
    """Prompts of these layouts have the logits in a batch, padded on that side, that they have alone."""
    singles = [prompts.one(layout, seed) for seed, layout in enumerate(layouts)]
    batch = prompts.batch(singles, side)
    with torch.no_grad():
        logits = model(**batch).logits
        for sample, single in enumerate(singles):
            valid = batch["attention_mask"][sample].bool()
            torch.testing.assert_close(logits[sample, valid], model(**single).logits[0], atol=1e-9, rtol=1e-9)


def assert_errs_no_more_than_dense(truth, low, inputs) -> None:
    """`low`, of few bits, errs at most twice as much in sparse mode as in dense mode; `truth` has the same weights.

    They must select every block: rounding may choose others.
    """
    errors = {}
    with torch.no_grad():
        for mode in ("sparse", "dense"):
            truth.config.nsa_mode = low.config.nsa_mode = mode
            output = low(**inputs).logits
            assert output.dtype == low.dtype
            errors[mode] = (output.double() - truth(**inputs).logits).abs().mean()
    assert errors["sparse"] < 2 * errors["dense"]


def assert_autocast_trains(model, inputs) -> None:
    """float32 weights under autocast, as transformers' Trainer runs `bf16=True`."""
    inputs = inputs | {"pixel_values_videos": inputs["pixel_values_videos"].float()}
    with torch.no_grad():
        expected = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    output.loss.backward()
    assert (output.logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.model.language_model.parameters())


def our_nodes(graph: torch.fx.GraphModule) -> list[str]:
    """The operators of `nsa_kernels` in a graph, in their order."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("videonsa_")]


def checkpoint_activations(model) -> None:
    """Gradient checkpointing on, by the name that transformers has for it; 5.20 knows the older one alone."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def assert_checkpointing_changes_no_gradient(build, prompts, video) -> None:
    """With the model that `build()` returns, every gradient is there, the gates' are not zero, and none changes."""
    inputs = prompts.batch([prompts.one([3, video, 4]), prompts.one([2, ("image", 4, 4), 8], seed=1)])
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] != 0, -100)
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            checkpoint_activations(model)
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-9)
    assert all(gradients[0][name].abs().max() > 0 for name in gradients[0] if "g_proj" in name)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return Prompts(build_config())


@pytest.fixture
def model():
    return build_model()


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> dict[str, Path]:
    """Tiny Qwen2.5-VL checkpoints, never written to."""
    root = tmp_path_factory.mktemp("qwen")
    return {
        "old": save_tiny_qwen2_5_vl(root / "old", layout="old"),
        "old tied": save_tiny_qwen2_5_vl(root / "old_tied", layout="old", tie_word_embeddings=True),
        "new": save_tiny_qwen2_5_vl(root / "new"),
        "new sharded": save_tiny_qwen2_5_vl(root / "new_sharded", max_shard_size="100KB"),
        "new tied": save_tiny_qwen2_5_vl(root / "new_tied", tie_word_embeddings=True),
    }


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    """A sharded checkpoint that a test may damage."""
    return Path(shutil.copytree(pristine["new sharded"], tmp_path / "source"))
