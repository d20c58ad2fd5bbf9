"""Configs: the options of a command, the folder of its run, and its run in W&B."""

import logging
import os
import warnings

from configs.errors import ROOT, UserError, cut, entry, note, quoted
from configs.folders import claim, release, releases
from configs.options import list_of, load, merge, plain, usage
from configs.runs import command, plain_name, replacing, save, versions

__all__ = [
    "ROOT",
    "UserError",
    "claim",
    "command",
    "cut",
    "entry",
    "list_of",
    "load",
    "merge",
    "note",
    "plain",
    "plain_name",
    "quoted",
    "release",
    "releases",
    "replacing",
    "save",
    "usage",
    "versions",
]

for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # read when those are imported, later
    os.environ.setdefault(_name, "error")
# on some CPUs it warns of a package that nothing here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# diffusers gives it to huggingface_hub
warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
