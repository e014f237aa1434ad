"""The file, its graph and its bytes."""
