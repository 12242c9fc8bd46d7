"""What must hold whatever the implementation: bounds, closed forms, and exact gradients by enumeration.

Policies and critics are tables, one row a state: a one-hot hidden state through a head that is the table transposed.
Expectations over trajectories are enumerated on a small token tree, so every comparison is exact in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_amd.objectives.divergences import DIVERGENCES
from megatron_amd.objectives.fused_head import TokenStatistics, critic_loss, head_statistics, student_loss
from megatron_amd.objectives.heads import CriticHead, Head, HeadOptions
from megatron_amd.objectives.moments import policy_gradient_scores
from megatron_amd.objectives.vocab_parallel import Vocabulary
from tests.objective_cases import CRITICS, Problem, Shard
from tests.reference import TokenTree

GAMMA = 0.9


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table_head(table: Tensor, states: Tensor | None = None) -> Head:
    """Logits table[state] for each of `states`, by default for every state once."""
    rows = torch.eye(table.shape[0], dtype=table.dtype)
    return Head(rows if states is None else rows[states], table.T)


def table_critic(f: Tensor, states: Tensor | None = None) -> CriticHead:
    head = table_head(f, states)
    return CriticHead(((head.hidden, head.weight, 1.0),), squash="none", center=False)


def table_statistics(z_student: Tensor, z_teacher: Tensor, f: Tensor) -> TokenStatistics:
    """Statistics of every state once."""
    targets = torch.zeros(len(f), dtype=torch.int64)
    heads = (table_head(z_student), table_head(z_teacher), table_critic(f))
    return head_statistics(*heads, targets, Vocabulary(f.shape[1]))


# Oracles 1, 2, 3, 5, 6, 7: single states


@pytest.mark.parametrize("critic", [name for name, options in CRITICS.items() if options.get("squash") != "none"])
def test_delta_never_exceeds_the_tv_bound(critic: str) -> None:
    shard = Shard(Problem({"critic": critic, "scale": 3.0}), None)
    heads = (shard.student_head(), shard.head("teacher"), shard.critic_head())
    statistics = head_statistics(*heads, shard.problem.targets, shard.vocabulary)
    bound = 2 * heads[2].bound * statistics.tv
    assert statistics.delta is not None
    assert (statistics.delta.abs() <= bound * (1 + 1e-12)).all()
    assert (bound > 0.01).all()


def test_sign_critic_attains_the_tv_bound() -> None:
    z_student, z_teacher = normal(6, 9, seed=1), normal(6, 9, seed=2)
    f = 1.5 * (z_teacher.softmax(1) - z_student.softmax(1)).sign()
    statistics = table_statistics(z_student, z_teacher, f)
    torch.testing.assert_close(statistics.delta, 2 * 1.5 * statistics.tv, rtol=1e-12, atol=0)


def test_steep_log_ratio_prior_attains_the_tv_bound() -> None:
    head, teacher = table_head(normal(6, 9, seed=1)), table_head(normal(6, 9, seed=2))
    critic = CriticHead(
        ((head.hidden, torch.zeros_like(head.weight), 1.0),), center=False, prior="log_ratio", prior_scale=1e6
    )
    statistics = head_statistics(head, teacher, critic, torch.zeros(6, dtype=torch.int64), Vocabulary(9))
    torch.testing.assert_close(statistics.delta, 2 * statistics.tv, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", list(DIVERGENCES))
def test_equal_models_have_exactly_no_distance_and_no_gradient(objective: str, dtype: torch.dtype) -> None:
    hidden, weight = normal(13, 8, seed=3).to(dtype), normal(50, 8, seed=4).to(dtype)
    student = Head(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    common = {"targets": torch.zeros(13, dtype=torch.int64), "weights": torch.ones(13), "vocabulary": Vocabulary(47)}
    loss, tokens = student_loss(
        student, Head(hidden, weight), None, objective=objective, **common, options=HeadOptions(chunk_tokens=5)
    )
    loss.backward()
    assert not tokens.value.any()
    for leaf in (student.hidden, student.weight):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("prior", ["none", "log_ratio"])
@pytest.mark.parametrize("head_scale", [0.0, 1.0])
def test_equal_models_under_amm(prior: str, head_scale: float) -> None:
    """delta and the critic's gradient are exactly 0; the student's is -w q (f - E_q f), 0 for a zero critic."""
    hidden, weight = normal(13, 8, seed=3), normal(50, 8, seed=4)
    critic_weight = (head_scale * normal(50, 8, seed=5)).requires_grad_()
    student, teacher = Head(hidden.clone().requires_grad_(), weight.clone().requires_grad_()), Head(hidden, weight)
    critic = CriticHead(((hidden, critic_weight, 1.0),), bound=1.3, prior=prior, prior_scale=2.0)
    weights, targets = torch.linspace(0.5, 2, 13, dtype=torch.float64), torch.zeros(13, dtype=torch.int64)
    common = {
        "targets": targets,
        "weights": weights,
        "vocabulary": Vocabulary(50),
        "options": HeadOptions(chunk_tokens=5),
    }
    loss, statistics = critic_loss(student, teacher, critic, on_policy=True, estimator="full_vocabulary", **common)
    loss.backward()
    assert statistics.delta is not None
    assert critic_weight.grad is not None
    assert not statistics.delta.any()
    assert not critic_weight.grad.any()
    loss, tokens = student_loss(student, teacher, critic, objective="amm", **common)
    loss.backward()
    assert not tokens.value.any()
    q = (hidden @ weight.T).softmax(1)
    raw = hidden @ critic_weight.detach().T
    f = 1.3 * torch.tanh(raw - (q * raw).sum(1, keepdim=True))
    expected = -weights[:, None] * q * (f - (q * f).sum(1, keepdim=True))
    assert student.weight.grad is not None
    torch.testing.assert_close(student.weight.grad, expected.T @ hidden, rtol=1e-10, atol=1e-13)
    assert student.weight.grad.any() == (head_scale > 0)


@pytest.mark.parametrize("estimator", ["full_vocabulary", "sampled"])
@pytest.mark.parametrize(("squash", "center"), [("none", False), ("tanh", True)])
def test_shift_of_the_critic_by_state_changes_nothing(estimator: str, squash: str, center: bool) -> None:
    """With tanh the shift is of the raw values, which centring takes out."""
    num, vocabulary = 7, 9
    shift = normal(num, 1, seed=8, scale=3.0)
    values, gradients = [], []
    for offset in (0 * shift, shift):
        leaves = [normal(vocabulary, 4, seed=seed).requires_grad_() for seed in (1, 2)]
        student = Head(normal(num, 4, seed=3), leaves[0])
        # One more feature, which a column of ones carries to every token alike.
        critic_hidden = torch.cat([normal(num, 4, seed=4), offset], dim=1)
        critic_weight = torch.cat([leaves[1], torch.ones(vocabulary, 1, dtype=torch.float64)], dim=1)
        critic = CriticHead(((critic_hidden, critic_weight, 1.0),), squash=squash, center=center)
        teacher = Head(normal(num, 4, seed=5), normal(vocabulary, 4, seed=6))
        common = {
            "targets": torch.arange(num),
            "weights": torch.ones(num, dtype=torch.float64),
            "vocabulary": Vocabulary(vocabulary),
        }
        critic_value, _ = critic_loss(student, teacher, critic, on_policy=True, estimator=estimator, **common)
        student_value, _ = student_loss(student, teacher, critic, objective="amm", **common)
        values.append(torch.stack([critic_value, student_value]).detach())
        gradients.append(torch.cat(torch.autograd.grad(critic_value + student_value, leaves)))
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    assert gradients[0].abs().max() > 0.1


def test_suprema_over_balls_have_their_closed_forms() -> None:
    z_student, z_teacher = normal(6, 9, seed=1), normal(6, 9, seed=2)
    p, q = z_teacher.softmax(1), z_student.softmax(1)
    balls: list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = [
        (lambda f: f.norm(dim=1, keepdim=True), p - q, (p - q).norm(dim=1)),
        (lambda f: (p * f**2).sum(1, keepdim=True).sqrt(), (p - q) / p, ((p - q) / p.sqrt()).norm(dim=1)),
    ]
    for size, best, supremum in balls:
        delta = table_statistics(z_student, z_teacher, best / size(best)).delta
        torch.testing.assert_close(delta, supremum, rtol=1e-12, atol=0)
        for seed in range(20):
            # Near the best one, so that a supremum too small would be passed.
            f = best / size(best) + normal(6, 9, seed=seed, scale=0.1)
            delta = table_statistics(z_student, z_teacher, f / size(f)).delta
            assert delta is not None
            assert (delta < supremum).all()


@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_ascent_of_a_linear_critic_reaches_the_closed_form(chunk_tokens: int | None) -> None:
    """sup over |W|_F <= 1 of sum w delta is |sum w (p-q) h^T|_F: projected gradient ascent gets there."""
    num, vocabulary = 10, 8
    student = Head(normal(num, 3, seed=1), normal(vocabulary, 3, seed=2))
    teacher = Head(normal(num, 4, seed=3), normal(vocabulary, 4, seed=4))
    weights = torch.linspace(0.2, 1.5, num, dtype=torch.float64)
    gap = (teacher.hidden @ teacher.weight.T).softmax(1) - (student.hidden @ student.weight.T).softmax(1)
    supremum = ((weights[:, None] * gap).T @ teacher.hidden).norm()
    weight = normal(vocabulary, 4, seed=5)
    weight = (weight / weight.norm()).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    values = []
    for _ in range(60):
        critic = CriticHead(((teacher.hidden, weight, 1.0),), squash="none", center=False)
        loss, _ = critic_loss(
            student,
            teacher,
            critic,
            targets=torch.zeros(num, dtype=torch.int64),
            weights=weights,
            on_policy=False,
            estimator="full_vocabulary",
            vocabulary=Vocabulary(vocabulary),
            options=HeadOptions(chunk_tokens=chunk_tokens),
        )
        values.append(-loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weight /= weight.norm().clamp(min=1)
    assert values[0] < 0.5 * supremum
    assert max(values) <= supremum * (1 + 1e-12)
    assert values[-1] == pytest.approx(supremum.item(), rel=1e-9)


def test_inequalities_between_the_distances() -> None:
    for seed, scale in ((1, 0.1), (2, 1.0), (3, 5.0)):
        z_student, z_teacher = normal(40, 12, seed=seed, scale=scale), normal(40, 12, seed=seed + 9, scale=scale)
        s = table_statistics(z_student, z_teacher, z_student)
        assert (2 * s.tv**2 <= s.kl).all()
        assert (2 * s.tv**2 <= s.rkl).all()
        assert (s.tv**2 / 2 <= s.js).all()
        assert (s.js <= math.log(2) * s.tv).all()


# Oracles 4, 8 and the policy gradients: enumerated trajectories


class Enumeration:
    """A token tree with its policies, and all of its trajectories as one batch of tokens."""

    def __init__(self, seed: int = 0, vocabulary: int = 3, depth: int = 3):
        self.tree = TokenTree(vocabulary, depth)
        shape = (self.tree.num_states, vocabulary)
        self.z_student, self.z_teacher = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
        self.q, self.p = self.z_student.softmax(1), self.z_teacher.softmax(1)
        self.f = normal(*shape, seed=seed + 2)
        paths = self.tree.trajectories
        self.states = torch.tensor([state for path in paths for state in path.states])
        self.targets = torch.tensor([token for path in paths for token in path.tokens])
        self.mask = torch.tensor([[t < len(path.states) for t in range(depth)] for path in paths])
        """[M, depth]: which tokens exist; its true entries in row order are the batch."""
        self.discount = (GAMMA ** torch.arange(depth, dtype=torch.float64)).expand(self.mask.shape)

    def probabilities(self, policy: Tensor) -> Tensor:
        """[M, 1]: of each trajectory."""
        return torch.stack([self.tree.probability(path, policy) for path in self.tree.trajectories])[:, None]

    def grid(self, values: Tensor) -> Tensor:
        """Per-token values of the batch -> [M, depth]."""
        return torch.zeros(self.mask.shape, dtype=values.dtype).masked_scatter(self.mask, values)

    def statistics(self, f: Tensor) -> TokenStatistics:
        heads = (table_head(self.z_student, self.states), table_head(self.z_teacher, self.states))
        critic = table_critic(f, self.states)
        return head_statistics(*heads, critic, self.targets, Vocabulary(self.tree.vocabulary))

    def student_gradient(self, f: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
        """Gradient in the student's table of the surrogate with these [M, depth] weights."""
        table = self.z_student.clone().requires_grad_()
        loss, _ = student_loss(
            table_head(table, self.states),
            table_head(self.z_teacher, self.states),
            table_critic(f, self.states),
            objective="amm",
            targets=self.targets,
            weights=weights[self.mask],
            scores=scores[self.mask],
            vocabulary=Vocabulary(self.tree.vocabulary),
            options=HeadOptions(chunk_tokens=5),
        )
        return torch.autograd.grad(loss, [table])[0]

    def exact_gradient(self, per_state: Callable[[Tensor], Tensor], on_policy: bool) -> Tensor:
        """Gradient in the student's table of E sum w per_state(q)(s_t), through the states' distribution as well."""
        table = self.z_student.clone().requires_grad_()
        q = table.softmax(1)
        value = self.tree.expectation(q if on_policy else self.p, per_state(q), GAMMA)
        return torch.autograd.grad(value, [table])[0]

    def moment(self, f: Tensor) -> Callable[[Tensor], Tensor]:
        """q -> delta of each state, f fixed."""
        return lambda q: ((self.p - q) * f).sum(1)

    def expected_gradient(self, policy_gradient: str, f: Tensor) -> Tensor:
        """Mean of the on-policy estimator over single trajectories (no other sequence, so no baseline)."""
        statistics = self.statistics(f)
        assert statistics.expected_f_teacher is not None
        assert statistics.delta is not None
        delta, sampled = self.grid(statistics.delta), self.grid(statistics.expected_f_teacher - statistics.f_target)
        rows = [
            policy_gradient_scores(policy_gradient, delta[[i]], sampled[[i]], self.mask[[i]], GAMMA)
            for i in range(len(delta))
        ]
        weights, scores = (torch.cat(part) for part in zip(*rows, strict=True))
        chance = self.probabilities(self.q)
        return self.student_gradient(f, chance * weights, chance * scores)


@pytest.mark.parametrize("policy_gradient", ["rao_blackwell", "reinforce"])
def test_policy_gradient_is_unbiased(policy_gradient: str) -> None:
    case = Enumeration()
    exact = case.exact_gradient(case.moment(case.f), on_policy=True)
    torch.testing.assert_close(case.expected_gradient(policy_gradient, case.f), exact, rtol=1e-10, atol=1e-13)
    assert exact.norm() > 0.1


def test_per_step_gradient_is_biased() -> None:
    case = Enumeration()
    exact = case.exact_gradient(case.moment(case.f), on_policy=True)
    per_step = case.expected_gradient("per_step", case.f)
    assert (per_step - exact).norm() > 0.1 * exact.norm()
    assert per_step.norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("policy_gradient", ["rao_blackwell", "reinforce"])
def test_leave_one_out_baseline_keeps_the_gradient_unbiased(policy_gradient: str) -> None:
    """Exactly, over all ordered pairs of independent trajectories; the baseline itself is not zero."""
    case = Enumeration()
    statistics = case.statistics(case.f)
    assert statistics.expected_f_teacher is not None
    assert statistics.delta is not None
    delta, sampled = case.grid(statistics.delta), case.grid(statistics.expected_f_teacher - statistics.f_target)
    chance = case.probabilities(case.q)[:, 0]
    weights, scores, without = (torch.zeros_like(delta) for _ in range(3))
    for i in range(len(delta)):
        for j in range(len(delta)):
            pair = [i, j]
            grids = (delta[pair], sampled[pair], case.mask[pair])
            pair_weights, pair_scores = policy_gradient_scores(policy_gradient, *grids, GAMMA)
            for row, path in enumerate(pair):
                weights[path] += chance[i] * chance[j] / 2 * pair_weights[row]
                scores[path] += chance[i] * chance[j] / 2 * pair_scores[row]
                alone = policy_gradient_scores(policy_gradient, *(grid[[row]] for grid in grids), GAMMA)[1]
                without[path] += chance[i] * chance[j] / 2 * alone[0]
    exact = case.exact_gradient(case.moment(case.f), on_policy=True)
    torch.testing.assert_close(case.student_gradient(case.f, weights, scores), exact, rtol=1e-10, atol=1e-13)
    assert (scores - without).abs().max() > 1e-3


@pytest.mark.parametrize("on_policy", [False, True])
def test_at_the_best_critic_the_gradient_is_that_of_tv(on_policy: bool) -> None:
    case, bound = Enumeration(seed=5), 1.4
    f = bound * (case.p - case.q).sign()
    exact = case.exact_gradient(lambda q: 2 * bound * (case.p - q).abs().sum(1) / 2, on_policy)
    if on_policy:
        gradient = case.expected_gradient("rao_blackwell", f)
    else:
        weights = case.probabilities(case.p) * case.discount
        gradient = case.student_gradient(f, weights, torch.zeros_like(weights))
    torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("on_policy", [False, True])
def test_sampled_moments_have_the_expectation_of_the_full_ones(on_policy: bool) -> None:
    case = Enumeration()
    s = case.statistics(case.f)
    assert s.expected_f_teacher is not None
    assert s.expected_f_student is not None
    assert s.delta is not None
    assert s.f_target is not None
    sampled = s.expected_f_teacher - s.f_target if on_policy else s.f_target - s.expected_f_student
    chance = case.probabilities(case.q if on_policy else case.p) * case.discount
    full = (chance * case.grid(s.delta)).sum()
    torch.testing.assert_close((chance * case.grid(sampled)).sum(), full, rtol=1e-12, atol=1e-14)


def test_performance_difference_lemma() -> None:
    """The return gap is the off-policy moment of Q^q and the on-policy moment of Q^p, for any reward table."""
    case = Enumeration(seed=3)
    reward = normal(*case.f.shape, seed=11)
    rewards = case.grid(reward[case.states, case.targets]) * case.discount
    from_p, from_q = case.probabilities(case.p), case.probabilities(case.q)
    gap = (from_p * rewards).sum() - (from_q * rewards).sum()
    off = case.statistics(case.tree.action_values(case.q, reward, GAMMA))
    on = case.statistics(case.tree.action_values(case.p, reward, GAMMA))
    assert off.f_target is not None
    assert on.expected_f_teacher is not None
    off_moment = (from_p * case.discount * case.grid(off.f_target - off.expected_f_student)).sum()
    on_moment = (from_q * case.discount * case.grid(on.expected_f_teacher - on.f_target)).sum()
    torch.testing.assert_close(off_moment, gap, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(on_moment, gap, rtol=1e-11, atol=1e-13)
    assert abs(gap) > 1e-2
