"""Names of tensors in checkpoints: whatever loads one into the model finds the model's own names.

Published Qwen2.5-VL checkpoints, and what `save_pretrained` writes, name their tensors `model.layers.*` and `visual.*`;
the model calls them `model.language_model.layers.*` and `model.visual.*`. transformers renames them in
`from_pretrained`, for the classes it knows by name, and nowhere else: its Trainer resumes through
`load_state_dict(strict=False)`, which would leave every weight as it was.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

# Modules that put themselves between a module and its name: FSDP, activation checkpointing, torch.compile.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class CheckpointNamesMixin:
    """Renames published names at every load, by the rules of `from_pretrained`; goes before transformers' class."""

    _checkpoint_renamings: list | None = None  # applied in order

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # `from_pretrained` looks them up by the name of the class, so a class that inherits needs an entry of its own.
        if cls._checkpoint_renamings is not None:
            # A copy: renamings remember that they were used, and `save_pretrained` goes by that.
            register_checkpoint_conversion_mapping(cls.__name__, deepcopy(cls._checkpoint_renamings), overwrite=True)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Override: torch calls this, with its own copy of the caller's dict, before it loads the submodules."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            own = prefix + self._own_name(name.removeprefix(prefix))
            # Where both names are given, the published one counts only if the other's value is what is loaded already:
            # `dict(model.state_dict(), **checkpoint)`, and torch's `set_model_state_dict`, which fills in like that.
            if own != name and (own not in state_dict or self._is_loaded(own.removeprefix(prefix), state_dict[own])):
                state_dict[own] = self._placed_alike(own.removeprefix(prefix), state_dict.pop(name))
        # Checkpoints of tied models leave out the weights that are tied to others.
        for target, source in (getattr(self, "all_tied_weights_keys", None) or {}).items():
            if prefix + source in state_dict:
                state_dict.setdefault(prefix + target, state_dict[prefix + source])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_name(self, name: str) -> str:
        """The name that the model has for a tensor of a checkpoint; unchanged where no other leads further."""
        renamed = name
        for renaming in self._checkpoint_renamings or ():
            renamed, _ = renaming.rename_source_key(renamed)
        base = f"{self.base_model_prefix}."
        candidates = [name, renamed, renamed.removeprefix(base), base + renamed]
        return min(candidates, key=lambda candidate: len(self._resolve(candidate)[1]))  # the first of the shortest

    def _resolve(self, name: str) -> tuple[nn.Module, list[str]]:
        """The last module on the way that a name describes, and the parts of the name that are left."""
        module, parts = self, name.split(".")
        while parts:
            wrapped = next((module._modules[wrapper] for wrapper in _WRAPPERS if wrapper in module._modules), None)
            if wrapped is not None and parts[0] not in module._modules:
                module = wrapped
            elif module._modules.get(parts[0]) is not None:
                module = module._modules[parts.pop(0)]
            else:
                break
        return module, parts

    def _tensor(self, name: str) -> torch.Tensor | None:
        """The parameter or buffer of that name."""
        module, parts = self._resolve(name)
        return (module._parameters | module._buffers).get(".".join(parts))

    def _is_loaded(self, name: str, value) -> bool:
        """Whether `value` is the model's own tensor, so that loading it would change nothing."""
        tensor = self._tensor(name)
        if tensor is None or value is tensor or not isinstance(value, torch.Tensor):
            return tensor is not None and value is tensor
        has_memory = not any(x.is_meta or _is_sharded(x) for x in (value, tensor))
        return has_memory and value.data_ptr() == tensor.data_ptr()

    def _placed_alike(self, name: str, value):
        """`value`, sharded as the model's tensor is: who shards by names has missed it under another one."""
        tensor = self._tensor(name)
        if tensor is None or not _is_sharded(tensor) or _is_sharded(value):
            return value
        from torch.distributed.tensor import distribute_tensor  # not in every build of torch

        return distribute_tensor(value.detach().to(tensor.device), tensor.device_mesh, tensor.placements)


def _is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a `DTensor`."""
    return hasattr(tensor, "device_mesh")
