"""DRO: selector and generator against enumeration, the E- and M-steps, warm-up, phases, answering."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.systems import generator, permutations
from expertrag_jax.systems.description import describe, rebuild
from expertrag_jax.systems.dro import DRO, Estimate
from expertrag_jax.training import parameters, step
from expertrag_jax.training.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_compile")
ROWS, N, K = 3, 8, 2
CHOICES = permutations.enumerate_choices(N, K)
LEAVES = jax.tree.leaves


def make(tiny, **fields):
    dense = {"num_experts": 0, "mlp_dim": 8, "num_heads": 2}
    sizes = dict(num_candidates=N, num_selected=K, num_samples=4, iterations=2, max_target_length=tiny.target)
    return DRO(tiny.model(**dense), tiny.model(**dense, vocab_size=tiny.vocab + N), **{**sizes, **fields})


@pytest.fixture(scope="module")
def setting(tiny):
    """System, parameters, batch, and log p(z|x), log p(y|x, z) of all 56 choices."""
    system = make(tiny)
    params, batch = tiny.initial(system), tiny.batch(ROWS, N)
    every = np.broadcast_to(CHOICES, (ROWS, *CHOICES.shape))

    @jax.jit
    def enumerate_all(params):
        prior = system.log_prior(params, batch.passage_tokens, every)[0]
        return prior, system.log_likelihood(params, batch, every)[0]

    return system, params, batch, every, enumerate_all


def test_the_selector_is_a_distribution_over_ordered_choices(setting):
    """Scored together in one decoder row as each alone; a choice's probability depends on what was chosen before."""
    system, params, batch, _, enumerate_all = setting
    prior, _ = enumerate_all(params)
    np.testing.assert_allclose(np.exp(prior).sum(-1), 1, rtol=1e-5)
    one = jax.jit(lambda z: system.log_prior(params, batch.passage_tokens, z)[0])
    for place in (0, 5, 11):
        alone = one(np.broadcast_to(CHOICES[place], (ROWS, 1, K)))
        np.testing.assert_allclose(alone[:, 0], prior[:, place], rtol=1e-4, atol=1e-5)
    p = np.zeros((ROWS, N, N))
    p[:, CHOICES[:, 0], CHOICES[:, 1]] = np.exp(prior)
    behind = p / p.sum(-1, keepdims=True)
    assert np.abs(behind[:, 0, 2] / behind[:, 0, 3] - behind[:, 1, 2] / behind[:, 1, 3]).max() > 1e-3
    best = jax.jit(lambda: system.select(params, batch.passage_tokens))()[:, 0]
    first = p.sum(-1).argmax(-1)
    np.testing.assert_array_equal(best[:, 0], first)
    np.testing.assert_array_equal(best[:, 1], behind[np.arange(ROWS), first].argmax(-1))


def test_the_selector_is_list_wise(setting):
    """Another candidate's text changes the odds between two that stayed."""
    system, params, batch, every, _ = setting
    run = jax.jit(lambda passages: system.log_prior(params, passages, every)[0])
    usual, other = batch.passage_tokens, batch.passage_tokens.copy()
    other[:, 3] = np.roll(other[:, 3], 1, -1)
    odds = [(p := run(passages))[:, 1] - p[:, 3] for passages in (usual, other)]  # of (0, 2) and of (1, 0)
    assert np.abs(odds[0] - odds[1]).max() > 1e-3


def test_the_generator_reads_the_chosen_passages_in_their_order(setting):
    system, params, batch, _, enumerate_all = setting
    _, likelihood = enumerate_all(params)
    one = jax.jit(lambda passages: system.log_likelihood(params, batch.replace(passage_tokens=passages), FIRST)[0])
    FIRST = np.broadcast_to(np.arange(K), (ROWS, 1, K))
    for place in (0, 4, 11):  # choosing (i, j) is reading a list that starts with i and j
        rest = [i for i in range(N) if i not in CHOICES[place]]
        listed = batch.passage_tokens[:, [*CHOICES[place], *rest]]
        np.testing.assert_allclose(one(listed)[:, 0], likelihood[:, place], rtol=1e-4, atol=1e-5)
    place = {tuple(z): i for i, z in enumerate(CHOICES.tolist())}
    assert np.abs(likelihood[:, place[0, 1]] - likelihood[:, place[1, 0]]).max() > 1e-3


def test_the_e_step_estimates_the_enumerated_posterior(setting):
    system, params, batch, _, enumerate_all = setting
    prior, likelihood = enumerate_all(params)
    exact = np.exp(permutations.log_posterior(likelihood, prior))
    place = np.full((N, N), -1)
    place[CHOICES[:, 0], CHOICES[:, 1]] = np.arange(len(CHOICES))
    rows, distance = np.arange(ROWS)[:, None], []
    for samples in (8, 64, 512):
        many = dataclasses.replace(system, num_samples=samples, temperature=1.5)
        found = jax.jit(lambda system=many: system.estimate(params, batch, jax.random.key(0)))()
        index = place[found.choices[..., 0], found.choices[..., 1]]
        estimate = np.zeros((ROWS, len(CHOICES)))
        np.add.at(estimate, (np.broadcast_to(rows, index.shape), index), np.asarray(found.weights))
        distance.append(0.5 * np.abs(estimate - exact).sum(-1).mean())
    # As m^-1/2, by 2.8 for each factor of 8; slower while m is small beside 56.
    assert distance[0] > 1.5 * distance[1] > 3 * distance[2] and distance[2] < 0.1, distance
    np.testing.assert_allclose(found.log_prior, np.asarray(prior)[rows, index], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.log_likelihood, np.asarray(likelihood)[rows, index], rtol=1e-3, atol=1e-4)
    evidence = permutations.log_evidence(found.log_likelihood, found.log_prior, found.log_proposal)
    np.testing.assert_allclose(evidence, jax.nn.logsumexp(likelihood + prior, -1), atol=0.2)


def test_the_m_step_on_the_exact_posterior_climbs_the_marginal(setting):
    """Its gradient is that of sum_z p(z|x) p(y|x, z), in both models, and small steps raise that at every iteration."""
    system, params, batch, every, enumerate_all = setting

    def m_step(params):
        prior, likelihood = enumerate_all(params)
        weights = jax.lax.stop_gradient(jnp.exp(permutations.log_posterior(likelihood, prior)))
        estimate = Estimate(every, weights, likelihood, prior, prior)
        return system.maximization_loss(params, batch, estimate, None)[0]

    def marginal(params):
        prior, likelihood = enumerate_all(params)
        return -jax.nn.logsumexp(prior + likelihood, axis=-1).mean()

    live = {name: tree for name, tree in params.items() if name != "previous"}
    both = jax.jit(lambda params: (jax.grad(m_step)(params), jax.value_and_grad(marginal)(params)))
    losses = []
    for _ in range(4):
        gradient, (loss, exact) = both(live)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-5), gradient, exact)
        losses.append(float(loss))
        live = jax.tree.map(lambda p, g: p - 0.02 * g, live, gradient)
    assert all(later < earlier for earlier, later in zip(losses, losses[1:])), losses
    flat = parameters.flatten(gradient)
    moved = {name.split("/")[0] for name, leaf in flat.items() if np.any(leaf)}
    assert moved == {"selector", "token_embedder", "encoder", "decoder"}


def test_an_iteration_weighs_with_the_parameters_at_its_start(setting):
    """The choices are the previous parameters', the losses the present ones'; a row of padding counts for nothing."""
    system, params, batch, _, _ = setting
    padded = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), batch)

    @jax.jit
    def run(params, rng):
        (loss, metrics), gradient = jax.value_and_grad(system.loss, has_aux=True)(params, padded, rng)
        estimate = system.estimate(params["previous"], padded, jax.random.split(rng)[0])
        prior = system.log_prior(params, padded.passage_tokens, estimate.choices)[0]
        likelihood = system.log_likelihood(params, padded, estimate.choices)[0]
        return loss, metrics, gradient, estimate, prior, likelihood

    loss, metrics, gradient, estimate, prior, likelihood = run(params, jax.random.key(3))
    assert not any(np.any(leaf) for leaf in LEAVES(gradient["previous"]))
    parts = {"selector_loss": prior, "generator_loss": likelihood}
    for name, log_p in parts.items():
        total = -(np.asarray(estimate.weights) * log_p)[:ROWS].sum()
        np.testing.assert_allclose(metrics[name], (total, ROWS), rtol=1e-4)
    np.testing.assert_allclose(loss, sum(metrics[name][0] for name in parts) / ROWS, rtol=1e-5)
    total, count = metrics["effective_sample_size"]
    assert count == ROWS and 1 <= total / count <= system.num_samples
    assert np.abs(estimate.log_prior - prior).max() > 1e-3  # the two sets of parameters differ


def test_estimation_copies_and_freezes(setting):
    system, params, batch, _, _ = setting
    names = [phase.name for phase in system.phases]
    iterations = ["estimation_1", "maximization_1", "estimation_2", "maximization_2"]
    assert names == ["warm_generator", "warm_selector", *iterations]
    phase = system.phases[2]
    live = {name: tree for name, tree in params.items() if name != "previous"}
    previous = jax.tree.map(lambda x: np.asarray(x * 1.7 + 0.3, np.float32), live)
    params = jax.tree.map(jnp.asarray, live | {"previous": previous})
    optimizer = phase.make_optimizer()
    trainable, _ = parameters.split(params, phase.trainable)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, zero, params, optimizer.init(trainable))
    run = step.make_train_step(phase.loss, optimizer, phase.trainable, donate=False)
    for _ in range(phase.steps):
        state, _ = run(state, batch)
    after = dict(state.params)
    jax.tree.map(np.testing.assert_array_equal, after.pop("previous"), live)
    jax.tree.map(np.testing.assert_array_equal, after, live)


def test_warm_up_ranks_by_what_the_reader_makes_of_each_passage(setting):
    system, params, batch, _, _ = setting
    alone = np.broadcast_to(np.arange(N)[:, None], (ROWS, N, 1))
    utility = jax.jit(lambda: system.log_likelihood(params, batch, alone)[0])()
    ranking = np.argsort(-np.asarray(utility), -1)[:, None, :K]
    expected = -jax.jit(lambda: system.log_prior(params, batch.passage_tokens, ranking)[0])().mean()
    run = jax.jit(jax.value_and_grad(system.warm_selector_loss, has_aux=True))
    (loss, _), gradient = run(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert not any(np.any(leaf) for name, tree in gradient.items() if name != "selector" for leaf in LEAVES(tree))
    first = np.broadcast_to(np.arange(K), (ROWS, 1, K))
    nll = -jax.jit(lambda: system.log_likelihood(params, batch, first)[0])().sum()
    warm, metrics = jax.jit(system.warm_generator_loss)(params, batch, jax.random.key(0))
    np.testing.assert_allclose([metrics["loss"][0], warm], [nll, nll / batch.decoder_loss_weights.sum()], rtol=1e-4)


def test_answers_come_from_the_selected_passages(setting):
    system, params, batch, _, _ = setting

    @jax.jit
    def first():
        return system.begin(params, system.read(params, batch.passage_tokens))[0]

    chosen = jax.jit(system.select)(params, batch.passage_tokens)
    np.testing.assert_array_equal(jax.jit(system.read)(params, batch.passage_tokens).choices, chosen[:, 0])
    logits = jax.jit(lambda: system.answer_losses(params, batch, chosen)[1])()
    np.testing.assert_allclose(first(), jax.nn.log_softmax(logits[:, 0]), rtol=1e-4, atol=1e-5)
    _, metrics = jax.jit(system.evaluation_loss)(params, batch)
    nll = generator.cross_entropy(logits, batch.decoder_target_tokens)
    np.testing.assert_allclose(metrics["loss"][0], (nll * batch.decoder_loss_weights).sum(), rtol=1e-4)
    question = jax.jit(system.encode_question)(params, batch.encoder_input_tokens)
    assert (system.decide(params, question) == 1).all()


def test_tree_axes_description_and_online(tiny):
    system = make(tiny)
    params = jax.eval_shape(system.init, jax.random.key(0))
    assert set(params) == {"token_embedder", "encoder", "decoder", "selector", "previous"}
    assert set(params["selector"]) == {"token_embedder", "encoder", "decoder"}
    ranks = jax.tree.map(len, system.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)
    again = rebuild(describe(system))
    assert (again.model, again.selector, again.num_samples) == (system.model, system.selector, 4)
    online = make(tiny, online=True, iteration_steps=7, optimizer=lambda: optax.sgd(0.1))
    assert "previous" not in jax.eval_shape(online.init, jax.random.key(0))
    assert [(phase.name, phase.steps) for phase in online.phases][2:] == [("online_1", 7), ("online_2", 7)]
    paper = DRO(tiny.model())
    assert (paper.num_candidates, paper.num_selected, paper.num_samples, paper.iterations) == (20, 5, 8, 5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_selected": 9}, "between 1 and num_candidates=8"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_settings_are_refused(tiny, fields, message):
    with pytest.raises(UserError, match=message):
        make(tiny, **fields)


def test_the_number_of_passages_must_fit(tiny):
    system = make(tiny)
    for count in (1, 9):
        with pytest.raises(UserError, match="set NUM_PASSAGES"):
            jax.eval_shape(system.select, tiny.initial(system), tiny.batch(2, count).passage_tokens)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}, {"data": 2, "expert": 2}], ids=str)
def test_a_step_on_a_mesh_is_the_step_of_one_device(axes, tiny):
    """The E-step's samples too: they are drawn from the same random numbers, whatever devices draw them."""
    sparse = {"num_experts": 2} if "expert" in axes else {"num_experts": 0, "mlp_dim": 8}
    system = DRO(
        tiny.model(**sparse, num_heads=2), tiny.model(**sparse, num_heads=2, vocab_size=tiny.vocab + N),
        num_candidates=N, num_selected=K, num_samples=4, iterations=1, max_target_length=tiny.target,
    )  # fmt: skip
    found = []
    for sizes in ({"data": 1}, axes):
        metrics, params = tiny.one_step(system, optax.sgd(0.1), tiny.batch(8, N), sizes)
        logged = [metrics[name][0] for name in ("objective", "effective_sample_size", "log_evidence")]
        found.append((logged, params))
    (expected, expected_params), (logged, params) = found
    np.testing.assert_allclose(logged, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5), params, expected_params)
