"""Arguments of `train.py`: transformers' TrainingArguments and what is VideoNSA's own, from YAML files and flags."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .manifest import DataOptions
from .parts import PARTS


@dataclass
class TrainArguments(TrainingArguments):
    """transformers' `TrainingArguments`, and:

    Raises:
        ValueError: a value out of range, or values that contradict each other.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "VideoNSA checkpoint to start from: a folder or a Hub id (see convert_weights.py)"},
    )
    attention: str = field(
        default="sparse",
        metadata={"help": '"sparse": Native Sparse Attention; "dense": Qwen2.5-VL\'s, the Dense-SFT baseline'},
    )
    nsa_backend: str | None = field(
        default=None, metadata={"help": '"torch", "triton" or "reference"; default: the checkpoint\'s'}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "of text rows and of the vision tower: sdpa, eager, flash_attention_2"}
    )

    train_data: list[str] = field(default_factory=list, metadata={"help": "files of records, .json or .jsonl"})
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "files of records to evaluate on; or give `eval_share`"}
    )
    eval_share: float = field(
        default=0.0, metadata={"help": "share of the training videos that is held out for evaluation"}
    )
    video_folder: str = field(default=".", metadata={"help": "what relative paths of videos are relative to"})
    fps: float = field(default=4.0, metadata={"help": "frames per second to sample"})
    min_frames: int | None = field(
        default=None, metadata={"help": "leave out records whose videos have, sampled, fewer frames"}
    )
    max_frames: int | None = field(
        default=None, metadata={"help": "leave out records whose videos have, sampled, more frames"}
    )
    max_pixels_per_frame: int = field(default=64 * 28 * 28, metadata={"help": "larger frames are shrunk to this"})
    max_tokens: int = field(
        default=36 * 1024, metadata={"help": "leave out longer samples; with `packing`, the length of a pack"}
    )
    max_bad_share: float = field(default=0.01, metadata={"help": "stop if a larger share of the records is bad"})
    packing: bool = field(
        default=False, metadata={"help": "fill rows of `max_tokens` with several samples, without padding"}
    )
    shuffle: bool = field(default=True, metadata={"help": "a new order in every epoch"})
    prepare_only: bool = field(default=False, metadata={"help": "check the data, write the manifest, and stop"})
    prepare_workers: int = field(
        default=0, metadata={"help": "processes that look at the videos before training; 0: this one"}
    )

    freeze: list[str] = field(
        default_factory=list, metadata={"help": f"parts that are not trained: {', '.join(PARTS)}"}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "of the vision tower; default: `learning_rate`"}
    )
    merger_learning_rate: float | None = field(
        default=None, metadata={"help": "of the merger; default: `learning_rate`"}
    )
    gate_learning_rate: float | None = field(default=None, metadata={"help": "of the gates; default: `learning_rate`"})
    lora_rank: int = field(
        default=0, metadata={"help": "train LoRA adapters of the language model, and the gates, instead of all; 0: all"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "default: twice the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})

    sequence_parallel_size: int = field(default=1, metadata={"help": "processes that share the tokens of one batch"})

    # Other defaults than transformers'.
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows of a batch"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "rows of a batch"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    save_total_limit: int | None = field(default=3, metadata={"help": "checkpoints that are kept, at least 2"})
    hub_strategy: str = field(
        default="end", metadata={"help": 'when to push: "end", "every_save", "checkpoint", "all_checkpoints"'}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "every parameter that is trained is used"}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "log a loss that is NaN as what it was before"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay off: the batches are the trainer's own"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": '"auto": go on from the last whole checkpoint, if there is one'}
    )

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("`output_dir` is needed: where checkpoints and the result go")
        # The same by its name in later versions of transformers, which warn of this one.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        super().__post_init__()
        if not self.model:
            raise ValueError("`model` is needed: a VideoNSA checkpoint, see convert_weights.py")
        if not self.train_data:
            raise ValueError("`train_data` is needed: files of records, .json or .jsonl")
        if self.attention not in ("sparse", "dense"):
            raise ValueError(f"`attention` must be 'sparse' or 'dense', got {self.attention!r}")
        for part in self.freeze:
            if part not in PARTS:
                raise ValueError(f"`freeze` takes {', '.join(PARTS)}, got {part!r}")
        if self.packing and self.per_device_train_batch_size != 1:
            raise ValueError(
                "`packing` fills one row of `max_tokens`: `per_device_train_batch_size` must be 1, got "
                f"{self.per_device_train_batch_size}"
            )
        if self.lora_rank < 0:
            raise ValueError(f"`lora_rank` must not be negative, got {self.lora_rank}")
        if self.lora_rank and set(self.freeze) - {"gates"}:
            raise ValueError(f"`lora_rank` freezes all but the adapters and the gates; `freeze` = {self.freeze}")
        if self.eval_data and self.eval_share:
            raise ValueError("`eval_data` and `eval_share` exclude each other")
        if self.eval_strategy != "no" and not (self.eval_data or self.eval_share):
            raise ValueError(f"`eval_strategy` = {self.eval_strategy!r} needs `eval_data` or `eval_share`")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"`save_total_limit` must be at least 2, got {self.save_total_limit}: a run that is killed while it "
                "saves has nothing else to go on from"
            )
        if self.fp16:
            raise ValueError("`fp16` is not supported: use `bf16`")
        if self.n_gpu > 1:
            raise ValueError(f"{self.n_gpu} GPUs and one process: start with `accelerate launch`, or show it one GPU")
        if self.hub_token:
            raise ValueError("`hub_token` would be saved, and pushed, with the arguments: set HF_TOKEN instead")
        for name, required in (("remove_unused_columns", False), ("average_tokens_across_devices", True)):
            if getattr(self, name) is not required:
                raise ValueError(f"`{name}` must be {required}")
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.world_size:
            raise ValueError(
                f"{launched} processes were launched and do not train together: without GPUs, add --use_cpu true"
            )
        if self.world_size % self.sequence_parallel_size:
            raise ValueError(
                f"`sequence_parallel_size` must divide the number of processes ({self.world_size}), got "
                f"{self.sequence_parallel_size}"
            )
        self.data_options()

    def data_options(self) -> DataOptions:
        shared = {option.name for option in fields(DataOptions)} & {argument.name for argument in fields(self)}
        return DataOptions(**{name: getattr(self, name) for name in shared})


def parse_arguments(argv: Sequence[str]) -> TrainArguments:
    """Arguments from any number of YAML files, then flags; what comes later wins.

    Raises:
        ValueError: a YAML file is missing or has a key that is no argument; or as `TrainArguments`.
    """
    parser = HfArgumentParser(
        TrainArguments, prog="train.py", usage="train.py [PRESET.yaml ...] [--argument value ...]"
    )
    known = [argument.name for argument in fields(TrainArguments)]
    argv = list(argv)
    while argv and not argv[0].startswith("-"):
        preset = Path(argv.pop(0))
        if not preset.is_file():
            raise ValueError(f"{preset}: there is no such file of arguments")
        values = yaml.safe_load(preset.read_text()) or {}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(
                    f"{preset}: unknown argument `{name}`" + (f"; did you mean `{close[0]}`?" if close else "")
                )
        parser.set_defaults(**values)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    # Where no GPU is, pinned memory only brings a warning.
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's processes are forks
    return arguments
