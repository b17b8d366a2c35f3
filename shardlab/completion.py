"""Shell completion: a static script that shtab makes from the flags, so that a TAB starts no Python.

Files complete where a flag takes one, models by name.
"""

from __future__ import annotations

import argparse

from shardlab.errors import ShardlabError

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"FILE", "PATH", "MESH", "BASE", "HEAD", "DIR"}


class ShtabMissing(ShardlabError):
    """shtab is not installed. The user must act."""

    def __init__(self) -> None:
        super().__init__("completion: shtab is not installed; pip install shtab")


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell to source. Raises ShtabMissing."""
    try:
        import shtab
    except ImportError:
        raise ShtabMissing from None
    from shardlab.spec.models import MODELS

    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif "--model" in action.option_strings:
            action.choices = sorted(MODELS)
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of the parser and of every verb."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                found += _actions(verb)
    return found
