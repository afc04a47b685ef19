"""RolloutEvaluation and BestCheckpoint inside real, tiny trainings."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.prepared import in_long_region
from lit_diffrl.rollout import BestCheckpoint, RolloutEvaluation, run_episodes


class Learner(LightningModule):
    """Learns one weight, by two optimizers; its action is the weight plus noise from the episode's seed."""

    def __init__(self, spec, begins: int = 0, step: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters("begins", "step")
        self.automatic_optimization = False
        self.spec, self.begins, self.step = spec, begins, step
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.draws: list[float] = []

    @property
    def can_act(self) -> bool:
        return int(self.updates) > 4 * self.begins

    def reset(self, mask=None, seeds=None):
        self.noise = [np.random.default_rng(s) for s in seeds or []]

    def act(self, obs, active=None):
        torch.rand(5)
        noise = np.array([0.01 * self.noise[row].normal() if on else 0 for row, on in enumerate(active)])
        return (float(self.weight) + noise)[:, None]

    def training_step(self, batch, batch_idx):
        self.draws.append(float(torch.rand(())))
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(-self.weight)
            optimizer.step()
        self.updates += 1

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return [torch.optim.SGD([self.weight], lr=self.step / 8), torch.optim.SGD([self.weight], lr=self.step / 8)]

    def train_dataloader(self):
        return DataLoader(range(4))

    def val_dataloader(self):
        return DataLoader(range(1))

    test_dataloader = val_dataloader


def trainer(folder, rollout, epochs=3, **options):
    last = ModelCheckpoint(folder / "checkpoints", "last", save_top_k=1, enable_version_counter=False)
    callbacks = [rollout, BestCheckpoint(str(folder / "checkpoints")), last]
    values = dict(
        logger=TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False),
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    return Trainer(**{**values, **options})


def curves(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags if tag.startswith("eval/")}


def test_fit_validate_and_test_agree(toy_spec, tmp_path, capsys):
    folder = tmp_path / "run"
    module = Learner(toy_spec())
    rollout = RolloutEvaluation(episodes=4, num_envs=3, test_episodes=6, seed=50)
    fit = trainer(folder, rollout, accelerator="cpu")
    fit.fit(module)

    # The curves lie on the axis of batches (4 an epoch), although global_step counts two optimizers.
    logged = curves(folder)
    assert set(logged) == {f"eval/{k}" for k in ("return", "score", "length", "action_ms", "score_rat", "score_oms")}
    steps, values = zip(*logged["eval/score"])
    assert fit.global_step == 24 and steps == (3, 7, 11)
    returns = [v for _, v in logged["eval/return"]]
    lengths = [v for _, v in logged["eval/length"]]
    for epoch, (value, length) in enumerate(zip(returns, lengths), start=1):
        assert value == pytest.approx(length * (1 + 0.05 * epoch), rel=0.02)
    np.testing.assert_allclose(values, np.array(returns) * 5, rtol=1e-5)
    np.testing.assert_allclose([v for _, v in logged["eval/score_rat"]], np.cumsum(values) / [1, 2, 3], rtol=1e-5)
    np.testing.assert_allclose([v for _, v in logged["eval/score_oms"]], np.maximum.accumulate(values), rtol=1e-5)

    # The run ends with its figures.
    out = capsys.readouterr().out
    for part in ("Learner", "toy/countdown-v0", "score, last", f"{values[-1]:.2f} (epoch 2)", "seeds 50 to 53"):
        assert part in out

    # A checkpoint evaluated again gives the logged score, exactly.
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    torch.load(checkpoint, weights_only=True)
    again = trainer(folder, RolloutEvaluation(episodes=4, num_envs=2, seed=50), logger=False)
    (metrics,) = again.validate(Learner(toy_spec()), ckpt_path=checkpoint, verbose=False)
    assert metrics["eval/score"] == values[-1] and "eval/score_rat" not in metrics

    # Tests run on other episodes and write everything.
    fresh = trainer(folder, RolloutEvaluation(test_episodes=6, num_envs=4), logger=False)
    (metrics,) = fresh.test(Learner(toy_spec()), ckpt_path=checkpoint, verbose=False)
    written = json.loads((folder / "results" / "last-test.json").read_text())
    assert [e["seed"] for e in written["episodes"]] == list(range(10_000, 10_006))
    assert written["seeds"] == [10_000, 10_005]
    assert written["summary"]["score"]["mean"] == pytest.approx(metrics["eval/score"])
    assert np.mean([e["return"] for e in written["episodes"]]) == pytest.approx(metrics["eval/return"])
    assert (written["method"], written["dataset"]) == ("Learner", ["toy/countdown-v0"])
    assert written["environment"] == json.loads(str(toy_spec().env_spec))["id"]
    assert written["options"] == {"begins": 0, "step": 0.05} and written["checkpoint"] == checkpoint
    assert [p.name for p in (folder / "results").iterdir()] == ["last-test.json"]  # no drafts left

    expected = run_episodes(module.spec, module, episodes=6, num_envs=1, seed=10_000)
    assert [e["return"] for e in written["episodes"]] == [r.return_ for r in expected]


def test_evaluation_does_not_change_the_training(toy_spec, tmp_path):
    draws = []
    for every in (1, 3):
        torch.manual_seed(0)
        module = Learner(toy_spec())
        rollout = RolloutEvaluation(episodes=3, every_n_epochs=every)
        trainer(tmp_path / f"run{every}", rollout, logger=False).fit(module)
        draws.append(module.draws)
    assert draws[0] == draws[1]


def test_first_last_and_every_nth_epoch_once_the_agent_can_act(toy_spec, tmp_path):
    rollout = RolloutEvaluation(episodes=2, every_n_epochs=3)
    trainer(tmp_path / "run", rollout, epochs=8).fit(Learner(toy_spec(), begins=1))
    assert [epoch for epoch, _ in rollout.returns.history] == [1, 3, 6, 7]
    assert [step for step, _ in curves(tmp_path / "run")["eval/return"]] == [7, 15, 27, 31]


@pytest.mark.parametrize(("epochs", "evaluations"), [(2000, 201), (1000, 101)])
def test_evaluations_of_a_published_run(epochs, evaluations):
    """After the first epoch and after every tenth, as EDP reports its scores."""
    rollout = RolloutEvaluation(every_n_epochs=10)
    for epoch in range(epochs):
        if rollout._due(SimpleNamespace(current_epoch=epoch, max_epochs=epochs)):
            rollout.returns.add(epoch, 0.0)
    assert len(rollout.returns.history) == evaluations


def test_a_resumed_run_continues_its_scores(toy_spec, tmp_path):
    def fit(name, *ends):
        folder = tmp_path / name
        checkpoint = None
        for end in ends:
            rollout = RolloutEvaluation(episodes=3)
            trainer(folder, rollout, epochs=end, logger=False).fit(Learner(toy_spec()), ckpt_path=checkpoint)
            checkpoint = str(folder / "checkpoints" / "last.ckpt")
        return rollout

    whole, parts = fit("whole", 4), fit("parts", 2, 4)
    assert whole.scores.history == parts.scores.history and len(parts.scores.history) == 4
    assert whole.returns.history == parts.returns.history
    assert (whole.scores.rat, whole.scores.oms) == (parts.scores.rat, parts.scores.oms)


def test_the_best_checkpoint_is_the_best_evaluation(toy_spec, tmp_path):
    """The weight crosses the largest allowed action and the return then stays: the earliest of equals is kept."""
    folder = tmp_path / "run"
    rollout = RolloutEvaluation(episodes=2, every_n_epochs=2)
    trainer(folder, rollout, epochs=8).fit(Learner(toy_spec(), begins=1, step=0.2))
    epoch = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]
    assert epoch == rollout.scores.best_epoch
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 7
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_without_reference_returns_the_returns_are_compared(toy_spec, tmp_path, capsys):
    folder = tmp_path / "run"
    trainer(folder, RolloutEvaluation(episodes=2), epochs=2).fit(Learner(toy_spec(ref_min=None, ref_max=None)))
    names = {f"eval/{k}" for k in ("return", "length", "action_ms", "return_rat", "return_oms")}
    assert set(curves(folder)) == names and (folder / "checkpoints" / "best.ckpt").exists()
    assert "return, best (OMS)" in capsys.readouterr().out


def test_data_without_an_environment_still_trains(toy_spec, tmp_path, caplog):
    folder = tmp_path / "run"
    module = Learner(toy_spec(env_spec=None))
    with caplog.at_level(logging.WARNING):
        trainer(folder, RolloutEvaluation(), epochs=2).fit(module)
    assert int(module.updates) == 8
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("lit_diffrl")]
    assert len(lines) == 1 and "names no environment" in lines[0]
    with pytest.raises(ConfigError, match="nothing to test in"):
        trainer(folder, RolloutEvaluation(), logger=False).test(module, verbose=False)


def test_an_unknown_environment_is_refused_before_training(toy_spec, tmp_path):
    gone = EnvSpec("Gone-v0", entry_point="no_such_package:Gone").to_json()
    module = Learner(toy_spec(env_spec=gone))
    with pytest.raises(ConfigError, match="Gone-v0"):
        trainer(tmp_path / "run", RolloutEvaluation()).fit(module)
    assert int(module.updates) == 0


def test_a_checkpoint_that_cannot_act_is_refused(toy_spec, tmp_path):
    with pytest.raises(ConfigError, match="Learner cannot act yet"):
        trainer(tmp_path / "run", RolloutEvaluation(), logger=False).validate(Learner(toy_spec()), verbose=False)


def test_no_validation_batches_means_no_evaluation_and_says_so(toy_spec, tmp_path, caplog):
    rollout = RolloutEvaluation()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path / "run", rollout, limit_val_batches=0, epochs=1).fit(Learner(toy_spec()))
    assert not rollout.returns.history and "will not be evaluated" in caplog.text


def test_fast_dev_run_is_a_short_rehearsal(toy_spec, tmp_path):
    rollout = RolloutEvaluation(episodes=10, video=True)
    trainer(tmp_path / "run", rollout, fast_dev_run=1, logger=False).fit(Learner(toy_spec()))
    assert len(rollout.returns.history) == 1 and rollout.returns.last < 8
    assert not (tmp_path / "run" / "pictures").exists()


def test_processes_share_the_episodes_and_agree_with_one(toy_spec, tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    rollout = {"episodes": 5, "num_envs": 2, "test_episodes": 7}
    options = {"epochs": 2, "limit_train_batches": 2}
    trainer(shared, RolloutEvaluation(**rollout), devices=2, strategy="ddp_fork", **options).fit(Learner(toy_spec()))
    trainer(alone, RolloutEvaluation(**rollout), **options).fit(Learner(toy_spec()))
    for tag, points in curves(alone).items():
        if tag != "eval/action_ms":
            assert [v for _, v in curves(shared)[tag]] == [v for _, v in points], tag

    checkpoint = str(shared / "checkpoints" / "last.ckpt")
    results = []
    for folder, more in ((shared, {"devices": 2, "strategy": "ddp_fork"}), (alone, {})):
        tester = trainer(folder, RolloutEvaluation(**rollout), logger=False, **more)
        tester.test(Learner(toy_spec()), ckpt_path=checkpoint, verbose=False)
        written = json.loads((shared / "results" / "last-test.json").read_text())
        results.append([(e["seed"], e["return"], e["length"]) for e in written["episodes"]])
        (shared / "results" / "last-test.json").unlink()
    assert results[0] == results[1] and len(results[0]) == 7


def test_video_and_maze_pictures_reach_disk_and_tensorboard(toy_spec, tmp_path):
    folder = tmp_path / "run"
    trainer(folder, RolloutEvaluation(episodes=2, video=True), epochs=1).fit(Learner(toy_spec()))
    assert (folder / "pictures" / "epoch=0.gif").read_bytes()[:6] == b"GIF89a"
    events = EventAccumulator(str(folder))
    events.Reload()
    (image,) = events.Images("eval/video")
    assert image.encoded_image_string[:6] == b"GIF89a" and image.step == 3

    maze = EnvSpec("M-v0", entry_point="lit_diffrl.data.maze_env:PointMaze", max_episode_steps=9).to_json()

    class Walker(Learner):
        def act(self, obs, active=None):
            return obs["desired_goal"] - obs["achieved_goal"]

    spec = toy_spec(
        env_spec=maze, obs_dim=4, action_dim=2, action_low=[-1.0] * 2, action_high=[1.0] * 2,
        obs_keys=["observation"], goal_key="desired_goal",
    )  # fmt: skip
    folder = tmp_path / "maze"
    trainer(folder, RolloutEvaluation(episodes=2), epochs=2, val_check_interval=1.0).fit(Walker(spec))
    assert sorted(p.name for p in (folder / "pictures").iterdir()) == ["epoch=0.png", "epoch=1.png"]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [image.step for image in events.Images("eval/plans")] == [3, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "rollout.episodes"),
        ({"num_envs": -1}, "rollout.num_envs"),
        ({"every_n_epochs": 0}, "rollout.every_n_epochs"),
        ({"max_steps": 0}, "rollout.max_steps"),
        ({"seed": -3}, "rollout.seed"),
        ({"rat_window": 0}, "rollout.rat_window"),
        ({"seed": 9_995}, "rollout.test_seed 10000 would test on episodes seen during fit .*at least 10005"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        RolloutEvaluation(**options)


def test_acting_follows_the_precision_of_the_trainer_where_asked(toy_spec, tmp_path):
    seen = []

    class Watched(Learner):
        def act(self, obs, active=None):
            assert in_long_region(), "or every decision prepares the weights anew"
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().act(obs, active)

    for mixed in (False, True):
        rollout = RolloutEvaluation(episodes=1, num_envs=1, mixed=mixed)
        trainer(tmp_path / str(mixed), rollout, epochs=1, precision="bf16-mixed").fit(Watched(toy_spec()))
        assert set(seen) == {mixed}
        seen.clear()
    with pytest.raises(ConfigError, match=r"rollout.mixed .* --trainer.precision is 32-true; give bf16-mixed"):
        trainer(tmp_path / "refused", RolloutEvaluation(mixed=True)).fit(Watched(toy_spec()))
    assert not seen
