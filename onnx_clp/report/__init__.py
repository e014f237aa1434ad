"""Reports as text of one format each: ``render(…) -> str``. Nothing here prints, and nothing imports onnx."""
