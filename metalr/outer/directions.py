"""Meta-gradients of one task that are not the plain derivative of its query loss through all inner steps.

Each is a function (apply, spec, meta, episode, key, …) -> (direction shaped like `meta`, measured), where `measured` is
what the objective measures on the query set after adaptation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from metalr import inner
from metalr.inner import descent, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.inner.objective import CROSS_ENTROPY, Objective
from metalr.models import Apply, predict
from metalr.trees import count
from metalr.types import Episode, MetaParams, Params, Rates

Direction = tuple[MetaParams, dict[str, jax.Array]]


def step_of(
    apply: Apply, spec: RatesSpec, rates: Rates, episode: Episode, key: jax.Array | None, **options: Any
) -> tuple[inner.Step, Any]:
    """The inner step of an episode with actual rates, and the function that starts the optimizer's state."""
    optimizer = descent.optimizer(spec, rates)
    x, y = episode.support_x, episode.support_y
    size = spec.minibatch(count(y))
    step = inner.make_step(apply, x, y, optimizer, spec.steps, batch_size=size, key=key, **options)
    return step, optimizer.init


def adapted(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    key: jax.Array | None,
    *,
    dropout: bool = False,
    remat: bool = False,
    last: int | None = None,
    **options: Any,
) -> Params:
    """Params after spec.steps steps from meta.init.

    dropout: whether the model has some; a learned rate replaces it. remat: as in inner.take.
    last: differentiate only that many steps, the last ones (truncated back-propagation, Shaban et al. 2019, section
    2); the ones before move the params as if by a constant, so the init still gets a gradient, of first order.
    """
    stopped = jax.lax.stop_gradient(meta)
    before = 0 if last is None else max(spec.steps - last, 0)

    def steps(meta: MetaParams) -> tuple[inner.Step, Any]:
        rates = hyperparameters.actual(spec, meta.rates)
        drop = hyperparameters.dropout(spec, rates, dropout)
        return step_of(apply, spec, rates, episode, key, dropout=drop, **options)

    step, start = steps(meta)
    carry = meta.init, start(meta.init)
    if before:
        constant_step, start = steps(stopped)
        params, state = inner.take(constant_step, (stopped.init, start(stopped.init)), 0, before)
        moved = jax.tree.map(lambda now, then, init: init + (now - then), params, stopped.init, meta.init)
        carry = moved, jax.lax.stop_gradient(state)
    return inner.take(step, carry, before, spec.steps, remat=remat)[0]


def reptile(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    key: jax.Array,
    *,
    objective: Objective = CROSS_ENTROPY,
    dropout: bool = False,
) -> Direction:
    """The Reptile direction init - adapted (Nichol et al. 2018, algorithm 2); rates get zeros: they do not learn."""
    fast = adapted(apply, spec, meta, episode, key, loss=objective.loss, dropout=dropout)
    direction = jax.tree.map(jnp.subtract, meta.init, fast)
    _, metrics = on_query(apply, fast, episode, objective)
    return _of_init(direction, meta), metrics


def _of_init(direction: Params, meta: MetaParams) -> MetaParams:
    """A direction of the init alone: rates do not learn."""
    return MetaParams(direction, jax.tree.map(jnp.zeros_like, meta.rates))


def on_query(
    apply: Apply, fast: Params, episode: Episode, objective: Objective
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The query loss of adapted params, and all that the objective measures."""
    outputs = predict(apply, fast, episode.support_x, episode.query_x)
    measured = objective.measure(outputs, episode.query_y)
    return measured["loss"], measured


def joint(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    key: jax.Array,
    *,
    objective: Objective = CROSS_ENTROPY,
    dropout: bool = False,
) -> Direction:
    """The init's own gradient on all of the task's images, with no inner loop: ordinary pre-training on many tasks.

    The baseline that says what adaptation in training is good for. Metrics are of the query set before any step; rates
    get zeros: they do not learn.
    """
    x, y = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), tuple(episode[:2]), tuple(episode[2:]))
    options = {"key": key} if dropout else {}
    gradient = jax.grad(lambda p: objective.loss(apply(p, x, **options), y))(meta.init)
    _, metrics = on_query(apply, meta.init, episode, objective)
    return _of_init(gradient, meta), metrics


def implicit(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    key: jax.Array,
    *,
    objective: Objective = CROSS_ENTROPY,
    dropout: bool = False,
    solver_steps: int = 5,
) -> Direction:
    """The implicit meta-gradient of iMAML (Rajeswaran et al. 2019, lemma 1 and algorithm 2).

    If adaptation ends in a minimum of support loss + lambda/2 |w - init|^2, the init's gradient is lambda * z with
    (H + lambda) z = query gradient, and H the support loss's Hessian there; solved by `solver_steps` of conjugate
    gradient. Layers that do not adapt get query gradient - H z. Costs no memory for the path that adaptation took.
    Rates get zeros: they do not learn.

    It is right only near a minimum: take enough steps, at a rate that is stable there (16 steps at 0.1, say).
    """
    fast = adapted(apply, spec, meta, episode, key, loss=objective.loss, dropout=dropout)
    (_, metrics), query = jax.value_and_grad(lambda p: on_query(apply, p, episode, objective), has_aux=True)(fast)
    rates = hyperparameters.actual(spec, meta.rates)

    def scaled(tree: Params, by: Callable[[jax.Array], jax.Array | float]) -> Params:
        """Times by(lambda) in layers that adapt, zero elsewhere."""

        def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            layer = hyperparameters.layer_of(spec, path)
            return jnp.zeros_like(leaf) if layer is None else by(rates[f"proximal:{layer}"]) * leaf

        return jax.tree_util.tree_map_with_path(scale, tree)

    # Reverse over reverse, for the convolution that CPUs use has no forward mode; the Hessian is symmetric.
    _, curved = jax.vjp(jax.grad(lambda p: objective.loss(apply(p, episode.support_x), episode.support_y)), fast)

    def system(v: Params) -> Params:
        return jax.tree.map(jnp.add, scaled(curved(v)[0], lambda _: 1.0), scaled(v, lambda pull: pull))

    target, start = scaled(query, lambda _: 1.0), scaled(query, lambda pull: 1 / pull)
    solved = _conjugate_gradient(system, target, start, solver_steps)
    crossed = curved(solved)[0]  # what does not adapt moves what does

    def gradient(path: tuple[Any, ...], q: jax.Array, z: jax.Array, h: jax.Array) -> jax.Array:
        layer = hyperparameters.layer_of(spec, path)
        return q - h if layer is None else rates[f"proximal:{layer}"] * z

    return _of_init(jax.tree_util.tree_map_with_path(gradient, query, solved, crossed), meta), metrics


def _conjugate_gradient(system: Callable[[Params], Params], target: Params, start: Params, steps: int) -> Params:
    """Solve system(x) = target, symmetric, from `start`; ends where curvature is not positive.

    Away from a minimum H + lambda may be indefinite, where plain conjugate gradient blows up (Nocedal & Wright 2006,
    algorithm 7.1).
    """
    b, restore = ravel_pytree(target)
    x = ravel_pytree(start)[0]
    residual = b - ravel_pytree(system(start))[0]

    def body(_: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, direction, going = carry
        along = ravel_pytree(system(restore(direction)))[0]
        square, curvature = residual @ residual, direction @ along
        going = going & (curvature > 1e-6 * (direction @ direction))
        size = jnp.where(going, square / jnp.where(going, curvature, 1.0), 0.0)
        left = residual - size * along
        turn = jnp.where(going, left @ left / jnp.where(going, square, 1.0), 0.0)
        return x + size * direction, left, left + turn * direction, going

    return restore(jax.lax.fori_loop(0, steps, body, (x, residual, residual, jnp.array(True)))[0])


def forward(
    apply: Apply,
    spec: RatesSpec,
    meta: MetaParams,
    episode: Episode,
    key: jax.Array,
    *,
    objective: Objective = CROSS_ENTROPY,
    dropout: bool = False,
    first_order: bool = False,
) -> Direction:
    """The exact gradient of the rates by forward mode (Franceschi et al. 2017, section 3.2); the init's is first order.

    Carries one derivative of the params for every learned number instead of the path, so memory does not grow with
    steps; time grows with the number of learned numbers. first_order leaves second derivatives out here too.
    """
    flat, restore = ravel_pytree(meta.rates)

    def final(flat: jax.Array) -> Params:
        options: dict[str, Any] = {"loss": objective.loss, "dropout": dropout, "first_order": first_order}
        return adapted(apply, spec, MetaParams(meta.init, restore(flat)), episode, key, **options)

    push = jax.vmap(lambda one: jax.jvp(final, (flat,), (one,)), out_axes=(None, 0))
    fast, changes = push(jnp.eye(flat.size, dtype=flat.dtype))
    (_, metrics), query = jax.value_and_grad(lambda p: on_query(apply, p, episode, objective), has_aux=True)(fast)
    each = jax.tree.map(lambda change, g: change.reshape(flat.size, -1) @ g.reshape(-1), changes, query)
    return MetaParams(query, restore(jnp.stack(jax.tree.leaves(each)).sum(0))), metrics


DIRECTIONS = {"joint": joint, "reptile": reptile, "implicit": implicit, "forward": forward}
