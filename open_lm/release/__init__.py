"""Build an open release of a finished run, rate its openness, sign it and verify it.

`build.build_bundle` writes a folder, the bundle. `layout.COMPONENT_PATHS` maps each component of the Model Openness
Framework to its place in it:

| component | path in the bundle |
|---|---|
| Model card | README.md |
| Data card | DATA_CARD.md |
| Technical report | report/ (technical_report.md, technical_report.pdf, figures) |
| Model parameters (Final) | weights/final/ (safetensors, Hugging Face layout) |
| Model parameters (Intermediate) | weights/intermediate/ (a folder per checkpoint) |
| Model architecture, Training code, Inference code, Evaluation code, Data preprocessing code | code/source.tar.gz |
| Evaluation results | evaluation/results/ |
| Evaluation data | evaluation/data/ |
| Sample model outputs | samples/ |
| Datasets | data/ (records and manifests of the shards, instructions, croissant.json) |
| Model metadata | metadata/ (settings, logs, metrics, optimizer state) |
| Supporting libraries and tools | libraries/ (requirements.txt, bom.cdx.json) |
| Research paper | paper/ |

code/contents.json lists the files of each component in the archive, its commit and its licence. Not components:
mof.yml, LICENSES/{SPDX id}.txt (a text per licence in use), reproduce.sh, manifest.json (sha256 of every other file,
written last) and model.sig (signature over all files).
"""
