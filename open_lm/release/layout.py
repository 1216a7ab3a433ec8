"""The places of files in a bundle. Other modules name no path of a bundle themselves."""

from __future__ import annotations

MODEL_CARD, DATA_CARD = "README.md", "DATA_CARD.md"
REPORT, REPORT_MARKDOWN, REPORT_PDF = "report", "report/technical_report.md", "report/technical_report.pdf"
FINAL_WEIGHTS, INTERMEDIATE_WEIGHTS = "weights/final", "weights/intermediate"
CODE, ARCHIVE, ARCHIVE_CONTENTS = "code", "code/source.tar.gz", "code/contents.json"
RESULTS, EVALUATION_DATA = "evaluation/results", "evaluation/data"
SAMPLES, DATA, METADATA = "samples", "data", "metadata"
CROISSANT = "data/croissant.json"
LIBRARIES, REQUIREMENTS, BILL = "libraries", "libraries/requirements.txt", "libraries/bom.cdx.json"
PAPER = "paper"
LICENSES = "LICENSES"
MOF_FILE, MANIFEST, SIGNATURE, REPRODUCE = "mof.yml", "manifest.json", "model.sig", "reproduce.sh"
TRAINING_SETTINGS = "metadata/training.json"  # the flags with which reproduce.sh trains
