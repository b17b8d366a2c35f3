"""The error tree, sorted by who must act. Imports nothing.

Every error is one line that says what is wrong, where, and what to do next. The command line prints
`str(error)` and exits with `exit_code`; it never shows a traceback for any of these.
"""

from __future__ import annotations

from dataclasses import dataclass


class ShardlabError(Exception):
    """Base of everything shardlab raises on purpose."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake of the user's: `where` (file, line, key), `what` is wrong, `fix` (what to do next)."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}" if self.fix else f"{self.where}: {self.what}"


class UserError(ShardlabError):
    """Mistakes in a file or a flag: all of them at once. The user must act."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class ParseError(ShardlabError):
    """HLO that cannot be read. `line` and `column` count from 1; 0 where the input is not text."""

    def __init__(self, message: str, *, source: str = "<hlo>", line: int = 0, column: int = 0) -> None:
        self.message, self.source, self.line, self.column = message, source, line, column
        super().__init__(f"{source}:{line}:{column}: {message}")


class TargetMissing(ShardlabError):
    """This machine cannot compile for `target` yet; `install` is the command that would change that."""

    def __init__(self, target: str, why: str, install: str) -> None:
        self.target, self.why, self.install = target, why, install
        super().__init__(f"target {target}: {why}; {install}")


class CompileFailed(ShardlabError):
    """The compiler refused for a reason other than memory. `log` is the path of what it said, if kept."""

    def __init__(self, what: str, why: str, log: str | None = None) -> None:
        self.what, self.why, self.log = what, why, log
        super().__init__(f"{what}: {why}" + (f"; the compiler's log is {log}" if log else ""))


class Infeasible(ShardlabError):
    """The plan cannot be put on this model or machine (6 heads over 4 devices). An answer, not a mistake.

    `nearest` says what would work. Commands turn this into a row with a reason and exit 0.
    """

    exit_code = 0

    def __init__(self, reason: str, nearest: str = "") -> None:
        self.reason, self.nearest = reason, nearest
        super().__init__(f"{reason}; {nearest}" if nearest else reason)
