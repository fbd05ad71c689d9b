"""transformers' Trainer for VideoNSA: loss on answers, learning rates by part, sequence parallelism, checkpoints."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from .arguments import TrainArguments
from .data import IGNORE_INDEX, Collator, EpochBatches, EpochDataLoader, VideoDataset, plan_batches
from .monitor import FailureMonitor, GateMonitor, SpeedMonitor
from .parts import PARTS, parameter_groups, part_of
from .sequence_parallel import SequenceParallel

logger = logging.getLogger(__name__)

# Written into a checkpoint's folder when everything else is there.
_WHOLE = "complete"


class VideoNSATrainer(Trainer):
    """Trains on `VideoDataset`s.

    The loss of an optimizer step is the mean over all answer tokens of all its batches on all processes, whatever the
    batches' shapes: packed or padded, accumulated or parallel, one step is the same step.

    Args:
        model: a `VideoNSAForConditionalGeneration`, or one with adapters.
        args: `TrainArguments`.
        train_dataset, eval_dataset: `VideoDataset`s.
        failures: watches the share of samples that cannot be decoded.
    """

    args: TrainArguments

    def __init__(self, model, args: TrainArguments, train_dataset, eval_dataset, failures: FailureMonitor, **kwargs):
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[failures],
            **kwargs,
        )
        # Qwen2.5-VL's own loss is a mean over each batch; here `compute_loss` divides by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            self._set_fsdp_precision()
        self.failures, self.speed, self.gates = failures, SpeedMonitor(), GateMonitor(model)
        self.sequence_parallel = None
        if args.sequence_parallel_size > 1:
            self.sequence_parallel = SequenceParallel(args.sequence_parallel_size)
            self.sequence_parallel.attach(model)

    def _set_fsdp_precision(self) -> None:
        """Gradients are summed over batches and processes in float32, which accelerate would do in bfloat16."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version: {plugin.fsdp_version} is not supported, use 2")
        if self.args.bf16:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    # ---- Data: the loaders know the ranks and the epoch by themselves ----

    def get_train_dataloader(self) -> EpochDataLoader:
        """Batches of this process; the processes of a sequence-parallel group get the same."""
        args, dataset = self.args, self.train_dataset
        batches = plan_batches(
            dataset.manifest.tokens,
            batch_size=args.per_device_train_batch_size,
            packing=args.packing,
            max_tokens=args.max_tokens,
            shuffle=args.shuffle,
            seed=self._data_seed,
        )
        return self._loader(dataset, batches, packing=args.packing, shuffle=args.shuffle)

    def get_eval_dataloader(self, eval_dataset=None) -> EpochDataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = plan_batches(
            dataset.manifest.tokens,
            batch_size=self.args.per_device_eval_batch_size,
            packing=False,
            max_tokens=self.args.max_tokens,
            shuffle=False,
            seed=0,
        )
        return self._loader(dataset, batches, packing=False, shuffle=False)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _loader(self, dataset: VideoDataset, batches, *, packing: bool, shuffle: bool) -> EpochDataLoader:
        args = self.args
        sampler = EpochBatches(
            batches,
            rank=args.process_index // args.sequence_parallel_size,
            num_ranks=args.world_size // args.sequence_parallel_size,
            shuffle=shuffle,
            seed=self._data_seed,
        )
        return EpochDataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=Collator(self.model.config, packing),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # ---- Optimisation ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Override: a group of parameters for each part of the model, with its learning rate."""
        if self.optimizer is None:
            args, model = self.args, self.model if model is None else model
            rates = {part: getattr(args, f"{part.removesuffix('s')}_learning_rate", None) for part in PARTS}
            optimizer, kwargs = self.get_optimizer_cls_and_kwargs(args, model)
            for part, rate in rates.items():
                if rate is not None and not any(
                    p.requires_grad and part_of(n) == part for n, p in model.named_parameters()
                ):
                    logger.warning("`%s_learning_rate` = %s: that part is not trained", part.removesuffix("s"), rate)
            groups = parameter_groups(
                model,
                set(self.get_decay_parameter_names(model)),
                weight_decay=args.weight_decay,
                learning_rates={part: args.learning_rate if rate is None else rate for part, rate in rates.items()},
            )
            self.optimizer = optimizer(groups, **kwargs)
        return self.optimizer

    def _run_epoch(self, *args, **kwargs) -> None:
        """Override: a run that is started again after its last step takes none more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """Override: takes out of a batch what is not the model's."""
        self.failures.add(inputs.pop("failures"))
        self.speed.add(inputs.pop("num_tokens"))
        del inputs["indices"]
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """Override: the sum over this batch's answer tokens, over the step's number of them.

        Processes average their gradients; the factor makes that the sum.
        """
        losses, _, _ = self._answer_losses(model, inputs)
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def _answer_losses(self, model, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cross-entropy of this process's answer tokens.

        Logits are computed where a row has an answer token, and nowhere else: over a vocabulary of 152K, those of a
        whole video would take more memory than the model.

        Returns:
            losses (batch, columns), 0 where a row has no answer token; predicted and target tokens, alike.
        """
        inputs = dict(inputs)
        targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
        if self.sequence_parallel:
            targets = self.sequence_parallel.share(targets, fill=IGNORE_INDEX)
        columns = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(-1)
        targets = targets[:, columns]
        logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view_as(targets)
        return losses, logits.argmax(-1), targets

    def _get_num_items_in_batch(self, batch_samples, device):
        """Override: the processes of a sequence-parallel group count the same tokens."""
        return super()._get_num_items_in_batch(batch_samples, device) / self.args.sequence_parallel_size

    # ---- Evaluation ----

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Override: every sample counts once, on any number of processes.

        Metrics: `loss`, the mean over answer tokens; `answer_accuracy`, the share of samples whose every answer token
        is the most likely one, given the true ones before it.
        """
        model = self._wrap_model(self.model, training=False)
        model.eval()
        rows: list[tuple[int, float, int, int]] = []  # index, loss, tokens, wrong tokens
        for batch in dataloader:
            self.failures.add(batch.pop("failures"), "eval")
            indices = batch.pop("indices")
            del batch["num_tokens"]
            losses, predicted, targets = self._answer_losses(model, self._prepare_inputs(batch))
            is_answer = targets != IGNORE_INDEX
            counts = torch.stack(
                [losses.double().sum(1), is_answer.sum(1), (is_answer & (predicted != targets)).sum(1)]
            )
            if self.sequence_parallel:
                counts = self.sequence_parallel.sum(counts)
            rows += [(index, *row) for index, row in zip(indices, counts.T.tolist(), strict=True)]
        samples = {index: row for index, *row in gather_object(rows)}
        loss, tokens, _ = (sum(column) for column in zip(*samples.values(), strict=True))
        metrics = {
            "loss": loss / tokens,
            "answer_accuracy": sum(wrong == 0 for *_, wrong in samples.values()) / len(samples),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(samples))

    # ---- Logging and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Override: adds gates, speed, memory and failures to what is logged of training steps."""
        gates = {}
        if "loss" in logs:
            logs |= self.speed.read(self.accelerator, self.args.sequence_parallel_size) | self.failures.check()
            gates = self.gates.read(self.accelerator)
            logs |= {name: value for name, value in gates.items() if "layer" not in name}
        super().log(logs, start_time)
        # Layer by layer into TensorBoard alone: they would flood the console and trainer_state.json.
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in gates.items():
                    callback.tb_writer.add_scalar(f"train/{name}", value, self.state.global_step)

    def _save_checkpoint(self, model, trial) -> None:
        """Override: marks the checkpoint when every process has written its part."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / _WHOLE).touch()

    def _issue_warnings_after_load(self, load_result) -> None:
        """Override: a checkpoint that fits only in part is an error, not a warning."""
        missing = set(load_result.missing_keys) - set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"`output_dir` {self.args.output_dir}: the checkpoint to be resumed has not the weights of this model: "
                f"{_some(missing)} missing, {_some(load_result.unexpected_keys)} unexpected. A run of another model, "
                "or with LoRA instead of without, needs another output_dir"
            )


def _some(names) -> str:
    """At most two of the names."""
    names = sorted(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more" if len(names) > 2 else ", ".join(names) or "none"


def is_whole(checkpoint: str | Path) -> bool:
    """Whether that is the folder of a checkpoint that was written to its end."""
    return (Path(checkpoint) / _WHOLE).is_file()


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint that was written to its end."""
    whole = [folder for folder in Path(output_dir).glob("checkpoint-*") if is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))) if whole else None


def set_unfinished_checkpoints_aside(output_dir: str | Path) -> None:
    """Rename what a killed process left: a checkpoint of the same step must not be mixed with it."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if not is_whole(folder):
            aside = folder.with_name(f"_unfinished-{folder.name}")
            logger.warning("%s is not whole: the run ended while it was written. It is %s now", folder, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
