"""How much work one module's loops and branches may cause: counted, never timed, so that answers repeat.

Hostile text can hold thousands of loops that must be simulated, or calls that fan out without end. All of a
module's loops share one allowance; what comes after it is spent is unknown, with a reason that says so.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_STEPS = 100_000
MAX_OPERATIONS = 2_000_000
STEPS_SPENT = f"the arithmetic of the module takes more than {MAX_STEPS} steps to follow"
OPERATIONS_SPENT = (
    f"not simulated: the module's loops and branches together take more than {MAX_OPERATIONS} operations"
)


@dataclass(slots=True)
class Effort:
    """What is left for one module.

    steps: instructions and nodes that may be followed to find what a number depends on. operations: scalar
    operations that may be carried out, iterations x length of the program.
    """

    steps: int = MAX_STEPS
    operations: int = MAX_OPERATIONS

    def follow(self) -> bool:
        """Take one step; False when none is left."""
        self.steps -= 1
        return self.steps >= 0

    def spend(self, operations: int) -> bool:
        """Take so many operations if they are left."""
        if operations > self.operations:
            return False
        self.operations -= operations
        return True
