"""Train or fine-tune VideoNSA.

    python train.py configs/tiny.yaml --model path/to/checkpoint --train_data my.jsonl --output_dir out
    accelerate launch --config_file configs/accelerate_fsdp2.yaml train.py configs/paper_7b.yaml ...

Arguments come from YAML files and flags; `python train.py --help` lists them, docs/training.md explains them. On top of
transformers' Trainer and accelerate: one GPU, several (DDP), sharded (FSDP2, DeepSpeed), with the tokens of a sample
shared over several (`sequence_parallel_size`).

From top to bottom: arguments, data, model, training, result.
"""

import logging
import sys
from pathlib import Path

import torch
from transformers import set_seed

from configuration_videonsa import VideoNSAConfig
from modeling_videonsa import VideoNSAForConditionalGeneration
from processing_videonsa import VideoNSAProcessor
from training.arguments import TrainArguments, parse_arguments
from training.data import VideoDataset
from training.manifest import load_or_build_manifests
from training.monitor import FailureMonitor
from training.parts import add_lora, freeze_parts
from training.trainer import VideoNSATrainer, is_whole, last_whole_checkpoint, set_unfinished_checkpoints_aside

logger = logging.getLogger("training")

# In the output folder. What begins with an underscore is not pushed to the Hub: it holds the training data's texts.
DATA_FOLDER = "_data"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    set_seed(args.seed)
    checkpoint = find_checkpoint(args)

    processor = load_processor(args)
    train_data, eval_data = prepare_data(args, processor, is_resumed=checkpoint is not None)
    if args.prepare_only:
        return

    model, dtype = load_model(args)
    options = args.data_options()
    trainer = VideoNSATrainer(
        model,
        args,
        train_dataset=VideoDataset(train_data, processor, options),
        eval_dataset=VideoDataset(eval_data, processor, options) if eval_data is not None else None,
        failures=FailureMonitor(sum(train_data.report.bad.values()), train_data.report.records, args.max_bad_share),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.failures.check()

    save_result(trainer, args, processor, dtype)
    if args.push_to_hub:
        push(trainer, args)


def find_checkpoint(args: TrainArguments) -> str | None:
    """Where to go on from, or None for a new run.

    Raises:
        ValueError: the output folder holds another run's checkpoints, or what it must not; or there is no checkpoint
            where one was named.
    """
    wanted = args.resume_from_checkpoint
    for name, folder in (("`model`", Path(args.model)), ("the folder of train.py", Path(__file__).parent)):
        if folder.is_dir() and Path(args.output_dir).resolve() == folder.resolve():
            raise ValueError(f"`output_dir` = {args.output_dir} is {name}, where files would be overwritten")
    if wanted is None and any(Path(args.output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"`output_dir` = {args.output_dir} holds checkpoints: go on with --resume_from_checkpoint auto, or choose "
            "another"
        )
    if wanted not in (None, "auto") and not is_whole(wanted):
        raise ValueError(f"`resume_from_checkpoint` must be 'auto' or the folder of a whole checkpoint, got {wanted!r}")
    if wanted != "auto":
        return wanted
    with args.main_process_first(local=False):
        if args.process_index == 0:
            set_unfinished_checkpoints_aside(args.output_dir)
        return last_whole_checkpoint(args.output_dir)


def load_processor(args: TrainArguments) -> VideoNSAProcessor:
    """The checkpoint's processor; from here on, and so in the result, its defaults are those of the training."""
    processor = VideoNSAProcessor.from_pretrained(args.model, trust_remote_code=True)
    processor.fps, processor.num_frames = args.fps, None
    processor.max_pixels_per_frame = args.max_pixels_per_frame
    processor.min_pixels_per_frame = min(processor.min_pixels_per_frame, args.max_pixels_per_frame)
    return processor


def prepare_data(args: TrainArguments, processor: VideoNSAProcessor, *, is_resumed: bool):
    """The manifests to train on and to evaluate on (None where there is no such data)."""
    folder = Path(args.output_dir) / DATA_FOLDER
    settings = {"num_workers": args.prepare_workers, "must_be_unchanged": is_resumed}
    options = args.data_options()
    # The main process looks at the data, the others then read what it wrote.
    with args.main_process_first(local=False, desc="looking at the data"):
        train_data, eval_data = load_or_build_manifests(args.train_data, folder, processor, options, **settings)
        if args.eval_data:
            eval_data, _ = load_or_build_manifests(args.eval_data, folder / "eval", processor, options, **settings)
    if eval_data is not None and not len(eval_data):
        raise ValueError(f"`eval_share` = {args.eval_share} holds out none of the videos")
    return train_data, eval_data


def load_model(args: TrainArguments):
    """The model to train, and the dtype that the result will have.

    Trained weights are float32, whatever the checkpoint's dtype: at a learning rate of 1e-6, bfloat16 rounds every step
    away. With `bf16`, accelerate computes in bfloat16; frozen weights of a LoRA run are then kept in it.
    """
    config, _ = VideoNSAConfig.get_config_dict(args.model)
    if config.get("model_type") != VideoNSAConfig.model_type:
        kind = config.get("model_type")
        raise ValueError(f"`model` = {args.model} is a {kind} checkpoint: convert it with convert_weights.py first")
    nsa = {"nsa_mode": args.attention} | ({"nsa_backend": args.nsa_backend} if args.nsa_backend else {})
    model = VideoNSAForConditionalGeneration.from_pretrained(
        args.model,
        dtype=torch.bfloat16 if args.lora_rank and args.bf16 else torch.float32,
        attn_implementation=args.attn_implementation,
        **nsa,
    )
    # Checkpoints keep the model's own names, which the Trainer resumes by, whatever names this one came with.
    model._weight_conversions = []
    train_gates = args.attention == "sparse" and "gates" not in args.freeze
    if args.lora_rank:
        model = add_lora(
            model, rank=args.lora_rank, alpha=args.lora_alpha, dropout=args.lora_dropout, train_gates=train_gates
        )
    else:
        freeze_parts(model, {*args.freeze, *([] if train_gates else ["gates"])})
    if args.attention == "sparse" and model.config.nsa_variant != "paper":
        for name, unset in (("packing", False), ("sequence_parallel_size", 1)):
            if getattr(args, name) != unset:
                raise ValueError(f"`{name}` = {getattr(args, name)} needs a checkpoint with nsa_variant='paper'")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("Training %.1f M of %.1f M parameters", trained / 1e6, model.num_parameters() / 1e6)
    return model, getattr(torch, config.get("dtype") or "float32")


def save_result(
    trainer: VideoNSATrainer, args: TrainArguments, processor: VideoNSAProcessor, dtype: torch.dtype
) -> None:
    """Write the trained model into the output folder, whole, in the dtype of the checkpoint it came from.

    Adapters are merged, and kept apart in `adapter/`.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered, where it is sharded
    if not args.should_save:
        return
    if args.lora_rank:
        trained.save_pretrained(Path(args.output_dir) / "adapter", state_dict=weights)
        from peft import PeftModel

        del weights
        model = VideoNSAForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, Path(args.output_dir) / "adapter").merge_and_unload().to(dtype)
        model.config.nsa_mode = args.attention
    else:
        # A model of its own class again, which FSDP changes, and without memory of its own.
        with torch.device("meta"):
            model = VideoNSAForConditionalGeneration(trained.config).to(dtype)
        model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
        model.tie_weights()
        model.generation_config = trained.generation_config
    model.config.use_cache = True
    model.config.nsa_backend = VideoNSAConfig.from_pretrained(args.model).nsa_backend  # that of this machine ends here
    model.save_pretrained(args.output_dir, save_original_format=False)
    processor.save_pretrained(args.output_dir)
    logger.info("The trained model is in %s", args.output_dir)


def push(trainer: VideoNSATrainer, args: TrainArguments) -> None:
    """Upload the result, its model card and its TensorBoard logs."""
    if args.process_index != 0:
        return
    from huggingface_hub import upload_folder

    trainer.create_model_card(tags=["videonsa", "custom_code"])
    upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=args.output_dir,
        commit_message="Trained model",
        revision=args.hub_revision,
        ignore_patterns=["_*", "checkpoint-*"],
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"train.py: error: {error}") from error
