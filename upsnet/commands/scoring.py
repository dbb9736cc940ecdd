"""`upsnet evaluate`: the score of stored panoptic files."""

from pathlib import Path
from typing import Any

from upsnet.evaluation.json_files import write_json
from upsnet.evaluation.panoptic_files import evaluate_files
from upsnet.evaluation.tables import summary_tables


def evaluate(
    prediction_json: Path,
    truth_json: Path,
    out: Path | None = None,
    official: bool = False,
    boundary: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Scores COCO panoptic files, prints the tables and, with `out`, writes the summary; see `evaluate_files`."""
    summary = evaluate_files(prediction_json, truth_json, official, boundary, workers)
    print(summary_tables(summary, per_class=True))
    if out is not None:  # after the tables: that it cannot be written must not cost the score
        write_json(out, summary)
    return summary
