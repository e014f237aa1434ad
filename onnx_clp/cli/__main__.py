"""``python -m onnx_clp.cli``."""

from onnx_clp.cli import main

main()
