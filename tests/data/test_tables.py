"""Tables of one's own: columns, classes and their names, rows without a target, and what is refused."""

import numpy as np
import pytest

from metalr import data
from metalr.errors import ConfigError, DataError

pandas = pytest.importorskip("pandas")
ROWS = {"shop": ["a", "a", "b", "b"], "size": [1, 2, 3, 4], "price": [0.5, 1.5, 2.5, 3.5], "kind": ["x", "y", "x", "y"]}


def written(path, **changes):
    frame = pandas.DataFrame(ROWS | changes)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_numbers_and_classes(tmp_path, suffix):
    path = written(tmp_path / f"t{suffix}")
    table = data.read_table(path, target=["price"], task_column="shop", features=["size"])
    assert (table.features, table.classes, table.task.tolist()) == (("size",), (), ["a", "a", "b", "b"])
    np.testing.assert_array_equal(table.x, np.array([[1], [2], [3], [4]], np.float32))
    np.testing.assert_array_equal(table.y, np.array([0.5, 1.5, 2.5, 3.5], np.float32))
    table = data.read_table(path, target=["kind"], task_column="shop", classes=True)
    assert (table.features, table.classes, table.y.tolist()) == (("size", "price"), ("x", "y"), [0, 1, 0, 1])
    other = written(tmp_path / f"o{suffix}", kind=[1, 2, 3, 4])
    assert data.read_table(other, target=["price", "size"], task_column="shop").y.shape == (4, 2)


def test_rows_without_a_target_are_to_be_predicted(tmp_path):
    path = written(tmp_path / "t.csv", kind=["y", None, "y", None])
    table = data.read_table(
        path, target=["kind"], task_column=None, features=["size"], classes=("x", "y"), may_lack_targets=True
    )
    assert table.y.tolist() == [1, -1, 1, -1]
    empty = written(tmp_path / "e.parquet", kind=["", "y", "x", None])  # "" is a class, and not a missing one
    table = data.read_table(empty, target=["kind"], task_column="shop", classes=True, may_lack_targets=True)
    assert (table.classes, table.y.tolist()) == (("", "x", "y"), [0, 2, 1, -1])
    numbers = written(tmp_path / "n.csv", price=[0.5, None, 1.0, None])
    table = data.read_table(numbers, target=["price"], task_column=None, features=["size"], may_lack_targets=True)
    assert np.isnan(table.y).tolist() == [False, True, False, True]
    whole = written(tmp_path / "i.csv", kind=[7, None, 9, None])  # pandas reads integers beside gaps as floats
    table = data.read_table(
        whole, target=["kind"], task_column=None, features=["size"], classes=("7", "9"), may_lack_targets=True
    )
    assert table.y.tolist() == [0, -1, 1, -1]


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"task_column": "store"}, ConfigError, r"data.task_column: expected columns of t.csv, .* no 'store'"),
        ({}, {"target": ["cost"]}, ConfigError, "data.target: expected columns of t.csv"),
        ({}, {"target": []}, ConfigError, "data.target: expected one or more columns"),
        ({}, {"target": ["shop"]}, ConfigError, "neither the task's nor features"),
        ({}, {"features": ["kind"]}, DataError, "column 'kind': expected numbers, got .* such as 'x'"),
        ({}, {"target": ["price", "price"]}, ConfigError, "data.target: expected every column once"),
        ({}, {"features": ["size", "size"]}, ConfigError, "data.features: expected every column once"),
        ({"size": [1, None, 3, 4]}, {}, DataError, "column 'size': expected a number in every row, row 2 has none"),
        ({"price": [1, None, 3, 4]}, {}, DataError, "column 'price': expected a number in every row, row 2 has none"),
        ({"shop": ["a", None, "b", "b"]}, {}, DataError, "expected a task in every row"),
        (
            {"kind": ["x", None, "x", "y"]},
            {"target": ["kind"], "classes": True},
            DataError,
            "a class in every row, row 2",
        ),
        ({}, {"target": ["price"], "classes": True}, DataError, "got numbers such as 0.5; for numbers: --objective"),
        ({}, {"target": ["kind"], "classes": ("x", "z")}, DataError, r"one of the classes \['x', 'z'\], got 'y'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, options, error, message):
    path = written(tmp_path / "t.csv", **changes)
    settings = {"target": ["price"], "task_column": "shop", "features": ["size"]} | options
    with pytest.raises(error, match=message):
        data.read_table(path, **settings)


def test_times_are_no_classes(tmp_path):
    path = written(tmp_path / "t.parquet", kind=pandas.date_range("2024", periods=4))
    with pytest.raises(DataError, match="expected classes in 'kind', got times such as 2024-01-01"):
        data.read_table(path, target=["kind"], task_column="shop", features=["size"], classes=True)


def test_a_file_without_some_targets_is_to_be_predicted(tmp_path):
    path = written(tmp_path / "t.csv")
    options = {"target": ["price", "cost"], "task_column": None, "features": ["size"]}
    table = data.read_table(path, **options, may_lack_targets=True)
    assert np.isnan(table.y).tolist() == [[False, True]] * 4
    with pytest.raises(ConfigError, match="data.target: expected columns of t.csv"):
        data.read_table(path, **options)
    (tmp_path / "head.csv").write_text("shop,size,price\n")
    with pytest.raises(DataError, match="expected rows, got none"):
        data.read_table(tmp_path / "head.csv", target=["price"], task_column="shop")


def test_no_table_is_told_from_a_damaged_one(tmp_path):
    for name, content, message in (
        ("n.csv", None, "no such file"),
        ("e.csv", b"", "not a table"),
        ("d.parquet", b"x", "not a"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            data.read_table(tmp_path / name, target=["a"], task_column=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shop,size,size,price\na,1,2,3\n", "names of columns that differ, got 'size' twice"),
        ("shop,size,price,price\na,1,2,3\n", "names of columns that differ, got 'price' twice"),
        ("shop,size,price\na,1,2,\nb,3,4,\n", "a value for each of 3 names in its first line, got more"),
        ("shop,size,price\na,1,inf\n", "column 'price': expected a number in every row, row 1 has an infinite one"),
    ],
)
def test_files_whose_columns_would_be_mixed_up_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        data.read_table(tmp_path / "t.csv", target=["price"], task_column="shop", may_lack_targets=True)


def test_task_ids_that_are_one_number_are_the_tasks_that_they_are_written_as(tmp_path):
    rows = zip(["007", "07", "7", "8"], range(4), range(4), strict=True)
    (tmp_path / "t.csv").write_text("size,shop,price\n" + "".join(f"{size},{shop},{p}\n" for shop, size, p in rows))
    read = {"target": ["price"], "task_column": "shop"}
    assert data.read_table(tmp_path / "t.csv", **read).task.tolist() == ["007", "07", "7", "8"]
    plain = written(tmp_path / "n.csv", shop=[7, 7, 8, 8])
    table = data.read_table(plain, target=["price"], task_column="shop", features=["size"])
    assert (table.task.dtype.kind, table.task.tolist()) == ("i", [7, 7, 8, 8])
    (tmp_path / "c.csv").write_text("size,shop\n1,01\n2,1\n3,2\n")
    with pytest.raises(DataError, match="one spelling of each class in 'shop', got '01' and '1'"):
        data.read_table(tmp_path / "c.csv", target=["shop"], task_column=None, classes=True)
