"""What the model copies round its attention: of a prompt of one video, its output alone."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import copied_bytes

TOKENS, OUTPUT = 1024, 1024 * 28 * 128 * 2  # of the 7B's heads, in bfloat16
VIDEO = OUTPUT * (TOKENS - 2 * copied_bytes.TEXT) // TOKENS


def test_what_is_copied():
    result = copied_bytes.measure(TOKENS)
    assert result["slices"]["forward"] == {"bytes": OUTPUT, "by_operator": {"cat": OUTPUT}}
    # Gathered: queries, keys and values, of 28, 4 and 4 heads; put: zeros, and the output.
    by_operator = result["index tensors"]["forward"]["by_operator"]
    assert by_operator["index"] == VIDEO * (28 + 4 + 4) // 28
    assert by_operator["new_zeros"] == OUTPUT
    for name in ("slices", "index tensors"):
        assert result[name]["forward and backward"]["bytes"] > result[name]["forward"]["bytes"]


def test_no_room_for_a_video():
    with pytest.raises(ValueError, match="`tokens` must be more than 128, got 128"):
        copied_bytes.measure(128)
