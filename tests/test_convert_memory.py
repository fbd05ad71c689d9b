"""The converter's memory depends on the size of its pieces, not on that of the model, of a shard or of a tensor."""

import sys

import pytest
from tiny_random import save_tiny_qwen2_5_vl

from checkpoints import run_python


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_chunks(tmp_path):
    """A checkpoint of 400 MB whose largest tensor has 64 MB, copied and cast into a single shard."""
    save_tiny_qwen2_5_vl(
        tmp_path / "source",
        max_shard_size="16MB",
        vocab_size=31250,
        hidden_size=512,
        intermediate_size=8192,
        num_hidden_layers=5,
        num_attention_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    )
    shards = list((tmp_path / "source").glob("*.safetensors"))
    assert len(shards) >= 16 and sum(path.stat().st_size for path in shards) > 300e6
    grown = run_python(
        """
        import sys
        from pathlib import Path
        import convert_weights

        def status(name):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

        # Imports, the configuration and the model on the meta device cost the same for every checkpoint.
        source, plain, cast = map(Path, sys.argv[1:])
        convert_weights.make_plan(convert_weights.open_source(source, None, ()), convert_weights.Options())
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
        convert_weights.convert(source, plain, max_shard_size="5GB")
        convert_weights.convert(source, cast, dtype="bfloat16", max_shard_size="5GB")
        print(status("VmHWM") - before)
        """,
        tmp_path / "source",
        tmp_path / "plain",
        tmp_path / "cast",
    )
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size > 300e6
    assert int(grown) < 60e6
