"""Where a figure of a run goes: its folder of pictures, and TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_diffrl.rollout.pictures import encode_png, figure_pixels
from lit_diffrl.rollout.results import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def publish(trainer: Trainer, folder: Path, figure: Figure, tag: str, name: str) -> None:
    """Write a figure as ``pictures/<name>.png`` of the run and show it in TensorBoard; on one process.

    Args:
        trainer: Of the run.
        folder: The run's, which all processes have to ask for.
        figure: The figure.
        tag: Its name in TensorBoard.
        name: Its name among the pictures.
    """
    pixels = figure_pixels(figure)
    if trainer.loggers or trainer.ckpt_path:
        write_bytes(folder / "pictures" / f"{name}.png", encode_png(pixels))
    # The axis of self.log: batches, where trainer.global_step would count every optimizer's steps.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped if trainer.training else 0
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
