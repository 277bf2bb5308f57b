"""AdaMix: its routing, its loss, its averaging; SparseAdapter: its masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress_peft.adapters import AdaMix, SparseAdapter
from compress_peft.adapters.sparse_adapter import Masked, erdos_renyi, grasp_scores, keep_highest, masked
from compress_peft.errors import DataError
from compress_peft.models.bundle import load_adapter, save_adapter
from compress_peft.training.batches import Batch
from compress_peft.training.losses import language_modelling_loss
from tests.adapters.helpers import part_at, perturb, prompts
from tests.conftest import build_tiny_llama
from tests.training.helpers import response_logits

D, BLOCKS = 64, 2


def batch() -> Batch:
    tokens = prompts(3, 9)
    targets = tokens[:, -4:].clone()
    targets[1, :2] = -100
    ones = torch.ones_like(tokens)
    return Batch(tokens, ones, ones.cumsum(1) - 1, targets, torch.tensor([4, 6, 4]))


def adamix(**settings):
    model = AdaMix(r=4, **settings).attach(build_tiny_llama())
    perturb(model, size=0.3)
    return model


def test_training_draws_halves_and_inference_averages():
    model = adamix(experts=3)
    part, y = part_at(model, "model.layers.0.mlp.down_proj"), torch.randn(2, 5, D)
    pairs = {}
    for i in range(3):
        for j in range(3):
            hidden = torch.relu(y @ part.down[i] + part.down_bias[i])
            pairs[i, j] = y + hidden @ part.up[j] + part.up_bias[j]
    part.train()
    torch.manual_seed(0)
    drawn = [part(y, y) for _ in range(60)]
    found = {next(key for key, value in pairs.items() if torch.allclose(value, one, atol=1e-5)) for one in drawn}
    assert found == set(pairs)  # the halves are drawn by themselves
    part.eval()
    mean = y + torch.relu(y @ part.down.mean(0) + part.down_bias.mean(0)) @ part.up.mean(0) + part.up_bias.mean(0)
    torch.testing.assert_close(part(y, y), mean)


def test_loss_is_that_of_one_pass_and_the_symmetrized_divergence_of_two():
    model, one = adamix().train(), batch()
    torch.manual_seed(3)
    passes = [response_logits(model, one).float().softmax(-1) for _ in range(2)]
    first, second = (p[one.targets != -100] for p in passes)
    divergence = (first * (first / second).log()).sum() + (second * (second / first).log()).sum()
    picked = first[torch.arange(len(first)), one.targets[one.targets != -100]]
    torch.manual_seed(3)
    found = AdaMix(r=4, consistency=0.5).training_loss(model, one, language_modelling_loss)
    torch.testing.assert_close(found, -picked.log().sum() + 0.5 * divergence / 2, rtol=1e-4, atol=1e-4)
    assert divergence > 1e-3
    torch.manual_seed(3)
    plain = AdaMix(r=4, consistency=0).training_loss(model, one, language_modelling_loss)
    torch.testing.assert_close(plain, -picked.log().sum(), rtol=1e-4, atol=1e-4)
    assert not model._forward_hooks


@pytest.mark.parametrize("shared", ["", "down", "up"])
def test_the_end_is_one_adapter(shared, tmp_path):
    adapter = AdaMix(r=4, experts=3, shared_half=shared)
    down, up = D * 4 + 4, 4 * D + D
    counts = {"": 3 * (down + up), "down": down + 3 * up, "up": 3 * down + up}
    model = adapter.attach(build_tiny_llama())
    assert adapter.parameter_counts(model)["trainable"] == BLOCKS * counts[shared]
    perturb(model, size=0.3)
    expected = model.eval()(prompts()).logits
    adapter.finish_training(model)
    torch.testing.assert_close(model(prompts()).logits, expected)
    assert torch.equal(model.train()(prompts()).logits, model(prompts()).logits)
    assert adapter.changed_parameters(model) == BLOCKS * (down + up)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(
        load_adapter(build_tiny_llama(), tmp_path).eval()(prompts()).logits, model.eval()(prompts()).logits
    )


def sparse(criterion, model=None, **settings):
    adapter = SparseAdapter(r=16, criterion=criterion, sparsity=0.75, init_std=0.1, **settings)
    torch.manual_seed(0)
    return adapter, adapter.attach(model or build_tiny_llama())


class Data(list):
    """What the training loop gives to prepare_training."""

    def loss(self, model, one):
        return language_modelling_loss(model, one) / one.target_count


ENTRIES = BLOCKS * 2 * 2 * D * 16


@pytest.mark.parametrize("criterion", ["random", "er", "magnitude", "snip", "grasp"])
def test_a_share_of_all_entries_is_pruned_before_training(criterion, tmp_path):
    adapter, model = sparse(criterion)
    adapter.prepare_training(model, Data([batch()]), 10)
    matrices = masked(model, "default")
    kept = sum(int(matrix.mask.sum()) for matrix in matrices)
    assert kept == ENTRIES // 4
    biases = BLOCKS * 2 * (16 + D)
    assert adapter.parameter_counts(model)["trainable"] == kept + biases
    assert adapter.estimate_parameters(build_tiny_llama()) == kept + biases
    model.train()
    language_modelling_loss(model, batch()).backward()
    for matrix in matrices:
        assert not matrix.weight.grad[~matrix.mask].any() and matrix.weight.grad[matrix.mask].any()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(build_tiny_llama(), tmp_path)
    for mine, other in zip(matrices, masked(again, "default"), strict=True):
        assert torch.equal(mine.mask, other.mask)


def gradient_of(model, one, create_graph=False):
    """By autograd, with the adapter's matrices as they are and nothing pruned."""
    matrices = masked(model, "default")
    for matrix in matrices:
        matrix.mask.fill_(True)
    loss = language_modelling_loss(model, one) / one.target_count
    return matrices, torch.autograd.grad(loss, [m.weight for m in matrices], create_graph=create_graph)


def best(scores):
    """Masks of the highest quarter of all entries, by a threshold."""
    every = torch.cat([score.flatten() for score in scores]).sort(descending=True).values
    return [score >= every[ENTRIES // 4 - 1] for score in scores]


def test_snip_keeps_what_the_loss_depends_on():
    adapter, model = sparse("snip")
    matrices, gradients = gradient_of(model, batch())
    expected = best([(m.weight * g).abs() for m, g in zip(matrices, gradients, strict=True)])
    adapter.prepare_training(model, Data([batch()]), 10)
    assert all(torch.equal(m.mask, mask) for m, mask in zip(matrices, expected, strict=True))
    before = [m.mask.clone() for m in sparse("magnitude")[1].modules() if isinstance(m, Masked)]
    assert not all(torch.equal(m.mask, mask) for m, mask in zip(matrices, before, strict=True))


def test_grasp_is_the_hessian_times_the_gradient():
    """In double precision on a plain attention, against the second derivative by autograd."""
    llama = build_tiny_llama()
    llama.set_attn_implementation("eager")
    _, model = sparse("grasp", llama)
    model.double().eval()
    for module in model.modules():  # smooth, so that the second derivative is that of the function
        if hasattr(module, "activation"):
            module.activation = "silu"
        if isinstance(module, Masked):
            module.forward = lambda x, m=module: x.double() @ (m.weight * m.mask) + m.bias

    def loss():
        logits = response_logits(model, batch())
        return functional.cross_entropy(logits.flatten(0, 1), batch().targets.flatten(), ignore_index=-100)

    matrices = masked(model, "default")
    for matrix in matrices:
        matrix.mask.fill_(True)
    weights = [m.weight for m in matrices]
    gradients = torch.autograd.grad(loss(), weights, create_graph=True)
    product = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradients), weights)
    expected = torch.cat([(w * h).flatten() for w, h in zip(weights, product, strict=True)])
    found = torch.cat([score.flatten() for score in grasp_scores(matrices, loss)])
    assert functional.cosine_similarity(found, expected, dim=0) > 0.99
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_masks_of_magnitude_and_of_random_scores():
    matrices = masked(sparse("magnitude")[1], "default")
    expected = best([matrix.weight.detach().abs() for matrix in matrices])
    assert all(torch.equal(m.mask, mask) for m, mask in zip(matrices, expected, strict=True))
    counts = {name: [int(m.mask.sum()) for m in masked(sparse(name)[1], "default")] for name in ("random", "er")}
    assert len(set(counts["er"])) == 1  # all matrices have one shape
    assert len(set(counts["random"])) > 1


def test_erdos_renyi_densities():
    found = erdos_renyi([(100, 100), (100, 100), (4, 4)], 0.1)
    kept = found[0] * 10_000 * 2 + found[2] * 16
    assert kept == pytest.approx(0.1 * 20_016)
    assert found[2] == 1.0  # its share would be 2.4
    assert found[0] == found[1] < 0.1
    assert erdos_renyi([(10, 10), (40, 10)], 0.2)[0] == pytest.approx(0.2 * 500 / (20 + 50) * 20 / 100)


def test_ties_are_cut_at_the_exact_number():
    masks = keep_highest([torch.zeros(3, 3), torch.ones(1, 2)], 6 / 11)
    assert [int(mask.sum()) for mask in masks] == [3, 2]


def test_snip_needs_data():
    adapter, model = sparse("snip")
    with pytest.raises(DataError, match="needs batches"):
        adapter.prepare_training(model, [], 10)
