"""End-to-end prefill of a 7B model with random weights, sparse against dense, on one GPU.

    python benchmarks/bench_prefill.py --output prefill.json [--tokens 8192 ...] [--seconds 120]
    TRITON_INTERPRET=1 python benchmarks/bench_prefill.py --dry-run        # a tiny model on a CPU; times mean nothing

The model is the one that config.json describes, without its vision tower: random embeddings stand in for a prompt of 20
text tokens, a video of so many tokens in frames of 256, and a question of 100 text tokens. One call fills the cache and
computes the last token's logits. Sparse and dense share their weights; dense is Qwen2.5-VL's attention through torch's
FlashAttention and cuDNN kernels. The report is written after every measurement. It also says, layer by layer, how many
blocks neighbouring tokens select together (benchmarks/unions.py), on this model's own q and k: its embeddings have the
structure of a video, but its weights are random.

The model needs transformers 5.20 or later. 5.17 can run this script all the same: the one thing that is missing there
names sub-configurations, and gets a stand-in.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:  # the interpreter has to be chosen before Triton is imported, which torch may do
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import timing  # noqa: E402
import unions  # noqa: E402

from positions_videonsa import mrope_position_ids  # noqa: E402

# Long prompts say most, but take most of the time: one that takes little comes first.
TOKENS = [32768, 131072, 8192, 65536, 16384]
TEXT_BEFORE, TEXT_AFTER, FRAME_SIDE = 20, 100, 16
TINY = {
    "hidden_size": 224,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "vocab_size": 151700,
    "block_size": 16,
    "block_counts": 2,
    "window_size": 24,
}
if DRY_RUN:
    TOKENS, TEXT_BEFORE, TEXT_AFTER, FRAME_SIDE = [64], 3, 5, 4


def stand_in_for_sub_config_specs() -> None:
    """transformers before 5.20 names a sub-configuration by its class."""
    from transformers import configuration_utils

    if not hasattr(configuration_utils, "SubConfigSpec"):
        configuration_utils.SubConfigSpec = lambda config_class: config_class


def build_model(device: torch.device, dtype: torch.dtype):
    """The model of config.json with random weights and a vision tower of one layer, which is not used."""
    from configuration_videonsa import VideoNSAConfig
    from modeling_videonsa import VideoNSAForConditionalGeneration

    config = VideoNSAConfig.from_pretrained(ROOT)
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 1, [0]
    config.text_config.nsa_backend = "triton"
    if DRY_RUN:
        for name, value in TINY.items():
            setattr(config.text_config, name, value)
        config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
        config.text_config.layer_types = config.text_config.layer_types[: TINY["num_hidden_layers"]]
        config.vision_config.hidden_size, config.vision_config.out_hidden_size = 32, TINY["hidden_size"]
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = VideoNSAForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_prompt(model, tokens: int, device: torch.device, dtype: torch.dtype) -> dict:
    frames = tokens // FRAME_SIDE**2
    types = torch.tensor([0] * TEXT_BEFORE + [2] * (frames * FRAME_SIDE**2) + [0] * TEXT_AFTER)[None]
    merge = model.config.vision_config.spatial_merge_size
    grid = torch.tensor([[frames, FRAME_SIDE * merge, FRAME_SIDE * merge]])
    positions, _ = mrope_position_ids(
        types, video_grid_thw=grid, spatial_merge_size=merge, tokens_per_second=2, second_per_grid_ts=[1.0]
    )
    hidden_size = model.config.text_config.hidden_size
    generator = torch.Generator(device=device).manual_seed(0)
    embeddings = torch.randn(*types.shape, hidden_size, device=device, dtype=dtype, generator=generator)
    is_video = (types[0] == 2).to(device)
    embeddings[0, is_video] = timing.video_content(int(is_video.sum()), (hidden_size,), generator).to(dtype)
    return {
        "inputs_embeds": embeddings,
        "mm_token_type_ids": types.to(device),
        "position_ids": positions.to(device),
        "use_cache": True,
        "logits_to_keep": 1,
    }


@contextlib.contextmanager
def running(model, mode: str):
    """`mode` is "sparse", "dense flash" or "dense cudnn"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"dense flash": SDPBackend.FLASH_ATTENTION, "dense cudnn": SDPBackend.CUDNN_ATTENTION}
    model.config.nsa_mode = mode.split()[0]
    with sdpa_kernel([kernels[mode]]) if mode in kernels else contextlib.nullcontext():
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="video tokens, multiples of 256")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=600, help="stop starting measurements after this long")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, on the CPU where there is no GPU")
    args = parser.parse_args()

    import transformers

    stand_in_for_sub_config_specs()
    device = timing.choose_device(args.dry_run)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    watch = timing.Stopwatch(device, args.seconds, seconds_per_measurement=2.0)
    model = build_model(device, dtype)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "machine": timing.describe_machine(device) | {"transformers": transformers.__version__},
        "parameters": sum(p.numel() for name, p in model.named_parameters() if "visual" not in name),
        "text_tokens": TEXT_BEFORE + TEXT_AFTER,
        "lengths": [],
    }
    for tokens in args.tokens:
        if watch.is_over():
            break
        prompt = make_prompt(model, tokens, device, dtype)
        row, logits = {"tokens": tokens}, {}
        report["lengths"].append(row)
        for mode in ("sparse", "dense flash", "dense cudnn"):

            def prefill(mode=mode, prompt=prompt, logits=logits):
                with torch.no_grad(), running(model, mode):
                    logits[mode] = model(**prompt).logits

            row[mode] = watch.measure(prefill, repeats=(1, 5))
            if mode == "sparse" and "ms" in row[mode] and not watch.is_over():
                with unions.recording() as row["unions"]:
                    prefill()
            if args.output:
                timing.write_report(args.output, report)
        if {"sparse", "dense flash"} <= logits.keys():
            # Not a measure of quality, with random weights: it shows that two different attentions ran.
            row["largest_difference_of_logits"] = float((logits["sparse"] - logits["dense flash"]).abs().max())
        for mode in ("dense flash", "dense cudnn"):
            if row["sparse"].get("ms") and row[mode].get("ms"):
                row[f"{mode} / sparse"] = row[mode]["ms"] / row["sparse"]["ms"]
        print({name: value for name, value in row.items() if name != "unions"}, flush=True)
        if row.get("unions"):
            print(f"  r by layer: {[round(layer['r'], 2) for layer in row['unions'] if layer]}", flush=True)
        if args.output:
            timing.write_report(args.output, report)
    print_table(report)


def print_table(report: dict) -> None:
    print(f"{'tokens':>8} {'sparse':>24} {'dense flash':>24} {'dense cudnn':>24}")
    for row in sorted(report["lengths"], key=lambda row: row["tokens"]):
        cells = []
        for mode in ("sparse", "dense flash", "dense cudnn"):
            result = row.get(mode, {"not measured": None})
            peak = f", {result['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in result else ""
            cells.append(f"{result['ms']:.0f} ms{peak}" if "ms" in result else next(iter(result)))
        print(f"{row['tokens']:>8} " + " ".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
