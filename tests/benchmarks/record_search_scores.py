"""Record which rows each format of a model answers as the evaluated one does, for the test of `export search`'s rounds.

    python -m tests.benchmarks.record_search_scores [RUN DATA.jsonl] > tests/search_scores.json

Every format answers every row (`--every-row`); `right` holds one digit a row. Without a run it is a random Llama of 256
columns whose answers are one token long: the first tokens that its quantisations change, on the demo's inputs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from export import expected, search
from export.loss import Loss
from export.search import LADDER, search_run
from tests.tiny_models import make
from unshot.console import Output
from unshot.errors import GateError
from unshot.metrics.answers import Answers

DEMO = Path(__file__).parents[2] / "unshot" / "demo" / "data.jsonl"


def main() -> None:
    """See the module's text."""
    rights: list[str] = []
    usual = search.paired_loss

    def kept(metric: str, reference: Answers, export: Answers) -> Loss:
        rights.append("".join(str(int(b >= a)) for a, b in zip(reference.right, export.right, strict=True)))
        return usual(metric, reference, export)

    search.paired_loss = kept
    with tempfile.TemporaryDirectory() as scratch:
        if sys.argv[1:]:
            run, data = map(Path, sys.argv[1:])
        else:
            run, data = make("llama", Path(scratch, "base"), hidden_size=256, intermediate_size=512), DEMO
            expected.ANSWER_TOKENS = 1
        out = Path(scratch, "out")
        try:
            search_run(
                str(run),
                LADDER,
                out,
                Output(verbosity=0),
                limit=0.9,
                data=data,
                rows=10**6,
                rounds=1,
                every_row=True,
            )
        except GateError as error:
            print(error, file=sys.stderr)
        found = json.loads((out / "search.json").read_text())
    shown = [c for c in found["candidates"] if c["loss"]]
    formats = {c["target"]: {"bytes": c["bytes"], "right": r} for c, r in zip(shown, rights, strict=True)}
    print(json.dumps({"rows": found["rows"], "metric": found["metric"], "formats": formats}, indent=1))


if __name__ == "__main__":
    main()
