"""Makes models with PyTorch to test onnx-clp on. Run from a checkout; ``onnx_clp`` never imports it.

Its dependencies are the extra ``export``. What is trained today is ``examples/train.py``.
"""
