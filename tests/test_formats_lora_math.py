"""Low-rank algebra against numpy in float64: Eckart and Young, exact joins, quantiles."""

import numpy as np
import pytest
import torch

from finetune.errors import Problem
from finetune.formats import lora_math
from finetune.formats.lora_kinds import LoraModule

SHAPES = [(12, 7), (7, 12), (9, 5, 1, 1), (8, 4, 3, 3)]


def pair(shape, rank=3, alpha=1.5, seed=0):
    torch.manual_seed(seed)
    return LoraModule(torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2)), alpha)


def matrix(module):
    """The pair's change as a matrix, by numpy."""
    up, down = (half.double().flatten(1).numpy() for half in (module.up, module.down))
    return module.alpha / module.down.shape[0] * up @ down


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_singular_values_from_the_factors_are_numpys_of_the_whole(shape, rank):
    module = pair(shape, rank)
    found, wanted = lora_math.of_pair(module), np.linalg.svd(matrix(module), compute_uv=False)
    assert np.allclose(found.values.numpy(), wanted[: len(found.values)], atol=1e-12 * wanted[0])
    assert np.allclose((found.left * found.values @ found.right).numpy(), matrix(module), atol=1e-12)
    assert found.values.dtype == torch.float64 and len(found.values) <= rank


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_of_a_truncation_is_the_tail_of_numpys_singular_values(shape, rank):
    torch.manual_seed(3)
    weight = torch.randn(shape)
    flat = weight.double().flatten(1).numpy()
    tail = (np.linalg.svd(flat, compute_uv=False)[rank:] ** 2).sum()
    spectrum = lora_math.of_matrix(weight)
    cut = lora_math.truncate(spectrum, rank)
    assert spectrum.lost(rank) == pytest.approx(tail, rel=1e-10)
    assert ((matrix(cut) - flat) ** 2).sum() == pytest.approx(tail, rel=1e-5)  # the pair is float32
    assert lora_math.error(spectrum, cut) == pytest.approx(tail, rel=1e-5)
    assert cut.alpha == rank and cut.down.shape == (rank, *shape[1:]) and cut.change(weight).shape == weight.shape


def test_clamping_is_kohyas_and_costs_what_error_says():
    torch.manual_seed(4)
    weight = torch.randn(40, 30)
    spectrum = lora_math.of_matrix(weight)
    cut = lora_math.truncate(spectrum, 8, clamp=0.9)
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    up, down = left[:, :8] * values[:8], right[:8]
    limit = np.quantile(np.concatenate([up.ravel(), down.ravel()]), 0.9)
    wanted = np.clip(up, -limit, limit) @ np.clip(down, -limit, limit)
    signs_free = cut.up.double().numpy() @ cut.down.double().numpy()
    assert np.allclose(signs_free, wanted, atol=1e-5)
    error = ((wanted - weight.double().numpy()) ** 2).sum()
    assert lora_math.error(spectrum, cut) == pytest.approx(error, rel=1e-5) and error > spectrum.lost(8)


@pytest.mark.parametrize("share", [0.0, 0.37, 0.99, 1.0])
def test_quantiles_are_numpys(share):
    values = torch.randn(1001, dtype=torch.float64)
    assert lora_math.quantile(values, share) == pytest.approx(np.quantile(values.numpy(), share))


def test_the_rank_for_a_share_is_the_smallest():
    spectrum = lora_math.Spectrum(torch.eye(4), torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.eye(4), (4, 4))  # energy 9 + 4 + 1
    assert [spectrum.rank_for(share) for share in (0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    nothing = lora_math.Spectrum(torch.eye(2), torch.zeros(2), torch.eye(2), (2, 2))
    assert nothing.rank_for(0.9) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_join_is_the_sum_with_strengths(shape):
    first, second = pair(shape, 3, 1.5), pair(shape, 2, 4.0, seed=1)
    joined = lora_math.join([(first, 0.8), (second, -0.5)])
    assert joined.rank == 5 and joined.alpha == 5
    assert np.allclose(matrix(joined), 0.8 * matrix(first) - 0.5 * matrix(second), atol=1e-5)


def test_layers_of_other_widths_are_not_joined():
    with pytest.raises(Problem, match="different widths"):
        lora_math.join([(pair((12, 7)), 1.0), (pair((12, 8)), 1.0)])


def test_zeros_and_ranks_beyond_the_layer_stay_whole():
    cut = lora_math.truncate(lora_math.of_matrix(torch.zeros(4, 3)), 6)
    assert cut.rank == 6 and not cut.delta().any()
    module = pair((5, 4), 9)
    assert np.allclose(matrix(lora_math.truncate(lora_math.of_pair(module), 4)), matrix(module), atol=1e-5)
