"""Griffe extension: the docstrings' mathematics (``:math:`` and ``.. math::``) as Markdown for the site."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^( *)\.\. math::[ \t]*(.*)\n((?:[ \t]*\n|\1[ \t]+.*\n?)*)", re.M)


def to_markdown(text: str) -> str:
    """Return a docstring with LaTeX between dollars."""

    def block(match: re.Match[str]) -> str:
        indent, first, rest = match.groups()
        body = "\n".join(line for line in [first, *textwrap.dedent(rest).splitlines()] if line.strip())
        return "\n".join(f"{indent}{line}" for line in ["$$", *body.splitlines(), "$$", ""]) + "\n"

    return _INLINE.sub(r"$\1$", _BLOCK.sub(block, text + "\n"))


class RstMath(griffe.Extension):
    """Translate every docstring when it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Translate one object's docstring."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
