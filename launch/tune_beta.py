"""Search: `python launch/tune_beta.py SEARCH.yaml [key=value ...]`, on a cluster `ray job submit -- python launch/...`.

Tries schedules of beta, eta, concat_depth and whatever else the search file lets vary, each trial a training run in
DeepSpeed workers that Ray starts, and writes the best configuration to runs/NAME/best.yaml for launch/train.py. A
key=value whose key the search file has (trials.count=4) changes the search, any other (data.shards=DIR) the base of all
its runs.
Stopped at any moment, the same command with --resume goes on. Ctrl-C stops all trials; a second one ends at once.
"""

from __future__ import annotations

import argparse

from mdnet_dist.program import run_program


def main() -> None:
    """Parse the command line, search, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", help="YAML file, as tune/beta.yaml; docs/search_file.md lists every key")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the search file, or of all of its runs")
    parser.add_argument("--resume", action="store_true", help="continue the newest search of this name")
    arguments = parser.parse_intermixed_args()

    from tune.search_config import load_search

    search = load_search(arguments.search, arguments.overrides)

    from tune.progress import Display
    from tune.report import BEST, SUMMARY
    from tune.search import run_search

    outcome = run_search(search, Display(), resume=arguments.resume)
    print(f"\n{(outcome.folder / SUMMARY).read_text(encoding='utf-8')}")
    print(f"best   deepspeed launch/train.py {outcome.folder / BEST}")
    print(f"next   make ui    (experiment {search.base.tracking.experiment}, run {outcome.folder.name})")


if __name__ == "__main__":
    run_program(main)
