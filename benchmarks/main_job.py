"""Where the main job's time goes: make bench, or python -m benchmarks.main_job [preset]."""

import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

START = time.perf_counter()

import analyses  # noqa: E402 - the import is one of the parts
from analyses import render  # noqa: E402
from mechgrok import pipeline  # noqa: E402
from mechgrok.config import TrainConfig, load_config  # noqa: E402
from mechgrok.plan import component_names, plan_units  # noqa: E402
from mechgrok.store import RunDirectory  # noqa: E402
from mechgrok.tasks import make_split  # noqa: E402
from mechgrok.train import train  # noqa: E402
from mechgrok.types import Study  # noqa: E402

IMPORTS = time.perf_counter() - START


def cpu_seconds() -> float:
    """Of this process and of its workers, those that live and those that have ended."""
    process = psutil.Process()
    own = process.cpu_times()
    living = [own, *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(of.user + of.system for of in living) + own.children_user + own.children_system


@contextmanager
def timed(name: str, rows: list[tuple[str, float, float]]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    yield
    rows.append((name, time.perf_counter() - wall, cpu_seconds() - cpu))


def main(preset: str = "modular-addition") -> None:
    from joblib.externals.loky import get_reusable_executor

    config = load_config(preset)
    assert isinstance(config.train, TrainConfig)
    rows = [("imports", IMPORTS, IMPORTS)]
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.create(Path(folder) / "run", config)
        split = make_split(config.task, config.seed)
        names = component_names(config, split)
        with timed(f"training, {config.train.n_steps} steps", rows):
            trajectory = train(directory, split)
            split = pipeline.with_reference(directory, split, train)
        n_units = sum(map(len, plan_units(config, names, split, trajectory.steps).values()))
        with timed(f"sampling, {n_units} estimates", rows):
            curve = pipeline.follow(directory, trajectory, split, names, None, pipeline.silent, None)
        with timed("stages", rows):
            stages = pipeline.find_stages(curve, config)
        study = Study(config, split, trajectory, curve, stages)
        reports = []
        for name in config.analyses.names:
            with timed(f"analysis {name}", rows):
                reports.append(analyses.run(name, study, os.cpu_count() or 1))
        with timed("report", rows):
            render.to_html(study, reports)
    get_reusable_executor().shutdown(wait=True)  # so that the workers' memory is counted
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f"{preset} on {platform.node()}: {os.cpu_count()} cores, {processor()}")
    print(f"{'part':28} {'seconds':>8} {'CPU seconds':>12}")
    for name, wall, cpu in rows:
        print(f"{name:28} {wall:8.1f} {cpu:12.1f}")
    print(f"largest process: {peak:.2f} GB")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main(*sys.argv[1:])
