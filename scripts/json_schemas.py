"""Write the JSON Schemas of all reports into the package: python scripts/json_schemas.py"""

from __future__ import annotations

import json

from nbl_export.report.bench import BenchReport
from nbl_export.report.evaluation import Evaluation
from nbl_export.report.json_schema import FOLDER, file_of, schema_of
from nbl_export.report.schema import Report

KINDS = (Report, BenchReport, Evaluation)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for kind in KINDS:
        path = file_of(kind)
        path.write_text(json.dumps(schema_of(kind), indent=2) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
