"""What the Trainer's loop, the drawing of batches and our logging add to an update, for every config of conf/.

The run is the command line's, with its callbacks, curves and checkpoints, without rollouts: each phase for one epoch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_diffrl.__main__ import main
from lit_diffrl.methods.base import Method
from lit_diffrl.typos import find_class

CONF = Path(__file__).resolve().parents[1] / "conf"
UPDATES = 300


@pytest.mark.parametrize("config", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_loop(
    config: Path, note: Callable[..., None], timer: Callable[[], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    model = yaml.safe_load(config.read_text())["model"]
    kind = find_class("model", model["class_path"], Method)
    spent: dict[tuple[str, str], float] = defaultdict(float)

    def timed(name: str, part: str) -> None:
        """Add the time of a method of the class to a part, by phase."""
        original = getattr(kind, name)

        def wrapper(self: Method, *args: Any, **kwargs: Any) -> Any:
            begun = timer()
            try:
                return original(self, *args, **kwargs)
            finally:
                spent[self.phase.name, part] += timer() - begun

        monkeypatch.setattr(kind, name, wrapper)

    def marks(name: str, sign: int, last_only: bool) -> None:
        """Count the time between two hooks of the loop: from an epoch's start to its last update's end."""
        original = getattr(kind, name)

        def wrapper(self: Method, *args: Any) -> Any:
            found = original(self, *args)
            if not last_only or args[-1] == UPDATES - 1:
                spent[self.phase.name, "all"] += sign * timer()
            return found

        monkeypatch.setattr(kind, name, wrapper)

    marks("on_train_batch_end", 1, True)
    marks("on_train_epoch_start", -1, False)
    timed("training_step", "step")
    for name in ("report", "guard", "clip_gradients_of"):
        timed(name, "watching")

    monkeypatch.chdir(tmp_path)
    phases = [f"--model.{key}=1" for key, value in model["init_args"].items() if key.endswith("_epochs") and value]
    arguments = [f"--data.updates_per_epoch={UPDATES}", "--rollout.max_steps=1", "--rollout.episodes=1"]
    more = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--rollout.pictures=false"]
    assert main(["fit", "--config", str(config), *phases, *arguments, *more]) == 0

    for phase in dict.fromkeys(name for name, _ in spent):
        every, step, watching = (spent[phase, part] / UPDATES for part in ("all", "step", "watching"))
        bare = step - watching
        share = 100 * (every - bare) / bare
        note(f"{config.stem}, {phase}: update without loop, data and logs", bare)
        note(f"{config.stem}, {phase}: loop and data", every - step)
        note(f"{config.stem}, {phase}: logs, norms and guard; all three are {share:.1f} % of the update", watching)
