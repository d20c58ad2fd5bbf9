"""Noise levels, sampling, prompts and families."""

import configs  # noqa: F401  before diffusers and transformers: it quietens them
