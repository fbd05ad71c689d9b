"""What test_training_distributed runs in two processes: `train.py`, once for every line of a file of arguments.

    torchrun --nproc-per-node 2 distributed_training.py RUNS.json

RUNS.json: a list of {"arguments": [...], "fsdp": true or false}.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import accelerate.state
from accelerate.utils import DistributedType

import train

torch.set_num_threads(1)

# What `accelerate launch --config_file configs/accelerate_fsdp2.yaml` sets, but for the precision.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "VideoNSADecoderLayer,Qwen2_5_VLVisionBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def offer_fsdp_on_cpus() -> None:
    """accelerate shards over accelerators alone; torch's FSDP2 runs on CPUs as well."""
    build = accelerate.state.AcceleratorState.__init__

    def build_as_if_on_gpus(self, *args, **kwargs):
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU and "ACCELERATE_USE_FSDP" in os.environ:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        build(self, *args, **kwargs)

    accelerate.state.AcceleratorState.__init__ = build_as_if_on_gpus


if __name__ == "__main__":
    offer_fsdp_on_cpus()
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(FSDP if run["fsdp"] else {})
        train.main(["--use_cpu", "true", *run["arguments"]])
        for name in FSDP:
            os.environ.pop(name, None)
    torch.distributed.destroy_process_group()
