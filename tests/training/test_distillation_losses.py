"""Losses against naive formulas, finite differences and their limits; top-k events against the full distribution."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from compress_peft.errors import ConfigError
from compress_peft.training.batches import IGNORED, Batch, collate
from compress_peft.training.distillation import (
    LOSSES,
    AttentionRelations,
    DistributionLoss,
    HiddenStates,
    Objective,
    Teacher,
)
from compress_peft.training.distillation.attention_relations import relations
from compress_peft.training.distillation.divergences import jensen_shannon, skewed_kl, skewed_reverse_kl
from compress_peft.training.distillation.events import student_events, teacher_events
from compress_peft.training.distillation.objective import LEARNED
from compress_peft.training.distillation.outputs import run
from compress_peft.training.losses import language_modelling_loss
from tests.conftest import build_tiny_llama

ROWS = [([5, 6, 7], [8, 9]), ([11, 12, 13, 14, 15], [16, 17, 18, 2]), ([3], [4])]


def logits(seed: int, count: int = 4, vocabulary: int = 11) -> Tensor:
    return 2 * torch.randn(count, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def naive_values(name: str, p: list[float], q: list[float]) -> float:
    """p: teacher, q: student."""
    half = [(a + 3 * b) / 4 for a, b in zip(p, q, strict=True)]  # beta = 1/4
    formulas = {
        "forward_kl": lambda: naive(p, q),
        "reverse_kl": lambda: naive(q, p),
        "js": lambda: naive(p, half) / 4 + 3 * naive(q, half) / 4,
        "skewed_kl": lambda: naive(p, [0.3 * a + 0.7 * b for a, b in zip(p, q, strict=True)]),
        "skewed_reverse": lambda: naive(q, [0.7 * a + 0.3 * b for a, b in zip(p, q, strict=True)]),
    }
    return formulas[name]()


DIVERGENCES = {
    "forward_kl": LOSSES.create("forward_kl"),
    "reverse_kl": LOSSES.create("reverse_kl"),
    "js": LOSSES.create("js", beta=0.25),
    "skewed_kl": LOSSES.create("skewed_kl", alpha=0.3),
    "skewed_reverse": LOSSES.create("skewed_kl", alpha=0.3, direction="reverse"),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_formula_and_its_gradient(name: str) -> None:
    loss = DIVERGENCES[name]
    teacher, student = logits(0), logits(1).requires_grad_()
    value = loss.divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    for row in range(len(teacher)):
        expected = naive_values(name, teacher[row].softmax(-1).tolist(), student[row].softmax(-1).tolist())
        assert value[row].item() == pytest.approx(expected, rel=1e-9)
    assert (value > 0).all()
    same = loss.divergence(teacher.log_softmax(-1), teacher.log_softmax(-1))
    assert same.abs().max() < 1e-12
    small = logits(2, 2, 4).requires_grad_()
    fixed = logits(3, 2, 4).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: loss.divergence(fixed, x.log_softmax(-1)), small)


def test_every_distribution_loss_is_tested() -> None:
    assert {loss.method for loss in DIVERGENCES.values()} == {
        name for name in LOSSES if issubclass(LOSSES[name], DistributionLoss)
    }


def test_forward_kl_is_torchs() -> None:
    p, q = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(DIVERGENCES["forward_kl"].divergence(p, q), expected)


def test_limits() -> None:
    p, q = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    forward, reverse = (DIVERGENCES[name].divergence(p, q) for name in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(jensen_shannon(p, q, 1e-7) / 1e-7, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(jensen_shannon(p, q, 1 - 1e-7) / 1e-7, reverse, rtol=1e-4, atol=0)
    torch.testing.assert_close(jensen_shannon(p, q, 0.5), jensen_shannon(q, p, 0.5))
    assert (jensen_shannon(p, q, 0.5) < math.log(2)).all()
    for alpha in (0.0, 1e-9):
        torch.testing.assert_close(skewed_kl(p, q, alpha), forward, rtol=1e-6, atol=0)
        torch.testing.assert_close(skewed_reverse_kl(p, q, alpha), reverse, rtol=1e-6, atol=0)
    apart = torch.tensor([[0.0, -400.0]]).log_softmax(-1)
    assert skewed_kl(apart, apart.flip(-1), 0.1).item() == pytest.approx(-math.log(0.1), rel=1e-5)  # bounded


def test_events_keep_all_probability_and_lose_nothing_when_k_is_the_vocabulary() -> None:
    teacher, student = logits(0, 6, 40).float(), logits(1, 6, 40).float()
    full = teacher_events(teacher, 2.0, None)
    assert full.ids is None and torch.equal(full.log_probs, (teacher / 2).log_softmax(-1))
    exact = DIVERGENCES["forward_kl"].divergence(full.log_probs, student_events(student, 2.0, None))
    before = torch.zeros(6)
    for k in (1, 4, 16, 39):
        events = teacher_events(teacher, 2.0, k)
        assert events.ids is not None and events.log_probs.shape == (6, k + 1)
        torch.testing.assert_close(events.log_probs.exp().sum(-1), torch.ones(6))
        likely = (teacher / 2).softmax(-1).sort(-1, descending=True).values
        torch.testing.assert_close(events.log_probs[:, :k].exp(), likely[:, :k])
        value = DIVERGENCES["forward_kl"].divergence(events.log_probs, student_events(student, 2.0, events.ids))
        assert (value >= before - 1e-6).all() and (value <= exact + 1e-6).all()
        before = value
    torch.testing.assert_close(before, exact)
    assert teacher_events(teacher, 2.0, 40).ids is None


def test_student_events_have_a_gradient_where_the_teacher_is_certain() -> None:
    student = torch.zeros(1, 5, requires_grad=True)
    ids = torch.tensor([[2, 0]])
    torch.autograd.gradcheck(
        lambda x: torch.cat([x.log_softmax(-1).gather(-1, ids)], -1),
        torch.zeros(1, 5, dtype=torch.float64).requires_grad_(),
    )
    events = student_events(student, 1.0, ids)
    assert events.exp().tolist()[0] == pytest.approx([0.2, 0.2, 0.6])
    events[0, -1].backward()
    expected = torch.tensor([[-0.2, 1 / 3 - 0.2, -0.2, 1 / 3 - 0.2, 1 / 3 - 0.2]])  # of log(sum of the others)
    torch.testing.assert_close(student.grad, expected)


def batch() -> Batch:
    return collate(ROWS, 0)


def test_temperature_and_mixture_with_hard_labels() -> None:
    student, teacher = build_tiny_llama(seed=1), build_tiny_llama(seed=2)
    losses = [LOSSES.create("forward_kl", temperature=3, weight=0.7), LOSSES.create("hard_labels", weight=0.3)]
    value = Objective(losses, Teacher(teacher, 128, 3.0, None), 128, 3.0)(student, batch())
    chosen = batch().targets != IGNORED
    with torch.no_grad():
        p = (run(teacher, batch()).logits / 3).log_softmax(-1)
        q = run(student, batch()).logits
    assert len(p) == int(chosen.sum()) == 7
    soft = functional.kl_div((q / 3).log_softmax(-1), p, log_target=True, reduction="sum")
    hard = language_modelling_loss(student, batch())
    assert value.item() == pytest.approx((0.7 * 9 * soft + 0.3 * hard).item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_logits_beyond_the_tokenizers_vocabulary_do_not_count() -> None:
    student, teacher = build_tiny_llama(seed=1), build_tiny_llama(seed=2, vocab_size=160)
    value = Objective([LOSSES.create("forward_kl")], Teacher(teacher, 100, 1.0, None), 100)(student, batch())
    with torch.no_grad():
        p, q = (run(model, batch()).logits[:, :100].log_softmax(-1) for model in (teacher, student))
    assert value.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


def test_row_weights() -> None:
    from compress_peft.training.distillation.rows import row_key, task_weights

    student = build_tiny_llama(seed=1)
    parts = [language_modelling_loss(student, collate([row], 0)).item() for row in ROWS]
    hard = [LOSSES.create("hard_labels")]
    weighted = Objective(hard, None, 128, weights={row_key(*ROWS[1]): 0.25})(student, batch()).item()
    assert weighted == pytest.approx(parts[0] + 0.25 * parts[1] + parts[2], rel=1e-5)
    weights = task_weights([ROWS[0], ROWS[2]], [ROWS[1]], share=0.5)  # 3 tokens of answers, 4 of reasons
    value = Objective(hard, None, 128, weights=weights)(student, batch()).item() / 7
    assert value == pytest.approx((parts[0] + parts[2]) / 3 + 0.5 * parts[1] / 4, rel=1e-5)


def test_hidden_states() -> None:
    student, teacher = build_tiny_llama(seed=1), build_tiny_llama(seed=2, num_hidden_layers=4)
    assert HiddenStates().pairs((2, 4)) == {0: 1, 1: 3} and HiddenStates().pairs((4, 2)) == {1: 0, 2: 0, 3: 1}
    objective = Objective([HiddenStates(layers={0: 2})], Teacher(teacher, 128, 1.0, None), 128)
    objective.attach(student)
    value = objective(student, batch())
    keep = batch().targets.shape[1] + 1
    states = [
        model(
            input_ids=batch().input_ids,
            attention_mask=batch().attention_mask,
            position_ids=batch().position_ids,
            output_hidden_states=True,
        ).hidden_states[block + 1][:, -keep:-1]
        for model, block in ((student, 0), (teacher, 2))
    ]
    distance = (states[0] - states[1]).square().mean(-1)[batch().targets != IGNORED].sum()
    assert value.item() == pytest.approx(distance.item(), rel=1e-5)  # the projection starts as the identity
    value.backward()
    assert any(
        LEARNED in name and p.grad is not None and p.grad.abs().sum() > 0 for name, p in student.named_parameters()
    )
    objective.detach(student)
    assert not any(LEARNED in name for name, _ in student.named_parameters())


def test_hidden_states_of_another_size_are_projected_and_wrong_layers_named() -> None:
    student, teacher = build_tiny_llama(seed=1), build_tiny_llama(seed=2, hidden_size=96)
    objective = Objective([HiddenStates()], Teacher(teacher, 128, 1.0, None), 128)
    objective.attach(student)
    assert student.get_parameter(f"{LEARNED}.0.1.weight").shape == (96, 64) and objective(student, batch()) > 0
    wrong = Objective([HiddenStates(layers={0: 7}), AttentionRelations(student_layer=5)], objective.teacher, 128)
    with pytest.raises(ConfigError) as error:
        wrong.attach(build_tiny_llama())
    assert "0: 7" in str(error.value) and "student_layer is 5 of 2 blocks" in str(error.value)


def naive_relation(vectors: Tensor, heads: int, query: int, first: int) -> list[list[float]]:
    """Per head: the distribution of one position over those up to itself; vectors (length, width)."""
    size = vectors.shape[1] // heads
    found = []
    for head in range(heads):
        part = vectors[:, head * size : (head + 1) * size]
        scores = [float(part[query] @ part[other]) / math.sqrt(size) for other in range(first, query + 1)]
        total = sum(math.exp(score) for score in scores)
        found.append([math.exp(score) / total for score in scores])
    return found


def test_attention_relations_follow_their_formula() -> None:
    student = build_tiny_llama(seed=1)
    teacher = build_tiny_llama(seed=2, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    loss = AttentionRelations(heads=4, teacher_layer=1)
    value = Objective([loss], Teacher(teacher, 128, 1.0, None), 128)(student, batch())
    with torch.no_grad():
        own = run(student, batch(), attention=[1]).attention[1]
        other = run(teacher, batch(), attention=[1]).attention[1]
    expected, length = 0.0, batch().input_ids.shape[1]
    for row, (prompt, response) in enumerate(ROWS):
        first = length - len(prompt) - len(response)
        for query in range(length - len(response) - 1, length - 1):
            for mine, wanted in zip(own, other, strict=True):
                pairs = zip(
                    naive_relation(wanted[row], 4, query, first),
                    naive_relation(mine[row], 4, query, first),
                    strict=True,
                )
                expected += sum(naive(p, q) for p, q in pairs) / 4
    assert value.item() == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert AttentionRelations().relation_heads([64, 32, 64]) == 32
    with pytest.raises(ConfigError, match="divisor of 32"):
        AttentionRelations(heads=7).relation_heads([64, 32])


def test_a_relation_does_not_depend_on_an_orthogonal_change_of_a_head() -> None:
    vectors = torch.randn(3, 9, 64)
    turn = torch.linalg.qr(torch.randn(64, 64)).Q
    torch.testing.assert_close(
        relations(vectors, 1, batch()), relations(vectors @ turn, 1, batch()), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(relations(vectors, 2, batch()), relations(vectors @ turn, 2, batch()), atol=1e-2)


@pytest.mark.parametrize("settings", [{"beta": 0}, {"beta": 1}, {"temperature": 0}, {"weight": -1}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LOSSES.create("js", **settings)
