"""What was learned, in PyTorch: five adapted steps give JAX's logits. Needs torch (the extra `torch`)."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metalr
from metalr import models, outer
from metalr.errors import ArtifactError, ConfigError
from metalr.inner import hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.tasks import Standardisation

torch = pytest.importorskip("torch")
from metalr.integrations import torch as metalr_torch

NETWORKS = {
    "mlp": lambda: models.mlp(3, (10, 9, 1), widths=(8, 6)),
    "conv4": lambda: models.conv4(3, (10, 9, 2), channels=4, layers=2),
    "conv4 instance": lambda: models.conv4(3, (10, 9, 1), channels=4, layers=2, norm="instance"),
    "gru": lambda: models.rnn(3, (10, 9, 1), width=7),
}
SPECS = {
    "layer": RatesSpec("layer", steps=5, initial=0.3),
    "shared": RatesSpec("shared", steps=5, initial=0.2, momentum=0.5, clip=0.5),
    "tensor and step": RatesSpec("tensor", per_step=True, steps=3, initial=0.3),
    "channel": RatesSpec("channel", steps=5, initial=0.3),
    "parameter, knots": RatesSpec("parameter", knots=3, steps=5, initial=0.3),
    "all": RatesSpec("layer", steps=5, initial=0.3, momentum=0.5, decay=0.05, clip=0.2, proximal=0.1),
    "adam": RatesSpec("layer", steps=5, initial=0.03, base="adam", decay=0.01),
    "horizon": RatesSpec("layer", knots=2, steps=3, initial=0.3, horizon_power=0.5),
    "size": RatesSpec("layer", steps=5, initial=0.3, support_power=0.5, support=4),  # with 9 examples
    "head only": RatesSpec("layer", steps=5, initial=0.3, adapts="head"),
    "signed": RatesSpec("layer", steps=5, initial=0.3, positive=False),
}
Y = np.arange(9, dtype=np.int32) % 3


def learner(model, spec, path):
    meta = outer.initial(model, spec, jax.random.key(0))
    noise = {name: jax.random.normal(jax.random.key(3), v.shape) for name, v in meta.rates.items()}
    raw = {name: v + 0.3 * noise[name] * (abs(v) + 0.1) for name, v in meta.rates.items()}
    learned = metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, raw))
    metalr.save(path, learned)
    return learned


def images(model, count=9, seed=0):
    return np.random.default_rng(seed).random((count, *model.input_shape), np.float32)


def as_torch(x, model):
    """[n, h, w, c] as PyTorch has images; an mlp takes them as they are."""
    return torch.from_numpy(x if model.name == "mlp" else np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(("network", "spec"), [*((n, "all") for n in NETWORKS), *(("mlp", s) for s in SPECS)])
def test_five_steps_give_the_same_logits(network, spec, tmp_path):
    model = NETWORKS[network]()
    learned = learner(model, SPECS[spec], tmp_path / "a")
    x, query = images(model), images(model, 20, 1)
    expected = learned.apply(learned.adapt(x, Y, steps=5), query)
    theirs = metalr_torch.load(tmp_path / "a")
    module = theirs.module()
    np.testing.assert_allclose(module(as_torch(query, model)).detach(), learned.apply(learned.init, query), atol=1e-5)
    support = len(Y) if SPECS[spec].support else None
    optimizer = theirs.optimizer(module, steps=5, support=support)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(as_torch(x, model)), torch.from_numpy(Y).long()).backward()
        optimizer.step()
    np.testing.assert_allclose(module(as_torch(query, model)).detach(), expected, atol=1e-4)


@pytest.mark.parametrize("choice", ["inputs", "both"])
def test_a_table_that_was_standardised(choice, tmp_path):
    """In your own units on both sides, as JAX's adapt and apply."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (50, 4)).astype(np.float32), rng.normal(10, 5, (50, 2)).astype(np.float32)
    model, spec = models.mlp(2, (4,), widths=(8,)), RatesSpec("layer", steps=5, initial=0.1)
    meta = outer.initial(model, spec, jax.random.key(0))
    learned = metalr.Learner(
        model, spec, meta.init, hyperparameters.actual(spec, meta.rates),
        objective=metalr.inner.OBJECTIVES["squared_error"], standardisation=Standardisation.of(x, y, choice),
    )  # fmt: skip
    metalr.save(tmp_path / "a", learned)
    expected = learned.apply(learned.adapt(x[:9], y[:9], steps=5), x)
    theirs = metalr_torch.load(tmp_path / "a")
    module = theirs.module()
    optimizer = theirs.optimizer(module, steps=5)
    own_x, own_y = theirs.inputs(torch.from_numpy(x[:9])), theirs.targets(torch.from_numpy(y[:9]))
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(own_x), own_y).backward()
        optimizer.step()
    found = theirs.outputs(module(theirs.inputs(torch.from_numpy(x)))).detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    whole = np.arange(8).reshape(2, 4)
    np.testing.assert_allclose(
        theirs.inputs(torch.from_numpy(whole)), learned.standardisation.inputs(whole), rtol=1e-5
    )  # integers too


def test_rates_stay_within_their_bounds(tmp_path):
    """Also those of other lengths, as in JAX."""
    model = NETWORKS["mlp"]()
    spec = RatesSpec("layer", steps=100, initial=0.1, lowest=0.01, highest=0.15, knots=2, horizon_power=0.5)
    meta = outer.initial(model, spec, jax.random.key(0))
    metalr.save(tmp_path / "a", metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates)))
    theirs = metalr_torch.load(tmp_path / "a")
    for steps, expected in ((1, 0.15), (100, 0.1), (100_000, 0.01)):
        optimizer = theirs.optimizer(theirs.module(), steps=steps)
        np.testing.assert_allclose([group["lr"] for group in optimizer.param_groups], expected, rtol=1e-5)
    for name, value in (("support", -5), ("support", 0), ("steps", 2.5)):
        with pytest.raises(ConfigError, match=f"{name}: expected an integer of at least 1, got {value}"):
            theirs.optimizer(theirs.module(), **{name: value})


class Own(torch.nn.Module):
    """A module as people write it, with names of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = torch.nn.Linear(90, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


def names(name):
    layer, last = name.split(".")
    return (
        f"{ {'one': 'dense_0', 'two': 'dense_1', 'out': 'head'}[layer] }/{ {'weight': 'kernel', 'bias': 'bias'}[last] }"
    )


@pytest.mark.parametrize("spec", ["layer", "channel", "parameter, knots"])
def test_a_module_of_your_own(spec, tmp_path):
    model = NETWORKS["mlp"]()
    learned = learner(model, SPECS[spec], tmp_path / "a")
    x, query = images(model), images(model, 20, 1)
    theirs, module = metalr_torch.load(tmp_path / "a"), Own()
    module.load_state_dict(theirs.state_dict(module, names))
    optimizer = theirs.optimizer(module, 5, names)
    assert len(optimizer.param_groups) == 6  # a group a tensor
    scheduled = torch.optim.lr_scheduler.LambdaLR  # groups look as any optimizer's do
    assert scheduled(optimizer, lambda _: 1.0).get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(Y).long()).backward()
        optimizer.step()
    expected = learned.apply(learned.adapt(x, Y, steps=5), query)
    np.testing.assert_allclose(module(torch.from_numpy(query)).detach(), expected, atol=1e-4)


@pytest.mark.parametrize("spec", ["all", "horizon"])
def test_a_layer_that_is_like_none_takes_the_mean_of_the_others_as_in_jax(spec, tmp_path):
    learned = learner(NETWORKS["mlp"](), SPECS[spec], tmp_path / "a")
    theirs, module, steps = metalr_torch.load(tmp_path / "a"), Own(), 7
    known = lambda name: None if name.startswith("two") else names(name)  # noqa: E731
    groups = {group["name"]: group for group in theirs.optimizer(module, steps, known, default=0.2).param_groups}
    new = groups["two.weight"]
    for kind in ("momentum", "decay", "clip", "proximal"):
        values = [float(value) for name, value in learned.rates.items() if name.startswith(f"{kind}:")]
        assert (new[kind] is None) == (not values)
        if values:
            assert new[kind] == pytest.approx(np.mean(values), rel=1e-5)
    powers = [np.asarray(value) for name, value in learned.rates.items() if name.startswith("horizon_power:")]
    factor = (learned.spec.steps / steps) ** np.mean(powers, axis=0) if powers else 1.0
    assert new["lr"] == pytest.approx(np.mean(0.2 * factor), rel=1e-5)


def test_an_optimizer_goes_on_from_its_state_dict(tmp_path):
    model = NETWORKS["mlp"]()
    learner(model, SPECS["all"], tmp_path / "a")
    theirs, x = metalr_torch.load(tmp_path / "a"), torch.from_numpy(images(model))

    def steps(module, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), torch.from_numpy(Y).long()).backward()
            optimizer.step()

    whole, cut, again = theirs.module(), theirs.module(), theirs.module()
    steps(whole, theirs.optimizer(whole), 4)
    first = theirs.optimizer(cut)
    steps(cut, first, 2)
    again.load_state_dict(cut.state_dict())
    second = theirs.optimizer(again)
    second.load_state_dict(first.state_dict())
    steps(again, second, 2)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_a_torch_module_are_an_init(tmp_path):
    """Rates are learned for somebody's pre-trained network, which stays what it is."""
    theirs, model = Own(), NETWORKS["mlp"]()
    init = metalr_torch.init_of(theirs, names)
    x = images(model, 5)
    np.testing.assert_allclose(model.apply(init, jnp.asarray(x)), theirs(torch.from_numpy(x)).detach(), atol=1e-5)
    started = models.starting_from(model, init)

    def sample(key):
        x = jax.random.uniform(key, (12, 10, 9, 1))
        y = (x.mean((1, 2, 3)) > 0.5).astype(jnp.int32)
        return metalr.Episode(x[:6], y[:6], x[6:], y[6:])

    from metalr.config import EvaluationConfig, OuterConfig
    from metalr.runs.progress import ConsoleReporter

    learned = metalr.meta_train(
        metalr.Tasks(sample, sample, sample), started, outer_steps=5, steps=2, out=tmp_path / "run",
        outer=OuterConfig(learns="rates", validate_every=5), reporter=ConsoleReporter(quiet=True),
        evaluation=EvaluationConfig(episodes=5, validation_episodes=4, shown_tasks=0),
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, dict(learned.init), init)
    with pytest.raises(ArtifactError, match="holds a custom model"):  # its weights are no random ones
        metalr.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="params: dense_0/bias: expected .*, got none"):
        models.starting_from(model, {"head": init["head"]})


def test_what_does_not_fit_is_refused(tmp_path):
    learner(NETWORKS["mlp"](), SPECS["layer"], tmp_path / "a")
    theirs = metalr_torch.load(tmp_path / "a")
    with pytest.raises(ConfigError, match="one.weight: expected a learned tensor for it"):
        theirs.state_dict(Own())
    module = Own()
    module.one = torch.nn.Linear(90, 5)
    with pytest.raises(ConfigError, match=r"one.weight: expected shape \[8, 90\] for dense_0/kernel, got \[5, 90\]"):
        theirs.state_dict(module, names)
    learner(NETWORKS["mlp"](), dataclasses.replace(SPECS["layer"], predicted=True), tmp_path / "b")
    predicted = metalr_torch.load(tmp_path / "b")
    with pytest.raises(ConfigError, match="expected rates that are not predicted"):
        predicted.optimizer(predicted.module())


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "own_loop.md"
    block = next(b for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "metalr_torch" in b)
    assert len(block.splitlines()) <= 15
    model = NETWORKS["mlp"]()
    learner(model, SPECS["layer"], tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    scope = {"support_x": torch.from_numpy(images(model)), "support_y": torch.from_numpy(Y).long()}
    scope["query_x"] = torch.from_numpy(images(model, 4, 1))
    exec(block, scope)
    assert scope["predicted"].shape == (4,)


def test_loading_imports_no_jax(tmp_path):
    learner(NETWORKS["mlp"](), SPECS["layer"], tmp_path / "a")
    script = (
        "import sys; from metalr.integrations import torch as t; learned = t.load(sys.argv[1]); "
        "learned.optimizer(learned.module()); assert 'jax' not in sys.modules, 'jax'"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=True)
