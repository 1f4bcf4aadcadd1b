"""A crash at every point where a script writes, flushes, renames or deletes; then it goes on.

Part of the soak: `pytest -m soak`.
"""

import shutil

import pytest
from crashes import CRASHED, Driver
from soak import Task, differences, tasks, write_data

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, driver):
    """Data, masks of it, and a folder of runs that were never touched."""
    folder = tmp_path_factory.mktemp("shared")
    write_data(folder / "data")
    commands = tasks(folder, epochs=1)
    assert driver(folder / "untouched", "infer", *commands["infer"].arguments(folder)) == 0
    (folder / "out").rename(folder / "masks")
    return folder


def crash_everywhere(driver: Driver, task: Task, untouched, folder) -> tuple[int, list[str]]:
    """Return how many crashes there were, and what was wrong after which."""
    untouched.mkdir()  # so that the points are the same ones
    arguments = task.arguments(untouched)
    assert driver(untouched, task.script, *arguments) == 0, driver.stderr
    points, wrong = driver.points, []
    trials = [(n, power) for n, p in enumerate(points, 1) for power in (False, True)[: 1 + p[2]]]
    for n, power in trials:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        where = f"{'power failure' if power else 'crash'} at {n}, {points[n - 1][:2]}: "
        arguments = task.arguments(folder)
        status = driver(folder, task.script, *arguments, crash_at=n, power=power)
        if status != CRASHED:
            wrong.append(f"{where}exit status {status}")
        status = driver(folder, task.script, *arguments, *task.go_on)
        if status:
            wrong.append(f"{where}then exit status {status}: {driver.stderr[-500:]}")
        wrong += [f"{where}{what}" for what in differences(folder, untouched)]
    return len(trials), wrong


@pytest.mark.parametrize("name", ["train", "infer", "render", "preview", "evaluate"])
def test_a_crash_at_any_point_costs_nothing(name, driver, shared, tmp_path, record_property):
    task = tasks(shared, epochs=2)[name]
    count, wrong = crash_everywhere(driver, task, tmp_path / "untouched", tmp_path / "crashed")
    record_property("crashes", count)
    print(f"{name}: {count} crashes")
    assert not wrong, f"{count} crashes, {len(wrong)} wrong:\n" + "\n".join(wrong)
