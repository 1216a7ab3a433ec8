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

# Components of the Model Openness Framework by name, and the file or folder in the bundle that each of them is.
COMPONENT_PATHS = {
    "Model architecture": ARCHIVE,
    "Model parameters (Final)": FINAL_WEIGHTS,
    "Technical report": REPORT,
    "Evaluation results": RESULTS,
    "Model card": MODEL_CARD,
    "Data card": DATA_CARD,
    "Sample model outputs": SAMPLES,
    "Training code": ARCHIVE,
    "Inference code": ARCHIVE,
    "Evaluation code": ARCHIVE,
    "Evaluation data": EVALUATION_DATA,
    "Supporting libraries and tools": LIBRARIES,
    "Datasets": DATA,
    "Data preprocessing code": ARCHIVE,
    "Model metadata": METADATA,
    "Research paper": PAPER,
    "Model parameters (Intermediate)": INTERMEDIATE_WEIGHTS,
}
