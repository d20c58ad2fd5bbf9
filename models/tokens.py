"""Tokens: what text encoders are given of a text, and what is cut off."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from configs import UserError, quoted

SAID = 3  # texts that are named where several are cut


@dataclass(frozen=True)
class Reader:
    """What a text encoder takes of a text."""

    tokenizer: Any
    length: int  # tokens, those of the template included
    written: Callable[[str], str] = str  # the text inside of its template


def chat(tokenizer: Any, thinking: bool) -> Callable[[str], str]:
    """How a user's turn is written in the template of a tokenizer."""

    def written(text: str) -> str:
        turn = [{"role": "user", "content": text}]
        how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        return tokenizer.apply_chat_template(turn, **how)

    return written


def kept(reader: Reader, text: str) -> tuple[list[int], bool]:
    """The tokens that a text encoder is given of a text, padding included, and whether the text goes on."""
    tokenizer, length, text = reader.tokenizer, reader.length, reader.written(text)
    whole = tokenizer(text, padding=False, truncation=False).input_ids
    return tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids, len(
        whole
    ) > length


def cuts(readers: Iterable[Reader], texts: Iterable[str]) -> list[str]:
    """A line for each text that no encoder reads whole: where the one that reads most of it ends."""
    lines, most = [], max(readers, key=lambda reader: reader.length, default=None)
    for text in texts if most else ():
        tokens, cut = kept(most, text)
        if cut:
            end = most.tokenizer.decode(tokens, skip_special_tokens=True)[-40:]
            lines.append(
                f"{quoted(text, 60)} is longer than the {most.length} tokens that are read: it ends at "
                f"{quoted(end)}"
            )
    more = len(lines) - SAID
    return (
        lines
        if more <= 0
        else [*lines[:SAID], f"{more} more texts are longer than the {most.length} tokens that are read"]
    )


def tell_apart(readers: Iterable[Reader], a: str, b: str, what: str) -> None:
    """Raises UserError for two texts that are the same to all readers: cut to the same beginning, or of words
    that they do not know.
    """
    if all(kept(reader, a)[0] == kept(reader, b)[0] for reader in readers):
        raise alike(a, b, what)


def alike(a: str, b: str, what: str) -> UserError:
    """What is wrong with two texts that say the same to `what`."""
    return UserError(
        f"{quoted(a, 60)} and {quoted(b, 60)} are the same text to {what}: "
        "they differ in words that it does not know, or beyond what it reads"
    )
