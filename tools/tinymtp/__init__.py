"""Make tiny `qwen35` models with a multi-token-prediction block, as GGUF files.

Only :mod:`tinymtp.network` needs PyTorch; the rest needs numpy, gguf and regex.
"""
