"""What does it cost? `python -m benchmarks` (or `make bench`) measures it, beside others' programs."""
