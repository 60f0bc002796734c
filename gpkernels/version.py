"""The package's version, and the oldest PyTorch that it runs on."""

__version__ = "0.1.0"
OLDEST_TORCH = "2.13"  # as in pyproject.toml; CMakeLists.txt and setup.py read it from here
