"""The components of the Model Openness Framework: name, kind, the class that requires them, and place in a bundle.

Source: White et al. 2024, "The Model Openness Framework" (arXiv 2403.13784), version 1.0, with the names of the Model
Openness Tool.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.release import layout

CODE, DATA, DOCUMENT = KINDS = ("code", "data", "document")
CLASSES = (3, 2, 1)  # from the least to the most open; each requires the components of the classes before it
CLASS_NAMES = {
    0: "unclassified",
    1: "Class I (Open Science Model)",
    2: "Class II (Open Tooling Model)",
    3: "Class III (Open Model)",
}
ROMAN = {1: "I", 2: "II", 3: "III"}


@dataclass(frozen=True)
class Component:
    """A component of a release.

    Attributes:
        name: name in mof.yml.
        kind: code, data or document: the kind of license that fits it.
        level: 3, 2 or 1, the class to which it belongs.
        required: whether this class and those above require it.
        path: file or folder in a bundle.
        description: what it holds, for mof.yml.
    """

    name: str
    kind: str
    level: int
    required: bool
    path: str
    description: str


MODEL_CARD = "Model card"
DATA_CARD = "Data card"
TECHNICAL_REPORT = "Technical report"
RESEARCH_PAPER = "Research paper"  # is accepted as technical report as well
EVALUATION_RESULTS = "Evaluation results"
SAMPLE_OUTPUTS = "Sample model outputs"
ARCHITECTURE = "Model architecture"
FINAL_PARAMETERS = "Model parameters (Final)"
INTERMEDIATE_PARAMETERS = "Model parameters (Intermediate)"
TRAINING_CODE = "Training code"
INFERENCE_CODE = "Inference code"
EVALUATION_CODE = "Evaluation code"
EVALUATION_DATA = "Evaluation data"
LIBRARIES = "Supporting libraries and tools"
DATASETS = "Datasets"
PREPROCESSING_CODE = "Data preprocessing code"
METADATA = "Model metadata"

_ALL = (
    Component(
        ARCHITECTURE, CODE, 3, True, layout.ARCHIVE, "Source code that defines the model's layers, and its settings"
    ),
    Component(FINAL_PARAMETERS, DATA, 3, True, layout.FINAL_WEIGHTS, "Weights after the last training step"),
    Component(
        TECHNICAL_REPORT,
        DOCUMENT,
        3,
        True,
        layout.REPORT,
        "How the model was trained and evaluated, with all measurements",
    ),
    Component(EVALUATION_RESULTS, DOCUMENT, 3, True, layout.RESULTS, "Scores and losses of the evaluations"),
    Component(
        MODEL_CARD,
        DOCUMENT,
        3,
        True,
        layout.MODEL_CARD,
        "Purpose, limits, training and evaluation of the model in brief",
    ),
    Component(
        DATA_CARD, DOCUMENT, 3, True, layout.DATA_CARD, "Origin, composition and preprocessing of the training data"
    ),
    Component(SAMPLE_OUTPUTS, DOCUMENT, 3, False, layout.SAMPLES, "Text that the model generated"),
    Component(TRAINING_CODE, CODE, 2, True, layout.ARCHIVE, "Source code of the training program"),
    Component(INFERENCE_CODE, CODE, 2, True, layout.ARCHIVE, "Source code that generates text with the model"),
    Component(EVALUATION_CODE, CODE, 2, True, layout.ARCHIVE, "Source code of the evaluations"),
    Component(EVALUATION_DATA, DATA, 2, True, layout.EVALUATION_DATA, "Data on which the model was evaluated"),
    Component(
        LIBRARIES, CODE, 2, False, layout.LIBRARIES, "Versions of all packages in use, and their bill of materials"
    ),
    Component(DATASETS, DATA, 1, True, layout.DATA, "Training data, or instructions that rebuild them, with checksums"),
    Component(PREPROCESSING_CODE, CODE, 1, True, layout.ARCHIVE, "Source code that turns raw text into training data"),
    Component(
        METADATA, DATA, 1, False, layout.METADATA, "Settings, logs, metrics and optimizer states of the training run"
    ),
    Component(RESEARCH_PAPER, DOCUMENT, 1, True, layout.PAPER, "Paper about the model"),
    Component(
        INTERMEDIATE_PARAMETERS,
        DATA,
        1,
        True,
        layout.INTERMEDIATE_WEIGHTS,
        "Weights of checkpoints from during the training",
    ),
)
COMPONENTS = {component.name: component for component in _ALL}


def required_components(level: int) -> tuple[Component, ...]:
    """Return the components that a class requires: those of the class, and those of the less open classes."""
    return tuple(component for component in _ALL if component.required and component.level >= level)
