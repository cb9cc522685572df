"""Faults of files: damage, hostile artifacts, fuzzing. See faults.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fault_trials import SEED, Failed, Row, count, expect

import metalr
from metalr import models, outer
from metalr.errors import ArtifactError, MetalrError
from metalr.inner import hyperparameters
from metalr.storage import checkpoints


def small_learner() -> metalr.Learner:
    model, spec = models.mlp(3, (8, 8, 1), widths=(6,), dropout=0.0), hyperparameters.RatesSpec("layer", steps=3)
    meta = outer.initial(model, spec, jax.random.key(0))
    return metalr.Learner(model, spec, meta.init, hyperparameters.actual(spec, meta.rates), {"seed": 0})


def damaged_files(root: Path, flips: int, cuts: int) -> list[Row]:
    """Bit flips and truncations in an artifact and a checkpoint; peers: the same in the files of other tools."""
    rng = random.Random(SEED + 3)
    artifact = metalr.save(root / "artifact", small_learner())
    tree = {"w": np.arange(1000, dtype=np.float32)}
    (root / "checkpoints").mkdir()
    step = checkpoints.save(root / "checkpoints", 1, tree, {})
    targets = [(artifact, name) for name in ("learner.safetensors", "metalr.json", "README.md")]
    targets += [(step, name) for name in (checkpoints.TENSORS, checkpoints.MANIFEST)]

    def read(folder: Path) -> Any:
        return metalr.load(folder) if folder == artifact else checkpoints.load(folder.parent, tree, lambda line: None)

    def damage(kind: str) -> None:
        folder, name = rng.choice(targets)
        whole = (folder / name).read_bytes()
        at = rng.randrange(len(whole))
        (folder / name).write_bytes(flip(whole, at, rng) if kind == "flip" else whole[:at])
        try:
            read(folder)
        except ArtifactError as error:
            expect(name in str(error) or folder.name in str(error), f"does not name the file: {error}")
        else:
            raise Failed(f"{name}: loaded, damaged at byte {at}")
        finally:
            (folder / name).write_bytes(whole)

    rows = [
        count("bit flip in an artifact or checkpoint", [lambda: damage("flip")] * flips),
        count("truncation of an artifact or checkpoint", [lambda: damage("cut")] * cuts),
    ]
    return [row | peers(root, kind, row["n"]) for row, kind in zip(rows, ("flip", "cut"), strict=True)]


def flip(whole: bytes, at: int, rng: random.Random) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]


def peers(root: Path, kind: str, n: int) -> Row:
    """How often safetensors, numpy.savez and Orbax give back damaged values as if nothing were wrong."""
    import orbax.checkpoint as ocp
    from safetensors.numpy import load_file, save_file

    rng, w = random.Random(SEED + 4), np.arange(1000, dtype=np.float32)
    folder = root / f"peers-{kind}"
    folder.mkdir()
    save_file({"w": w}, folder / "a.safetensors")
    np.savez(folder / "a.npz", w=w)
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(folder / "orbax", {"w": w})
    data = max(
        (p for p in (folder / "orbax").rglob("*") if p.is_file() and "/d/" in str(p)), key=lambda p: p.stat().st_size
    )
    systems: dict[str, tuple[Path, Callable[[], np.ndarray]]] = {
        "safetensors": (folder / "a.safetensors", lambda: load_file(folder / "a.safetensors")["w"]),
        "numpy.savez": (folder / "a.npz", lambda: np.load(folder / "a.npz")["w"]),
        "orbax": (data, lambda: np.asarray(checkpointer.restore(folder / "orbax")["w"])),
    }
    failures = {}
    for name, (file, read) in systems.items():
        tries, whole, silent = n if name != "orbax" else min(n, 100), file.read_bytes(), 0
        for _ in range(tries):
            at = rng.randrange(len(whole))
            file.write_bytes(flip(whole, at, rng) if kind == "flip" else whole[:at])
            with contextlib.suppress(Exception):
                silent += not np.array_equal(read(), w)
        file.write_bytes(whole)
        failures[name] = f"{silent} of {tries}"
    return {"peer": "values given back wrong, with no error", "peer_failures": failures}


def specimens() -> dict[str, Callable[[Path], None]]:
    """Hostile artifacts: each changes a good one in place. Facts are sealed again, so that no hash gives them away."""

    def facts(change: Callable[[dict], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            found = json.loads((path / "metalr.json").read_text())
            change(found)
            reseal(path, found)

        return apply

    def tensors(content: bytes) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            (path / "learner.safetensors").write_bytes(content)
            facts(lambda f: f["files"].update({"learner.safetensors": hash_of(content)}))(path)

        return apply

    def link(name: str, target: str) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            (path / name).unlink()
            (path / name).symlink_to(target)

        return apply

    def replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            (path / name).unlink()
            make(path / name)

        return apply

    def sparse(file: Path) -> None:
        with file.open("wb") as opened:
            opened.truncate(1 << 40)

    header = lambda text, rest=b"": len(text).to_bytes(8, "little") + text + rest  # noqa: E731
    entry = b'{"init/dense_0/kernel":{"dtype":"F32","shape":[64,6],"data_offsets":[0,%d]}}'
    deep = "[" * 100_000 + "]" * 100_000
    found = {
        "no pickle: a pickle as tensors": tensors(b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        "empty tensors": tensors(b""),
        "header longer than the file": tensors((1 << 62).to_bytes(8, "little")),
        "header of 100 MB": tensors((10**8).to_bytes(8, "little") + b"{}"),
        "header not JSON": tensors(header(b"{not json")),
        "offsets past the end": tensors(header(entry % (1 << 40))),
        "negative offsets": tensors(header(entry.replace(b"[0,", b"[-8,") % 8)),
        "huge shape": tensors(header(entry.replace(b"[64,6]", b"[4611686018427387904,2]") % 8, bytes(8))),
        "unknown dtype": tensors(header(entry.replace(b"F32", b"X99") % 8, bytes(8))),
        "tensor of another name": tensors(
            header(b'{"../../etc/passwd":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
        ),
        "no tensors": tensors(header(b"{}")),
        "deep JSON header": tensors(header(deep.encode())),
        "tensors are a link": link("learner.safetensors", "/etc/passwd"),
        "manifest is a link": link("metalr.json", "/etc/passwd"),
        "card is a link": link("README.md", "/etc/shadow"),
        "link to a device": link("learner.safetensors", "/dev/zero"),
        "manifest links to a device": link("metalr.json", "/dev/zero"),
        "tensors are a pipe": replaced("learner.safetensors", os.mkfifo),
        "manifest is a pipe": replaced("metalr.json", os.mkfifo),
        "tensors are a folder": replaced("learner.safetensors", Path.mkdir),
        "manifest is a folder": replaced("metalr.json", Path.mkdir),
        "tensors of 1 TB": replaced("learner.safetensors", sparse),
        "manifest of 1 TB": replaced("metalr.json", sparse),
        "card of 1 TB": replaced("README.md", sparse),
        "manifest missing": lambda path: (path / "metalr.json").unlink(),
        "manifest empty": lambda path: (path / "metalr.json").write_bytes(b""),
        "manifest deep": lambda path: (path / "metalr.json").write_text(deep),
        "manifest not UTF-8": lambda path: (path / "metalr.json").write_bytes(b"\xff\xfe{}"),
        "manifest a list": lambda path: (path / "metalr.json").write_text("[]"),
        "manifest with NaN": lambda path: (path / "metalr.json").write_text('{"format": NaN}'),
        "number of a million digits": lambda path: (path / "metalr.json").write_text('{"format": ' + "9" * 10**6 + "}"),
    }
    changes: dict[str, Callable[[dict], Any]] = {
        "newer format": lambda f: f.update(format=99),
        "format as text": lambda f: f.update(format="1"),
        "format negative and model gone": lambda f: f.update(format=-1, model=None),
        "files with a path": lambda f: f.update(files={"../../../etc/passwd": "0" * 64}),
        "files gone": lambda f: f.pop("files"),
        "million layers": lambda f: f["model"].update(name="conv4", settings={"layers": 10**6}),
        "a billion wide": lambda f: f["model"]["settings"].update(widths=[10**9, 10**9]),
        "100,000 widths": lambda f: f["model"]["settings"].update(widths=[8] * 100_000),
        "width as text": lambda f: f["model"]["settings"].update(widths=["6"]),
        "width as a float": lambda f: f["model"]["settings"].update(widths=[6.5]),
        "unknown setting": lambda f: f["model"]["settings"].update(__class__="os.system"),
        "way 0": lambda f: f["model"].update(way=0),
        "way 10^18": lambda f: f["model"].update(way=10**18),
        "negative input shape": lambda f: f["model"].update(input_shape=[-8, 8, 1]),
        "input shape of 5 axes": lambda f: f["model"].update(input_shape=[8, 8, 1, 1, 1]),
        "huge input shape": lambda f: f["model"].update(input_shape=[10**9, 10**9, 1]),
        "model name a path": lambda f: f["model"].update(name="../../evil"),
        "model name not text": lambda f: f["model"].update(name=["mlp"]),
        "rates of 10^9 steps": lambda f: f["rates"].update(steps=10**9, per_step=True),
        "unknown granularity": lambda f: f["rates"].update(granularity="neuron"),
        "infinite initial rate": lambda f: f["rates"].update(initial=float("inf")),
        "rates gone": lambda f: f.pop("rates"),
        "rates a number": lambda f: f.update(rates=3),
        "head elsewhere": lambda f: f["rates"].update(head="nowhere", adapts="head"),
    }
    return found | {name: facts(change) for name, change in changes.items()}


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def reseal(path: Path, facts: dict[str, Any]) -> None:
    facts["sha256"] = hash_of(json.dumps({k: v for k, v in facts.items() if k != "sha256"}, sort_keys=True).encode())
    (path / "metalr.json").write_text(json.dumps(facts))


def hostile(root: Path) -> Row:
    good = metalr.save(root / "good", small_learner())
    metalr.load(good)
    worst = {"milliseconds": 0.0, "extra_mib": 0.0}

    def trial(name: str, change: Callable[[Path], None]) -> None:
        path = root / "hostile"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        change(path)
        times = []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            began = time.perf_counter()
            try:
                metalr.load(path)
            except MetalrError:
                times.append(1e3 * (time.perf_counter() - began))
            else:
                raise Failed(f"{name}: loaded")
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        worst["milliseconds"] = max(worst["milliseconds"], np.median(times))
        worst["extra_mib"] = max(worst["extra_mib"], extra)
        expect(np.median(times) <= 100, f"{name}: {np.median(times):.0f} ms")
        expect(extra <= 64, f"{name}: {extra:.0f} MiB")

    row = count(
        "hostile artifact: refused in 100 ms and 64 MiB", [lambda n=n, c=c: trial(n, c) for n, c in specimens().items()]
    )
    return row | {f"worst_{k}": round(float(v), 1) for k, v in worst.items()}


def fuzz(root: Path, n: int) -> Row:
    """hypothesis: any JSON anywhere in a sealed manifest, any bytes as manifest or tensors; only MetalrError comes."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as hypothesis_seed
    from hypothesis import strategies as st

    good = metalr.save(root / "fuzz-good", small_learner())
    path = root / "fuzz"
    shutil.copytree(good, path)
    facts = json.loads((good / "metalr.json").read_text())
    content = (good / "learner.safetensors").read_bytes()
    places = [("format",), ("model",), ("rates",), ("files",), ("facts",), ("inner_steps",)]
    places += [("model", k) for k in facts["model"]] + [("rates", k) for k in facts["rates"]]
    places += [("model", "settings", k) for k in (*facts["model"]["settings"], "dtype", "cell", "layers")]
    leaf = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.sampled_from(["mlp", "conv4", "rnn", "layer", "head"])
    )
    value = st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=8,
    )
    tried = {"inputs": 0, "loaded": 0}
    reasons: list[str] = []

    def attempt() -> None:
        tried["inputs"] += 1
        try:
            metalr.load(path)
            tried["loaded"] += 1  # a change that does not matter, such as in "facts"
        except MetalrError:
            pass
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}"[:300])

    def of(strategy: Any, share: float) -> Callable[[Callable[[Any], None]], None]:
        def run(body: Callable[[Any], None]) -> None:
            checks = list(HealthCheck)
            hypothesis_seed(SEED)(
                settings(max_examples=int(n * share), database=None, deadline=None, suppress_health_check=checks)(
                    given(strategy)(body)
                )
            )()

        return run

    def manifest(drawn: Any) -> None:
        place, new = drawn
        changed = json.loads(json.dumps(facts))
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = new
        reseal(path, changed)
        attempt()

    def raw_manifest(drawn: bytes) -> None:
        (path / "metalr.json").write_bytes(drawn)
        attempt()

    def raw_tensors(drawn: tuple[int, bytes]) -> None:
        at, new = drawn
        changed = content[: at % len(content)] + new + content[at % len(content) + len(new) :]
        (path / "learner.safetensors").write_bytes(changed)
        sealed_again = json.loads(json.dumps(facts))
        sealed_again["files"]["learner.safetensors"] = hash_of(changed)
        reseal(path, sealed_again)
        attempt()

    of(st.binary(max_size=200), 0.4)(raw_manifest)
    of(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=40)), 0.4)(raw_tensors)
    (path / "learner.safetensors").write_bytes(content)
    of(st.tuples(st.sampled_from(places), value), 0.2)(manifest)
    return {
        "fault": "fuzzed artifacts: only MetalrError",
        "n": tried["inputs"],
        "failures": len(reasons),
        "loaded": tried["loaded"],
        "reasons": reasons[:5],
    }
