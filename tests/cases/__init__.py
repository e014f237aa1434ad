"""Small built ONNX models, one builder per case, each with the bounds that a scan has to find in it."""
