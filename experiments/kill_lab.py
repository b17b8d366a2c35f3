"""Kill training at random moments, go on from its checkpoints, and compare with an undisturbed run.

python experiments/kill_lab.py --kills=3 -n 2 -- --mesh=meshes/cpu8-fsdp.toml --steps=60 --checkpoint_every=5

What stands behind `--` goes to `train.py`. Each kill is `kill -9` of one process or of all, after a random
number of further steps. Every restart must find a checkpoint, and lose no more than the steps since it; a
save that was under way counts as not made.
"""

from __future__ import annotations

import csv
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags

from shardlab.errors import Problem, ShardlabError, UserError

_KILLS = flags.DEFINE_integer("kills", 3, "How often to kill.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("n", 2, "Processes.", lower_bound=1)
_SEED = flags.DEFINE_integer("kill_seed", 0, "Of what is killed, and when.")
_FURTHER = flags.DEFINE_integer("further_steps", 15, "At most so many steps before each kill.", lower_bound=1)
_TIMEOUT_S = 300
_LAUNCH = Path(__file__).with_name("launch_local.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What was killed after which step, and after which step the next run went on."""

    whom: str
    after_step: int
    resumed_after: int


def launch(arguments: Sequence[str], log: Path) -> subprocess.Popen[str]:
    """A training run; its output goes to `log`."""
    command = [sys.executable, str(_LAUNCH), "-n", str(_PROCESSES.value), "--", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, text=True, start_new_session=True)


def curve(path: Path) -> dict[int, str]:
    """Step -> loss, as written."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {int(row["step"]): row["loss"] for row in csv.DictReader(file) if row["tokens_per_s"]}


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_at(run: subprocess.Popen[str], metrics: Path, step: int, chance: random.Random, log: Path) -> str:
    """Kill one process or all when `step` is done. Returns whom."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while max(curve(metrics), default=0) < step:
        if run.poll() is not None or time.monotonic() > deadline_s:
            said = " ".join(log.read_text().strip().splitlines()[-1:])
            raise UserError(Problem("training", f"ended before it was killed: {said}", "use more --steps"))
        time.sleep(0.01)
    time.sleep(chance.random() * 0.2)  # anywhere in a step, or in a save
    running = children(run.pid)
    victims = running if chance.random() < 0.5 else [chance.choice(running)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    run.wait(_TIMEOUT_S)
    return "all" if len(victims) == len(running) else "one"


def disturbed(arguments: Sequence[str], folder: Path, steps: int) -> list[Kill]:
    """Run to the end through --kills kills. Raises UserError when a run finds no checkpoint."""
    chance, kills, metrics = random.Random(_SEED.value), list[Kill](), folder / "killed.csv"
    last: tuple[str, int] | None = None
    while True:
        log = folder / f"run{len(kills)}.log"
        run = launch([*arguments, f"--checkpoints={folder}/checkpoints", f"--metrics={metrics}"], log)
        done = max(curve(metrics), default=0)
        final = len(kills) + (last is not None) >= _KILLS.value
        if final:
            code = run.wait(_TIMEOUT_S)
        else:
            target = min(done + chance.randint(1, _FURTHER.value), steps - 1)
            whom = kill_at(run, metrics, target, chance, log)
        if last is not None:
            found = re.search(r"goes on after step (\d+)", log.read_text())
            kills.append(Kill(whom=last[0], after_step=last[1], resumed_after=int(found[1]) if found else 0))
            print(kills[-1], flush=True)
        if final:
            if code:
                raise UserError(Problem("training", f"ended with {code}", log.read_text()[-500:]))
            return kills
        last = whom, max(curve(metrics), default=0)


def main(argv: Sequence[str]) -> None:
    """Undisturbed, then disturbed; exit code 1 when the curves differ or a checkpoint was lost."""
    arguments = list(argv[1:])
    value = {name: int(number) for name, number in re.findall(r"--(\w+)=(\d+)(?= |$)", " ".join(arguments))}
    steps, every = value.get("steps", 200), value.get("checkpoint_every", 100)
    try:
        with tempfile.TemporaryDirectory(prefix="shardlab-kill-") as name:
            folder = Path(name)
            if not any(argument.startswith("--compile_cache") for argument in arguments):
                arguments.append(f"--compile_cache={folder}/compiled")  # a restart compiles nothing
            plain = launch([*arguments, f"--metrics={folder}/plain.csv"], folder / "plain.log")
            if plain.wait(_TIMEOUT_S):
                raise UserError(
                    Problem("training", "failed undisturbed", (folder / "plain.log").read_text()[-500:])
                )
            kills = disturbed(arguments, folder, steps)
            expected, found = curve(folder / "plain.csv"), curve(folder / "killed.csv")
    except ShardlabError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    worst = max(kill.after_step - kill.resumed_after for kill in kills)
    same = expected == found and len(found) == steps
    of_all = sum(kill.whom == "all" for kill in kills)
    print(
        f"{len(kills)} kills, {of_all} of all processes: at most {worst} steps done again (a checkpoint "
        f"every {every}); the loss curve is {'identical' if same else 'NOT the same'}"
    )
    sys.exit(0 if same and worst < 2 * every + 1 else 1)


if __name__ == "__main__":
    app.run(main)
