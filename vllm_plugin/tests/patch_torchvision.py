"""Let PyPI's torchvision, which is built for CUDA, be imported beside a torch without: run once in an environment.

Its compiled operators cannot be loaded there. Two of them are looked up when it is imported, so that it is enough to
declare these; nothing here calls them.
"""

import importlib.util
from pathlib import Path

DECLARATION = """for _name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    file = Path(importlib.util.find_spec("torchvision").origin)  # found without importing it
    text = file.read_text()
    if "import torch\n" not in text:
        raise ValueError(f"{file} does not import torch as torchvision 0.28 does")
    if DECLARATION not in text:
        file.write_text(text.replace("import torch\n", f"import torch\n{DECLARATION}", 1))


if __name__ == "__main__":
    main()
