"""``python -m onnx_clp``."""

import sys

if not sys.flags.safe_path:
    # Python puts the working folder first, which may be the folder to scan: nothing more is imported from there.
    # What runpy and the package itself have imported by now cannot be helped; the command onnx-clp has no such path.
    del sys.path[0]

from onnx_clp.cli import main

main()
