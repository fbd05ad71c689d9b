"""Checkpoints under published names (`model.layers.*`, `visual.*`), whoever loads them into the model."""

import copy
import os

import accelerate
import peft
import pytest
import torch
from conftest import Prompts, build_config, build_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from transformers import AutoModel, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from checkpoints import load_all, new_name, save_published_videonsa
from modeling_videonsa import VideoNSAForConditionalGeneration, VideoNSAModel, VideoNSATextModel
from names_videonsa import CheckpointNamesMixin

OLD_NAMES = {"model.embed_tokens.weight", "model.layers.1.self_attn.g_proj_2.bias", "visual.merger.ln_q.weight"}


def assert_equal_weights(model, expected: dict[str, torch.Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


@pytest.fixture(scope="module", params=["untied", "tied"])
def tied(request):
    return {"tie_word_embeddings": request.param == "tied"}


@pytest.fixture(scope="module")
def source(tied):
    """The model that the checkpoints hold."""
    return build_tied(tied)


def build_tied(tied, seed=0):
    return build_model(torch.float32, seed=seed, text=tied)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """The same weights under published and under the model's own names, whole and in shards, and in a .bin file."""
    root = tmp_path_factory.mktemp("names")
    for kind, options in (("old", {}), ("old sharded", {"max_shard_size": "300KB"})):
        source.save_pretrained(root / kind, **options)
        assert load_all(root / kind).keys() >= OLD_NAMES
    source.save_pretrained(root / "new", save_original_format=False)
    (root / "bin").mkdir()
    torch.save(load_all(root / "old"), root / "bin" / "pytorch_model.bin")
    return root


def other(source, tied):
    model = build_tied(tied, seed=1)
    assert not torch.equal(model.model.visual.merger.ln_q.weight, source.model.visual.merger.ln_q.weight)
    return model


@pytest.mark.parametrize("kind", ["old", "new", "bin"])
@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict(source, tied, folders, kind, strict):
    weights = torch.load(folders / "bin/pytorch_model.bin") if kind == "bin" else load_all(folders / kind)
    model, given = other(source, tied), dict(weights)
    result = model.load_state_dict(given, strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_equal_weights(model, source.state_dict())
    assert given.keys() == weights.keys()  # the caller's dict is the caller's


@pytest.mark.parametrize(
    ("kind", "strict"),
    # Strictly, accelerate wants every shard to hold the whole model.
    [("old", True), ("old", False), ("new", True), ("old sharded", False), ("bin", True)],
)
def test_accelerate(source, tied, folders, kind, strict):
    for load in (accelerate.load_checkpoint_in_model, accelerate.load_checkpoint_and_dispatch):
        model = other(source, tied)
        load(model, folders / kind, strict=strict)
        assert_equal_weights(model, source.state_dict())


def test_sharded_checkpoints(source, tied, folders):
    model = other(source, tied)
    load_sharded_checkpoint(model, folders / "old sharded", strict=False)
    assert_equal_weights(model, source.state_dict())


def test_published_checkpoints(tmp_path):
    """Both layouts in which VideoNSA weights were published."""
    weights = load_all(save_published_videonsa(tmp_path))
    own = {new_name(name): tensor for name, tensor in weights.items()}
    shape = {"hidden_size": 224, "num_attention_heads": 28, "num_key_value_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    model = build_model(torch.float32, text=shape | {"rope_parameters": rope})
    model.load_state_dict(weights)
    assert_equal_weights(model, own)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_base_and_text_models(source, folders, kind):
    """The parts find their weights in a whole model's checkpoint, and a base model's goes into the whole model."""
    weights = load_all(folders / kind)
    weights.pop("lm_head.weight", None)
    base, expected = VideoNSAModel(source.config), source.model.state_dict()
    base.load_state_dict(weights)
    assert_equal_weights(base, expected)
    base, loading = VideoNSAModel.from_pretrained(folders / kind, output_loading_info=True)
    assert not loading["missing_keys"]
    assert_equal_weights(base, expected)
    text, expected = VideoNSATextModel(source.config.text_config), source.model.language_model.state_dict()
    text.load_state_dict({name: x for name, x in weights.items() if "visual." not in name})
    assert_equal_weights(text, expected)
    text = VideoNSATextModel.from_pretrained(folders / kind)
    assert_equal_weights(text, expected)


def test_base_models_checkpoint_in_the_whole_model(source, tmp_path):
    source.model.save_pretrained(tmp_path)
    for weights in (source.model.state_dict(), load_all(tmp_path)):
        whole = VideoNSAForConditionalGeneration(source.config)
        result = whole.load_state_dict(weights, strict=False)
        assert set(result.missing_keys) <= {"lm_head.weight"} and not result.unexpected_keys
        assert_equal_weights(whole.model, source.model.state_dict())
    for model in (
        VideoNSAForConditionalGeneration.from_pretrained(tmp_path).model,
        VideoNSAModel.from_pretrained(tmp_path),
    ):
        assert_equal_weights(model, source.model.state_dict())


def test_classes_that_inherit(folders, source):
    class OwnVideoNSA(VideoNSAForConditionalGeneration):
        pass

    model, loading = OwnVideoNSA.from_pretrained(folders / "old", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_equal_weights(model, source.state_dict())
    model = OwnVideoNSA(source.config)
    model.load_state_dict(load_all(folders / "old"))
    assert_equal_weights(model, source.state_dict())


def test_checkpoints_keep_the_names_they_came_with(source, folders, tmp_path):
    """Also where others were loaded by hand before."""
    for kind in ("new", "old"):
        source.load_state_dict(load_all(folders / "old"))
        VideoNSAForConditionalGeneration.from_pretrained(folders / kind).save_pretrained(tmp_path)
        assert load_all(tmp_path).keys() == load_all(folders / kind).keys()


def test_own_names_are_loaded_as_before(source, tied):
    """What torch reports of wrong, missing and surplus names, and of shapes, is what it reports without the mixin."""
    weights = {name: x for name, x in source.state_dict().items() if "norm" not in name}
    weights |= {"model.surplus": torch.zeros(1), "surplus.weight": torch.zeros(1), "model.visual.x.y": torch.zeros(1)}
    result = other(source, tied).load_state_dict(weights, strict=False)
    plain = other(source, tied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointNamesMixin, "_load_from_state_dict", nn.Module._load_from_state_dict)
        assert plain.load_state_dict(weights, strict=False) == result
    assert len(result.unexpected_keys) == 3 and result.missing_keys
    with pytest.raises(RuntimeError, match=r"size mismatch for model.language_model.norm.weight"):
        other(source, tied).load_state_dict({"model.norm.weight": torch.zeros(3)}, strict=False)


def test_both_names_at_once(source, tied, folders):
    """The model's own value of before yields to the checkpoint; another value is not overridden, but reported."""
    published = load_all(folders / "old")
    model = other(source, tied)
    model.load_state_dict(model.state_dict() | published)
    assert_equal_weights(model, source.state_dict())
    both = {"model.norm.weight": torch.zeros(64), "model.language_model.norm.weight": torch.ones(64)}
    result = model.load_state_dict(both, strict=False)
    assert result.unexpected_keys == ["model.norm.weight"]
    assert (model.model.language_model.norm.weight == 1).all()


def test_wrapped_models(source, tied, folders):
    """Names with a prefix: PEFT, `torch.compile`, a module that holds the model; and `assign`."""
    published, expected = load_all(folders / "old"), source.state_dict()
    holder = nn.ModuleDict({"policy": other(source, tied)})
    holder.load_state_dict({f"policy.{name}": x for name, x in published.items()})
    assert_equal_weights(holder["policy"], expected)
    compiled = torch.compile(other(source, tied), backend="eager")
    compiled.load_state_dict({f"_orig_mod.{name}": x for name, x in published.items()})
    assert_equal_weights(compiled._orig_mod, expected)
    with torch.device("meta"):
        model = VideoNSAForConditionalGeneration(source.config)
    model.load_state_dict(published, assign=True)
    assert_equal_weights(model, expected)
    copied = copy.deepcopy(other(source, tied))
    copied.load_state_dict(published)
    assert_equal_weights(copied, expected)


def test_adapters_that_were_trained_under_published_names(source, tied, tmp_path):
    """Of transformers before 4.52: `base_model.model.model.layers.0...`; and PEFT models' whole state dicts."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "g_proj_2"], init_lora_weights=False)
    trained = peft.get_peft_model(build_tied(tied), config)
    trained.save_pretrained(tmp_path)
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {name.replace("model.language_model.layers", "model.layers"): x for name, x in adapter.items()}
    assert renamed.keys().isdisjoint(adapter)
    save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    loaded = peft.PeftModel.from_pretrained(build_tied(tied), tmp_path)
    assert_equal_weights(loaded, trained.state_dict())
    whole = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x
        for name, x in trained.state_dict().items()
    }
    loaded = peft.get_peft_model(other(source, tied), config)
    loaded.load_state_dict(whole)
    assert_equal_weights(loaded, trained.state_dict())


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_wrappers(source, tied, folders, process_group):
    """DDP, FSDP2 as accelerate and `set_model_state_dict` load it, FSDP."""
    published, expected = load_all(folders / "old"), source.state_dict()
    ddp = nn.parallel.DistributedDataParallel(other(source, tied))
    ddp.load_state_dict({f"module.{name}": x for name, x in published.items()})
    assert_equal_weights(ddp.module, expected)

    options = StateDictOptions(full_state_dict=True, strict=True)
    for load in (
        lambda model: set_model_state_dict(model, dict(published), options=options),
        lambda model: accelerate.load_checkpoint_in_model(model, folders / "old", strict=True),
    ):
        model = other(source, tied)
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        load(fully_shard(model, mesh=init_device_mesh("cpu", (1,))))
        assert_equal_weights_of_shards(model, expected)

    model = other(source, tied)
    model.model.language_model.layers[0] = shard(model.model.language_model.layers[0])
    model = shard(model)
    model.load_state_dict(published)
    assert_equal_weights(model, expected)


def shard(module):
    return FullyShardedDataParallel(
        module, device_id=torch.device("cpu"), use_orig_params=True, sharding_strategy=ShardingStrategy.NO_SHARD
    )


def assert_equal_weights_of_shards(model, expected):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name


class Videos(torch.utils.data.Dataset):
    """Two prompts with a video each."""

    def __init__(self):
        prompts = Prompts(build_config(), torch.float32)
        self.items = [prompts.one([3, ("video", 2, 4, 4), 5], seed) for seed in range(2)]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        item = self.items[index % 2]
        return item | {"labels": item["input_ids"]}


class StepAsLoss(Trainer):
    """A Trainer whose first checkpoint is the best one."""

    def evaluate(self, *args, metric_key_prefix="eval", **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.log(metrics)
        return metrics


def make_trainer(model, folder, trainer=Trainer, **options):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = Videos()
    return trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=lambda items: items[0]
    )


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A plain Trainer's run without a stop, from a checkpoint loaded by AutoModel: its folder and last weights."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(load_auto(folders), folder)
    trainer.train()
    return folder, copy.deepcopy(trainer.model.state_dict())


def load_auto(folders):
    return AutoModel.from_pretrained(folders / "old", trust_remote_code=True, dtype=torch.float32)


@pytest.mark.parametrize("sharded", [False, True])
def test_trainer_resumes_from_the_checkpoints_weights(folders, run, tmp_path, sharded):
    """Stopped after two steps of four and resumed, a run ends with the weights of one that was not stopped."""
    folder, expected = run
    checkpoint = folder / "checkpoint-2"
    assert load_all(checkpoint).keys() >= OLD_NAMES
    model = load_auto(folders)
    if sharded:
        model_of_checkpoint = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
        os.rename(checkpoint / "model.safetensors", checkpoint / "unsharded")
        model_of_checkpoint.save_pretrained(checkpoint, max_shard_size="300KB")
        assert (checkpoint / "model.safetensors.index.json").is_file()
    trainer = make_trainer(model, tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_weights(trainer.model, expected)


def test_trainer_ends_with_the_best_checkpoint(folders, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(load_auto(folders), tmp_path, StepAsLoss, **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = AutoModel.from_pretrained(tmp_path / "checkpoint-2", trust_remote_code=True, dtype=torch.float32)
    last = AutoModel.from_pretrained(tmp_path / "checkpoint-4", trust_remote_code=True, dtype=torch.float32)
    assert_equal_weights(trainer.model, best.state_dict())
    assert not torch.equal(best.lm_head.weight, last.lm_head.weight)
