"""How far DRO's E-step with m samples is from the exact one: 8 candidates, 2 chosen, all 56 choices enumerated.

    python benchmarks/dro_variance.py --plot docs/results/dro_variance.svg --json dro_variance.json

The selector is a table of random logits and the answer's likelihood is log-normal over the choices, in 16 random
problems. For each m, the gradient sum_i w_i d log p(z_i|x) / d logits is estimated many times. Prints its variance and
its squared bias (self-normalised weights are biased by O(1/m)), relative to the squared length of the exact gradient,
for samples from the selector itself and for ones at a temperature of 2 that the weights correct.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

from expertrag_jax.systems import permutations

CANDIDATES, PLACES = 8, 2
CHOICES = jnp.asarray(permutations.enumerate_choices(CANDIDATES, PLACES))


def scorer(tables):
    """Logits of the first place [n], and of the second behind each first one [n, n]."""
    first, second = tables

    def score(choices):
        start = jnp.broadcast_to(first, (*choices.shape[:-1], CANDIDATES))
        return jnp.stack([start, second[choices[..., 0]]], axis=-2)

    return score


def errors(key: jax.Array, samples: int, temperature: float, trials: int) -> jax.Array:
    """[variance, squared bias] of one random problem, over the squared length of the exact gradient."""
    keys = jax.random.split(key, 4)
    tables = jax.random.normal(keys[0], (CANDIDATES,)), jax.random.normal(keys[1], (CANDIDATES, CANDIDATES))
    log_likelihood = jax.random.normal(keys[2], (len(CHOICES),))

    def log_prior(tables):
        return permutations.log_probability(scorer(tables)(CHOICES), CHOICES)

    first, second = jax.jacobian(log_prior)(tables)
    scores = jnp.concatenate([first, second.reshape(len(CHOICES), -1)], -1)  # d log p(z) of every z
    prior = log_prior(tables)
    exact = jnp.exp(permutations.log_posterior(log_likelihood, prior)) @ scores
    place = jnp.zeros((CANDIDATES, CANDIDATES), jnp.int32).at[tuple(CHOICES.T)].set(jnp.arange(len(CHOICES)))

    def estimate(key):
        choices, log_proposal = permutations.sample(scorer(tables), (samples, PLACES), key, temperature)
        index = place[choices[:, 0], choices[:, 1]]
        weights = permutations.importance_weights(log_likelihood[index], prior[index], log_proposal)
        return weights @ scores[index]

    found = jax.lax.map(estimate, jax.random.split(keys[3], trials), batch_size=500)
    length = jnp.square(exact).sum()
    variance = found.var(0, ddof=1).sum()
    bias = jnp.square(found.mean(0) - exact).sum() - variance / trials  # what a finite number of trials adds
    return jnp.stack([variance, bias]) / length


def plot(rows: list[dict], path: str) -> None:
    """Variance against m on logarithmic axes, with a line that falls as 1/m."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for temperature, mark in ((1.0, "o"), (2.0, "s")):
        points = [row for row in rows if row["temperature"] == temperature]
        axes.loglog(
            [row["samples"] for row in points], [row["variance"] for row in points], marker=mark, linestyle="none",
            label="drawn from the selector" if temperature == 1 else "drawn at temperature 2, corrected",
        )
    last = [row for row in rows if row["temperature"] == 1.0][-1]
    m = np.array(sorted({row["samples"] for row in rows}))
    axes.loglog(m, last["variance"] * last["samples"] / m, color="gray", linewidth=1, label="1 / m")
    axes.set(xlabel="samples m", ylabel="variance / squared gradient")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="*", default=[2**i for i in range(11)])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--plot", help="file for the figure, .svg or .png")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    rows, keys = [], jax.random.split(jax.random.key(0), options.problems)
    print(f"{'temperature':>11} {'m':>5} {'variance':>10} {'bias^2':>10} {'m * variance':>13}")
    for temperature in (1.0, 2.0):
        for samples in options.samples:
            run = jax.jit(lambda key, m=samples, t=temperature: errors(key, m, t, options.trials))
            variance, bias = np.mean([run(key) for key in keys], axis=0).tolist()
            rows.append({"temperature": temperature, "samples": samples, "variance": variance, "squared_bias": bias})
            print(f"{temperature:11} {samples:5} {variance:10.4f} {bias:10.5f} {samples * variance:13.3f}", flush=True)
        large = [row for row in rows if row["temperature"] == temperature and row["samples"] >= 32]
        if len(large) > 1:
            logs = np.log([[row["samples"], row["variance"]] for row in large])
            slope = float(np.polyfit(*logs.T, 1)[0])
            print(f"temperature {temperature}: variance falls as m^{slope:.3f} from m = 32 on")
            rows[-1]["slope_from_32"] = slope
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
