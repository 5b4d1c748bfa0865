"""benchmarks/clip.py runs where little is installed, as on a lent GPU machine, and prints what caching gains."""
from bare_machine import run_benchmark


def test_the_clip_benchmark_needs_neither_data_nor_the_packages_of_preprocessing(tmp_path):
    ways = "bottleneck 256;clip_small"
    printed = run_benchmark("clip", tmp_path, batch_size=4, steps=1, ways=ways)
    rows = {line[:34].strip(): line[34:].split() for line in printed.splitlines()[2:]}
    assert set(rows) == set(ways.split(";")) and all(float(row[4]) > 0 for row in rows.values())   # images a second
