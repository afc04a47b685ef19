"""The command line: LightningCLI with the rules of a run (folders, resuming, saved config) and one-line errors."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import OmegaConfBaseException

import lit_diffrl.data
import lit_diffrl.methods  # noqa: F401  their classes are known by short names once imported
from lit_diffrl import runs
from lit_diffrl.arguments import nest_nulls
from lit_diffrl.checkpoint_io import AtomicCheckpointIO
from lit_diffrl.continuing import (
    agreed_checkpoint,
    check_method,
    refuse_other_seed,
    refuse_shorter_epochs,
    with_own_config,
)
from lit_diffrl.errors import ConfigError, DataError, causes
from lit_diffrl.memory import keep_freed_memory
from lit_diffrl.methods.base import CHECKPOINT_KEY, Method
from lit_diffrl.methods.loading import read_checkpoint
from lit_diffrl.precision import check_precision
from lit_diffrl.processes import end_others, first_process, say
from lit_diffrl.rollout.callback import RolloutEvaluation
from lit_diffrl.rollout.checkpoints import BestCheckpoint, LastCheckpoint
from lit_diffrl.rollout.energy_check import EnergyCheck
from lit_diffrl.rollout.model_check import ModelCheck
from lit_diffrl.rollout.selection import OfflineCheckpoint
from lit_diffrl.run_callbacks import ConfiguredOptimizers, NoProfiler, RunProgressBar, SaveRunConfig
from lit_diffrl.stopping import StopAfterUpdate
from lit_diffrl.trainer_options import check_seed, check_trainer_options
from lit_diffrl.typos import Names, find_class, shorten

# Batches are indexed from memory, by their place in the run; a resumed run's folder is not empty, a branched run's is
# another; curves count updates across epochs; averaged and target networks stay in eval mode; the last two are
# between Lightning and torch, whose older versions know no other name for that option.
EXPECTED_WARNINGS = (
    "does not have many workers",
    "your dataloader is not resumable",
    "exists and is not empty",
    "dirpath has changed",
    "smaller than the logging interval",
    r"module\(s\) in eval mode at the start of training",
    "LeafSpec",
    "`broadcast_buffers` is deprecated",
)
BASES: dict[str, type] = {"model": Method, "data": LightningDataModule}
TRAINER_CLASSES: dict[str, type] = {"trainer.callbacks": Callback, "trainer.logger": Logger}


class DiffRLCLI(LightningCLI):
    """One command line for all methods, data modules and subcommands.

    Args:
        args: Arguments without the program's name.
    """

    folder: Path
    epochs_done: int = 0
    updates_done: int = 0
    batches_done: int = 0

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            Method,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveRunConfig,
            parser_kwargs={
                "prog": "python -m lit_diffrl",
                "parser_mode": "omegaconf+",
                "exit_on_error": False,
                "allow_abbrev": False,
            },
            trainer_defaults={
                "num_sanity_val_steps": 0,
                # Guidance differentiates while it samples, which inference mode forbids.
                "inference_mode": False,
                # The data module draws each rank's own batches.
                "use_distributed_sampler": False,
                "log_every_n_steps": 50,
            },
            args=args,
        )

    # ---------------------------------------------------------------- parsing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands, with the Trainer's arguments that are no options."""
        skip = {"model", "dataloaders", "datamodule", "weights_only", "verbose"}
        return {
            "fit": (skip - {"verbose", "dataloaders"}) | {"train_dataloaders", "val_dataloaders"},
            "validate": skip,
            "test": skip,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the evaluation and the run folder's name."""
        parser.add_lightning_class_args(RolloutEvaluation, "rollout")
        parser.add_lightning_class_args(ModelCheck, "model_check")
        parser.add_lightning_class_args(EnergyCheck, "energy_check")
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run; default: the time of day.")
        parser.add_argument("--logs", type=str, default="tb_logs", help="Folder of all runs.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check names, parse, and settle which checkpoint and which run folder are meant."""
        args = with_own_config(list(args))
        subcommand = args[0]
        known = Names((a.dest for a in self._subcommand_parsers[subcommand]._actions), BASES)
        known.check(args[1:])
        for note in known.notes:
            say(f"note: {note}", error=True)
        try:
            self.config = parser.parse_args(nest_nulls(args, BASES))
        except ArgumentError as error:
            raise ConfigError(shorten(str(error), TRAINER_CLASSES)) from error
        except OmegaConfBaseException as error:
            raise ConfigError(known.explain_interpolation(str(error))) from error
        check_trainer_options(self.config[subcommand].trainer)
        check_seed(self.config[subcommand].seed_everything)
        self._settle_run(subcommand, self.config[subcommand])
        self.save_config_kwargs = {"folder": self.folder}

    def _settle_run(self, subcommand: str, config: jsonargparse.Namespace) -> None:
        logs = Path(config.logs).expanduser()
        if logs.is_file():
            raise ConfigError(f"--logs {logs} is a file; give the folder of all runs, default tb_logs")
        method = find_class("model", config.model.class_path, Method)
        dataset = (config.data.get("init_args") or {}).get("dataset") or "data"
        parent = logs / method.__name__.lower() / runs.dataset_slug(dataset)
        fit, given, name = subcommand == "fit", config.ckpt_path, config.run
        if given is None:
            if not fit:
                raise ConfigError(
                    f"{subcommand} needs --ckpt_path: a file, or 'last' or 'best' for the newest of these"
                )
            # Only the first process may ask: by the time others do, it may have begun to write.
            self.folder = runs.new_run(parent, name) if first_process() else parent / (name or "rank")
            return
        checkpoint = agreed_checkpoint(given, logs, f"{parent.relative_to(logs)}/{name or '*'}")
        own = runs.run_folder(checkpoint)
        if not fit and name is not None and name != own.name:
            raise ConfigError(f"{subcommand} writes beside its checkpoint, into {own}: leave out --run {name}")
        content = read_checkpoint(checkpoint)
        check_method(checkpoint, content[CHECKPOINT_KEY]["method"], method)
        if not {"epoch", "loops", "optimizer_states"} <= content.keys():
            raise ConfigError(
                f"{checkpoint} holds weights alone: it acts (lit_diffrl.load), but {subcommand} needs a run's whole "
                "state; give a file from a run's checkpoints folder"
            )
        loops = content["loops"]["fit_loop"]
        updates = loops["epoch_loop.batch_progress"]
        self.epochs_done = loops["epoch_progress"]["total"]["processed"]
        self.updates_done = 0 if updates["is_last_batch"] else updates["current"]["processed"]
        config.ckpt_path = str(checkpoint)
        if fit:
            refuse_shorter_epochs(config.data.get("init_args") or {}, self.updates_done)
        target = None if given in runs.ALIASES or name is None else parent / name
        if not fit or runs.continues(checkpoint, target):
            self.folder = own
            # A killed run may have drawn its curves beyond its last checkpoint: they are drawn again from there.
            self.batches_done = updates["total"]["processed"]
            refuse_other_seed(checkpoint, content[CHECKPOINT_KEY]["seed"], config.seed_everything, fit)
        else:
            self.folder = runs.new_run(parent, target.name if target else None)

    def _parse_ckpt_path(self) -> None:
        # LightningCLI writes the checkpoint's hyperparameters over the config and the command line here. With us these
        # decide, and Method refuses a checkpoint that does not fit them.
        return

    # ---------------------------------------------------------------- building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer of this run: length from the method's phases, logger, checkpoints, progress bar."""
        config = self._get(self.config_init, "trainer")
        if config["max_epochs"] is None:
            kwargs["max_epochs"] = self.model.total_epochs
        if config["default_root_dir"] is None:
            kwargs["default_root_dir"] = str(self.folder)
        if config["logger"] in (None, True):
            if self.subcommand == "fit":
                runs.outlast_events(self.folder)
            # An evaluation must not add points to the curves of training.
            kwargs["logger"] = self.subcommand == "fit" and TensorBoardLogger(
                str(self.folder.parent),
                name="",
                version=self.folder.name,
                default_hp_metric=False,
                purge_step=self.batches_done,
            )
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        # The first: what others do when an update begins has then not been done when the run is stopped before it.
        keeps = config["enable_checkpointing"] is not False and not config["fast_dev_run"]
        self.stop = StopAfterUpdate(self.folder / "checkpoints" / "last.ckpt" if keeps else None)
        config["callbacks"] = [self.stop, *given, *self._own_callbacks(config, given)]
        config["profiler"] = config["profiler"] or NoProfiler()
        plugins = config["plugins"] or []
        config["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        check_precision(config["precision"] or "32-true")
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise ConfigError(f"--trainer: {error}") from error

    def _own_callbacks(self, config: Any, given: list[Callback]) -> list[Callback]:
        callbacks: list[Callback] = [ConfiguredOptimizers()]
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks.append(RunProgressBar())
        if config["enable_checkpointing"] is not False:
            folder = str(self.folder / "checkpoints")
            # One file each, replaced in place. `last` comes second: it then holds what `best` has just noted.
            rollout: RolloutEvaluation = self._get(self.config_init, "rollout")
            chosen = rollout.offline
            best = OfflineCheckpoint(folder, chosen) if chosen.chooses else BestCheckpoint(folder)
            callbacks += [best, LastCheckpoint(folder)]
        return callbacks

    # ---------------------------------------------------------------- running

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            # Both ways to stop end like this: ours after an update, and the Trainer's at a second Ctrl-C.
            self.stopped()
            number = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
            # The Trainer kills the first process when another one does not end with 0.
            sys.exit(128 + (self.stop.received or number) if first_process() else 0)
        except BaseException as error:
            end_others(self.trainer.strategy.launcher, error)
            if isinstance(error, MisconfigurationException):
                raise ConfigError(f"--trainer: {error}") from error
            runs.refuse_unwritable(error, self.folder)
            raise

    def before_fit(self) -> None:
        """Say what is about to happen."""
        trainer, start = self.trainer, self.config.fit.ckpt_path
        device = f"{trainer.world_size} {trainer.strategy.root_device.type}"
        epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
        length = f"{epochs} epochs" if epochs >= 0 else "epochs without end"
        where = "keeping nothing" if self._get(self.config, "trainer").fast_dev_run else f"into {self.folder}"
        say(f"{type(self.model).__name__}: {length} on {device}, {where}")
        if start:
            kind = "continuing" if runs.continues(Path(start), self.folder) else "a new run, starting"
            within = f" and {self.updates_done} updates" if self.updates_done else ""
            say(f"{kind} from {start}, which has {self.epochs_done} epochs{within}")
            if 0 <= epochs <= self.epochs_done:
                say("nothing is left to train; --trainer.max_epochs trains longer")

    def after_fit(self) -> None:
        """Say where the run is and what can be done with it."""
        saved = self.folder / "checkpoints"
        best = next((saved / n for n in ("best.ckpt", "last.ckpt") if (saved / n).is_file()), None)
        if best is None:
            return
        say(f"\nrun       {self.folder}")
        say(f"curves    tensorboard --logdir {self.config.fit.logs}")
        say(f"evaluate  python -m lit_diffrl test --ckpt_path {best}")

    def stopped(self) -> None:
        """Say how an interrupted run is continued."""
        last = self.folder / "checkpoints" / "last.ckpt"
        if self.subcommand == "fit" and last.is_file():
            say(f"\nstopped in epoch {self.trainer.current_epoch + 1}; continue with:")
            say(f"  python -m lit_diffrl fit --ckpt_path {last}")
        else:
            say("\nstopped" + (" before the first checkpoint" if self.subcommand == "fit" else ""))


def run(args: list[str]) -> int:
    """Parse and run a command line.

    Args:
        args: Arguments without the program's name.

    Returns:
        The exit code.

    Raises:
        ConfigError: If an option, a name or a checkpoint does not fit.
        DataError: If the dataset cannot be used.
    """
    # Keeps ${...} relative to the file's root, so that they follow the command line and work across files.
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    quieten()
    keep_freed_memory()
    with warnings.catch_warnings(), one_report():
        for text in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{text}")
        try:
            DiffRLCLI(args)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except ValueError as error:
            # The parser wraps whatever a constructor raises in a report of its own.
            raise next((c for c in causes(error) if isinstance(c, ConfigError | DataError)), error) from error
    return 0


def quieten() -> None:
    """Show our own messages and the Trainer's warnings; leave out its hints and advertisements."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    own = logging.getLogger("lit_diffrl")
    if not own.hasHandlers():
        own.addHandler(logging.StreamHandler())
        own.setLevel(logging.INFO if first_process() else logging.WARNING)


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """Keep the thread that writes the curves from reporting its error, a full disk say: it ends the run, told there."""
    before = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before
