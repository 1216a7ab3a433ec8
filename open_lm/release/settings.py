"""The settings of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class BundleSettings:
    """What `build.build_bundle` builds. The fields have the names of the flags of `python -m open_lm.release`.

    Attributes:
        run: run folder.
        out: folder to write; it must not exist.
        licenses: SPDX ids by scope: "distribution", "code", "data", "document", or the name of a component.
        name, version: of the release; None: those of the run.
        producer, contact, origin: who releases the model, how to reach them, and the model it derives from.
        paper: file of a research paper.
        include_data: put the shards of the training data into the bundle, in addition to their records.
        license_texts: files with the texts of licenses by SPDX id, for those whose text this package does not have.
        redact: replace secrets and private paths in logs and settings, instead of refusing them.
        sign_key: private key (PEM, elliptic curve) that signs the bundle.
        sigstore: sign with the identity of a sigstore login, which needs the network.
        upload: hf:// or s3:// URL that receives the bundle.
    """

    run: str
    out: Path
    licenses: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    version: str | None = None
    producer: str | None = None
    contact: str | None = None
    origin: str | None = None
    paper: Path | None = None
    include_data: bool = False
    license_texts: Mapping[str, Path] = field(default_factory=dict)
    redact: bool = False
    sign_key: Path | None = None
    sigstore: bool = False
    upload: str | None = None
