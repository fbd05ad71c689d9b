"""VideoNSA for vLLM: a plug-in that is installed beside it (`pip install videonsa[vllm]`), see docs/serving.md."""
