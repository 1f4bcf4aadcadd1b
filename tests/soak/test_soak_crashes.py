"""A crash at every point where a script writes, flushes, renames or deletes; then it goes on.

Part of the soak: `pytest -m soak`.
"""

import shutil

import pytest
from crashes import CRASHED, Driver
from soak import Task, go_on, never_touched, tasks

pytestmark = pytest.mark.soak


def crash_everywhere(driver: Driver, task: Task, untouched, folder) -> tuple[int, list[str]]:
    """Return how many crashes there were, and what was wrong after which."""
    never_touched(driver, task, untouched)
    points, wrong = driver.points, []
    trials = [(n, power) for n, p in enumerate(points, 1) for power in (False, True)[: 1 + p[2]]]
    for n, power in trials:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()  # so that the points are the same ones
        where = f"{'power failure' if power else 'crash'} at {n}, {points[n - 1][:2]}: "
        status = driver(folder, task.script, *task.arguments(folder), crash_at=n, power=power)
        if status != CRASHED:
            wrong.append(f"{where}exit status {status}")
        wrong += [f"{where}{what}" for what in go_on(driver, task, folder, untouched)]
    return len(trials), wrong


@pytest.mark.parametrize("name", ["train", "infer", "render", "preview", "evaluate"])
def test_a_crash_at_any_point_costs_nothing(name, driver, shared, tmp_path, record_property):
    task = tasks(shared, epochs=2)[name]
    count, wrong = crash_everywhere(driver, task, tmp_path / "untouched", tmp_path / "crashed")
    record_property("crashes", count)
    print(f"{name}: {count} crashes")
    assert not wrong, f"{count} crashes, {len(wrong)} wrong:\n" + "\n".join(wrong)
