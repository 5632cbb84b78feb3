"""How fast this is, as ratios of things measured side by side on the machine at hand (docs/performance.md).

A suite measures one aspect and gives rows; `launch/benchmark.py` runs suites and prints and writes what they give.
"""
