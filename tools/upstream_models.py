"""transformers' own tests of models, on Qwen2.5-VL's classes and on ours; run by `run_upstream_tests.py`.

That puts this file beside transformers' tests, from which the relative imports come.
"""

import os
import sys
import unittest

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.auto import modeling_auto

from .test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

sys.path.insert(0, os.environ["VIDEONSA"])

from configuration_videonsa import VideoNSAConfig
from modeling_videonsa import VideoNSAForConditionalGeneration, VideoNSAModel

# The tests know by these names which classes have a loss.
modeling_auto.MODEL_MAPPING_NAMES["videonsa"] = VideoNSAModel.__name__
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["videonsa"] = VideoNSAForConditionalGeneration.__name__

PAD, VISION_START, VISION_END, IMAGE, VIDEO = 2, 3, 4, 5, 6
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": PAD,
}
VISION = {
    "depth": 2,
    "in_chans": 3,
    "hidden_act": "silu",
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 14,
    "spatial_merge_size": 1,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": True,
}


class Prompts:
    """What the mixin asks of a model's tester: three prompts of text around an image of 16 tokens."""

    is_training = True
    batch_size, seq_length, num_image_tokens = 3, 24, 16
    hidden_size, num_hidden_layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    num_attention_heads, vocab_size = TEXT["num_attention_heads"], TEXT["vocab_size"]

    def __init__(self, config_class, **fields):
        self.config_class, self.fields = config_class, fields

    def get_config(self):
        return self.config_class(text_config=dict(TEXT), vision_config=dict(VISION), **TOKENS, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], TEXT["vocab_size"] - 10) + 10
        ids[:, 3], ids[:, 4 : 4 + self.num_image_tokens], ids[:, 20] = VISION_START, IMAGE, VISION_END
        inputs = {
            "pixel_values": floats_tensor([self.batch_size * self.num_image_tokens, 3 * 14 * 14 * 2]),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * self.batch_size),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
        return self.get_config(), inputs


class StockTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Qwen2_5_VLModel, Qwen2_5_VLForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = Prompts(Qwen2_5_VLConfig)


class VideoNSATest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VideoNSAModel, VideoNSAForConditionalGeneration)
    _is_composite = True

    def setUp(self):
        self.model_tester = Prompts(VideoNSAConfig, block_size=4, block_counts=2, window_size=5)

    def test_reverse_loading_mapping(self):
        """As LLaVA's do: a base model that is saved has its own names, which renaming leaves as they are."""
        super().test_reverse_loading_mapping(skip_base_model=True)


class VideoNSADenseTest(VideoNSATest):
    test_all_params_have_gradient = False  # the gates are not used

    def setUp(self):
        self.model_tester = Prompts(VideoNSAConfig, nsa_mode="dense")
