"""EnergyCheck: the guidance that a policy has learnt, measured against the exact one of its own critics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_diffrl.errors import ConfigError, check_each, check_range
from lit_diffrl.rollout.callback import _checkpoint_name, _rehearsing, _run_folder
from lit_diffrl.rollout.publish import publish
from lit_diffrl.rollout.results import unused_name, write_json
from lit_diffrl.rollout.sweep import COLORS, INK, aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

TIMES = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
Found = Mapping[str, Sequence[Any]]  # kind of states: a GuidanceCheck for each time
STARTS, DATA = "where episodes begin", "all over the data"


class EnergyCheck(Callback):
    """Compares an energy's guidance with the exact one, by Monte Carlo over the behaviour model's own actions.

    Done in states where the data's episodes begin and in states spread evenly over it, at the end of ``fit`` and by
    ``test``, once the energy has learnt. It tells an energy that learnt something wrong from critics that are wrong:
    where the two lengths differ or the cosine is low, guidance does what the critics did not ask for. Where episodes
    begin a policy must not fail, and the data has few states.

    A table is printed and drawn (TensorBoard ``energy/check`` and ``pictures/``), and ``test`` writes it into
    ``results/``: medians of the lengths of ``sigma_t grad E_t`` at degree 1, exact and learnt, of the cosine between
    them, and of the number of actions that the exact one rests on. Where that is small, the exact one is not known.
    ``guidance_t_max`` and rescaling are left out of it.

    Args:
        states: States of either kind to compare in; 0 compares nothing.
        actions: Actions drawn in each of them.
        times: Times to compare at, each from 0.001 (clean) to 1 (noise).
    """

    def __init__(self, states: int = 0, actions: int = 1024, times: Sequence[float] = TIMES) -> None:
        check_range("energy_check.states", states, 0)
        check_range("energy_check.actions", actions, 2)
        check_each("energy_check.times", times)
        for t in times:
            check_range("energy_check.times", t, 1e-3, 1)
        self.states, self.actions, self.times = states, actions, list(times)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a method without an energy, before anything is trained."""
        if self.states and not hasattr(pl_module, "check_guidance"):
            raise ConfigError(
                f"energy_check.states is {self.states}, but {type(pl_module).__name__} has no energy; QGPO and AEPO "
                "have: leave it out, or give --energy_check.states 0"
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare when all has been learnt; the last checkpoint is written."""
        folder = _run_folder(trainer)  # asks all processes
        if self._wanted(trainer, pl_module):
            self._show(trainer, folder, pl_module, self._measure(trainer, pl_module), "energy")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compare, and write the numbers."""
        run = _run_folder(trainer)  # asks all processes
        if not self._wanted(trainer, pl_module):
            return
        found, folder = self._measure(trainer, pl_module), run / "results"
        name = unused_name(folder, f"{_checkpoint_name(trainer)}-energy")
        content = {
            "dataset": pl_module.spec.dataset_ids,
            "states": self.states,
            "support": self.actions,
            **{where: [row._asdict() for row in rows] for where, rows in found.items()},
            "options": dict(pl_module.hparams),
        }
        write_json(folder / f"{name}.json", content)
        log.info("wrote %s", folder / f"{name}.json")
        self._show(trainer, run, pl_module, found, name)

    def _wanted(self, trainer: Trainer, method: Any) -> bool:
        if not self.states or not trainer.is_global_zero or _rehearsing(trainer):
            return False
        if not method.guided:
            log.warning("energy_check: the energy has not learnt yet, so its guidance is not compared")
        return bool(method.guided)

    def _measure(self, trainer: Trainer, method: Any) -> Found:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        found = {}
        for where, rows in ((STARTS, data.initial), (DATA, torch.arange(len(data.table), device=data.table.device))):
            if len(rows):  # of files without successors episodes of one step are left out
                spread = torch.linspace(0, len(rows) - 1, min(self.states, len(rows))).long().to(rows.device)
                obs = method.to_own(data.transitions(rows[spread]).obs)
                found[where] = method.check_guidance(obs, self.times, self.actions)
        return found

    @staticmethod
    def _show(trainer: Trainer, folder: Path, method: Any, found: Found, name: str) -> None:
        title = f"{type(method).__name__} · {'+'.join(method.spec.dataset_ids)} · guidance of degree 1"
        print(check_table(found), flush=True)
        publish(trainer, folder, check_figure(found, title), "energy/check", name)


def check_table(found: Found) -> str:
    """A table for each kind of states, a line for each time."""
    head = ("t", "exact", "learnt", "cosine", "actions")
    tables = []
    for where, rows in found.items():
        lines = [(f"{r.t:g}", f"{r.exact:.2f}", f"{r.learnt:.2f}", f"{r.cosine:.2f}", f"{r.actions:.0f}") for r in rows]
        tables.append(f"length of the guidance, {where}\n{aligned([head, *lines])}")
    return "\n\n".join(tables)


def check_figure(found: Found, title: str) -> Figure:
    """Draw lengths and cosines over the time, a column for each kind of states; not registered with pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 4.4), facecolor="white", layout="constrained")
    axes = figure.subplots(2, len(found), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    for (where, rows), (lengths, cosines) in zip(found.items(), axes.T):
        times = [r.t for r in rows]
        for label, color, values in (
            ("exact", INK, [r.exact for r in rows]),
            ("learnt", COLORS[1], [r.learnt for r in rows]),
        ):
            lengths.plot(times, values, color=color, marker="o", markersize=4, label=label)
        cosines.plot(times, [r.cosine for r in rows], color=COLORS[1], marker="o", markersize=4)
        lengths.set_yscale("log")
        lengths.set_title(where, fontsize=9, color=INK)
        cosines.set(ylim=(-1.05, 1.05), xlabel="time t, from clean to noise")
        for axis in (lengths, cosines):
            axis.grid(color="#d8dbe2", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("length of σ∇E", color=INK)
    axes[1, 0].set_ylabel("cosine", color=INK)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9, color=INK)
    return figure
