"""``python -m lit_diffrl``: answers for help and typos before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lit_diffrl.errors import ConfigError, DataError

HELP = """\
usage: python -m lit_diffrl {fit,validate,test,export} --config FILE [--config FILE ...] [options]

Trains diffusion models for offline reinforcement learning and measures them in MuJoCo.

commands:
  fit                    train; curves, pictures and checkpoints go to <logs>/<method>/<dataset>/<run>/
  validate               repeat the evaluation made during training, for a checkpoint
  test                   evaluate a checkpoint over more episodes; writes <run>/results/
  export                 store a checkpoint's synthetic transitions as a Minari dataset: --ckpt_path FILE [--name ID]
                         [--rows N], the newest N

options (all of them: python -m lit_diffrl fit --help):
  --config FILE          your own file, or one that comes with the package (conf/dmemm.yaml); later files and options
                         override earlier ones
  --run NAME             name of the run; default: the time of day
  --logs DIR             where runs are written; default: tb_logs
  --ckpt_path FILE       continue (fit) or evaluate (validate, test) this checkpoint; 'last' and 'best' mean the
                         newest of that name among the runs of this method and dataset, or of --run. Without
                         --config, the run's own config.yaml is used
  --model.NAME VALUE     an argument of the method;         list: fit --model.help DMEMM
  --data.NAME VALUE      an argument of the data module;    list: fit --data.help WindowData
  --rollout.NAME VALUE   an argument of the evaluation
  --trainer.NAME VALUE   an argument of Lightning's Trainer, e.g. --trainer.max_epochs 5
  --print_config         show the resulting config and stop

examples:
  python -m lit_diffrl fit --config conf/dmemm.yaml
  python -m lit_diffrl fit --config conf/dmemm.yaml --config conf/data/medium.yaml --run medium --rollout.episodes 20
  python -m lit_diffrl fit --config conf/dmemm.yaml --ckpt_path last
  python -m lit_diffrl test --ckpt_path best
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0, 2 after an error that a person can fix (one line on stderr; LIT_DIFFRL_TRACEBACK=1 shows where
        it came from), 130, 143 and 138 when stopped by Ctrl-C, SIGTERM and SIGUSR1.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    try:
        from lit_diffrl.arguments import check_subcommand, find_configs

        check_subcommand(args)
        if args[0] == "export":
            from lit_diffrl.export import main as export

            return export(args[1:])
        args = find_configs(args)
        from lit_diffrl.cli import run

        return run(args)
    except (ConfigError, DataError) as error:
        if os.environ.get("LIT_DIFFRL_TRACEBACK") == "1":
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before a run has begun, or while it ends
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
