"""What is logged beside the loss: gates, speed, memory, and how much of the data could not be decoded."""

import logging
import resource
import time

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)

BRANCHES = ("compression", "selection", "window")


class GateMonitor:
    """Mean gates of every layer and branch over the vision tokens, the heads and the training steps between two reads.

    (With nsa_variant="released", which computes gates of text too, over all tokens.)

    Args:
        model: a `VideoNSAForConditionalGeneration`, or one with adapters.
    """

    def __init__(self, model: nn.Module):
        language_model = next(module.language_model for module in model.modules() if hasattr(module, "language_model"))
        self.temperature = model.config.gate_temperature
        self.sums: list[torch.Tensor | None] = [None] * len(language_model.layers)  # [3] each
        self.counts = [0] * len(self.sums)
        for index, layer in enumerate(language_model.layers):
            layer.self_attn.g_proj_2.register_forward_hook(lambda *args, index=index: self._add(index, *args))

    @torch.no_grad()
    def _add(self, index: int, module: nn.Module, inputs, logits: torch.Tensor) -> None:
        if module.training:
            gates = torch.sigmoid(logits.float() / self.temperature).unflatten(-1, (-1, 3)).flatten(0, -2)
            self.sums[index] = gates.sum(0) if self.sums[index] is None else self.sums[index] + gates.sum(0)
            self.counts[index] += len(gates)

    def read(self, accelerator) -> dict[str, float]:
        """Means over all processes since the last read: `gates/selection` and `gates/selection/layer_00`."""
        if any(values is None for values in self.sums):
            return {}  # dense mode
        sums = torch.stack(self.sums)
        sums = accelerator.reduce(torch.cat([sums, sums.new_tensor(self.counts)[:, None]], dim=1))
        self.sums, self.counts = [None] * len(self.sums), [0] * len(self.sums)
        means = sums[:, :3] / sums[:, 3:]
        logs = {f"gates/{branch}": mean for branch, mean in zip(BRANCHES, means.mean(0).tolist(), strict=True)}
        for index, layer in enumerate(means.tolist()):
            logs |= {f"gates/{branch}/layer_{index:02}": mean for branch, mean in zip(BRANCHES, layer, strict=True)}
        return logs


class SpeedMonitor:
    """Tokens per second, padding aside, and memory."""

    def __init__(self):
        self.tokens, self.start = 0, None

    def add(self, tokens: int) -> None:
        """Count a batch; the clock runs from the first."""
        self.start = time.perf_counter() if self.start is None else self.start
        self.tokens += tokens

    def read(self, accelerator, copies: int) -> dict[str, float]:
        """`tokens_per_second` of all processes since the last read, and the largest `memory_gib` of one so far.

        Args:
            copies: processes that get the same batch.
        """
        device, now = accelerator.device, time.perf_counter()
        tokens = accelerator.reduce(torch.tensor(float(self.tokens), device=device)).item() / copies
        speed = tokens / (now - (self.start or now)) if self.start else 0.0
        self.tokens, self.start = 0, now
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = accelerator.gather(torch.tensor([memory / 2**30], device=device)).max().item()
        return {"tokens_per_second": speed, "memory_gib": memory}


class FailureMonitor(TrainerCallback, ExportableState):
    """Samples that could not be decoded during training; stops the run when there are too many.

    Args:
        num_bad: records that were bad before training.
        num_records: all records.
        max_bad_share: of the records.
    """

    def __init__(self, num_bad: int, num_records: int, max_bad_share: float):
        self.num_bad, self.num_records, self.max_bad_share = num_bad, num_records, max_bad_share
        self.failures: dict[str, str] = {}  # by data set and index of the sample
        self.new: dict[str, str] = {}  # of this process, since the last check

    def add(self, failures: dict[int, str], dataset: str = "train") -> None:
        """Failures that came with a batch."""
        self.new |= {f"{dataset}/{index}": text for index, text in failures.items()}

    def check(self) -> dict[str, float]:
        """Share the processes' failures and log them; to be called by all of them.

        Raises:
            RuntimeError: more than `max_bad_share` of the records are bad.
        """
        new = dict(item for part in gather_object([self.new]) for item in part.items())
        self.new = {}
        for index in new.keys() - self.failures.keys():
            logger.warning("left out, another sample took its place: %s", new[index])
        self.failures |= new
        if len(self.failures) and self.num_bad + len(self.failures) > self.max_bad_share * self.num_records:
            raise RuntimeError(
                f"{len(self.failures)} samples could not be decoded and {self.num_bad} records were bad before: "
                f"of {self.num_records} records that is more than max_bad_share={self.max_bad_share}. The last: "
                f"{next(reversed(self.failures.values()))}"
            )
        return {"undecodable_samples": float(len(self.failures))}

    def state(self) -> dict:
        """What a checkpoint keeps, in its trainer_state.json."""
        return {"args": {}, "attributes": {"failures": self.failures}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.failures = dict(state.stateful_callbacks[type(self).__name__]["attributes"]["failures"])
