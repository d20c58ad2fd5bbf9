"""Noise levels, sampling, prompts and families. Importing it quietens libraries that warn about what they do not need."""

import os

for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(name, "error")
