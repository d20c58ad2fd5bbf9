"""Controls: layer sets, attachment, files."""

import configs  # noqa: F401  before diffusers: it quietens it
