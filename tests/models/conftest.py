"""What tests of families have in common."""

import huggingface_hub.constants
import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The Hub's cache, empty, in place of the user's own."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        yield folder
