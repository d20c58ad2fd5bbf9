"""Entry points that measure, and the numbers they stand on."""

import configs  # noqa: F401  before transformers: it quietens it
