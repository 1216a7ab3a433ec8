"""Describe the training data of a bundle in Croissant, the metadata format of data sets for machine learning.

Source: the Croissant format specification 1.0 (MLCommons).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.data.manifest import DATASET_NAME, MANIFEST_NAME
from open_lm.errors import ConfigError
from open_lm.release import components, layout
from open_lm.release.context import Context
from open_lm.release.datasets import DataFolder
from open_lm.release.weights import sha256_of
from open_lm.storage.strict_json import to_json

_CONFORMS_TO = "http://mlcommons.org/croissant/1.0"
_VERSION = "1.0.0"  # of data whose release has no version
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "separator", "source", "subField", "transform", "samplingRate",
)  # fmt: skip
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}
_FIELDS = {
    "shard": ("sc:Text", "name of the shard, a tar file of sequences of token ids"),
    "num_sequences": ("sc:Integer", "number of its sequences"),
    "num_bytes": ("sc:Integer", "size of the file in bytes"),
    "sha256": ("sc:Text", "SHA-256 of the file"),
}


def write_croissant(context: Context) -> bool:
    """Write data/croissant.json and validate it; return False without a folder of data that has a manifest.

    Raises:
        ConfigError: mlcroissant finds errors.
    """
    folders = [folder for folder in context.folders if folder.has_manifest]
    if not folders:
        return False
    path = context.bundle / layout.CROISSANT
    storage.write_text(path, to_json(_document(context, folders), indent=2) + "\n")
    validate(path)
    return True


def validate(path: Path) -> None:
    """Raise ConfigError if mlcroissant finds errors in a file. Reads local files only."""
    import mlcroissant

    try:
        mlcroissant.Dataset(jsonld=str(path))
    except (mlcroissant.ValidationError, ValueError) as error:
        raise ConfigError(f"{path}: not valid Croissant metadata: {error}") from error


def _document(context: Context, folders: list[DataFolder]) -> dict[str, Any]:
    license_id = context.license_of(components.DATASETS)
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": f"Training data of {context.name}",
        "description": "Shards of token ids on which the model was trained: their manifests with checksums, and the "
        "records from which they can be made again.",
        "conformsTo": _CONFORMS_TO,
        "citeAs": f"{context.producer or context.name}: training data of {context.name}, {context.date}",
        "version": context.settings.version or _VERSION,
        "datePublished": context.date,
        "distribution": [item for folder in folders for item in _files(context, folder)],
        "recordSet": [_record_set(context, folder) for folder in folders],
        "rai:dataPreprocessingProtocol": "see README.md and dataset.json of each folder",
    }
    if license_id:
        document["license"] = f"https://spdx.org/licenses/{license_id}.html"
    if context.producer:
        document["creator"] = {"@type": "sc:Organization", "name": context.producer}
    return document


def _files(context: Context, folder: DataFolder) -> list[dict[str, Any]]:
    number = f"{folder.number:02}"
    kinds = {MANIFEST_NAME: "application/jsonlines", DATASET_NAME: "application/json"}
    place = context.bundle / folder.place
    files = [_file(f"{number}/{name}", place / name, kind) for name, kind in kinds.items() if (place / name).is_file()]
    return files + [_file(f"{number}/{path.name}", path, "application/x-tar") for path in sorted(place.glob("*.tar"))]


def _file(identifier: str, path: Path, kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": identifier,
        "name": identifier,
        "contentUrl": identifier,
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": kind,
        "sha256": sha256_of(path),
    }


def _record_set(context: Context, folder: DataFolder) -> dict[str, Any]:
    number = f"{folder.number:02}"
    name = f"shards-{number}"
    first_line = storage.read_lines(context.bundle / folder.place / MANIFEST_NAME)[0]
    keys = [key for key in _FIELDS if key in json.loads(first_line)]
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": f"The shards of data set {folder.number}, one record each.",
        "field": [_field(name, key, f"{number}/{MANIFEST_NAME}") for key in keys],
    }


def _field(record_set: str, key: str, file: str) -> Mapping[str, Any]:
    kind, description = _FIELDS[key]
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{key}",
        "name": key,
        "description": description,
        "dataType": kind,
        "source": {"fileObject": {"@id": file}, "extract": {"column": key}},
    }
