"""The step plan: every sample once an epoch, no pass too long, ranks in step."""

import numpy as np
import pytest

from finetune.steps.plan import Plan, lay_out


def make(count=103, seed=0, **settings):
    lengths = np.random.default_rng(1).integers(5, 600, count)
    supervised = lengths // 3
    settings = {"samples_per_step": 16, "world_size": 2, "max_tokens_per_pass": 1000, "seed": seed} | settings
    return Plan(lengths, supervised, **settings)


def steps(plan, epoch=0):
    return [plan.step(epoch, i) for i in range(plan.steps_per_epoch)]


def flat(step):
    return [i for rank in step.passes for one in rank for i in one]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_sample_once_an_epoch(world_size):
    plan = make(world_size=world_size)
    assert plan.steps_per_epoch == 7  # 103 = 6 x 16 + 7
    seen = [i for step in steps(plan) for i in flat(step)]
    assert sorted(seen) == list(range(103))


def test_sums_are_those_of_the_samples():
    plan = make()
    for step in steps(plan):
        members = flat(step)
        assert step.samples == len(members)
        assert step.tokens == plan.lengths[members].sum()
        assert step.supervised_tokens == plan.supervised[members].sum()
        assert step.loss_weight == step.supervised_tokens and isinstance(step.loss_weight, float)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_weights_are_those_of_all_ranks(world_size):
    """They change nothing but the step's sum, which is the same whatever the ranks are."""
    weights = np.random.default_rng(2).uniform(0, 200, 103)
    plan, plain = make(world_size=world_size, weights=weights), make(world_size=world_size)
    for step, other in zip(steps(plan), steps(plain), strict=True):
        assert step.passes == other.passes and step.supervised_tokens == other.supervised_tokens
        assert step.loss_weight == pytest.approx(sum(float(weights[i]) for i in flat(step)), rel=1e-12)
    ranks, alone = steps(plan, epoch=1), steps(make(world_size=1, weights=weights), epoch=1)  # the first has a front, which depends on ranks
    assert [step.loss_weight for step in ranks] == [step.loss_weight for step in alone]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_make_the_same_number_of_passes_within_the_limit(world_size):
    plan = make(world_size=world_size)
    for step in steps(plan):
        assert len(step.passes) == world_size
        assert len({len(rank) for rank in step.passes}) == 1
        for one in (one for rank in step.passes for one in rank):
            assert plan.lengths[list(one)].sum() <= 1000


def test_ranks_do_the_same_samples_as_one_process():
    one, four = make(world_size=1), make(world_size=4)
    for a, b in zip(steps(one, 3), steps(four, 3)):
        assert sorted(flat(a)) == sorted(flat(b))


def test_load_is_level():
    plan = make(count=640, world_size=4, samples_per_step=64, max_tokens_per_pass=4096)
    for step in steps(plan):
        loads = [sum(plan.lengths[i] for one in rank for i in one) for rank in step.passes]
        assert max(loads) <= 1.1 * sum(loads) / len(loads)


def test_passes_are_few():
    """At most one pass a rank more than tokens / limit, rounded up."""
    plan = make(count=640, world_size=1, samples_per_step=64, max_tokens_per_pass=2000)
    for step in steps(plan):
        assert len(step.passes[0]) <= -(-step.tokens // 2000) + 1


def test_seed_and_epoch_decide_the_order():
    assert steps(make(seed=1)) == steps(make(seed=1))
    assert flat(make(seed=1).step(0, 0)) != flat(make(seed=2).step(0, 0))
    assert flat(make().step(0, 0)) != flat(make().step(1, 0))
    assert make(shuffle=False).order(5).tolist() == list(range(103))


def test_any_step_can_be_asked_for_first():
    straight = steps(make(), 2)
    assert make().step(2, 4) == straight[4]


def test_drop_last():
    assert make(drop_last=True).steps_per_epoch == 6
    assert make(count=5, drop_last=True).steps_per_epoch == 1  # a run of no steps serves nobody


def test_total_steps():
    assert make().total_steps(2.5) == 18  # 7 steps an epoch, rounded up
    assert make().total_steps(2.5, max_steps=4) == 4


def test_a_long_sample_has_a_pass_of_its_own():
    bins = lay_out([5000, 10, 20], max_tokens=100, ranks=1)
    assert bins == [[0], [2, 1]]


def test_fewer_samples_than_ranks_leave_empty_passes():
    bins = lay_out([7], max_tokens=100, ranks=4)
    assert bins == [[0], [], [], []]


def test_first_fit_helps_where_levelling_overflows():
    # 60 + 40 and 50 + 30 + 20 fill two bins exactly; the emptiest-bin rule would put 40 onto 50 and then overflow
    bins = lay_out([60, 50, 40, 30, 20], max_tokens=100, ranks=1)
    assert [sorted(b) for b in bins] == [[0, 2], [1, 3, 4]]


def test_random_layouts_hold_every_sample_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 300, rng.integers(1, 40)).tolist()
        ranks, limit = int(rng.integers(1, 5)), int(rng.integers(100, 1000))
        bins = lay_out(lengths, limit, ranks)
        assert len(bins) % ranks == 0
        assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in members) <= limit or len(members) == 1 for members in bins)


def test_the_largest_passes_come_first():
    """The first epoch's steps are those of the shuffled order, two of them moved to the front."""
    plan, unmoved = make(count=1003, seed=5), make(count=1003, seed=5)
    unmoved.front = ()
    before, after = steps(unmoved), steps(plan)

    def largest(step):
        return max(plan.lengths[list(one)].sum() for rank in step.passes for one in rank)

    ranked = sorted(map(largest, before), reverse=True)
    assert [largest(step) for step in after[:2]] == ranked[:2]
    assert len(set(ranked)) > 2 and largest(before[0]) < ranked[1]  # else there is nothing to show
    rest = [step for step in before if step not in after[:2]]
    assert after[2:] == rest and len(rest) == len(before) - 2
    assert steps(plan, epoch=1) == steps(unmoved, epoch=1)


@pytest.mark.parametrize("count", [1, 16, 17])
def test_few_steps_have_a_front_too(count):
    plan = make(count=count)
    assert sorted(i for step in steps(plan) for i in flat(step)) == list(range(count))


def test_without_shuffling_the_order_is_the_files():
    plan = make(shuffle=False)
    assert flat(plan.step(0, 0)) != [] and sorted(flat(plan.step(0, 0))) == list(range(16))
