"""The ways to a meta-gradient, each with its own options: how one task says where the init and the rates should go.

A way is a frozen dataclass that is called as way(problem, meta, episode, key) and gives (direction shaped like `meta`,
what the objective measures on the query set after adaptation). `Reverse` gives outputs instead, through which
`meta_gradient` differentiates a whole group of tasks at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metalr import inner
from metalr.inner import descent, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Apply, predict
from metalr.trees import count
from metalr.types import Episode, MetaParams, Params, RawRates

NOISE = 0xE5  # folded into a task's key; inner steps fold in 0 and 1
Direction = tuple[MetaParams, dict[str, jax.Array]]


class TaskSize(NamedTuple):
    """What the cost of a task depends on, beside its inner steps.

    Attributes:
      batch: examples of one inner step.
      support, query: examples of either set.
      numbers: learned numbers among the rates.
    """

    batch: int
    support: int
    query: int
    numbers: int


class Problem(NamedTuple):
    """What a meta-gradient is of: static choices.

    Attributes:
      apply: of the model, in the form that the platform is best at.
      spec: of the hyperparameters.
      objective: its loss is that of the support set, and of the query set too unless it has a meta_loss.
      dropout: whether the model has some; a learned rate replaces it.
      begin: (init, support_x, support_y) -> where the inner steps start; default: from the init.
      horizon: how many inner steps are taken; default: spec.steps.
    """

    apply: Apply
    spec: RatesSpec
    objective: Objective = CROSS_ENTROPY
    dropout: bool = False
    begin: Callable[[Params, Any, Any], Params] = lambda init, x, y: init
    horizon: int | None = None

    @property
    def steps(self) -> int:
        """Inner steps of the fine-tune."""
        return self.spec.steps if self.horizon is None else self.horizon

    def begun(self, meta: MetaParams, episode: Episode) -> MetaParams:
        """Meta-parameters whose init is where this episode's inner steps start."""
        return meta._replace(init=self.begin(meta.init, episode.support_x, episode.support_y))


def steps_of(
    problem: Problem, raw: RawRates, episode: Episode, key: jax.Array | None, *, first_order: bool = False
) -> tuple[inner.Step, Callable[[Params], Any]]:
    """The inner step of an episode with raw rates, and the function that starts the optimizer's state."""
    spec = problem.spec
    x, y = episode.support_x, episode.support_y
    rates = hyperparameters.actual(spec, raw)
    steps = problem.steps
    optimizer, options = descent.fine_tune(spec, rates, count(y), dropout=problem.dropout, of_steps=steps)
    step = inner.make_step(
        problem.apply, x, y, optimizer, steps, key=key, loss=problem.objective.loss, first_order=first_order,
        **options,
    )  # fmt: skip
    return step, optimizer.init


def adapted(
    problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array | None, way: Reverse | None = None
) -> Params:
    """Params after problem.steps steps from meta.init; `way` says what a derivative through them keeps."""
    way, steps, meta = way or Reverse(), problem.steps, problem.begun(meta, episode)
    before = 0 if way.last is None else max(steps - way.last, 0)
    step, start = steps_of(problem, meta.rates, episode, key, first_order=way.first_order)
    carry = meta.init, start(meta.init)
    if before:  # move the params as if by a constant, so that the init still gets a gradient, of first order
        stopped = jax.lax.stop_gradient(meta)
        constant_step, start = steps_of(problem, stopped.rates, episode, key, first_order=way.first_order)
        params, state = inner.take(constant_step, (stopped.init, start(stopped.init)), 0, before)
        moved = jax.tree.map(lambda now, then, init: init + (now - then), params, stopped.init, meta.init)
        carry = moved, jax.lax.stop_gradient(state)
    return inner.take(step, carry, before, steps, remat=way.remat)[0]


def _of_init(direction: Params, meta: MetaParams) -> MetaParams:
    """A direction of the init alone: rates do not learn."""
    return MetaParams(direction, jax.tree.map(jnp.zeros_like, meta.rates))


def on_query(problem: Problem, fast: Params, episode: Episode) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The query loss of adapted params, and all that the objective measures."""
    outputs = predict(problem.apply, fast, episode.support_x, episode.query_x)
    measured = problem.objective.measure(outputs, episode.query_y)
    return measured["loss"], measured


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The derivative of the query loss through the inner steps, by reverse mode (Finn et al. 2017, algorithm 2).

    Attributes:
      first_order: treat the inner gradients as constants (the same paper, section 5.2).
      remat: keep only the params of every step, and compute a step again, instead of keeping its activations.
      last: differentiate that many steps, the last ones, only (truncated back-propagation, Shaban et al. 2019, section
        2); None: all.
    """

    first_order: bool = False
    remat: bool = False
    last: int | None = None

    def outputs(
        self, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array | None, *, every_step: bool = False
    ) -> Any:
        """Outputs [query, …] after all steps; with every_step [steps + 1, query, …], before each and after the last."""
        if not every_step:
            fast = adapted(problem, meta, episode, key, self)
            return predict(problem.apply, fast, episode.support_x, episode.query_x)
        meta = problem.begun(meta, episode)
        step, start = steps_of(problem, meta.rates, episode, key, first_order=self.first_order)
        carry = meta.init, start(meta.init)
        seen = [predict(problem.apply, meta.init, episode.support_x, episode.query_x)]
        for number in range(problem.steps):
            carry = inner.take(step, carry, number, number + 1, remat=self.remat)
            seen.append(predict(problem.apply, carry[0], episode.support_x, episode.query_x))
        return jax.tree.map(lambda *each: jnp.stack(each), *seen)

    def cost(self, steps: int, size: TaskSize) -> float:
        """Example-gradients of one task: of its inner steps, and of its query set."""
        kept = steps if self.last is None else min(self.last, steps)
        again = 0 if self.first_order else (2 if self.last is None and not self.remat else 3) * kept
        return size.batch * (steps + again) + size.query


@dataclasses.dataclass(frozen=True)
class Forward:
    """The exact gradient of the rates by forward mode (Franceschi et al. 2017, section 3.2); the init's is first order.

    Carries one derivative of the params for every learned number instead of the path, so memory does not grow with
    steps; time grows with the number of learned numbers. first_order leaves second derivatives out here too.
    """

    first_order: bool = False

    def __call__(self, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array) -> Direction:
        flat, restore = ravel_pytree(meta.rates)
        way = Reverse(self.first_order)

        def final(flat: jax.Array) -> Params:
            return adapted(problem, MetaParams(meta.init, restore(flat)), episode, key, way)

        push = jax.vmap(lambda one: jax.jvp(final, (flat,), (one,)), out_axes=(None, 0))
        fast, changes = push(jnp.eye(flat.size, dtype=flat.dtype))
        (_, metrics), query = jax.value_and_grad(lambda p: on_query(problem, p, episode), has_aux=True)(fast)
        each = jax.tree.map(lambda change, g: change.reshape(flat.size, -1) @ g.reshape(-1), changes, query)
        return MetaParams(query, restore(jnp.stack(jax.tree.leaves(each)).sum(0))), metrics

    def cost(self, steps: int, size: TaskSize) -> float:
        """As of Reverse."""
        return size.batch * steps * (1 if self.first_order else 2 * size.numbers + 1) + size.query


@dataclasses.dataclass(frozen=True)
class Evolution:
    """The gradient of the rates by evolution strategies, from losses alone; the init gets zeros: it does not learn.

    Rates are moved by Gaussian noise, to either side, and each moved set fine-tunes the task. The estimate is the mean
    of (loss of one side - loss of the other) * noise / (2 size^2): the gradient of the loss smoothed by that noise
    (antithetic pairs: Salimans et al. 2017, section 2; Vicol et al. 2021, section 2). No derivative goes through a
    fine-tune, so memory does not grow with steps. Each is a whole one, so nothing is biased by truncation, and nothing
    is carried from one outer step to the next, as persistent evolution strategies do.
    Its error grows with the square root of learned numbers / (pairs * tasks). Metrics are means over the moved rates;
    one fine-tune that is not finite makes the estimate not finite.

    Attributes:
      pairs: of fine-tunes, for each task.
      size: standard deviation of the noise on raw rates: 0.1 moves a positive rate by about 10 %. (Signed rates are
        their own raw form, and it would be far too large for them.)
    """

    pairs: int = 4
    size: float = 0.1

    def __call__(self, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array) -> Direction:
        flat, restore = ravel_pytree(meta.rates)
        own = jax.random.fold_in(key, NOISE)
        noise = self.size * jax.random.normal(own, (self.pairs, flat.size), flat.dtype)

        def of_moved(change: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            moved = meta._replace(rates=restore(flat + change))
            return on_query(problem, adapted(problem, moved, episode, key), episode)

        # One after the other: side by side, a CPU took 1.8 times as long for an mlp.
        losses, metrics = jax.lax.map(of_moved, jnp.concatenate([noise, -noise]))
        up, down = losses[: self.pairs], losses[self.pairs :]
        estimate = ((up - down) @ noise / (2 * self.size**2 * self.pairs)).astype(flat.dtype)
        return MetaParams(jax.tree.map(jnp.zeros_like, meta.init), restore(estimate)), jax.tree.map(
            lambda each: each.mean(0), metrics
        )

    def cost(self, steps: int, size: TaskSize) -> float:
        """As of Reverse. Of the query set each fine-tune takes a forward pass, a third of a gradient."""
        return 2 * self.pairs * (size.batch * steps + size.query / 3)


@dataclasses.dataclass(frozen=True)
class Reptile:
    """The direction init - adapted (Nichol et al. 2018, algorithm 2); rates get zeros: they do not learn."""

    def __call__(self, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array) -> Direction:
        fast = adapted(problem, meta, episode, key)
        _, metrics = on_query(problem, fast, episode)
        return _of_init(jax.tree.map(jnp.subtract, meta.init, fast), meta), metrics

    def cost(self, steps: int, size: TaskSize) -> float:
        """As of Reverse."""
        return size.batch * steps + size.query


@dataclasses.dataclass(frozen=True)
class Joint:
    """The init's own gradient on all of the task's examples, with no inner loop: ordinary pre-training on many tasks.

    The baseline that says what adaptation in training is good for. Metrics are of the query set before any step; rates
    get zeros: they do not learn.
    """

    def __call__(self, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array) -> Direction:
        x, y = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), tuple(episode[:2]), tuple(episode[2:]))
        options = {"key": key} if problem.dropout else {}
        loss, apply = problem.objective.loss, problem.apply
        gradient = jax.grad(lambda p: loss(apply(p, x, **options), y))(meta.init)
        _, metrics = on_query(problem, meta.init, episode)
        return _of_init(gradient, meta), metrics

    def cost(self, steps: int, size: TaskSize) -> float:
        """As of Reverse."""
        return size.support + size.query


@dataclasses.dataclass(frozen=True)
class Implicit:
    """The implicit meta-gradient of iMAML (Rajeswaran et al. 2019, lemma 1 and algorithm 2).

    If adaptation ends in a minimum of support loss + lambda/2 |w - init|^2, the init's gradient is lambda * z with
    (H + lambda) z = query gradient, and H the support loss's Hessian there; solved by `solver_steps` of conjugate
    gradient. Layers that do not adapt get query gradient - H z. Costs no memory for the path that adaptation took.
    Rates get zeros: they do not learn.

    It is right only near a minimum: take enough steps, at a rate that is stable there (16 steps at 0.1, say).
    """

    solver_steps: int = 5

    def __call__(self, problem: Problem, meta: MetaParams, episode: Episode, key: jax.Array) -> Direction:
        spec, loss, apply = problem.spec, problem.objective.loss, problem.apply
        fast = adapted(problem, meta, episode, key)
        (_, metrics), query = jax.value_and_grad(lambda p: on_query(problem, p, episode), has_aux=True)(fast)
        rates = hyperparameters.actual(spec, meta.rates)

        def scaled(tree: Params, by: Callable[[jax.Array], jax.Array | float]) -> Params:
            """Times by(lambda) in layers that adapt, zero elsewhere."""

            def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
                layer = hyperparameters.layer_of(spec, path)
                return jnp.zeros_like(leaf) if layer is None else by(rates[f"proximal:{layer}"]) * leaf

            return jax.tree_util.tree_map_with_path(scale, tree)

        # Reverse over reverse, for the convolution that CPUs use has no forward mode; the Hessian is symmetric.
        _, curved = jax.vjp(jax.grad(lambda p: loss(apply(p, episode.support_x), episode.support_y)), fast)

        def system(v: Params) -> Params:
            return jax.tree.map(jnp.add, scaled(curved(v)[0], lambda _: 1.0), scaled(v, lambda pull: pull))

        target, start = scaled(query, lambda _: 1.0), scaled(query, lambda pull: 1 / pull)
        solved = _conjugate_gradient(system, target, start, self.solver_steps)
        crossed = curved(solved)[0]  # what does not adapt moves what does

        def gradient(path: tuple[Any, ...], q: jax.Array, z: jax.Array, h: jax.Array) -> jax.Array:
            layer = hyperparameters.layer_of(spec, path)
            return q - h if layer is None else rates[f"proximal:{layer}"] * z

        return _of_init(jax.tree_util.tree_map_with_path(gradient, query, solved, crossed), meta), metrics

    def cost(self, steps: int, size: TaskSize) -> float:
        """As of Reverse."""
        return size.batch * steps + 2 * (self.solver_steps + 2) * size.support + size.query


def _conjugate_gradient(system: Callable[[Params], Params], target: Params, start: Params, steps: int) -> Params:
    """Solve system(x) = target, symmetric, from `start`; ends where curvature is not positive, or nothing is left.

    Away from a minimum H + lambda may be indefinite, where plain conjugate gradient blows up (Nocedal & Wright 2006,
    algorithm 7.1).
    """
    b, restore = ravel_pytree(target)
    x = ravel_pytree(start)[0]
    residual = b - ravel_pytree(system(start))[0]
    rounding = jnp.finfo(b.dtype).eps ** 2 * (b @ b)  # beyond it, steps divide zero by zero

    def body(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, direction, going = carry
        along = ravel_pytree(system(restore(direction)))[0]
        square, curvature = residual @ residual, direction @ along
        going = going & (curvature > 1e-6 * (direction @ direction)) & (square > rounding)
        size = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        left = residual - size * along
        turn = jnp.where(going, left @ left / jnp.where(going, square, 1.0), 0.0)
        return x + size * direction, left, left + turn * direction, going

    return restore(jax.lax.fori_loop(0, steps, body, (x, residual, residual, jnp.array(True)))[0])


Method = Reverse | Forward | Evolution | Reptile | Joint | Implicit
