"""No test reaches the network: not the Hub, not W&B. A test of tracking asks for its mode itself."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs main, with the config that words give: it must end with one line on stderr and exit code 2.

    Returns the line.
    """
    from configs import entry, load

    def run(main: Callable, schema: type | None = None, words: list[str] = ()) -> str:
        with pytest.raises(SystemExit) as stop:
            entry(lambda: main(load(schema, list(words))) if schema else main())
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700, said
        return said.strip()

    return run
