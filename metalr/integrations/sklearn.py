"""What was learned as scikit-learn estimators: `fit` fine-tunes on one task; `from_tasks` meta-trains on many."""

from __future__ import annotations

import dataclasses
import json
import numbers
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from metalr import data, models, outer
from metalr import learner as learners
from metalr.config import EvaluationConfig, OuterConfig
from metalr.errors import ConfigError, DataError
from metalr.inner import OBJECTIVES, hyperparameters
from metalr.inner.hyperparameters import RatesSpec
from metalr.learner import Learner
from metalr.runs import meta_train
from metalr.runs.progress import ConsoleReporter
from metalr.storage import folders
from metalr.tasks import Standardisation, Tasks
from metalr.trees import check_digits, columns_of

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, check_random_state, validate_data
except ImportError as error:
    raise ConfigError("metalr.sklearn: expected scikit-learn; pip install 'metalr[sklearn]'") from error

PLAIN_STEPS, PLAIN_RATE = 200, 1e-2  # of a network that nothing was learned for: Adam on all rows
PARAMS, FACTS = "params.safetensors", "estimator.json"
FILES = {PARAMS, FACTS, "artifact"}


class _MetaEstimator(BaseEstimator):
    """What both estimators have in common; see MetaClassifier."""

    _objective: str

    def __init__(
        self,
        learned: str | Path | Learner | None = None,
        *,
        steps: int | None = None,
        hidden: tuple[int, ...] = (64,),
        random_state: Any = 0,
    ) -> None:
        self.learned = learned
        self.steps = steps
        self.hidden = hidden
        self.random_state = random_state

    @classmethod
    def from_tasks(
        cls,
        X: Any,
        y: Any,
        task: Any,
        *,
        out: str | Path,
        hidden: tuple[int, ...] = (64,),
        shot: int = 10,
        query: int = 10,
        steps: int = 5,
        outer_steps: int = 1000,
        meta_batch: int = 8,
        random_state: Any = 0,
        quiet: bool = True,
    ) -> Self:
        """Meta-train on the rows of many tasks; an estimator that is not fitted yet, for one new task.

        Inputs (and targets that are numbers) are standardised by the tasks of meta-training.

        Args:
          X: [rows, features] numbers. y: [rows], classes 0..n-1 or numbers.
          task: [rows] which task a row is of. Whole tasks are held out to validate, and to test: see results.json in
            `out`.
          out: the run folder, which the estimator points to; a finished one of the same settings is taken as it is.
          hidden: hidden layers of the network.
          shot, query: rows of a support set and of a query set.
          steps: inner steps that are trained.
          outer_steps, meta_batch: how long meta-training is: meta-updates, and tasks in each.
          random_state: an integer, or as scikit-learn has it: None and a RandomState draw one, and then a run in `out`
            is never the same again.

        Raises MetalrError as `metalr.meta_train` does.
        """
        if not isinstance(random_state, numbers.Integral):
            random_state = check_random_state(random_state).randint(2**31 - 1)
        if not isinstance(out, (str, Path)):
            raise ConfigError(f"out: expected the path of a run folder, got {out!r:.80}")
        names = {name: columns_of(given).get("") for name, given in (("features", X), ("targets", y))}
        X, y = check_array(X, dtype=np.float64), np.asarray(y)  # Tasks say what float32 cannot tell apart
        classes = cls._objective == "cross_entropy"
        if classes:
            _check_class_numbers(y)
        tasks = Tasks.from_arrays(
            X, y.astype(np.int32) if classes else _columns(y), task, shot=shot, query=query,
            standardise="inputs" if classes else "both", name=Path(out).name,
        )  # fmt: skip
        # Of DataFrames: the columns of other tasks have to be in this order.
        known = {name: found for name, found in names.items() if found is not None}
        tasks = dataclasses.replace(tasks, facts={**tasks.facts, **known})
        outputs = int(y.max()) + 1 if classes else _columns(y).shape[1]
        model = models.mlp(outputs, (X.shape[1],), widths=tuple(hidden))
        every = max(1, min(250, outer_steps // 10))
        meta_train(
            tasks, model, objective=cls._objective, steps=steps, outer_steps=outer_steps, meta_batch=meta_batch,
            seed=random_state, out=out, resume=True, reporter=ConsoleReporter(quiet=quiet),
            outer=OuterConfig(validate_every=every, checkpoint_every=every),
            evaluation=EvaluationConfig(episodes=100, validation_episodes=50),
        )  # fmt: skip
        return cls(learned=str(out))

    def _begin(self, X: np.ndarray, y: np.ndarray, outputs: int) -> Learner:
        """What fine-tunes: the learner of `learned`, or for none an ordinary network from a random init."""
        if self.learned is not None:
            found = self.learned if isinstance(self.learned, Learner) else learners.load(self.learned)
            if found.objective.name != self._objective:
                raise ConfigError(
                    f"learned: expected one of {self._objective} for a {type(self).__name__}, got {self.learned}, "
                    f"which is of {found.objective.name}"
                )
            if found.model.input_shape != X.shape[1:]:
                shape = found.model.input_shape
                raise DataError(f"X: expected rows of shape {shape}, as in {self.learned}, got {X.shape[1:]}")
            known, names = found.facts.get("features"), getattr(self, "feature_names_in_", None)
            if known is not None and names is not None and [str(name) for name in names] != known:
                raise DataError(f"X: expected the columns {known}, in this order, got {[str(name) for name in names]}")
            if self._objective != "cross_entropy" and found.model.way not in (None, outputs):
                raise ConfigError(
                    f"y: expected {found.model.way} columns, as {self.learned} was learned for, got {outputs}"
                )
            ways = found.model.way if found.model.of_way is None else None
            if self._objective == "cross_entropy" and ways is not None and outputs > ways:
                raise ConfigError(
                    f"y: expected at most {ways} classes, as {self.learned} was learned for, got {outputs}"
                )
            return found
        if not isinstance(self.hidden, (tuple, list)):
            raise ConfigError(f"hidden: expected a tuple of widths, such as (64,), got {self.hidden!r}")
        model = models.mlp(outputs, X.shape[1:], widths=tuple(self.hidden))
        spec = RatesSpec("shared", steps=PLAIN_STEPS, initial=PLAIN_RATE, base="adam", head=model.head)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        meta = outer.initial(model, spec, jax.random.key(seed))
        choice = "inputs" if self._objective == "cross_entropy" else "both"
        return Learner(
            model, spec, meta.init, hyperparameters.actual(spec, meta.rates), {"learned_rates": False},
            OBJECTIVES[self._objective], Standardisation.of(X, y, choice),
        )  # fmt: skip

    def _float32(self, X: Any, *y: Any, **options: Any) -> Any:
        """What scikit-learn's validate_data gives, with X as float32. Raises DataError where that loses digits."""
        found = validate_data(self, X, *y, dtype=np.float64, **options)
        rows = found[0] if y else found
        check_digits(rows, "X")
        return (rows.astype(np.float32), *found[1:]) if y else rows.astype(np.float32)

    def _adapt(self, learner: Learner, X: np.ndarray, y: np.ndarray, init: Any = None) -> None:
        """Sets what was fitted, and nothing where it fails: an earlier fit then stands whole."""
        self.params_ = jax.tree.map(np.asarray, learner.adapt(X, y, self.steps, init=init))
        self.n_iter_ = learner.spec.steps if self.steps is None else self.steps
        self.learner_ = learner

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "params_")

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = self._float32(X, reset=False)
        with jax.enable_x64(True):  # a row's prediction does not depend on the others', to scikit-learn's 1e-9
            params = jax.tree.map(lambda v: np.asarray(v, np.float64), self.params_)
            return np.asarray(self.learner_.apply(params, X.astype(np.float64)))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a fitted estimator to a folder, as safetensors and JSON: nothing is pickled. `load` reads it.

        One that was made from `learned` keeps a copy of that artifact.

        Raises ConfigError for a folder that is not empty (overwrite replaces an estimator that was saved there, and
        nothing else), StorageError if it cannot be written.
        """
        check_is_fitted(self)
        path = Path(path)
        folders.check_replaceable("path", path, FILES, what="an estimator's", marker=FACTS, overwrite=overwrite)
        settings = {
            "learned": None if self.learned is None else "artifact",  # the copy, of a path or a Learner
            "steps": None if self.steps is None else int(self.steps),
            "hidden": [int(width) for width in self.hidden],
            "random_state": int(self.random_state) if isinstance(self.random_state, numbers.Integral) else None,
        }
        facts = {"estimator": type(self).__name__, "n_features_in_": self.n_features_in_, "n_iter_": int(self.n_iter_)}
        if hasattr(self, "feature_names_in_"):
            facts["feature_names_in_"] = [str(name) for name in self.feature_names_in_]
        content = json.dumps({**facts, "settings": settings, **self._more()}, indent=1).encode()

        def fill(folder: Path) -> None:
            learners.save(folder / "artifact", self.learner_)
            self.learner_.save_params(folder / PARAMS, self.params_)
            folders.write_file(folder / FACTS, content)

        folders.make(path.parent, parents=True)
        folders.build_folder(path, fill)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A fitted estimator that `save` wrote. Raises ConfigError for another folder, ArtifactError if damaged."""
        path = Path(path)
        try:
            facts = json.loads((path / FACTS).read_text())
            settings = dict(facts["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: expected a folder that save() wrote, found none") from error
        if facts["estimator"] != cls.__name__:
            raise ConfigError(f"{path}: expected a {cls.__name__}, found a {facts['estimator']}")
        if settings["learned"] is not None:
            settings["learned"] = str(path / "artifact")  # the copy, wherever the first one is now
        made = cls(**settings | {"hidden": tuple(settings["hidden"])})
        made.learner_ = learners.load(path / "artifact")
        made.params_ = jax.tree.map(np.asarray, made.learner_.load_params(path / PARAMS))
        made.n_features_in_, made.n_iter_ = facts["n_features_in_"], facts["n_iter_"]
        if "feature_names_in_" in facts:
            made.feature_names_in_ = np.array(facts["feature_names_in_"], dtype=object)
        made._take(facts)
        return made

    def _more(self) -> dict[str, Any]:
        raise NotImplementedError

    def _take(self, facts: dict[str, Any]) -> None:
        raise NotImplementedError


class MetaClassifier(ClassifierMixin, _MetaEstimator):
    """A small network for the rows of one task, fine-tuned from a learned init with learned rates.

    Parameters:
      learned: a run or artifact folder of rows and classes (`from_tasks`, `metalr.meta_train`, or `metalr train` with a
        table), or a `metalr.Learner`. None: nothing was learned; a random init and Adam with 0.01, an ordinary network.
      steps: inner steps; default: as many as were trained (None learned: 200).
      hidden: hidden layers where nothing was learned.
      random_state: of the random init where nothing was learned.

    Attributes:
      `classes_`: as in y, in the order of the columns of predict_proba; `outputs_`: the network's output for each.
      `params_`: the fine-tuned params.
      `learner_`: what fine-tuned them.
      `n_iter_`: inner steps.
    """

    _objective = "cross_entropy"

    def fit(self, X: Any, y: Any) -> Self:
        """Fine-tune on the rows of one task. X: [rows, features]; y: [rows] classes of any kind.

        With `learned` from a table, classes are those of its target's column. With another one, whole numbers that are
        those of its outputs (0 to its classes - 1) mean those outputs, as in meta-training; other classes are numbered
        in their order.

        Raises ConfigError (a ValueError) for more classes than were learned for, for one that the table did not have,
        and for one class.
        """
        X, y = self._float32(X, y)
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ConfigError(f"y: expected 2 classes or more, got one class: {classes.tolist()}")
        learner = self._begin(X, labels, len(classes))
        outputs = self._numbered(learner, classes)
        self._adapt(learner, X, outputs[labels])
        self.classes_, self.outputs_ = classes, outputs
        return self

    def _numbered(self, learner: Learner, classes: np.ndarray) -> np.ndarray:
        """The output of each class: [classes] int32. Raises ConfigError for one that a table did not have."""
        kept = self.learned is not None and learner.model.of_way is None
        of_table = learner.facts.get("table", {}).get("classes")
        if kept and of_table:
            return np.array([data.output_of(value, of_table, "y") for value in classes.tolist()], np.int32)
        whole = classes.dtype.kind in "iu" or (  # pandas has integers as floats, once some were missing
            classes.dtype.kind == "f" and bool((classes == np.round(classes)).all())
        )
        if kept and whole and classes[0] >= 0 and classes[-1] < (learner.model.way or 0):
            return classes.astype(np.int32)
        return np.arange(len(classes), dtype=np.int32)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Go on fine-tuning from the params so far. classes: all classes, at the first call.

        Raises ConfigError for a learner whose output layer is made for each fine-tune (inner.head_start).
        """
        first = not hasattr(self, "params_")
        X, y = self._float32(X, y, reset=first)
        check_classification_targets(y)
        if first:
            if classes is None:
                raise ConfigError("classes: expected all classes at the first call of partial_fit, got None")
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ConfigError(
                f"classes: expected {self.classes_.tolist()} as before, got {np.unique(classes).tolist()}"
            )
        known = np.unique(classes) if first else self.classes_
        unknown = np.setdiff1d(y, known)
        if len(unknown):
            raise ConfigError(f"y: expected some of the classes {known.tolist()}, got {unknown.tolist()}")
        labels = np.searchsorted(known, y)
        learner = self._begin(X, labels, len(known)) if first else self.learner_
        if learner.model.of_way is not None:
            raise ConfigError(
                f"learned: expected a learned output layer, which partial_fit goes on from, got {self.learned}, whose "
                "output layer is made anew for each fine-tune (inner.head_start); call fit with all rows"
            )
        outputs = self._numbered(learner, known) if first else self.outputs_
        self._adapt(learner, X, outputs[labels], None if first else self.params_)
        self.classes_, self.outputs_ = known, outputs
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits [rows, classes]; of two classes the second's less the first's, [rows]."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def _logits(self, X: Any) -> np.ndarray:
        return self._outputs(X)[:, self.outputs_]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [rows, classes], of the classes that were shown."""
        logits = self._logits(X).astype(np.float64)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """Classes [rows]."""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]

    def _more(self) -> dict[str, Any]:
        named = {"classes_": self.classes_.tolist(), "dtype": str(self.classes_.dtype)}
        return named | {"outputs_": self.outputs_.tolist()}

    def _take(self, facts: dict[str, Any]) -> None:
        self.classes_ = np.array(facts["classes_"], np.dtype(facts["dtype"]))
        older = range(len(self.classes_))
        self.outputs_ = np.array(facts.get("outputs_", older), np.int32)


class MetaRegressor(MultiOutputMixin, RegressorMixin, _MetaEstimator):
    """As MetaClassifier, for numbers: y [rows], or [rows, outputs]. `learned` is a folder of squared_error."""

    _objective = "squared_error"

    def fit(self, X: Any, y: Any) -> Self:
        """Fine-tune on the rows of one task. X: [rows, features]; y: [rows] or [rows, outputs] numbers."""
        names = columns_of(y)
        X, y = self._float32(X, y, multi_output=True, y_numeric=True)
        learner = self._begin(X, _columns(y), _columns(y).shape[1])
        known = learner.facts.get("targets")
        if names and known is not None and names[""] != known:
            raise DataError(f"y: expected the columns {known}, in this order, got {names['']}")
        self._adapt(learner, X, _columns(y))
        self._one_column = y.ndim == 1
        return self

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Go on fine-tuning from the params so far."""
        if not hasattr(self, "params_"):
            return self.fit(X, y)
        X, y = self._float32(X, y, multi_output=True, y_numeric=True, reset=False)
        self._adapt(self.learner_, X, _columns(y), self.params_)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers, in the shape that y had."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._one_column else outputs

    def _more(self) -> dict[str, Any]:
        return {"one_column": self._one_column}

    def _take(self, facts: dict[str, Any]) -> None:
        self._one_column = facts["one_column"]


def _columns(y: Any) -> np.ndarray:
    """Targets as [rows, outputs] float32."""
    y = np.asarray(y, np.float32)
    return y[:, None] if y.ndim == 1 else y


def _check_class_numbers(y: np.ndarray) -> None:
    found = np.unique(y)
    if not np.issubdtype(y.dtype, np.integer) or found[0] != 0 or found[-1] != len(found) - 1:
        raise DataError(f"y: expected classes 0..n-1 that mean the same in all tasks, got {found[:5].tolist()}")
