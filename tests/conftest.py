"""What all tests share: the same examples in every run, one thread in each process, and the longest files first."""

import os

from hypothesis import HealthCheck, settings

# Before torch is imported, and for every process that a test starts. The tensors are small and the workers as many as
# the cores: threads would only spin while they wait for each other (14 times the processor's time, in test_grid).
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile(
    "same", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

# The files that take longest, by the processor's time. A worker takes a file whole: one of these at the end would keep
# it busy while the others have nothing left.
LONGEST = ("gloo", "fused", "resume", "laws", "initialize", "peft", "cli", "sharded", "grid", "mutations")


def pytest_collection_modifyitems(items):
    """Put the longest files first; `--no-loadscope-reorder` keeps that order, which xdist would change."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
