"""Several ways to act on the same episodes: a table, results, a picture."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_diffrl.rollout import RolloutEvaluation
from lit_diffrl.rollout.sweep import compare, comparison


class Pushing(LightningModule):
    """Acts by a constant that its variants set."""

    can_act = True

    def __init__(self, spec, pushes) -> None:
        super().__init__()
        self.spec, self.push = spec, 0.1
        self.pushes = pushes

    def variants(self):
        return [SimpleNamespace(axis="push", value=p, curve=c, enter=partial(self.pushing, p if c == "plain" else -p))
                for c in ("plain", "inverted") for p in self.pushes]  # fmt: skip

    @contextmanager
    def pushing(self, push):
        before, self.push = self.push, push
        yield
        self.push = before

    def reset(self, mask=None, seeds=None):
        pass

    def act(self, obs, active=None):
        return torch.full((len(obs), 1), self.push).numpy()

    def test_step(self, batch, batch_idx):
        pass

    def test_dataloader(self):
        return DataLoader(range(1))


def outcome(spec, pushes, folder):
    rollout = RolloutEvaluation(test_episodes=4, pictures=False)
    trainer = Trainer(
        logger=False, callbacks=[rollout], default_root_dir=folder, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.test(Pushing(spec, pushes), verbose=False)
    (path,) = folder.glob("results/*.json")
    return json.loads(path.read_text()), trainer.callback_metrics


def test_a_test_compares_the_variants_on_the_same_episodes(toy_spec, tmp_path, capsys):
    results, metrics = outcome(toy_spec(), [0.5, 0.0], tmp_path)
    points = results["comparison"]
    assert [(p["push"], p["curve"]) for p in points] == [
        (0.5, "plain"), (0.0, "plain"), (0.5, "inverted"), (0.0, "inverted"),
    ]  # fmt: skip
    assert len({tuple((e["seed"], e["length"]) for e in p["episodes"]) for p in points}) == 1
    length = points[0]["summary"]["length"]["mean"]
    for point, push in zip(points, (0.5, 0.0, -0.5, 0.0)):
        assert point["summary"]["return"]["mean"] == pytest.approx((1 + push) * length)
    # The first is the usual one: what is logged, and what stands where it always does.
    assert results["summary"] == points[0]["summary"]
    assert float(metrics["eval/return"]) == pytest.approx(1.5 * length)
    out = capsys.readouterr().out
    assert "score, plain" in out and f"{1.5 * length * 5:.1f} ±" in out
    (picture,) = tmp_path.glob("pictures/*-comparison.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_one_way_to_act_is_no_comparison(toy_spec, tmp_path, capsys):
    agent = Pushing(toy_spec(), [0.5])
    agent.variants = lambda: []
    rollout = RolloutEvaluation(test_episodes=2, pictures=False)
    trainer = Trainer(logger=False, callbacks=[rollout], default_root_dir=tmp_path, enable_progress_bar=False,
                      accelerator="cpu")  # fmt: skip
    trainer.test(agent, verbose=False)
    (path,) = tmp_path.glob("results/*.json")
    assert "comparison" not in json.loads(path.read_text()) and not list(tmp_path.glob("pictures/*"))


def test_the_table_leaves_out_what_was_not_played_and_names_returns_without_scores(toy_spec):
    from lit_diffrl.rollout import run_episodes

    spec = toy_spec(ref_min=None, ref_max=None)
    agent = Pushing(spec, [0.0, 2.0])
    points = compare(agent.variants()[:3], lambda: run_episodes(spec, agent, episodes=2))
    head, _, *rows = comparison(points).splitlines()
    assert head.split("  ") == ["push", "return, plain", "return, inverted"] or "return, plain" in head
    assert [row.split()[0] for row in rows] == ["0", "2"]
    assert rows[0].count("±") == 2 and rows[1].count("±") == 1
