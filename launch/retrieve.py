"""Find images by a sentence: `python launch/retrieve.py RUN "marked pleomorphism" --shards DIR --top 10`.

Images are ranked by how probable it is that the network says the sentence, or any sentence of people's reports that
contains the query, on its topic. Writes retrieval.json and contact_sheet.png.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from mdnet_dist.errors import InputError, printable
from mdnet_dist.program import run_program


def main() -> None:
    """Parse the command line, rank, print and write the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, runs/NAME, or of an exported model")
    parser.add_argument("query", help="a sentence of a report, or a part of one")
    parser.add_argument("--shards", help="shard set to look through; default: the one that the run was trained on")
    parser.add_argument("--part", default="test", help="train, val, test (default), or a part of the shard set")
    parser.add_argument("--topic", help="that the sentence is on; default: the one that makes it most probable")
    parser.add_argument("--top", type=int, default=10, help="how many images; default: 10")
    parser.add_argument("--checkpoint", help="best, last, step-00000120 or a path; default: the exported model")
    parser.add_argument("--out", type=Path, help="folder to write to; default: RUN/retrieval/QUERY")
    arguments = parser.parse_args()
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: must be at least 1")

    from mdnet_dist.distributed import local_device
    from mdnet_dist.figures import draw_contact_sheet
    from mdnet_dist.retrieval import find_images, query_tokens, wordings_of
    from mdnet_dist.run_data import open_part
    from mdnet_dist.run_folder import refuse_links
    from mdnet_dist.saved import open_model, saved_config
    from mdnet_dist.shards import write_atomically

    device = local_device()
    network, card, _ = open_model(arguments.run, arguments.checkpoint, device)
    config = saved_config(arguments.run, card, arguments.shards)
    query, unknown = query_tokens(arguments.query, card.vocabulary)
    if unknown:
        print(f"not among the network's words: {', '.join(unknown)}", file=sys.stderr)
    data, parts = open_part(config, card, arguments.part)
    records = data.training_records() if data.train else data.records(parts)
    wordings = wordings_of(query, (report for record in records for report in record.reports), data.encoder)
    damaged: list[str] = []
    topic, found = find_images(
        network, card, lambda: data.samples_of(parts, damaged), wordings, arguments.topic, arguments.top, device
    )
    for message in dict.fromkeys(damaged):
        print(f"left out: {message}", file=sys.stderr)

    name = re.sub(r"[^A-Za-z0-9]+", "-", arguments.query).strip("-")[:60]
    out = arguments.out or arguments.run / "retrieval" / name
    lines = [
        {
            "rank": rank,
            "key": one.key,
            "probability": round(one.probability, 6),
            "label": one.label,
            "reference": one.reference,
            "said": one.said,
        }
        for rank, one in enumerate(found, start=1)
    ]
    refuse_links(out, arguments.out or arguments.run)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out") from error
    content = {"query": arguments.query, "topic": topic, "part": arguments.part, "found": lines}
    write_atomically(out / "retrieval.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    draw_contact_sheet(
        [one.image for one in found],
        [one.attention for one in found],
        [one.mask for one in found],
        [
            [
                f"{one.key}  p {one.probability:.2f}" + (f"  {one.label}" if one.label else ""),
                f"person: {one.reference or '(nothing)'}",
                f"network: {one.said or '(nothing)'}",
            ]
            for one in found
        ],
        f"“{arguments.query}”, taken for {topic}; p: how probably the network says it",
        out / "contact_sheet.png",
    )
    print(
        f"'{arguments.query}', taken for the topic {topic}: how probably the network says it, label, what a person says"
    )
    for line, one in zip(lines, found):
        shown = f"{line['rank']:>3}  {one.key:<24} {one.probability:6.3f}  {one.label or '':<24} {one.reference or ''}"
        print(printable(shown))
    print(f"written to  {out}  (retrieval.json, contact_sheet.png)")


if __name__ == "__main__":
    run_program(main)
