"""What all tests share: the same examples in every run, and one thread in each process of torch."""

import os

from hypothesis import HealthCheck, settings

# Before torch is imported, and for every process that a test starts. The tensors are small and the workers as many as
# the cores: threads would only spin while they wait for each other (14 times the processor's time, in test_grid).
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile(
    "same", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
