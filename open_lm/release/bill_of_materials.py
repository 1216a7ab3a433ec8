"""List the packages of a run: requirements.txt, and a CycloneDX bill of materials with the model and its data.

Source: CycloneDX 1.6 (ECMA-424), with the machine-learning model card of its machine learning profile.
"""

from __future__ import annotations

import functools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.release import components, layout
from open_lm.release.context import JOULES_PER_KWH, Context
from open_lm.release.weights import sha256_of, weight_files
from open_lm.storage.strict_json import to_json

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_EXTRA = re.compile(r"extra\s*==")
_NAMESPACE = uuid.UUID("6f4b1e0a-54a3-5d35-9d4c-2f7c6f0c1a55")  # of serial numbers, so that they depend on the content


@functools.cache
def _metadata(name: str) -> metadata.PackageMetadata | None:
    """Return the metadata of an installed package; None if it is not installed. Parsing them takes time."""
    try:
        return metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None


def installed_packages(recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of the packages that open_lm needs, with what they need in turn.

    Versions that the run recorded take precedence over those of this environment.
    """
    versions: dict[str, str] = {}
    pending = ["open_lm", *(recorded or _requirements("open_lm", optional=True))]
    while pending:
        name = pending.pop()
        key, installed = _normalized(name), _metadata(name)
        if key in versions:
            continue
        if name in recorded:
            versions[key] = recorded[name]
        elif installed is not None:
            versions[key] = installed["Version"]
        pending += _requirements(name, optional=False)
    return dict(sorted(versions.items()))


def _requirements(name: str, optional: bool) -> list[str]:
    """Return the names of the packages that a package requires; with `optional`, those of its extras too."""
    installed = _metadata(name)
    requirements = (installed.get_all("Requires-Dist") or []) if installed is not None else []
    kept = [text for text in requirements if optional or not _EXTRA.search(text)]
    return [match[0] for match in map(_NAME.match, kept) if match is not None]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def write_libraries(context: Context) -> None:
    """Write libraries/requirements.txt and libraries/bom.cdx.json.

    Raises:
        ConfigError: the bill does not have the schema of CycloneDX, which is a defect of this package.
    """
    packages = installed_packages(context.packages)
    origin = "recorded by the run" if context.packages else "of the environment that built this bundle"
    lines = [
        f"# Versions {origin}.",
        *(f"{name}=={version}" for name, version in packages.items() if name != "open-lm"),
    ]
    storage.write_text(context.bundle / layout.REQUIREMENTS, "\n".join(lines) + "\n")
    content = _bill(context, packages)
    _validate(content)
    storage.write_text(context.bundle / layout.BILL, to_json(content, indent=2) + "\n")


def _validate(content: Mapping[str, Any]) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(to_json(content))
    if problem is not None:
        reason = str(problem).partition("\n")[0]
        raise ConfigError(f"{layout.BILL}: does not have the schema of CycloneDX 1.6: {reason}")


def _bill(context: Context, packages: Mapping[str, str]) -> dict[str, Any]:
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output.json import JsonV1Dot6

    model = _model(context)
    libraries = [_library(name, version) for name, version in packages.items()]
    bill = Bom(
        serial_number=uuid.uuid5(_NAMESPACE, to_json([context.name, context.date, dict(packages)])),
        metadata=BomMetaData(component=model, timestamp=context.end_time, tools=[]),
        components=[*libraries, *_data_sets(context)],
    )
    bill.register_dependency(model, bill.components)
    content: dict[str, Any] = json.loads(JsonV1Dot6(bill).output_as_string())
    # The library has no classes for model cards and descriptions of data.
    content["metadata"]["component"]["modelCard"] = _model_card(context)
    for component in content["components"]:
        if component["type"] == "data":
            component["data"] = [_data_description(context, component["bom-ref"])]
    return content


def _library(name: str, version: str) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    installed = _metadata(name)
    expression = None if installed is None else (installed.get_all("License-Expression") or [None])[0]
    kind = ComponentType.FRAMEWORK if name in ("torch", "transformers") else ComponentType.LIBRARY
    return Component(
        name=name,
        version=version,
        type=kind,
        bom_ref=f"pkg:pypi/{name}@{version}",
        purl=PackageURL("pypi", name=name, version=version),
        licenses=[LicenseFactory().make_from_string(expression)] if expression else None,
    )


def _model(context: Context) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.contact import OrganizationalEntity

    license_id = context.license_of(components.FINAL_PARAMETERS)
    files = list(weight_files(context.bundle / layout.FINAL_WEIGHTS))
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256_of(files[0]))] if len(files) == 1 else []
    return Component(
        name=context.name,
        version=context.settings.version or context.date,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        hashes=hashes,
        supplier=OrganizationalEntity(name=context.producer) if context.producer else None,
        licenses=[LicenseFactory().make_from_string(license_id)] if license_id else None,
        properties=[Property(name=f"sha256:{file.name}", value=sha256_of(file)) for file in files],
    )


def _data_sets(context: Context) -> Sequence[Component]:
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(name=f"training data {folder.number}", type=ComponentType.DATA, bom_ref=folder.place)
        for folder in context.folders
    ]


def _data_description(context: Context, place: str) -> dict[str, Any]:
    folder = next(item for item in context.folders if item.place == place)
    counts = (folder.record or {}).get("counts", {})
    facts = {**counts, "fingerprint": folder.source["fingerprint"], "weight": folder.source["weight"]}
    properties = [{"name": name, "value": str(value)} for name, value in facts.items()]
    return {"type": "dataset", "name": f"training data {folder.number}", "contents": {"properties": properties}}


def _model_card(context: Context) -> dict[str, Any]:
    """Return the model card of CycloneDX: parameters, measured performance, and what to consider."""
    from open_lm.release.model_card import INTENDED_USES, limits

    architecture = context.facts.architecture
    card = {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-generation",
            "architectureFamily": "transformer decoder",
            "modelArchitecture": f"{architecture['n_layers']} layers of width {architecture['hidden_dim']}, "
            f"{context.run.summary.parameters or 0} parameters",
            "datasets": [{"ref": folder.place} for folder in context.folders],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": _performance(context)},
        "considerations": {
            "useCases": list(INTENDED_USES),
            "technicalLimitations": limits(context),
            **_environmental(context),
        },
    }
    return card


def _performance(context: Context) -> list[dict[str, Any]]:
    from open_lm.release.results import final_validation, task_scores

    rows = [
        {"type": "loss", "value": f"{part.loss:.6f}", "slice": part.name}
        for part in final_validation(context)
        if part.loss is not None
    ]
    for _, score in task_scores(context):
        row: dict[str, Any] = {"type": score.metric, "value": f"{score.score:.6f}", "slice": score.label}
        if score.interval is not None:
            bounds = [f"{bound:.6f}" for bound in score.interval]
            row["confidenceInterval"] = {"lowerBound": bounds[0], "upperBound": bounds[1]}
        rows.append(row)
    return rows


def _environmental(context: Context) -> dict[str, Any]:
    joules = [start.get("progress", {}).get("energy_joules") for start in context.starts]
    known = [float(value) for value in joules if value]
    if not known:
        return {}
    energy = {"value": sum(known) / JOULES_PER_KWH, "unit": "kWh"}
    provider = {"organization": {"name": "unknown"}, "energySource": "unknown", "energyProvided": energy}
    consumption = {"activity": "training", "energyProviders": [provider], "activityEnergyCost": energy}
    return {"environmentalConsiderations": {"energyConsumptions": [consumption]}}
