"""What `convert_weights.py --dry-run` prints."""

import shutil
from pathlib import Path

from .safetensors_io import DTYPE_NAMES, PlannedTensor

_KINDS = {"qwen2_5_vl": "Qwen2.5-VL", "published": "published VideoNSA weights", "videonsa": "VideoNSA"}


def describe(plan, output: Path) -> str:
    """Keys, shapes, sizes and shards of a `convert_weights.Plan`, one line for every tensor."""
    copied = [tensor for tensor in plan.tensors if tensor.source]
    text = plan.config.text_config
    free = shutil.disk_usage(next(parent for parent in output.parents if parent.exists())).free
    target = f"VideoNSA, variant {text.nsa_variant}" if plan.config.model_type == "videonsa" else "Qwen2.5-VL"
    if plan.new_gates:
        target += f"; {len(plan.new_gates)} new gate tensors, gate_init {plan.gate_init}, seed {plan.options.seed}"
    lines = [
        f"Source  {plan.source}",
        f"        {_KINDS[plan.source_kind]}: {len(copied) + len(plan.dropped)} tensors, "
        f"{format_size(plan.source_bytes)}",
        f"Target  {target}; dtype {plan.options.dtype or 'as stored'}",
        f"Output  {output}: {format_size(plan.nbytes)}, {format_size(free)} free" + (", exists" * output.exists()),
        f"Files   config.json, README.md, {', '.join(sorted(plan.files))}",
        f"Dropped {', '.join(plan.dropped) or 'nothing'}",
        f"Shards  {len(plan.shards)}",
    ]
    for file, tensors in plan.shards.items():
        size = format_size(sum(tensor.nbytes for tensor in tensors))
        lines.append(f"\n{file}  {size}  {len(tensors)} tensors")
        lines += [f"  {_line(tensor)}" for tensor in tensors]
    return "\n".join(lines)


def _line(tensor: PlannedTensor) -> str:
    dtype = DTYPE_NAMES[tensor.dtype]
    if tensor.source is None:
        origin = "new"
    else:
        origin = f"from {tensor.source.key}" if tensor.source.key != tensor.name else "copied"
        if tensor.source.dtype != tensor.dtype:
            dtype = f"{DTYPE_NAMES[tensor.source.dtype]}->{dtype}"
    return f"{tensor.name}  {dtype} {list(tensor.shape)}  {format_size(tensor.nbytes)}  {origin}"


def format_size(nbytes: int) -> str:
    """Such as "16.6 GB", in powers of 1000."""
    size, units = float(nbytes), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while size >= 1000 and unit != "GB":
        size, unit = size / 1000, next(units)
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"
