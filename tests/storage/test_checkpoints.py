"""Checkpoints: exact, refused when damaged, the one before is used; also the seal that artifacts share."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from metalr.errors import ArtifactError, StorageError
from metalr.storage import checkpoints, sealed

TREE = {"state": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(7)}, "best": [np.float32(0.5)]}


def save(folder, step, scale=1.0):
    tree = {"state": {"w": TREE["state"]["w"] * scale, "n": np.int32(step)}, "best": [np.float32(0.5)]}
    return checkpoints.save(folder, step, tree, {"score": 0.1 + 0.2, "step": step})


def load(folder):
    lines = []
    return checkpoints.load(folder, TREE, lines.append), lines


def test_round_trip_is_exact_and_the_newest_two_stay(tmp_path):
    assert load(tmp_path) == (None, [])
    for step in (5, 10, 15):
        save(tmp_path, step, 1 / 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000010", "step_000000015"]
    (tree, facts), lines = load(tmp_path)
    np.testing.assert_array_equal(tree["state"]["w"], TREE["state"]["w"] * (1 / 3))
    assert (int(tree["state"]["n"]), facts, lines) == (15, {"score": 0.1 + 0.2, "step": 15}, [])


def test_a_damaged_one_is_named_and_passed_over(tmp_path):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / checkpoints.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tree, _), lines = load(tmp_path)
    assert int(tree["state"]["n"]) == 1
    assert len(lines) == 1
    assert "step_000000002 is passed over" in lines[0]
    (tmp_path / "step_000000001" / checkpoints.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="no checkpoint is whole"):
        load(tmp_path)


def damage(path):
    file = path / checkpoints.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_one_never_pushes_out_a_whole_one(tmp_path):
    """What stays are the newest whole ones, and a damaged step is written anew when it comes again."""
    save(tmp_path, 250)
    damage(save(tmp_path, 500))
    damage(save(tmp_path, 750))
    (tree, _), _ = load(tmp_path)
    assert int(tree["state"]["n"]) == 250
    save(tmp_path, 500)  # the run goes on from 250
    (tree, _), lines = load(tmp_path)
    assert (int(tree["state"]["n"]), lines) == (500, [])
    damage(tmp_path / "step_000000500")
    save(tmp_path, 750)
    damage(tmp_path / "step_000000750")
    assert int(load(tmp_path)[0][0]["state"]["n"]) == 250


def test_every_flip_and_every_cut_is_refused(tmp_path):
    path = save(tmp_path, 1)
    for name in (checkpoints.TENSORS, checkpoints.MANIFEST):
        whole = (path / name).read_bytes()
        for at in range(0, len(whole), 7):
            for damaged in (whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :], whole[:at]):
                (path / name).write_bytes(damaged)
                with pytest.raises(ArtifactError, match=f"{path.name}.*"):
                    load(tmp_path)
        (path / name).write_bytes(whole)
    assert load(tmp_path)[0] is not None


def test_non_finite_values_are_never_written(tmp_path):
    tree = TREE | {"best": [jnp.float32(jnp.nan)]}
    with pytest.raises(ArtifactError, match=r"state/best/0: expected finite values at step 3, so nothing is written"):
        checkpoints.save(tmp_path, 3, tree, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        save(tmp_path / "vanished", 3)


def test_what_could_not_be_read_back_is_never_written(tmp_path):
    tree = TREE | {"best": [jnp.zeros(2, jnp.bfloat16)]}
    with pytest.raises(ArtifactError, match="state/best/0: expected numbers of a dtype that numpy has, got bfloat16"):
        checkpoints.save(tmp_path, 3, tree, {})
    assert not list(tmp_path.iterdir())


def test_another_structure_is_refused_by_the_first_name(tmp_path):
    save(tmp_path, 1)
    like = TREE | {"best": [np.zeros(2, np.float32)]}
    with pytest.raises(ArtifactError, match=r"state/best/0: expected \(\(2,\).*got \(\(\)"):
        checkpoints.load(tmp_path, like, print)


def test_links_and_pipes_are_not_read(tmp_path):
    path = save(tmp_path, 1)
    file = path / checkpoints.TENSORS
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="expected a regular file"):
        load(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ArtifactError, match="expected a regular file"):
        load(tmp_path)


def test_sizes_are_capped_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "MANIFEST_BYTES", 10)
    save(tmp_path, 1)
    with pytest.raises(ArtifactError, match="expected at most 10 bytes, got"):
        load(tmp_path)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(StorageError, match="step_000000002: cannot be written: No space left.*needed"):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001"]
    assert load(tmp_path)[0] is not None
