"""The tables before the first computation: FileNames, FunctionNames, FileLocations, StackFrames."""

from __future__ import annotations

import re

from shardlab.hlo.lexer import Text
from shardlab.hlo.module import SourceFrame
from shardlab.hlo.strings import unescape

Tables = dict[str, dict[int, str]]
"""Table name -> id -> raw value: a quoted string or a braced record."""

_ID = re.compile(r"[0-9]{1,18}")
_FIELD = re.compile(r"([a-z_]+)=([0-9]{1,18})")


def read_table(text: Text, offset: int) -> tuple[dict[int, str], int]:
    """Entries `1 "name"` or `1 {key=value …}` from `offset`, and the offset after the last one."""
    entries: dict[int, str] = {}
    while True:
        at = text.skip(offset)
        match = _ID.match(text.text, at)
        if not match:
            return entries, offset
        value = text.skip(match.end())
        if text.at(value) == '"':
            offset = text.string_end(value)
        elif text.at(value) == "{":
            offset = text.bracket_end(value)
        else:
            raise text.error(value, f"expected a string or a braced record, found {text.found(value)}")
        entries[int(match.group())] = text.text[value:offset]


def stack_frames(tables: Tables) -> dict[int, SourceFrame]:
    """Join the four tables. `parent_frame_id` is printed as parent + 1: 1 is no parent, 0 here."""
    files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
    locations = {key: dict(_FIELD.findall(value)) for key, value in tables.get("FileLocations", {}).items()}
    frames = {}
    for key, value in tables.get("StackFrames", {}).items():
        fields = dict(_FIELD.findall(value))
        location = locations.get(int(fields.get("file_location_id", 0)), {})
        frames[key] = SourceFrame(
            file=unescape(files.get(int(location.get("file_name_id", 0)), "")),
            line=int(location.get("line", 0)),
            function=unescape(functions.get(int(location.get("function_name_id", 0)), "")),
            parent=max(int(fields.get("parent_frame_id", 1)) - 1, 0),
        )
    return frames
