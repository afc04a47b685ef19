"""DyDiff: rollouts in turns with the policy, what is stored of them, mixed batches, models that are used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from printed import digits
from short_runs import ROOT, Config, curves
from torch import Tensor

from lit_diffrl.__main__ import main
from lit_diffrl.data import PolicyBatch, TrajectoryData
from lit_diffrl.data.episodes import Episodes
from lit_diffrl.data.replay_buffer import ReplayBuffer
from lit_diffrl.data.sources import SourceInfo
from lit_diffrl.errors import ConfigError
from lit_diffrl.methods import BC, QGPO, DyDiffCQL, DyDiffIQL, DyDiffTD3BC, Method, dydiff
from lit_diffrl.methods.dydiff import DyDiff, Rollouts
from lit_diffrl.methods.synthetic_learner import AFTER_UPDATES, SYNTHETIC, Synthesis
from lit_diffrl.methods.termination import Termination
from lit_diffrl.methods.world_model import WorldModel
from lit_diffrl.seeding import Place

OBS, ACTION, H = 4, 2, 12
SMALL: dict[str, Any] = {
    "denoiser": {"dim": 8, "mults": [1, 2]},
    "edm_sampler": {"steps": 4},
    "world_model": {"members": 3, "elites": 2, "hidden": 16, "layers": 2, "reward_hidden": 16},
    "termination": "never",
    "policy_epochs": 1,
}


@pytest.fixture(scope="module")
def data() -> TrajectoryData:
    """A random walk of 200 steps in 5 episodes."""
    draw = torch.Generator().manual_seed(0)
    n, length = 200, 40
    obs = torch.randn(n, OBS, generator=draw)
    action = 2 * torch.rand(n, ACTION, generator=draw) - 1
    last = torch.arange(n) % length == length - 1
    made = TrajectoryData(dataset="test/walk-v0", horizon=H, batch_size=256)
    starts = torch.arange(0, n, length)
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0] * 2, [1.0] * 2, ["test/walk-v0"])
    reward = torch.rand(n, generator=draw)
    made.load(Episodes(obs, action, reward, ~last & last, last, torch.randn(n, OBS, generator=draw), starts), info)
    return made


def built(data: TrajectoryData, kind: type[Any] = DyDiffTD3BC, **options: Any) -> Any:
    """With its networks, the limits of the windows, and untrained models."""
    torch.manual_seed(0)
    method = kind(**{**SMALL, **options})
    method.build(data.spec)
    method.window_low.copy_(data.limits.low)
    method.window_high.copy_(data.limits.high)
    method.draws.begin(Place(0, 0), torch.device("cpu"))
    return method.eval()


def states(data: TrajectoryData, n: int = 8) -> Tensor:
    return data.transitions(torch.arange(n)).obs


# ---------------------------------------------------------------- rollouts (oracle 24)


@pytest.mark.parametrize("corrections", [0, 1, 3])
def test_the_trajectory_model_is_asked_once_in_each_round(
    data: TrajectoryData, corrections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    sample = DyDiff.sample_states

    def counted(self: DyDiff, first: Tensor, actions: Tensor, start: Any = None) -> Tensor:
        calls.append((first, actions))
        return sample(self, first, actions, start)

    monkeypatch.setattr(DyDiff, "sample_states", counted)
    method = built(data, rollouts={"corrections": corrections})
    with torch.no_grad():
        made = method.roll_out(states(data), H)
    assert len(calls) == corrections
    assert made.states.shape == (8, H, OBS) and made.actions.shape == (8, H, ACTION)
    for first, _ in calls:
        torch.testing.assert_close(first, method.to_model(states(data)))


def test_without_corrections_a_rollout_is_the_single_step_models(data: TrajectoryData) -> None:
    """To the bit: each state by an elite drawn for it, within the data's limits, and the policy's action there."""
    method = built(data, rollouts={"corrections": 0})
    with torch.no_grad():
        made = method.roll_out(states(data), H)
        method.draws.begin(Place(0, 0), torch.device("cpu"))
        x = states(data)
        for t in range(H):
            within = method.to_model(x)
            x = method.to_learner(within)
            action = method.actor(x)
            assert torch.equal(made.states[:, t], x) and torch.equal(made.actions[:, t], action)
            x = method.world_model.step(x, action, method.draws.randint(0, 2, x))
    assert float(made.gap.max()) == 0


@pytest.mark.parametrize("elite", ["step", "rollout", "mixture"])
@pytest.mark.parametrize("noise", [False, True])
def test_steps_are_by_an_elite_drawn_for_each_or_for_the_rollout_or_by_all(
    data: TrajectoryData, elite: str, noise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor | None] = []
    step = WorldModel.step

    def watched(self: WorldModel, obs: Tensor, action: Tensor, chosen: Any, normal: Any = None) -> Tensor:
        drawn.append(chosen)
        found = step(self, obs, action, chosen, normal)
        mean, var = self.mean_var(obs, action)
        assert (normal is not None) == noise
        if chosen is None:
            torch.testing.assert_close(found, mean if normal is None else mean + var.sqrt() * normal)
        return found

    monkeypatch.setattr(WorldModel, "step", watched)
    method = built(data, rollouts={"corrections": 0, "elite": elite, "sample_model": noise})
    with torch.no_grad():
        method.roll_out(states(data, 64), H)
    assert len(drawn) == H - 1
    if elite == "mixture":
        assert all(chosen is None for chosen in drawn)
        return
    table = torch.stack([chosen for chosen in drawn if chosen is not None])
    assert table.shape == (H - 1, 64) and set(table.unique().tolist()) == {0, 1}
    assert bool((table == table[0]).all()) == (elite == "rollout")


@pytest.mark.parametrize("kind", [DyDiffTD3BC, DyDiffCQL])
@pytest.mark.parametrize("corrections", [0, 2])
def test_emitted_actions_are_the_policys_in_the_emitted_states(
    data: TrajectoryData, kind: type[Any], corrections: int
) -> None:
    method = built(data, kind, rollouts={"corrections": corrections})
    start = states(data)
    with torch.no_grad():
        made = method.roll_out(start, H)
        action = method.propose(made.states.flatten(0, 1)).view_as(made.actions)
    torch.testing.assert_close(made.actions, action, rtol=1e-6, atol=1e-6)
    assert torch.equal(made.states[:, 0], method.to_learner(method.to_model(start))), "through the scales and back"
    torch.testing.assert_close(made.states[:, 0], start, rtol=1e-5, atol=1e-5)
    low = method.obs_normalizer.normalize(data.limits.low[:OBS])
    assert bool((made.states >= low - 1e-4).all()), "states stay within the data's limits"
    assert (float(made.gap.min()) > 0) == (corrections > 0)


def test_dynamics_consistent_rollouts_hold_the_models_sample_and_its_actions(
    data: TrajectoryData, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    sample = DyDiff.sample_states

    def kept(self: DyDiff, first: Tensor, actions: Tensor, start: Any = None) -> Tensor:
        calls.append((actions, sample(self, first, actions, start)))
        return calls[-1][1]

    monkeypatch.setattr(DyDiff, "sample_states", kept)
    method = built(data, rollouts={"corrections": 2, "emit": "dynamics"})
    with torch.no_grad():
        made = method.roll_out(states(data), H)
    assert torch.equal(made.actions, calls[-1][0])
    assert torch.equal(made.states, method.to_learner(calls[-1][1]))


def test_a_warm_start_begins_at_its_level_with_the_sample_before(
    data: TrajectoryData, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    sample = DyDiff.sample

    def kept(self: DyDiff, *args: Any) -> Tensor:
        begun.append(args[3])
        return sample(self, *args)

    monkeypatch.setattr(DyDiff, "sample", kept)
    method = built(data, rollouts={"corrections": 2, "warm_start": 2})
    with torch.no_grad():
        method.roll_out(states(data), H)
    assert begun[0] is None and begun[1][1] == 2 and begun[1][0].shape == (8, H, OBS + ACTION)
    with pytest.raises(ConfigError, match="rollouts.warm_start"):
        built(data, rollouts={"warm_start": 4})


def test_a_policy_may_be_drawn_from_in_rollouts(data: TrajectoryData) -> None:
    for kind in (DyDiffCQL, DyDiffIQL):
        method = built(data, kind, rollouts={"sample_policy": True, "corrections": 1})
        with torch.no_grad():
            obs = states(data)
            made, mean = method.choose(obs), method.propose(obs)
            again = built(data, kind, rollouts={"sample_policy": True, "corrections": 1}).choose(obs)
            rollouts = method.roll_out(obs, H)
        assert bool((made != mean).all()) and torch.equal(made, again)
        assert float(rollouts.actions.abs().max()) <= 1


def test_states_that_end_episodes_are_within_the_limits(data: TrajectoryData) -> None:
    """Clipped to the states that others begin with, a fallen robot would stand, and no rollout would ever end."""
    standing = torch.tensor([[1.2, 0.0, 0.0, 0.0], [0.72, 0.1, 0.5, -1.0], [1.0, -0.1, 0.2, 1.0]])
    fallen = torch.tensor([[0.72, 0.1, 0.5, -1.0], [1.0, -0.1, 0.2, 1.0], [0.66, 0.25, -2.0, 3.0]])
    ends = torch.tensor([False, False, True])
    made = TrajectoryData(dataset="test/falls-v0", horizon=2, normalizer="gaussian")
    info = SourceInfo(None, None, None, None, None, None, None, [-1.0] * 2, [1.0] * 2, ["test/falls-v0"])
    made.load(Episodes(standing, torch.rand(3, 2), torch.ones(3), ends, ~ends & ends, fallen, torch.tensor([0])), info)
    method = built(made, termination="hopper")
    raw = torch.stack([standing, fallen])
    again = method.obs_normalizer.unnormalize(method.to_learner(method.to_model(method.obs_normalizer.normalize(raw))))
    assert method.rule(again).tolist() == [[False] * 3, [False, False, True]]


def test_the_closed_loop_is_compared_as_it_is_rolled_out(data: TrajectoryData) -> None:
    method = built(data, rollouts={"corrections": 2, "warm_start": 2})
    first = data.limits.unnormalize(data.scaled[:4])[:, :OBS]
    loop = method.closed_loop(H)
    found = loop.roll_out(first)
    assert list(found) == ["single-step rollout", "correction 1", "correction 2"]
    method.draws.begin(Place(0, AFTER_UPDATES + 2), torch.device("cpu"))
    with torch.no_grad():
        made = method.roll_out(method.obs_normalizer.normalize(first), H)
    states, actions = found["correction 2"]
    torch.testing.assert_close(states, method.obs_normalizer.unnormalize(made.states), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(actions, method.action_normalizer.unnormalize(made.actions), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        judged = method._judge(made.states, made.actions)[0]
    torch.testing.assert_close(loop.reward(states, actions), judged, rtol=1e-3, atol=1e-3)


def test_rewards_and_disagreement_do_not_depend_on_the_parts_they_are_computed_in(data: TrajectoryData) -> None:
    found = []
    for chunk in (3, 100):
        method = built(data, rollouts={"chunk": chunk})
        with torch.no_grad():
            obs, action = torch.ones(8, H, OBS).cumsum(0), torch.ones(8, H, ACTION)
            found.append(method._judge(obs, action))
    for part, whole in zip(*found):
        assert part.shape == (8, H)
        torch.testing.assert_close(part, whole)


def test_each_rollout_is_made_by_one_of_several_trajectory_models(data: TrajectoryData) -> None:
    """The others' weights do not matter to it, in any round; and each learns from its share of a batch."""
    method = built(data, denoiser={**SMALL["denoiser"], "members": 3}, rollouts={"corrections": 2})
    found = []
    for silent in (None, 1):
        if silent is not None:
            for parameter in method.denoiser_ema.net[silent].parameters():
                parameter.data.zero_()
        method.draws.begin(Place(0, 0), torch.device("cpu"))
        with torch.no_grad():
            found.append(method.roll_out(states(data), H).states)
    changed = (found[0] != found[1]).flatten(1).any(1)
    assert changed.tolist() == [i % 3 == 1 for i in range(8)]
    method.train()
    batch = data.windows(torch.arange(6), H)
    batch.mask[2::3] = False
    method.diffusion_loss(batch).backward()
    learns = [any(p.grad is not None and p.grad.any() for p in net.parameters()) for net in method.denoiser]
    assert learns == [True, True, False]


# ---------------------------------------------------------------- losses


def test_the_loss_sees_neither_conditions_nor_padding(data: TrajectoryData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle 8; what enters the network is the same at every level."""
    method = built(data).train()
    batch = data.windows(torch.arange(4), H)
    batch.mask[:, 9:] = False
    seen: dict[str, Tensor] = {}

    def net(x: Tensor, c_noise: Tensor) -> Tensor:
        seen["x"], seen["out"] = x, torch.zeros_like(x).requires_grad_()
        return seen["out"]

    method.denoiser.forward = net
    loss = method.diffusion_loss(batch)
    (gradient,) = torch.autograd.grad(loss, seen["out"])
    assert (gradient[:, 0] == 0).all() and (gradient[..., OBS:] == 0).all() and (gradient[:, 9:] == 0).all()
    assert (gradient[:, 1:9, :OBS] != 0).all()
    ratio = seen["x"][..., OBS:] / batch.trajectory[..., OBS:]
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    everything = built(data, denoiser={**SMALL["denoiser"], "loss": "all"}).train()
    everything.denoiser.forward = net
    (gradient,) = torch.autograd.grad(everything.diffusion_loss(batch), seen["out"])
    assert (gradient[:, 0] != 0).all() and (gradient[:, 9:] == 0).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_network_reads_conditions_at_full_size_or_as_the_authors_scale_them(
    data: TrajectoryData, scaled: bool
) -> None:
    method = built(data, denoiser={**SMALL["denoiser"], "scale_conditions": scaled}, edm_sampler={"steps": 2})
    seen: list[Tensor] = []
    for net in (method.denoiser, method.denoiser_ema.net):
        net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    action = torch.rand(3, H, ACTION)
    with torch.no_grad():
        method.sample_states(torch.rand(3, OBS), action)
        batch = data.windows(torch.arange(3), H)
        method.diffusion_loss(batch)
    full = torch.equal(seen[0][..., OBS:], method.scaled_actions(action))
    assert full == torch.equal(seen[-1][..., OBS:], batch.trajectory[..., OBS:]) == (not scaled)
    if scaled:
        torch.testing.assert_close(seen[0][..., OBS:], method.scaled_actions(action) / 6400.25**0.5)


def test_the_measured_deviation_takes_the_place_of_sigma_data(data: TrajectoryData) -> None:
    method = built(data, denoiser={**SMALL["denoiser"], "measure_sigma_data": True})
    method.window_std.fill_(0.3)
    assert method.levels.sigma_data == pytest.approx(0.3) and built(data).levels.sigma_data == 0.5


def test_average_and_rate_of_the_trajectory_model_follow_the_windows_seen(
    data: TrajectoryData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle 23, in batches of 8; and the rate that only grows, 3e-4 and 4e-4 after 3 and 4 million."""
    monkeypatch.setattr(DyDiff, "_windows_per_update", lambda self: 8)
    monkeypatch.setattr(DyDiff, "descend", lambda *args: torch.zeros(()))
    method = built(data, denoiser={**SMALL["denoiser"], "lr_decay": "ramp", "lr": 1e-3}).train()
    batch, optimizer = data.windows(torch.arange(2), H), SimpleNamespace(param_groups=[{"lr": 0.0}])
    for seen, kept in ((100_000, "0.998892"), (1_000_000, "0.999889"), (3_000_000, None), (4_000_000, "0.999972")):
        with torch.no_grad():
            for mine, new in zip(method.denoiser_ema.net.parameters(), method.denoiser.parameters()):
                mine.fill_(1.0), new.fill_(0.0)
        method.denoiser_ema._steps = seen // 8 - 1
        method.model_step("diffusion", optimizer, batch)
        (average,) = {float(x) for p in method.denoiser_ema.net.parameters() for x in p.unique()}
        assert kept is None or average == digits(kept)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * seen / 10_000_000)


# ---------------------------------------------------------------- mixed batches (oracles 14 and 25)


def filled(method: Any, rows: int) -> Any:
    zero = torch.zeros(rows)
    method.buffer.insert(torch.full((rows, OBS), 9.0), torch.zeros(rows, ACTION), zero, torch.zeros(rows, OBS), zero, 0)
    return method


def synthetic_rows(batch: PolicyBatch) -> int:
    return int((batch.obs == 9).all(1).sum())


@pytest.mark.parametrize(
    ("real_ratio", "rows", "expected"),
    [(0.6, 1000, 103), (0.6, 103, 103), (0.6, 102, 0), (0.6, 0, 0), (1.0, 1000, 0), (0.0, 1000, 256)],
)
def test_a_batch_is_mixed_as_soon_as_the_buffer_holds_its_share(
    data: TrajectoryData, real_ratio: float, rows: int, expected: int
) -> None:
    """153 + 103 of 256."""
    method = filled(built(data, real_ratio=real_ratio), rows) if rows else built(data, real_ratio=real_ratio)
    batch = data.transitions(torch.arange(200).repeat(2)[:256])
    mixed, real = method.mix(batch)
    assert synthetic_rows(mixed) == expected
    assert (real is None) == (expected == 0)
    if real is not None:
        assert int(real.sum()) == 256 - expected
        for mine, given in zip(mixed, batch):
            assert torch.equal(mine[real], given[real])
        assert torch.equal(mixed.discount, batch.discount)


def test_processes_mix_what_one_would(data: TrajectoryData) -> None:
    method, batch = filled(built(data), 300), data.transitions(torch.arange(64))
    method.buffer.insert(*[x[:200] for x in data.transitions(torch.arange(200))[:5]], epoch=0)
    whole, _ = method.mix(batch)
    parts = []
    for rank in range(2):
        method.draws.begin(Place(0, 0, rank, 2), torch.device("cpu"))
        own = slice(32 * rank, 32 * rank + 32)
        parts.append(method.mix(PolicyBatch(*(x[own] for x in batch)))[0])
    for x, *own in zip(whole, *parts):
        assert torch.equal(torch.cat(own), x)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def folder(mazes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(mazes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(name: str = "dydiff_td3bc", epochs: int = 1) -> Config:
    return Config(ROOT / f"conf/{name}.yaml", epochs)


def learner_of(content: dict[str, Any]) -> dict[str, Tensor]:
    models = DyDiff.models
    return {k: v for k, v in content["state_dict"].items() if k.partition(".")[0] not in models}


def test_with_real_data_alone_the_learner_is_the_plain_one_bit_for_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no rollout is run at all (oracle 25). With lent models both begin at the same place of the run."""
    config().fit("lender")
    (models,) = Path("tb_logs").glob("*/*/lender/checkpoints/last.ckpt")

    def refused(self: DyDiff, *args: Any) -> Any:
        raise AssertionError("a rollout")

    monkeypatch.setattr(DyDiff, "roll_out", refused)
    content = config().fit("a", "--model.real_ratio=1", f"--model.models_ckpt={models}")
    assert len(content[SYNTHETIC]["rows"]) == 0
    plain, found = config("td3bc").fit("b")["state_dict"], learner_of(content)
    assert int(plain["updates"]) == 3 and found.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", ["dydiff_td3bc", "dydiff_cql", "dydiff_dql", "synther"])
def test_synthesis_changes_nothing_of_the_learner(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Oracle 24: no weight, no gradient, no mode of a network."""
    start, filled = Synthesis.on_train_epoch_start, []

    def look(method: Any) -> dict[str, Any]:
        own = {k: x.clone() for k, x in method.state_dict().items() if k.partition(".")[0] not in method.models}
        gradients = {k: None if p.grad is None else p.grad.clone() for k, p in method.named_parameters()}
        return {"weights": own, "gradients": gradients, "modes": {k: m.training for k, m in method.named_modules()}}

    def watched(self: Synthesis) -> None:
        before, rows = look(self), len(self.buffer)
        start(self)
        filled.append(len(self.buffer) > rows)
        after = look(self)
        assert after["modes"] == before["modes"]
        for part in ("weights", "gradients"):
            for k, x in before[part].items():
                assert after[part][k] is None if x is None else torch.equal(after[part][k], x), k

    monkeypatch.setattr(Synthesis, "on_train_epoch_start", watched)
    config(name, epochs=3).fit("a")  # with a refresh at every second
    assert filled[-3:] == [True, False, name != "synther"]


def test_rollouts_are_made_in_the_precision_of_the_updates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    sample = DyDiff.sample_states

    def watched(self: DyDiff, *args: Any) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        out = sample(self, *args)
        assert out.dtype == torch.float32
        return out

    monkeypatch.setattr(DyDiff, "sample_states", watched)
    for precision, expected in (("bf16-mixed", {True}), ("32-true", {False})):
        content = config().fit(precision, "--trainer.precision", precision)
        assert seen == expected and content[SYNTHETIC]["rows"].dtype == torch.float32
        seen.clear()


@pytest.mark.parametrize(("length", "stored"), [(None, 5), (8, 5), (3, 3)])
def test_what_follows_a_fall_is_neither_stored_nor_counted_and_rollouts_are_cut_to_their_length(
    folder: Path, monkeypatch: pytest.MonkeyPatch, length: int | None, stored: int
) -> None:
    """All fall in state 5; rewards sum to the number of steps until then, or to that of all."""
    roll_out = DyDiff.roll_out

    def falling(self: DyDiff, start: Tensor, horizon: int) -> Rollouts:
        made = roll_out(self, start, horizon)
        fallen = torch.arange(horizon)[:, None] >= 5
        return made._replace(states=torch.where(fallen, 1e6, made.states))

    monkeypatch.setattr(DyDiff, "roll_out", falling)
    monkeypatch.setattr(WorldModel, "reward", lambda self, obs, action: torch.ones(obs.shape[:-1]))
    monkeypatch.setattr(dydiff, "termination_rule", lambda name, spec: Termination("fall", height=(-1e3, 1e3)))
    more = [] if length is None else [f"--model.rollouts.length={length}"]
    for returns, total in (("until_done", min(5, stored + 1)), ("all", 32 if length is None else length + 1)):
        content = config().fit(returns, *more, f"--model.rollouts.returns={returns}")
        rows = content[SYNTHETIC]["rows"]
        ends = [0.0] * (stored - 1) + [float(stored == 5)]
        assert rows[:, -1].tolist() == ends * 2, "two of four are kept"
        logged = {name: points[0][1] for name, points in curves(returns, ("synthetic/",)).items()}
        assert logged["synthetic/return_mean"] == total
        assert logged["synthetic/length"] == stored and logged["synthetic/done"] == float(stored == 5)


@pytest.mark.parametrize("kept", [2, None])
def test_refreshes_come_when_they_are_due_and_are_kept_as_long_as_asked(folder: Path, kept: int | None) -> None:
    more = ["--model.policy_epochs=6", "--model.rollouts.every_n_epochs=2", "--model.rollouts.warmup_epochs=1"]
    more += [f"--model.rollouts.keep_refreshes={kept}"] if kept else []
    content = config().fit("a", *more)
    groups = content[SYNTHETIC]["groups"]
    assert groups == [[epoch, 2 * 31] for epoch in (1, 3, 5)][-(kept or 3) :], "two of four kept, 31 transitions each"
    assert len(content[SYNTHETIC]["rows"]) == sum(n for _, n in groups)


def test_models_of_one_learner_serve_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = config().fit("a")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    second = config("dydiff_cql").fit("b", "--model.models_ckpt", str(last))
    assert second["epoch"] + 1 == 1, "the policy's epochs alone"
    for name, value in first["state_dict"].items():
        if name.partition(".")[0] in DyDiff.models:
            assert torch.equal(value, second["state_dict"][name]), name
    assert len(second[SYNTHETIC]["rows"]) > 0

    config().fit("c", "--trainer.max_epochs=2")
    (early,) = Path("tb_logs").glob("*/*/c/checkpoints/last.ckpt")
    config("td3bc").fit("d")
    (other,) = Path("tb_logs").glob("*/*/d/checkpoints/last.ckpt")
    config().fit("n", "--model.rollouts.corrections=0", "--model.diffusion_epochs=0")
    (untrained,) = Path("tb_logs").glob("*/*/n/checkpoints/last.ckpt")
    for path, more, words in (
        (early, [], "its models learn until epoch 2"),
        (other, [], "which has none of"),
        (untrained, [], "has a diffusion model that never learned"),
        (last, ["--model.edm.sigma_data=1"], "edm.sigma_data: checkpoint 0.5, now 1.0"),
        (last, ["--model.denoiser.dim=16"], "networks differ"),
        (last, ["--model.world_model.reward_activation=relu"], "reward_activation: checkpoint 'silu', now 'relu'"),
        (last, ["--data.reward=minmax"], f"model.models_ckpt {last}: the checkpoint was trained on other data"),
        (last, ["--data.horizon=24"], "data.horizon: checkpoint 32, now 24"),
        (last, ["--model.denoiser.measure_sigma_data=true"], "denoiser.measure_sigma_data: checkpoint False, now True"),
    ):
        capsys.readouterr()
        options = [*config("dydiff_cql").options, "--run", "e", "--model.models_ckpt", str(path), *more]
        assert main(["fit", *options]) == 2
        assert words in capsys.readouterr().err


def test_a_run_that_was_lent_models_goes_on_without_their_file(folder: Path) -> None:
    config().fit("a")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    options = config("dydiff_cql", epochs=2).options
    assert main(["fit", *options, "--run", "b", "--model.models_ckpt", str(last), "--trainer.max_epochs=1"]) == 0
    last.unlink()
    (own,) = Path("tb_logs").glob("*/*/b/checkpoints/last.ckpt")
    assert main(["fit", "--ckpt_path", str(own), "--trainer.max_epochs=2"]) == 0
    assert torch.load(own, weights_only=True)["epoch"] == 1


def test_a_run_that_goes_on_has_its_rollouts_where_its_networks_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU they always are; a checkpoint is taken up before the Trainer moves the networks."""
    moved: list[int] = []
    to = ReplayBuffer.to

    def watched(self: ReplayBuffer, device: torch.device) -> None:
        moved.append(len(self))
        to(self, device)

    monkeypatch.setattr(ReplayBuffer, "to", watched)
    content = config(epochs=2).fit("a", "--trainer.max_epochs=5")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    assert main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs=6"]) == 0
    assert moved == [0, len(content[SYNTHETIC]["rows"])] and moved[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_with_its_rollouts(folder: Path) -> None:
    config(epochs=2).fit("a", "--trainer.max_epochs=5", "--trainer.accelerator=gpu", "--trainer.devices=1")
    (last,) = Path("tb_logs").glob("*/*/a/checkpoints/last.ckpt")
    assert main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs=6"]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--data TransitionData --data.dataset lit_diffrl/pointmaze/umaze-dense-v0", "needs --data TrajectoryData"),
        ("--data.horizon null", "data.horizon is null"),
        ("--model.denoiser.members 3", "data.window_batch_size 2 cannot be shared by model.denoiser.members 3"),
        ("--model.real_ratio 1.5", "model.real_ratio must be in [0, 1], got 1.5"),
        ("--model.rollouts.emit dynamics --model.rollouts.corrections 0", "rollouts.emit 'dynamics'"),
        ("--model.rollouts.filter best", "one of softmax, hardmax, none"),
        ("--model.rollouts.starts 1 --model.rollouts.keep 0.5", "rollouts.keep 0.5 of rollouts.starts 1"),
        ("--data.batch_size 100 --model.rollouts.capacity 40", "model.rollouts.capacity keeps 40"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(
    folder: Path, more: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    options = [o for o in config().options if not (more.startswith("--data Tr") and "window_batch" in o)]
    assert main(["fit", *options, *more.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["softmax", "hardmax", "none"])
def test_rollouts_without_a_return_are_refused_by_every_filter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    """Rewards are judged in parts of two rollouts, here with the first of each lost."""

    def reward(self: WorldModel, obs: Tensor, action: Tensor) -> Tensor:
        return torch.where(torch.arange(len(obs))[:, None] == 0, torch.nan, torch.ones(obs.shape[:-1]))

    monkeypatch.setattr(WorldModel, "reward", reward)
    assert main(["fit", *config().options, "--run", "a", f"--model.rollouts.filter={wanted}"]) == 2
    error = capsys.readouterr().err
    assert "2 of 4 rollouts have returns that are not finite: a model or the policy has diverged" in error


@pytest.mark.parametrize("wanted", ["softmax", "hardmax", "none"])
def test_the_filters_keep_what_their_names_say(data: TrajectoryData, wanted: str) -> None:
    """Oracle 14: 1228 and 1229 of 2048."""
    method = built(data, rollouts={"filter": wanted})
    returns = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    kept = method.keep(returns, torch.zeros(2048, dtype=torch.float64))
    assert len(kept) == {"softmax": 1228, "hardmax": 1229, "none": 2048}[wanted]
    if wanted == "hardmax":
        assert float(returns[kept].min()) >= float(returns.sort().values[819 - 1])


def test_predictions_for_the_simulator_begin_with_the_given_state_and_repeat(data: TrajectoryData) -> None:
    method = built(data)
    obs, action = data.recorded(3)
    found: dict[str, Callable[..., Tensor]] = method.predictors
    assert list(found) == ["single-step model", "trajectory model"]
    for predict in found.values():
        predicted = predict(obs[:, 0], action)
        assert predicted.shape == obs.shape and torch.equal(predicted, predict(obs[:, 0], action))
        torch.testing.assert_close(predicted[:, 0], obs[:, 0], rtol=1e-4, atol=1e-4)


def test_every_learner_is_known_by_name() -> None:
    found = {kind.__name__ for kind in DyDiff.__subclasses__()}
    names = ("TD3BC", "CQL", "CRR", "IQL", "DQL", "EDPTD3", "EDPCRR", "EDPIQL")
    assert {f"DyDiff{name}" for name in names} <= found
    assert issubclass(DyDiffTD3BC, Method) and DyDiffTD3BC.__mro__[1] is DyDiff


@pytest.mark.parametrize(("conf", "family", "ratio"), [("dydiff_td3bc", "DyDiff", 0.5), ("synther", "SynthER", 0)])
def test_learners_without_a_config_of_their_own_learn_from_the_mix(
    folder: Path, conf: str, family: str, ratio: float
) -> None:
    """Their code knows nothing of synthetic rows; the models are lent by TD3+BC's run."""
    config(conf).fit("lender")
    (models,) = Path("tb_logs").glob("*/*/lender/checkpoints/last.ckpt")
    more = ["--model.models_ckpt", str(models), f"--model.real_ratio={ratio}", "--data.updates_per_epoch=2"]
    for learner in ("IQL", "CRR", "EDPTD3", "EDPCRR", "EDPIQL"):
        kind = family + learner
        assert main(["fit", *config(conf).options, *more, "--model", kind, "--run", kind]) == 0
        found = curves(kind)
        assert found["synthetic/rows"][0][1] > 0 and "q/synthetic" in found, kind
        assert ("q/real" in found) is (ratio > 0), "a kind of rows that a batch has none of has no curve"


class DyDiffBC(DyDiff, BC):
    """A learner without critics, made outside of the project."""


class DyDiffQGPO(DyDiff, QGPO):
    """One with phases of its own."""


def test_a_learner_without_critics_learns_from_the_mix_and_one_with_phases_is_refused(folder: Path) -> None:
    config().fit("a", "--model", "DyDiffBC", "--data.updates_per_epoch=2")
    found = curves("a")
    assert found["synthetic/rows"][0][1] > 0 and "q/synthetic" not in found
    with pytest.raises(ConfigError, match="learner with phases behaviour, critic, energy.*e.g. TD3BC"):
        DyDiffQGPO()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("corrections=0", "model.diffusion_epochs 1 trains a model that model.rollouts.corrections 0 never asks"),
        ("warmup_epochs=1", "model.rollouts.warmup_epochs 1 leaves none of model.policy_epochs 1"),
        ("length=32", "model.rollouts.length 32 is more than the 31 transitions in windows of data.horizon 32"),
        ("sample_policy=true", "model.rollouts.sample_policy true changes nothing with model.policy deterministic"),
    ],
)
def test_options_that_would_do_nothing_are_refused_before_training(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    options = [*config().options, "--run", "a", f"--model.rollouts.{option}"]
    assert main(["fit", *options]) == 2
    assert words in capsys.readouterr().err
    assert main(["fit", *options, "--model.real_ratio=1"]) == 0, "there are no rollouts to change"
