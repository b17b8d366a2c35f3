"""The Python that compiles: this one, or that of an environment with another compiler. Imports no jax."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shardlab.compile.versions import versions
from shardlab.errors import Problem, UserError

PACKAGE_PARENT = Path(__file__).parents[2]
_ASK = """\
import json, sys
from shardlab.compile.versions import versions
print(json.dumps(versions(sys.argv[1])))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """executable: its path, or a name on PATH. It runs these sources with what is installed there."""

    executable: str

    def versions(self, family: str) -> dict[str, str]:
        """Package -> version there, as `versions.versions`. Raises UserError when it cannot say."""
        if self == HERE:
            return versions(family)
        # -P: nothing in the working directory becomes a module.
        command = [self.executable, "-P", "-c", _ASK, family]
        environment = os.environ | {"PYTHONPATH": str(PACKAGE_PARENT)}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                text=True,
                check=False,
            )
            found = json.loads(done.stdout) if done.returncode == 0 else None
        except (OSError, ValueError) as error:
            done, found = None, str(error)
        if isinstance(found, dict):
            return {str(package): str(version) for package, version in found.items()}
        said = str(found) if done is None else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fix = "name a Python of 3.11 or later in an environment with shardlab[jax] and the old jax"
        raise UserError(Problem(f"--python {self.executable}", f"cannot be used: {said}", fix))


HERE = Interpreter(sys.executable)
