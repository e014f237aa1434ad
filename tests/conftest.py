"""What holds for all tests."""

import os

# Before any test imports onnxruntime: no test reports to anyone that it was run.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
