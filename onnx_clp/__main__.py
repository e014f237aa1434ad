"""``python -m onnx_clp``."""

from onnx_clp.cli import main

main()
