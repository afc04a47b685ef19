from __future__ import annotations

import math

import pytest
import torch

from lit_diffrl.errors import ConfigError
from lit_diffrl.nets.embeddings import SinusoidalEmbedding


def test_embedding_of_one_is_sines_then_cosines_down_to_frequency_1e_4() -> None:
    embedding = SinusoidalEmbedding(32)(torch.tensor([1]))[0]
    torch.testing.assert_close(embedding[:2], torch.tensor([0.841471, 0.515138]), rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding[16:18], torch.tensor([0.540302, 0.857107]), rtol=0, atol=1e-6)
    assert embedding[15].item() == pytest.approx(1e-4, rel=1e-5)


def test_embedding_of_zero_and_shapes() -> None:
    embedding = SinusoidalEmbedding(16)(torch.zeros(5))
    assert embedding.shape == (5, 16)
    assert torch.equal(embedding[0], torch.tensor([0.0] * 8 + [1.0] * 8))


def test_cosines_may_come_first_and_frequencies_may_stop_before_the_end() -> None:
    embedding = SinusoidalEmbedding(16, cosines_first=True, reach_end=False)
    assert torch.equal(embedding(torch.zeros(1))[0], torch.tensor([1.0] * 8 + [0.0] * 8))
    assert embedding(torch.ones(1))[0, 15].item() == pytest.approx(10000 ** (-7 / 8), rel=1e-6)
    large = SinusoidalEmbedding(64, cosines_first=True, reach_end=False)(torch.tensor([1]))[0]
    assert large[33].item() == pytest.approx(math.sin(10000 ** (-1 / 32)), rel=1e-6)


def test_real_numbers_are_embedded_in_their_own_precision() -> None:
    j = torch.tensor([865.8, 0.25], dtype=torch.float64)
    embedding = SinusoidalEmbedding(16)(j)
    assert embedding.dtype == torch.float64
    torch.testing.assert_close(embedding[:, 8], j.cos(), rtol=1e-12, atol=0)
    torch.testing.assert_close(SinusoidalEmbedding(16)(j.float()).double(), embedding, rtol=0, atol=1e-4)


def test_embedding_tells_all_steps_apart_even_in_a_half_precision_model() -> None:
    embedding = SinusoidalEmbedding(32).to(torch.bfloat16)(torch.arange(1000))
    assert embedding.dtype == torch.float32
    distance = torch.cdist(embedding, embedding) + torch.eye(1000)
    assert distance.min() > 0.1


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_embedding_refuses_a_size_without_pairs(dim: int) -> None:
    with pytest.raises(ConfigError, match=f"even number >= 4.*got {dim}"):
        SinusoidalEmbedding(dim)
