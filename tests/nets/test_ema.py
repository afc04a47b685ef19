from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.ema import EMA


def constant(value: float) -> nn.Linear:
    net = nn.Linear(3, 2, dtype=torch.float64)
    for parameter in net.parameters():
        nn.init.constant_(parameter, value)
    return net


def average(ema: EMA) -> float:
    (value,) = {p.item() for w in ema.net.parameters() for p in w.flatten()}
    return value


def test_before_start_the_average_is_the_weights_at_every_tenth_step() -> None:
    ema, net = EMA(constant(0.0)), constant(0.0)
    for step in range(1, 2000):
        for parameter in net.parameters():
            parameter.data.fill_(step)
        ema.update(net)
        assert average(ema) == step // 10 * 10


@pytest.mark.parametrize(("every", "start"), [(10, 2000), (1, 0), (1, 1), (5, 0), (3, 10)])
def test_from_start_on_the_average_decays_geometrically_to_constant_weights(every: int, start: int) -> None:
    ema = EMA(constant(2.0), decay=0.995, every=every, start=start)
    before, after = constant(2.0), constant(5.0)
    while ema.count < start - 1:
        ema.update(before)
    updates = 0
    while updates < 7:
        ema.update(after)
        updates += int(ema.count) % every == 0
        assert average(ema) == pytest.approx(5.0 + 0.995**updates * (2.0 - 5.0), abs=1e-12)


def test_average_resumes_from_a_checkpoint_as_if_uninterrupted() -> None:
    torch.manual_seed(0)
    ema, net = EMA(constant(0.0), every=3, start=6), constant(0.0)

    def advance(ema: EMA, steps: int) -> None:
        generator = torch.Generator().manual_seed(int(ema.count))
        for _ in range(steps):
            for parameter in net.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            ema.update(net)

    advance(ema, 8)  # between two updates
    resumed = nn.ModuleDict({"ema": EMA(constant(9.0), every=3, start=6)})
    resumed.load_state_dict(nn.ModuleDict({"ema": ema}).state_dict())
    copied = copy.deepcopy(ema)
    for other in (ema, resumed["ema"], copied):
        assert isinstance(other, EMA)
        advance(other, 5)
        torch.testing.assert_close(other.state_dict(), ema.state_dict(), rtol=0, atol=0)
    assert ema.count.dtype == torch.int64
    assert ema.count == 13


def test_the_average_is_frozen_and_stays_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    owner = nn.ModuleDict({"net": net, "ema": EMA(net)}).train()
    ema = owner["ema"]
    assert isinstance(ema, EMA)
    assert net.training
    assert not any(m.training for m in ema.modules())
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in ema.parameters()}


def test_running_statistics_are_copied() -> None:
    net = nn.BatchNorm1d(2)
    ema = EMA(net, every=1, start=0)
    net(torch.randn(16, 2) + 3)
    ema.update(net)
    assert isinstance(ema.net, nn.BatchNorm1d)
    assert torch.equal(ema.net.running_mean, net.running_mean)  # type: ignore[arg-type]
    assert ema.net.num_batches_tracked == 1


@pytest.mark.parametrize("option", [{"decay": 1.0}, {"decay": -0.1}, {"every": 0}, {"start": -1}])
def test_options_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"EMA {next(iter(option))}"):
        EMA(constant(0.0), **option)  # type: ignore[arg-type]


def test_an_average_may_hold_its_first_weights_and_count_from_another_step() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ema = EMA(net, decay=0.5, every=5, start=11, offset=1, hold=True)
    torch.nn.init.ones_(net.weight)
    seen = []
    for _ in range(21):
        ema.update(net)
        seen.append(float(ema.net.weight))  # type: ignore[arg-type]
    assert seen == [0.0] * 10 + [0.5] * 5 + [0.75] * 5 + [0.875]


def test_half_of_the_way_takes_138_updates() -> None:
    ema, net = EMA(constant(0.0), decay=0.995, every=1, start=0), constant(1.0)
    for _ in range(138):
        ema.update(net)
    assert average(ema) == pytest.approx(0.4993, abs=5e-5)
