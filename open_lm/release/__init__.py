"""Build an open release of a finished run, rate its openness, sign it and verify it.

`build.build_bundle` writes a folder, the bundle. `components` lists the components of the Model Openness Framework with
their places in it. Those of source code share an archive; code/contents.json lists the files of each, the commit and
the license. Not components: mof.yml, LICENSES/{SPDX id}.txt (a text per license in use), reproduce.sh, manifest.json
(sha256 of every other file, written last) and model.sig (signature over all files).
"""
