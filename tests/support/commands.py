"""Commands in this process: what they print, and how they refuse."""

import io
import runpy
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from types import ModuleType
from unittest import mock

import pytest

from configs import UserError, entry, load

LONGEST = 700  # characters of a message: less than a screen


def refused(call: Callable, *says: str) -> str:
    """The message with which a call refuses, as a command does: exit code 2 and one short line.

    It holds each of `says`. A message of several lines is not excused by being printed in one.
    """
    messages, printed = [], io.StringIO()

    def heard():
        try:
            call()
        except UserError as error:
            messages.append(str(error))
            raise

    with pytest.raises(SystemExit) as stop, redirect_stderr(printed):
        entry(heard)
    line = printed.getvalue()
    assert stop.value.code == 2, line
    assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < LONGEST, line
    message = messages[0] if messages else line.removeprefix("error: ").strip()
    assert "\n" not in message and len(message) < LONGEST, message
    assert all(words in message for words in says), message
    return message


def configured(module: ModuleType, words: list[str]) -> Callable:
    """A call that runs a command's main with the config that words make."""
    return lambda: module.main(load(module.Config, words))


def called(module: ModuleType, *words) -> Callable:
    """A call that runs a command that takes plain words beside its options."""

    def call():
        with mock.patch.object(sys, "argv", ["command", *map(str, words)]):
            module.run()

    return call


def launched(name: str, *words) -> Callable:
    """A call that does what `python -m name words` does, in this process."""

    def call():
        with mock.patch.object(sys, "argv", [name, *map(str, words)]), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module was imported before
            runpy.run_module(name, run_name="__main__", alter_sys=True)

    return call


def ran(call: Callable) -> str:
    """What a call prints that ends well, as a command does."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            entry(call)
        except SystemExit as stop:  # after --help
            assert not stop.code, stop.code
    return printed.getvalue()
